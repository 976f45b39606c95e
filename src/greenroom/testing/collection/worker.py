"""One worker and its control plane, with a network between them that forgets nothing: what was ever sent may arrive at
any later time, any number of times, or never.

The promises are those of the package, numbered as there is need to speak of them:

G1  nothing is destroyed that should be there
G2  what is given up because it is missing is missing, and does not come later
G3  a resource is made once
G4  what was to go, or is gone, is never to be there again
G5  what a process says that is not the present one changes nothing
G7  what should be there is there, unless it went by itself or its disk did
G8  what is being made is not given up because it is missing
G11 what lives in another goes before it
G12 what the database knows nothing of, because it was restored to an earlier state, is not destroyed; and no worker is
    taken for such a one when it is not
N   what is wanted is not refused
L   when nothing goes wrong any more, what is there is what should be there
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition, LeaseLost
from greenroom.core.gc import control, worker
from greenroom.core.gc.records import (
    Create,
    Entry,
    Local,
    Member,
    Orders,
    Papers,
    Refusal,
    Refused,
    Register,
    Registered,
    Report,
    Resource,
    ResourceState,
    Stale,
)
from greenroom.core.records import Record
from greenroom.testing.collection.search import Violation

CREATING, LIVE, DESTROYING = ResourceState.CREATING, ResourceState.LIVE, ResourceState.DESTROYING
NAME = "w"
#: Rounds within which everything is settled once nothing goes wrong any more: a registration, which may be refused
#: once, then a report that closes, one that is told what to destroy, one that shows that it is done; for a child and
#: its parent one after the other.
ROUNDS = 7


class Done(Record, frozen=True, kw_only=True):
    """The worker says that it has made it."""

    handle: str


Message = Create | Done | Register | Registered | Refused | Report | Orders | Stale


class State(NamedTuple):
    """``backup``: what the database was when it was copied. ``greeted``: the worker has been heard since it was
    restored. ``made`` to ``forgotten`` are what only the one who looks knows: handles that were made, that went without
    being told to, that were to go or are gone, that were given up as missing on the present disk, and that the database
    has forgotten."""

    member: Member
    rows: tuple[Resource, ...]
    papers: Papers
    table: tuple[Entry, ...]
    executed: frozenset[str]
    net: frozenset[Message]
    handles: int
    reports: int
    processes: int
    losses: int
    made: frozenset[str]
    vanished: frozenset[str]
    doomed: frozenset[str]
    missing: frozenset[str]
    forgotten: frozenset[str] = frozenset()
    backup: tuple[Member, tuple[Resource, ...]] | None = None
    restored: bool = False
    greeted: bool = True


@dataclass(frozen=True)
class Worker:
    """How much may happen: so many handles, reports, new processes (with their disk or an empty one), and resources
    that go by themselves.

    ``nested``: each handle is made in the one before. ``restores``: the database is copied once and restored once; that
    cuts all connections, and nothing is made on a worker that was not heard since. ``shared``: numbers grow by
    themselves, at most so often, and not with each resource (`Member.shared`). ``settles``: it is looked whether things
    settle.
    """

    handles: int = 2
    reports: int = 2
    processes: int = 1
    losses: int = 1
    nested: bool = False
    restores: bool = False
    shared: int = 0
    settles: bool = True
    _settled: set[tuple[object, ...]] = field(default_factory=set, compare=False, repr=False)

    def initial(self) -> State:
        self._settled.clear()
        claim = "claim-0"
        member = Member(
            name=NAME, incarnation="disk-0", claim=claim, seq=1 if self.shared else 0, shared=self.shared > 0
        )
        papers = Papers(incarnation="disk-0", claim=claim, epoch=1, answered=True)
        none = frozenset[str]()
        return State(member, (), papers, (), none, frozenset(), 0, 0, 0, 0, none, none, none, none)

    # --- everything that can happen -----------------------------------------------------------------------

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        yield from self._control_plane(state)
        yield from self._worker(state)
        for message in state.net:
            for after in self._arrives(state, message):
                yield f"arrives: {message}", after

    def _control_plane(self, s: State) -> Iterator[tuple[str, State]]:
        if self.restores and not s.restored:
            if s.backup is None:
                yield "the database is copied", s._replace(backup=(s.member, s.rows))
            else:
                yield "the database is restored", _restored(s, *s.backup)
        if s.member.shared and s.member.seq <= self.shared:
            yield "it is written down that the worker is heard", _heard(s)
        if s.handles < self.handles and s.greeted:
            handle = f"h{s.handles}"
            above = f"h{s.handles - 1}" if self.nested and s.handles else ""
            parent = next((row for row in s.rows if row.handle == above), None)
            if not above or (parent is not None and parent.state is LIVE):
                decision, create = control.intend(s.member, handle, parent=parent)
                rows = _written(s.rows, decision.put)
                after = s._replace(member=decision.member, rows=rows, handles=s.handles + 1, net=s.net | {create})
                yield f"{handle} is meant for the worker", after
        for row in s.rows:
            if row.state is CREATING:
                yield f"{row.handle} is given up", _write(s, [control.abandon(row)])
            elif row.state is LIVE:
                yield f"{row.handle} is to go", _write(s, control.condemn(s.rows, row.handle))

    def _worker(self, s: State) -> Iterator[tuple[str, State]]:
        for entry in s.table:
            if entry.state is Local.INIT:
                table = _entered(s.table, replace(entry, state=Local.LIVE))
                yield f"{entry.handle} is made", s._replace(table=table, net=s.net | {Done(handle=entry.handle)})
            if s.losses < self.losses and entry.state is Local.LIVE and not _children(s.table, entry):
                vanished = s.vanished | {entry.handle}
                after = s._replace(table=_without(s.table, entry.handle), vanished=vanished, losses=s.losses + 1)
                yield f"{entry.handle} ends by itself", after
        for entry in worker.sweep(_by_handle(s.table), ()):
            self._may_destroy(s, entry)
            yield f"{entry.handle} is destroyed", s._replace(table=_without(s.table, entry.handle))
        if s.papers.answered and s.reports < self.reports:
            report = worker.report(s.papers, NAME, s.table)
            yield "the worker reports", s._replace(net=s.net | {report}, reports=s.reports + 1)
        if s.processes < self.processes:
            claim, processes = f"claim-{s.processes + 1}", s.processes + 1
            papers = worker.begin(s.papers, claim)
            yield "the worker's process dies", _began(s, papers, processes)
            papers = worker.begin(Papers(incarnation=f"disk-{processes}"), claim)
            lost = s.vanished | {e.handle for e in s.table}
            wiped = s._replace(table=(), vanished=lost, missing=frozenset())
            yield "the worker loses its disk", _began(wiped, papers, processes)

    def _may_destroy(self, s: State, entry: Entry) -> None:
        row = next((row for row in s.rows if row.handle == entry.handle), None)
        told_before = s.restored and entry.handle in s.doomed
        if row is not None and row.state is not DESTROYING and not told_before:
            raise Violation(f"G1: {entry.handle} is destroyed and is {row.state}")
        if entry.handle in s.forgotten:
            raise Violation(f"G12: {entry.handle} is destroyed, of which the database has forgotten that it made it")
        if _children(s.table, entry):
            raise Violation(f"G11: {entry.handle} is destroyed before what lives in it")

    # --- what a message does ------------------------------------------------------------------------------

    def _arrives(self, s: State, message: Message) -> Iterator[State]:
        match message:
            case Create():
                yield from _create(s, message)
            case Done():
                row = next((row for row in s.rows if row.handle == message.handle), None)
                if row is not None:
                    with contextlib.suppress(Conflict):
                        yield _write(s, [control.confirm(row)])
            case Register():
                yield _decided(s._replace(greeted=True), control.register(s.member, s.rows, message))
            case Report():
                yield _sync(s, message)
            case Registered():
                papers = worker.registered(s.papers, message)
                if papers != s.papers:
                    yield s._replace(papers=papers)
            case Refused():
                refused = message.what is Refusal.REGISTER and message.claim == s.papers.claim
                if refused and not s.papers.answered:
                    yield s._replace(net=s.net | {worker.registration(s.papers, NAME, s.table, message.epoch)})
                if worker.must_wipe(s.papers, message):
                    raise Violation("G5: the worker's only process is told to wipe itself")
            case Orders():
                table = s.table
                for entry in worker.doomed(_by_handle(table), message):
                    table = _entered(table, entry)
                yield s._replace(papers=worker.close(s.papers, message), table=table)
            case Stale():
                if worker.must_register(s.papers, message):
                    if not s.restored:
                        raise Violation("G5: the worker's only process is told that it is another")
                    papers = worker.begin(s.papers, f"again-{s.papers.epoch}")
                    again = worker.registration(papers, NAME, s.table)
                    yield s._replace(papers=papers, net=s.net | {again})

    # --- what must hold -----------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        present = {entry.handle for entry in state.table}
        if again := present & state.missing:
            raise Violation(f"G2: {again} were given up as missing and are there")
        for row in [] if state.restored else state.rows:  # which may say now what was true once
            if row.handle in state.doomed and row.state is not DESTROYING:
                raise Violation(f"G4: {row.handle} was to go and is {row.state}")
            if row.state is LIVE and row.handle not in present | state.vanished:
                raise Violation(f"G7: {row.handle} should be there and is not")
        for entry in state.table:
            if entry.parent and entry.parent not in present:
                raise Violation(f"G11: {entry.handle} is there without what it lives in")
        if state.member.quarantined and not state.restored:
            raise Violation(f"G12: {state.member.quarantined}")
        if self.settles:
            s = state  # how it settles does not depend on the rest
            course = (s.member, s.rows, s.papers, s.table, s.doomed, s.forgotten, s.restored)
            if course not in self._settled:
                self._settled.add(course)
                self._settles(state)

    def _settles(self, s: State) -> None:
        """Nothing is lost from now on, and what was sent before never comes; whoever waited for a create has given
        up, and whoever had to look has looked."""
        for _ in range(ROUNDS):
            s = _write(_heard(s), [control.abandon(row) for row in s.rows if row.state is CREATING])
            if s.member.quarantined:
                s = _decided(s, control.acknowledge(s.member, s.rows))._replace(forgotten=frozenset())
            s = s._replace(net=frozenset())
            if not s.papers.answered:
                s = self._answered(s, worker.registration(s.papers, NAME, s.table))
            else:
                s = self._answered(s, worker.report(s.papers, NAME, s.table))
                while begun := worker.sweep(_by_handle(s.table), ()):
                    for entry in begun:
                        self._may_destroy(s, entry)
                        s = s._replace(table=_without(s.table, entry.handle))
        there, should = {e.handle for e in s.table}, {row.handle for row in s.rows}
        if there != should or any(row.state is not LIVE for row in s.rows):
            raise Violation(f"L: {sorted(there)} are there for ever, {sorted(should)} are said to be: {s.rows}")

    def _answered(self, s: State, message: Message) -> State:
        """The message arrives, and what it causes, each once."""
        while True:
            for after in self._arrives(s._replace(net=frozenset()), message):
                s = after
            if not s.net:
                return s
            [message] = s.net


def _heard(s: State) -> State:
    return s._replace(member=replace(s.member, seq=s.member.seq + 1)) if s.member.shared else s


def _create(s: State, message: Create) -> Iterator[State]:
    try:
        entry = worker.admit(s.papers, _by_handle(s.table), s.executed, message)
    except FailedPrecondition:  # what it is to be made in has gone by itself
        return
    except LeaseLost:
        wanted = any(row.handle == message.handle and row.state is CREATING for row in s.rows)
        present = s.papers.answered and message.epoch == s.papers.epoch == s.member.epoch
        if wanted and present and message.handle not in s.made:
            raise Violation(f"N: {message.handle} is wanted and refused") from None
        return
    if message.handle in s.made:
        raise Violation(f"G3: {message.handle} is made again")
    made, executed = s.made | {message.handle}, s.executed | {message.handle}
    yield s._replace(table=_entered(s.table, entry), made=made, executed=executed)


def _sync(s: State, report: Report) -> State:
    decision = control.sync(s.member, s.rows, report)
    s = s._replace(greeted=True)
    for row in decision.removed:
        if row.state is CREATING:
            raise Violation(f"G8: {row.handle} is being made and given up as missing")
    current = (report.incarnation, report.epoch) == (s.member.incarnation, s.member.epoch)
    if not current and (decision.put or decision.removed):
        raise Violation(f"G5: what {report.incarnation} said in epoch {report.epoch} changes something")
    after = _decided(s, decision)
    if report.incarnation == s.papers.incarnation:
        after = after._replace(missing=after.missing | {row.handle for row in decision.removed})
    return after


def _decided(s: State, decision: control.Decision) -> State:
    gone = {row.handle for row in decision.removed}
    doomed = s.doomed | gone | {row.handle for row in decision.put if row.state is DESTROYING}
    rows = _written(tuple(row for row in s.rows if row.handle not in gone), decision.put)
    net = s.net if decision.answer is None else s.net | {decision.answer}
    return s._replace(member=decision.member, rows=rows, net=net, doomed=doomed)


def _write(s: State, rows: Sequence[Resource]) -> State:
    doomed = s.doomed | {row.handle for row in rows if row.state is DESTROYING}
    return s._replace(rows=_written(s.rows, rows), doomed=doomed)


def _restored(s: State, member: Member, rows: tuple[Resource, ...]) -> State:
    known = {row.handle for row in rows}
    kept = [e for e in s.table if e.state is not Local.DYING and e.handle not in known]
    forgotten = frozenset(e.handle for e in kept if e.create_seq > member.seq)
    return s._replace(
        member=member, rows=rows, net=frozenset(), forgotten=forgotten, backup=None, restored=True, greeted=False
    )


def _began(s: State, papers: Papers, processes: int) -> State:
    net = s.net | {worker.registration(papers, NAME, s.table)}
    return s._replace(papers=papers, processes=processes, executed=frozenset(), net=net)


def _written(rows: tuple[Resource, ...], new: Sequence[Resource]) -> tuple[Resource, ...]:
    if not new:
        return rows
    found = {row.handle: row for row in rows} | {row.handle: row for row in new}
    return tuple(found[handle] for handle in sorted(found))


def _entered(table: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
    found = _by_handle(table) | {entry.handle: entry}
    return tuple(found[handle] for handle in sorted(found))


def _without(table: tuple[Entry, ...], handle: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in table if entry.handle != handle)


def _by_handle(table: tuple[Entry, ...]) -> dict[str, Entry]:
    return {entry.handle: entry for entry in table}


def _children(table: tuple[Entry, ...], entry: Entry) -> bool:
    return any(other.parent == entry.handle for other in table)
