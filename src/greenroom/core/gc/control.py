"""The control plane's side of the collection; see the package. Each decision is written in one transaction, with the
worker's row locked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition, InvalidArgument
from greenroom.core.gc.records import (
    MAX_SEQ,
    Create,
    Entry,
    Kind,
    Local,
    Member,
    Orders,
    Refusal,
    Refused,
    Register,
    Registered,
    Report,
    Resource,
    ResourceState,
    Stale,
    Standing,
)
from greenroom.core.records import Record

CREATING, LIVE, DESTROYING = ResourceState.CREATING, ResourceState.LIVE, ResourceState.DESTROYING

#: Handles that one answer tells a worker to destroy; it asks for more when it has got a full page.
PAGE = 500
#: Between two questions to a worker; spread, so that workers that came together are not asked together.
PERIOD_S = 30.0
SPREAD = 0.2
#: Between two questions to one that does not answer, at most.
MAX_BACKOFF_S = 300.0
#: Entries of one report: ten times what a worker may hold (`greenroom.core.records.PoolSpec`).
MAX_INVENTORY = 100_000


class Decision(Record, frozen=True, kw_only=True):
    """What is to be written, and answered. ``removed``: rows that go; ``lost``: those of them that were LIVE, whose
    owners are told. ``alarm``: what somebody has to look at."""

    member: Member
    put: tuple[Resource, ...] = ()
    removed: tuple[Resource, ...] = ()
    answer: Registered | Refused | Orders | Stale | None = None
    alarm: str = ""

    @property
    def lost(self) -> tuple[Resource, ...]:
        return tuple(row for row in self.removed if row.state is LIVE)


# --- registration -----------------------------------------------------------------------------------------


def register(member: Member | None, rows: Sequence[Resource], said: Register, *, heard: bool = False) -> Decision:
    """A worker's process begins. ``heard``: the present one of that name is heard; then an empty disk has to wait, or
    two workers with one name would empty each other for ever. (Nothing but that depends on it.)

    It is a comparison and exchange of the epoch: who knows the present one takes the next. So a message that comes late
    or again changes nothing, and of two that have the same disk (it was copied) only one goes on.
    """
    if member is None:
        new = Member(name=said.worker, incarnation=said.incarnation, claim=said.claim)
        return _accept(new, []) if said.epoch == 0 else _took_back(new, said)
    same = said.incarnation == member.incarnation
    if same and member.standing is Standing.GONE:
        return _refuse(member, said, Refusal.WIPE)
    taken = heard and not same and member.standing is not Standing.GONE
    if taken and said.epoch > member.epoch:
        return _refuse(member, said, Refusal.NAME_TAKEN)  # a foreign disk; the present worker loses nothing to it
    if said.epoch > member.epoch or (same and max(said.highest_seq, said.closed_seq) > member.seq):
        return _took_back(member, said)
    if same and said.claim == member.claim:  # the first answer was lost, or it is asked once more
        return Decision(member=member, answer=_registered(member, rows))
    if same and said.epoch == member.epoch:
        return _accept(replace(member, claim=said.claim, epoch=member.epoch + 1), rows)
    if said.epoch > 0 or same:
        return _refuse(member, said, Refusal.WIPE)
    if taken:
        return _refuse(member, said, Refusal.NAME_TAKEN)
    if said.replaces != member.epoch:
        return _refuse(member, said, Refusal.REGISTER)
    # An empty disk under a known name: of what there was nothing is on it. (What was to go with the old one has gone.)
    new = replace(
        member,
        incarnation=said.incarnation,
        claim=said.claim,
        epoch=member.epoch + 1,
        standing=Standing.ACTIVE if member.standing in (Standing.GONE, Standing.RETIRING) else member.standing,
        quarantined="",
    )
    return Decision(member=new, removed=tuple(rows), answer=_registered(new, []))


def _accept(member: Member, rows: Sequence[Resource]) -> Decision:
    given_up = [] if member.quarantined else [abandon(row) for row in rows if row.state is CREATING]
    left = [row for row in rows if row.state is CREATING] if member.quarantined else []
    return Decision(member=member, put=tuple(given_up), answer=_registered(member, left))


def _registered(member: Member, rows: Sequence[Resource]) -> Registered:
    """Also again: what has been meant for it since its registration is not closed."""
    return Registered(claim=member.claim, epoch=member.epoch, closed_seq=closable(member, rows))


def _took_back(member: Member, said: Register) -> Decision:
    """It knows more of this database than the database itself: that has gone back to an earlier state."""
    highest = max(check_seq(said.closed_seq), check_seq(said.highest_seq))
    new = replace(
        member,
        incarnation=said.incarnation,
        claim=said.claim,
        epoch=max(member.epoch, said.epoch) + 1,
        seq=max(member.seq, highest),
        quarantined=f"it was in epoch {said.epoch} and knows of number {highest}, and the database does not",
    )
    return Decision(member=new, answer=_registered(new, []), alarm=alarm(new.name, new.quarantined))


def alarm(worker: str, why: str) -> str:
    """Why nobody acts on what is recorded of a worker, and what to do about it."""
    return (
        f"worker {worker}: {why}; was the database restored? Nothing is destroyed or forgotten "
        f"there until `greenroom acknowledge worker {worker}` says that the database is right as it is"
    )


def _refuse(member: Member, said: Register, what: Refusal) -> Decision:
    return Decision(member=member, answer=Refused(claim=said.claim, what=what, epoch=member.epoch))


# --- one resource -----------------------------------------------------------------------------------------


def intend(
    member: Member, handle: str, *, kind: Kind = Kind.SANDBOX, parent: Resource | None = None, operation: str = ""
) -> tuple[Decision, Create]:
    """A resource is to be made. The create may be sent once this is committed.

    Raises:
        FailedPrecondition: the worker gets no new ones, or the parent is not there.
    """
    if member.standing is not Standing.ACTIVE:
        raise FailedPrecondition(
            f"worker {member.name} is {member.standing.lower()} and gets nothing new; choose another",
            reason="WORKER_NOT_ACTIVE",
        )
    if parent is not None and parent.state is not LIVE:
        raise FailedPrecondition(
            f"{parent.kind} {parent.handle} on worker {member.name} is {parent.state.lower()}; nothing is made in it",
            reason="PARENT_NOT_LIVE",
        )
    if not member.shared:
        member = replace(member, seq=member.seq + 1)
    above = parent.handle if parent is not None else ""
    row = Resource(
        handle=handle,
        worker=member.name,
        create_seq=member.seq,
        state=CREATING,
        kind=kind,
        parent=above,
        operation=operation,
    )
    create = Create(epoch=member.epoch, create_seq=member.seq, handle=handle, kind=kind, parent=above)
    return Decision(member=member, put=(row,)), create


def confirm(row: Resource) -> Resource:
    """The worker says that it is made. Raises `Conflict` when it was given up meanwhile."""
    if row.state is DESTROYING:
        raise Conflict(
            f"{row.kind} {row.handle} on worker {row.worker} was given up before it was there; make another",
            reason="RESOURCE_ABANDONED",
        )
    return replace(row, state=LIVE)


def abandon(row: Resource) -> Resource:
    """Nobody waits for it any more; what is LIVE stays so."""
    return replace(row, state=DESTROYING) if row.state is CREATING else row


def condemn(rows: Iterable[Resource], handle: str) -> list[Resource]:
    """It is to go, with all that lives in it. Returns the rows to be written."""
    below: dict[str, list[Resource]] = {}
    chosen: list[Resource] = []
    for row in rows:
        below.setdefault(row.parent, []).append(row)
        if row.handle == handle:
            chosen.append(row)
    for row in chosen:  # it grows while it is gone through
        chosen += below.get(row.handle, [])
    return [replace(row, state=DESTROYING) for row in chosen if row.state is not DESTROYING]


# --- sync -------------------------------------------------------------------------------------------------


def sync(
    member: Member,
    rows: Sequence[Resource],
    report: Report,
    *,
    page: int = PAGE,
    generations: Mapping[str, int] = MappingProxyType({}),
) -> Decision:
    """A worker reports. ``rows``: all of this worker. ``generations``: those of the owners of what it reports, as far
    as they are known.

    Raises:
        InvalidArgument: the report is no report (too large, a handle twice, numbers out of range).
    """
    if not is_current(member, report):
        return Decision(member=member, answer=Stale(incarnation=report.incarnation, epoch=report.epoch))
    inventory = _checked(report)
    known = {row.handle: row for row in rows}
    unknown = [entry for entry in inventory.values() if entry.handle not in known]
    if not member.quarantined and (why := _went_back(member, report, unknown, generations)):
        return _wait(replace(member, quarantined=why), report, alarm(member.name, why))
    if member.quarantined:
        return _wait(member, report)
    orphans = [
        Resource(
            handle=e.handle,
            worker=member.name,
            create_seq=e.create_seq,
            state=DESTROYING,
            kind=e.kind,
            parent=e.parent,
        )
        for e in unknown
    ]
    removed = [row for row in rows if report.inventory is not None and is_missing(row, report, inventory)]
    going = {entry.handle for entry in inventory.values() if entry.state is Local.DYING}  # the worker knows
    doomed = [row for row in rows if row.state is DESTROYING and row.handle in inventory] + orphans
    doomed = [row for row in doomed if row.handle not in going]
    first = in_order(doomed)[:page]
    orders = Orders(
        incarnation=member.incarnation,
        closed_seq=closable(member, rows),
        destroy=tuple(row.handle for row in first),
        more=len(first) < len(doomed),
        drain=member.standing is not Standing.ACTIVE,
    )
    return Decision(member=member, put=tuple(orphans), removed=tuple(removed), answer=orders)


def _wait(member: Member, report: Report, said: str = "") -> Decision:
    """Nothing is decided; but no number is given out that the worker has seen already."""
    seen = max(member.seq, report.closed_seq, *(entry.create_seq for entry in report.inventory or ()))
    orders = Orders(incarnation=member.incarnation, closed_seq=report.closed_seq)
    return Decision(member=replace(member, seq=seen), answer=orders, alarm=said)


def is_current(member: Member, report: Report) -> bool:
    """Whether the worker's present process has said it."""
    return (
        member.standing is not Standing.GONE
        and report.incarnation == member.incarnation
        and report.epoch == member.epoch
    )


