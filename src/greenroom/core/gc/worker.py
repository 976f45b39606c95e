"""The worker's side of the collection; see the package. Who calls holds the lock of the handle that it is about, and
writes down what these functions return before it acts on it."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

from msgspec.structs import replace

from greenroom.core.errors import FailedPrecondition, LeaseLost
from greenroom.core.gc.records import (
    Create,
    Entry,
    Kind,
    Local,
    Orders,
    Papers,
    Refusal,
    Refused,
    Register,
    Registered,
    Report,
    Stale,
)

#: Destroyed at the same time, of each kind: so many may hang before others of the kind wait.
PLACES: dict[Kind, int] = {Kind.SANDBOX: 5, Kind.LOG: 3, Kind.SNAPSHOT: 2}


# --- registration -----------------------------------------------------------------------------------------


def begin(papers: Papers, claim: str) -> Papers:
    """The papers to be written before a process sends `registration` first. ``claim``: random; a claim whose answer
    never came is kept, because it may have been accepted."""
    if papers.claim and not papers.answered:
        return papers
    return replace(papers, claim=claim, answered=False)


def registration(papers: Papers, worker: str, entries: Iterable[Entry], replaces: int = 0) -> Register:
    return Register(
        worker=worker,
        incarnation=papers.incarnation,
        claim=papers.claim,
        epoch=papers.epoch,
        replaces=replaces,
        closed_seq=papers.closed_seq,
        highest_seq=max((entry.create_seq for entry in entries), default=0),
    )


def registered(papers: Papers, answer: Registered) -> Papers:
    """An answer to another claim, or one that is older, changes nothing. (A process that registers again with the same
    claim gets another epoch only from a database that has gone back.)"""
    if answer.claim != papers.claim or (papers.answered and answer.epoch <= papers.epoch):
        return papers
    closed = max(papers.closed_seq, answer.closed_seq)
    return replace(papers, epoch=answer.epoch, closed_seq=closed, answered=True)


def must_register(papers: Papers, stale: Stale) -> bool:
    """Whether it is this process's report that was refused, and not one before it."""
    return papers.answered and (stale.incarnation, stale.epoch) == (papers.incarnation, papers.epoch)


def must_wipe(papers: Papers, refused: Refused) -> bool:
    """Whether this process has no right to be any more: all that it has is to be destroyed; then it begins with new
    papers. It stays true once it is."""
    return refused.what is Refusal.WIPE and refused.claim == papers.claim


# --- creates ----------------------------------------------------------------------------------------------


def admit(papers: Papers, entries: Mapping[str, Entry], executed: Container[str], create: Create) -> Entry:
    """The INIT entry to be written down before anything is made. ``executed``: handles of creates of this epoch that
    were admitted before.

    Raises:
        LeaseLost: it comes too late.
        FailedPrecondition: what it is to be made in is not there.
    """
    if not is_open(papers, create):
        raise LeaseLost(
            f"{create.kind} {create.handle} (number {create.create_seq}, epoch {create.epoch}) comes too late: this "
            f"worker is in epoch {papers.epoch} and has closed {papers.closed_seq}; nobody waits for it any more"
        )
    if create.handle in executed or create.handle in entries:
        raise LeaseLost(f"{create.kind} {create.handle} was made here before, and is made once")
    if create.parent and ((above := entries.get(create.parent)) is None or above.state is not Local.LIVE):
        raise FailedPrecondition(
            f"{create.kind} {create.handle} is to be made in {create.parent}, which is not here", reason="NO_PARENT"
        )
    return Entry(
        handle=create.handle, create_seq=create.create_seq, state=Local.INIT, kind=create.kind, parent=create.parent
    )


def is_open(papers: Papers, create: Create) -> bool:
    """Whether it belongs to this process and is still wanted."""
    return papers.answered and create.epoch == papers.epoch and create.create_seq > papers.closed_seq


# --- sync -------------------------------------------------------------------------------------------------


def report(papers: Papers, worker: str, entries: Iterable[Entry] | None) -> Report:
    """``entries``: all of them, listed after ``papers`` were written; None when they could not be listed."""
    inventory = None if entries is None else tuple(filter(is_listed, entries))
    return Report(
        worker=worker,
        incarnation=papers.incarnation,
        epoch=papers.epoch,
        closed_seq=papers.closed_seq,
        inventory=inventory,
    )


def is_listed(entry: Entry) -> bool:
    """All of them. Without those in INIT a report that is processed late would deny what has come since."""
    return entry.state in Local


def close(papers: Papers, orders: Orders) -> Papers:
    """The papers to be written before the next inventory is taken. Orders may come in any order."""
    if orders.incarnation != papers.incarnation:
        return papers
    return replace(papers, closed_seq=max(papers.closed_seq, orders.closed_seq))


def doomed(entries: Mapping[str, Entry], orders: Orders) -> list[Entry]:
    """The entries to be written as DYING. Orders are good for ever, because handles are."""
    found = (entries[handle] for handle in orders.destroy if handle in entries)
    return [replace(entry, state=Local.DYING) for entry in found if entry.state is not Local.DYING]


# --- sweep ------------------------------------------------------------------------------------------------


def sweep(entries: Mapping[str, Entry], busy: Collection[str], places: Mapping[Kind, int] = PLACES) -> list[Entry]:
    """Those whose destruction begins now. ``busy``: those whose has begun; they hold a place each, also when they
    hang. What has children here waits for them."""
    free = dict(places)
    for handle in busy:
        if (entry := entries.get(handle)) is not None:
            free[entry.kind] -= 1
    parents = {entry.parent for entry in entries.values()}
    begun: list[Entry] = []
    for entry in sorted(entries.values(), key=lambda e: e.create_seq):
        ready = entry.state is Local.DYING and entry.handle not in busy and entry.handle not in parents
        if ready and free[entry.kind] > 0:
            free[entry.kind] -= 1
            begun.append(entry)
    return begun


def is_leftover(handle: str, entries: Mapping[str, Entry]) -> bool:
    """Whether what a driver has under that name belongs to nobody. To be asked with the handle's lock held, just before
    it is deleted: what was true when the driver was listed may not be so any more."""
    return handle not in entries
