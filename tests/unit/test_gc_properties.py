"""The garbage collection under more trouble than the exhaustive search has room for: several processes that call
themselves by one worker's name (a revenant behind a partition, a copied disk), lists that are partial, destroys that
hang, pages that are too small, a worker that is declared gone, a database that is restored. Whatever was sent may
arrive at any later time, at any of the processes, any number of times.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from greenroom.core.errors import Conflict, FailedPrecondition, LeaseLost
from greenroom.core.gc import control, worker
from greenroom.core.gc.records import (
    Create,
    Entry,
    Kind,
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
    Standing,
)

CREATING, LIVE, DESTROYING = ResourceState.CREATING, ResourceState.LIVE, ResourceState.DESTROYING
NAME = "w"
PAGE = 2
PLACES = {Kind.SANDBOX: 2, Kind.LOG: 1, Kind.SNAPSHOT: 1}
#: Rounds of everybody speaking once within which all is settled: see `greenroom.testing.collection.worker`; each level
#: of parents takes one more, and so does each page of what is to be destroyed.
ROUNDS = 40

picks = st.integers(0, 1 << 30)


class Process:
    """One agent process and its disk. ``hung``: destroys that do not end."""

    def __init__(self, papers: Papers) -> None:
        self.papers = papers
        self.table: dict[str, Entry] = {}
        self.executed: set[str] = set()
        self.hung: set[str] = set()
        self.missing: set[str] = set()  # what was given up because this process said that it is missing

    @property
    def present(self) -> set[str]:
        return {*self.table}


class Collection(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.names = 0
        self.member: Member | None = None
        self.rows: dict[str, Resource] = {}
        self.processes: list[Process] = []
        self.net: list[Any] = []
        self.made: set[str] = set()
        self.vanished: set[str] = set()
        self.doomed: set[str] = set()
        self.forgotten: set[str] = set()
        self.backup: tuple[Member, dict[str, Resource]] | None = None
        self.restored = False
        self.greeted = True
        self.fair = False
        self.start_process()

    def name(self, what: str) -> str:
        self.names += 1
        return f"{what}-{self.names}"

    # --- processes ----------------------------------------------------------------------------------------

    def start_process(self) -> None:
        papers = worker.begin(Papers(incarnation=self.name("disk")), self.name("claim"))
        self.begin(Process(papers))

    def begin(self, process: Process) -> None:
        self.processes.append(process)
        self.net.append(worker.registration(process.papers, NAME, process.table.values()))

    @precondition(lambda self: len(self.processes) < 3)
    @rule()
    def another_disk(self) -> None:
        """What ran under the name before goes on running, somewhere."""
        self.start_process()

    @precondition(lambda self: len(self.processes) < 3)
    @rule(pick=picks)
    def copy_of_a_disk(self, pick: int) -> None:
        """Of what runs nothing is copied. (A disk that is copied between a claim and its answer is not told from its
        copy.)"""
        original = self.process(pick)
        if original.papers.answered:
            self.begin(Process(worker.begin(original.papers, self.name("claim"))))

    @rule(pick=picks)
    def dies_and_comes_back(self, pick: int) -> None:
        process = self.process(pick)
        process.papers = worker.begin(process.papers, self.name("claim"))
        process.executed.clear()
        process.hung.clear()
        self.net.append(worker.registration(process.papers, NAME, process.table.values()))

    @rule(pick=picks)
    def dies_with_its_disk(self, pick: int) -> None:
        process = self.process(pick)
        self.processes.remove(process)
        self.vanished |= process.present
        self.start_process()

    @rule(pick=picks, what=picks)
    def is_made(self, pick: int, what: int) -> None:
        process = self.process(pick)
        if inits := [e for e in process.table.values() if e.state is Local.INIT]:
            entry = inits[what % len(inits)]
            process.table[entry.handle] = worker_live(entry)
            self.net.append(("done", entry.handle))

    @rule(pick=picks, what=picks)
    def ends_by_itself(self, pick: int, what: int) -> None:
        process = self.process(pick)
        if leaves := [e for e in process.table.values() if not self.children(process, e.handle)]:
            entry = leaves[what % len(leaves)]
            del process.table[entry.handle]
            self.vanished.add(entry.handle)

    @rule(pick=picks)
    def reports(self, pick: int) -> None:
        process = self.process(pick)
        if process.papers.answered:
            self.net.append(worker.report(process.papers, NAME, process.table.values()))

    @rule(pick=picks)
    def can_not_list(self, pick: int) -> None:
        process = self.process(pick)
        if process.papers.answered:
            self.net.append(worker.report(process.papers, NAME, None))

    @rule(pick=picks, hangs=st.booleans())
    def sweeps(self, pick: int, hangs: bool) -> None:
        process = self.process(pick)
        for entry in worker.sweep(process.table, process.hung, PLACES):
            if hangs:
                process.hung.add(entry.handle)
            else:
                self.destroy(process, entry.handle)
            hangs = False
        assert len(process.hung) <= sum(PLACES.values())

    @rule(pick=picks)
    def a_hung_destroy_ends(self, pick: int) -> None:
        process = self.process(pick)
        if process.hung:
            self.destroy(process, min(process.hung))

    def destroy(self, process: Process, handle: str) -> None:
        row = self.rows.get(handle)
        told_before = self.restored and handle in self.doomed
        stale_copy = self.member is None or process.papers.claim != self.member.claim
        if row is not None and row.state is not DESTROYING and not told_before:
            assert stale_copy, f"G1: {handle} is destroyed and is {row.state}"
        assert handle not in self.forgotten, f"G12: {handle} is destroyed"
        assert not self.children(process, handle), f"G11: {handle} goes before what is in it"
        process.hung.discard(handle)
        process.table.pop(handle, None)

    # --- the control plane --------------------------------------------------------------------------------

    @precondition(lambda self: self.member is not None and self.greeted and len(self.rows) < 6)
    @rule(kind=st.sampled_from(Kind), pick=picks, nested=st.booleans())
    def intends(self, kind: Kind, pick: int, nested: bool) -> None:
        assert self.member is not None
        parents = [row for row in self.rows.values() if nested and row.state is LIVE]
        parent = parents[pick % len(parents)] if parents else None
        try:
            decision, create = control.intend(self.member, self.name("h"), kind=kind, parent=parent)
        except FailedPrecondition:
            assert self.member.standing is not Standing.ACTIVE
            return
        self.write(decision)
        self.net.append(create)

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def gives_up(self, pick: int) -> None:
        row = list(self.rows.values())[pick % len(self.rows)]
        self.put(control.abandon(row))

    @precondition(lambda self: self.rows)
    @rule(pick=picks)
    def condemns(self, pick: int) -> None:
        row = list(self.rows.values())[pick % len(self.rows)]
        for changed in control.condemn(self.rows.values(), row.handle):
            self.put(changed)

    @precondition(lambda self: self.member is not None)
    @rule()
    def declares_gone(self) -> None:
        assert self.member is not None
        self.write(control.gone(self.member, list(self.rows.values())))
        assert not self.rows

    @precondition(lambda self: self.member is not None and self.backup is None)
    @rule()
    def database_is_copied(self) -> None:
        assert self.member is not None
        self.backup = (self.member, dict(self.rows))

    @precondition(lambda self: self.backup is not None)
    @rule()
    def database_is_restored(self) -> None:
        """That cuts all connections, and nothing is made on a worker that was not heard since."""
        assert self.backup is not None and self.member is not None
        now = self.member
        self.member, self.rows = self.backup[0], dict(self.backup[1])
        present = {e.handle: e for p in self.processes for e in p.table.values() if p.papers.claim == now.claim}
        self.forgotten |= {
            handle
            for handle, e in present.items()
            if e.state is not Local.DYING and handle not in self.rows and e.create_seq > self.member.seq
        }
        self.backup, self.net, self.restored, self.greeted = None, [], True, False

    @precondition(lambda self: self.member is not None and self.member.quarantined)
    @rule()
    def somebody_has_looked(self) -> None:
        self.acknowledge()

    def acknowledge(self) -> None:
        assert self.member is not None
        self.write(control.acknowledge(self.member, list(self.rows.values())))
        self.forgotten.clear()

    def put(self, row: Resource) -> None:
        old = self.rows.get(row.handle)
        if row.state is DESTROYING:
            self.doomed.add(row.handle)
        elif not self.restored:
            assert row.handle not in self.doomed, f"G4: {row.handle} was to go and is {row.state}"
        assert old is None or old.state is not DESTROYING or row.state is DESTROYING, "nothing leaves DESTROYING"
        self.rows[row.handle] = row

    def write(self, decision: control.Decision) -> None:
        if self.member is not None and not self.restored:
            assert decision.member.seq >= self.member.seq and decision.member.epoch >= self.member.epoch
            assert not decision.member.quarantined, f"G12: {decision.member.quarantined}"
        self.member = decision.member
        for row in decision.removed:
            self.doomed.add(row.handle)
            del self.rows[row.handle]
        for row in decision.put:
            self.put(row)
        if decision.answer is not None:
            self.net.append(decision.answer)

    # --- the network --------------------------------------------------------------------------------------

    @precondition(lambda self: self.net)
    @rule(pick=picks, to=picks)
    def something_old_arrives(self, pick: int, to: int) -> None:
        self.arrive(self.net[pick % len(self.net)], self.process(to))

    @precondition(lambda self: self.net)
    @rule(back=st.integers(1, 4), to=picks)
    def something_new_arrives(self, back: int, to: int) -> None:
        self.arrive(self.net[-min(back, len(self.net))], self.process(to))

    def arrive(self, message: Any, process: Process) -> None:
        match message:
            case Register():
                self.greeted = True
                rows, heard = list(self.rows.values()), self.fair and any(not self.is_other(p) for p in self.processes)
                self.write(control.register(self.member, rows, message, heard=heard))
            case Report():
                if self.member is not None:
                    self.greeted = True
                    self.sync(message)
            case ("done", handle):
                if (row := self.rows.get(handle)) is not None:
                    try:
                        self.put(control.confirm(row))
                    except Conflict:
                        assert row.state is DESTROYING
            case Create():
                self.create(process, message)
            case Registered():
                process.papers = worker.registered(process.papers, message)
            case Refused():
                self.refused(process, message)
            case Orders():
                for entry in worker.doomed(process.table, message):
                    process.table[entry.handle] = entry
                closed = process.papers.closed_seq
                process.papers = worker.close(process.papers, message)
                assert process.papers.closed_seq >= closed
            case Stale():
                if worker.must_register(process.papers, message):
                    assert self.member is not None
                    assert self.restored or process.papers.claim != self.member.claim or self.is_gone
                    process.papers = worker.begin(process.papers, self.name("claim"))
                    self.net.append(worker.registration(process.papers, NAME, process.table.values()))

    @property
    def is_gone(self) -> bool:
        return self.member is not None and self.member.standing is Standing.GONE

    def create(self, process: Process, create: Create) -> None:
        if create.handle in self.forgotten:
            return  # its connection was cut
        try:
            entry = worker.admit(process.papers, process.table, process.executed, create)
        except (LeaseLost, FailedPrecondition):
            return
        assert create.handle not in self.made, f"G3: {create.handle} is made again"
        assert create.epoch == process.papers.epoch and create.create_seq > process.papers.closed_seq
        self.made.add(create.handle)
        process.executed.add(create.handle)
        process.table[create.handle] = entry

    def refused(self, process: Process, message: Refused) -> None:
        if worker.must_wipe(process.papers, message):
            assert self.member is not None
            current = process.papers.claim == self.member.claim
            assert not current or self.is_gone or self.restored, "only who is not the present one wipes itself"
            self.processes.remove(process)
            self.vanished |= process.present
            self.start_process()
        elif message.what is Refusal.REGISTER and message.claim == process.papers.claim:
            self.net.append(worker.registration(process.papers, NAME, process.table.values(), message.epoch))

    def sync(self, report: Report) -> None:
        assert self.member is not None
        before, quarantined = dict(self.rows), self.member.quarantined
        decision = control.sync(self.member, list(self.rows.values()), report, page=PAGE)
        current = (report.incarnation, report.epoch) == (self.member.incarnation, self.member.epoch)
        for row in decision.removed:
            assert row.state is not CREATING, f"G8: {row.handle} is given up while it is being made"
            assert row.create_seq <= report.closed_seq
        if not current or self.is_gone or quarantined or report.inventory is None:
            assert not decision.removed
        if not current or self.is_gone or quarantined:
            assert not decision.put, "G5: it changes something"
        if isinstance(decision.answer, Orders):
            assert len(decision.answer.destroy) <= PAGE
        self.write(decision)
        # Said again at once it changes nothing (G6).
        again = control.sync(self.member, list(self.rows.values()), report, page=PAGE)
        assert not again.put and not again.removed and (again.answer == decision.answer or self.rows != before)
        for process in self.processes:
            if process.papers.claim == self.member.claim and current:
                process.missing |= {row.handle for row in decision.removed}

    # --- what always holds --------------------------------------------------------------------------------

    def process(self, pick: int) -> Process:
        return self.processes[pick % len(self.processes)]

    def children(self, process: Process, handle: str) -> bool:
        return any(entry.parent == handle for entry in process.table.values())

    @invariant()
    def keeps_its_promises(self) -> None:
        for process in self.processes:
            current = self.member is not None and process.papers.claim == self.member.claim
            assert not (current and process.missing & process.present), "G2: given up as missing, and there"
            for entry in process.table.values():
                assert not entry.parent or entry.parent in process.table, "G11"
        everywhere = set().union(*(p.present for p in self.processes))
        for row in [] if self.restored else self.rows.values():
            assert row.state is not LIVE or row.handle in everywhere | self.vanished, f"G7: {row.handle}"

    def teardown(self) -> None:
        """Nothing goes wrong any more. Everybody speaks and is answered until they all agree."""
        self.fair = True
        for _ in range(ROUNDS):
            for process in [*self.processes]:
                self.net = []
                if process not in self.processes:
                    continue
                if self.member is not None and self.member.quarantined:
                    self.acknowledge()
                    self.net = []
                for row in [*self.rows.values()]:
                    self.put(control.abandon(row))
                entries = process.table.values()
                self.net.append(
                    worker.report(process.papers, NAME, entries)
                    if process.papers.answered
                    else worker.registration(process.papers, NAME, entries)
                )
                while self.net and process in self.processes:
                    self.arrive(self.net.pop(0), process)
                for handle in sorted(process.hung):
                    self.destroy(process, handle)
                while process in self.processes and (begun := worker.sweep(process.table, (), PLACES)):
                    for entry in begun:
                        self.destroy(process, entry.handle)
                if process in self.processes and len(self.processes) > 1 and self.is_other(process):
                    self.processes.remove(process)  # somebody has ended what had another's name
                    self.vanished |= process.present
        assert len(self.processes) == 1
        assert all(row.state is LIVE for row in self.rows.values()), self.rows
        assert self.rows.keys() == self.processes[0].table.keys()

    def is_other(self, process: Process) -> bool:
        return self.member is None or process.papers.claim != self.member.claim


def worker_live(entry: Entry) -> Entry:
    return Entry(
        handle=entry.handle, create_seq=entry.create_seq, state=Local.LIVE, kind=entry.kind, parent=entry.parent
    )


TestCollection = Collection.TestCase
TestCollection.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