def is_missing(row: Resource, report: Report, inventory: dict[str, Entry]) -> bool:
    """Whether it is not there, and can't come any more."""
    return row.state is not CREATING and row.create_seq <= report.closed_seq and row.handle not in inventory


def closable(member: Member, rows: Iterable[Resource]) -> int:
    """Up to which number nothing is to be made any more. It only grows. ``rows``: read after ``member``."""
    closed = member.seq - 1 if member.shared else member.seq
    return min((row.create_seq - 1 for row in rows if row.state is CREATING), default=closed)


def in_order(rows: Iterable[Resource]) -> list[Resource]:
    """Children before parents, and the oldest first. (Made after their parents, they have higher numbers; so of those
    that are somebody's parent the newest go first.)"""
    rows = list(rows)
    parents = {row.parent for row in rows}
    leaves = sorted((r for r in rows if r.handle not in parents), key=_seq)
    return leaves + sorted((r for r in rows if r.handle in parents), key=_seq, reverse=True)


def _went_back(member: Member, report: Report, unknown: list[Entry], generations: Mapping[str, int]) -> str:
    """Why the database must be older than what the worker knows from it; "" when nothing says so."""
    for entry in unknown:
        if entry.create_seq > member.seq:
            return f"it has {entry.kind} {entry.handle} with number {entry.create_seq}, and {member.seq} was the last"
        if entry.generation > (latest := generations.get(entry.owner, entry.generation)):
            return f"it has generation {entry.generation} of {entry.owner}, and {latest} is the latest"
    if report.closed_seq > member.seq:
        return f"it has closed up to number {report.closed_seq}, and {member.seq} was the last"
    return ""


def _checked(report: Report) -> dict[str, Entry]:
    entries = report.inventory or ()
    if len(entries) > MAX_INVENTORY:
        raise InvalidArgument(
            f"worker {report.worker} reports {len(entries)} entries, more than {MAX_INVENTORY}; what makes so many?",
            reason="INVENTORY_TOO_LARGE",
        )
    found = {entry.handle: entry for entry in entries}
    if len(found) < len(entries):
        raise InvalidArgument(f"worker {report.worker} reports a handle twice", reason="INVENTORY_INVALID")
    for number in (report.closed_seq, *(entry.create_seq for entry in entries)):
        check_seq(number)
    return found


def check_seq(number: int) -> int:
    """Raises `InvalidArgument` if no resource can have it."""
    if not 0 <= number <= MAX_SEQ:
        raise InvalidArgument(f"sequence number {number} is not within 0 to {MAX_SEQ}", reason="SEQUENCE_INVALID")
    return number


# --- a person decides -------------------------------------------------------------------------------------


def gone(member: Member, rows: Sequence[Resource]) -> Decision:
    """The worker will never come back. Its row stays as a tombstone: should it come back, it is told to wipe itself."""
    return Decision(member=replace(member, standing=Standing.GONE, quarantined=""), removed=tuple(rows))


def acknowledge(member: Member, rows: Sequence[Resource]) -> Decision:
    """The database is right as it is: what is on the worker and not in it may go, and so may what was being made."""
    given_up = tuple(abandon(row) for row in rows if row.state is CREATING)
    return Decision(member=replace(member, quarantined=""), put=given_up)


def _seq(row: Resource) -> int:
    return row.create_seq


# --- when -------------------------------------------------------------------------------------------------


def first_pause_s(draw: float, period_s: float = PERIOD_S) -> float:
    """Before a worker is asked first. ``draw``: random, 0 to 1."""
    return period_s * draw


def pause_s(draw: float, period_s: float = PERIOD_S, *, failures: int = 0) -> float:
    """Until it is asked again. ``failures``: questions in a row that were not answered."""
    longest = max(MAX_BACKOFF_S, period_s)
    base = min(period_s * 2.0 ** min(failures, 10), longest)
    return base * (1.0 - SPREAD + 2.0 * SPREAD * draw)
