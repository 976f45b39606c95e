"""The races that others have had, one by one and by their numbers, with the shipped decisions of both sides and no I/O.
T32 is a calculation here, and what is said of processes and disks is as their owners would do it.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition, InvalidArgument, LeaseLost
from greenroom.core.gc import control, worker
from greenroom.core.gc.records import (
    MAX_SEQ,
    Create,
    Entry,
    Kind,
    Local,
    Member,
    Orders,
    Papers,
    Refusal,
    Refused,
    Registered,
    Report,
    Resource,
    ResourceState,
    Stale,
    Standing,
)

CREATING, LIVE, DESTROYING = ResourceState.CREATING, ResourceState.LIVE, ResourceState.DESTROYING


class Agent:
    """A worker's side, kept as an agent keeps it."""

    def __init__(self, disk: str = "disk-1", name: str = "w") -> None:
        self.name = name
        self.papers = worker.begin(Papers(incarnation=disk), f"{disk}-claim-1")
        self.table: dict[str, Entry] = {}
        self.executed: set[str] = set()
        self.processes = 1

    def restart(self) -> None:
        self.processes += 1
        self.papers = worker.begin(self.papers, f"{self.papers.incarnation}-claim-{self.processes}")
        self.executed.clear()

    def init(self, create: Create) -> None:
        self.table[create.handle] = worker.admit(self.papers, self.table, self.executed, create)
        self.executed.add(create.handle)

    def make(self, create: Create) -> None:
        self.init(create)
        self.table[create.handle] = replace(self.table[create.handle], state=Local.LIVE)

    def report(self, *, listed: bool = True) -> Report:
        return worker.report(self.papers, self.name, self.table.values() if listed else None)

    def hear(self, orders: Orders, *, sweep: bool = True) -> None:
        self.papers = worker.close(self.papers, orders)
        for entry in worker.doomed(self.table, orders):
            self.table[entry.handle] = entry
        if sweep:
            for entry in worker.sweep(self.table, ()):
                del self.table[entry.handle]


class Database:
    """The control plane's side."""

    def __init__(self) -> None:
        self.member: Member | None = None
        self.rows: dict[str, Resource] = {}
        self.lost: list[str] = []
        self.alarm = ""

    def write(self, decision: control.Decision) -> control.Decision:
        self.member = decision.member
        for row in decision.removed:
            del self.rows[row.handle]
        self.lost += [row.handle for row in decision.lost]
        self.rows |= {row.handle: row for row in decision.put}
        self.alarm = decision.alarm or self.alarm
        return decision

    @property
    def known(self) -> Member:
        assert self.member is not None
        return self.member

    def register(self, agent: Agent) -> Registered | Refused:
        """With the second question, if an empty disk is asked to say what it ends."""
        replaces = 0
        while True:
            said = worker.registration(agent.papers, agent.name, agent.table.values(), replaces)
            answer = self.write(control.register(self.member, [*self.rows.values()], said)).answer
            assert isinstance(answer, Registered | Refused)
            if isinstance(answer, Registered):
                agent.papers = worker.registered(agent.papers, answer)
            if isinstance(answer, Registered) or answer.what is not Refusal.REGISTER or replaces == answer.epoch:
                return answer
            replaces = answer.epoch

    def intend(self, handle: str, parent: str = "", kind: Kind = Kind.SANDBOX) -> Create:
        decision, create = control.intend(self.known, handle, kind=kind, parent=self.rows.get(parent))
        self.write(decision)
        return create

    def live(self, agent: Agent, handle: str, parent: str = "", kind: Kind = Kind.SANDBOX) -> Create:
        create = self.intend(handle, parent, kind)
        agent.make(create)
        self.rows[handle] = control.confirm(self.rows[handle])
        return create

    def abandon(self, handle: str) -> None:
        self.rows[handle] = control.abandon(self.rows[handle])

    def condemn(self, handle: str) -> None:
        self.rows |= {row.handle: row for row in control.condemn(self.rows.values(), handle)}

    def sync(self, report: Report, page: int = control.PAGE) -> Orders:
        answer = self.write(control.sync(self.known, [*self.rows.values()], report, page=page)).answer
        assert isinstance(answer, Orders)
        return answer

    def states(self) -> dict[str, ResourceState]:
        return {row.handle: row.state for row in self.rows.values()}


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def agent(database: Database) -> Agent:
    agent = Agent()
    assert isinstance(database.register(agent), Registered)
    return agent


def test_t20_a_report_from_before_a_create_that_is_processed_after_it(database: Database, agent: Agent) -> None:
    """Concourse 1959: what was made between the listing and its processing looked as if it had vanished."""
    agent.hear(database.sync(agent.report()))
    early = agent.report()
    create = database.live(agent, "a")
    database.sync(early)
    assert database.states() == {"a": LIVE} and not database.lost
    agent.hear(database.sync(agent.report()))
    assert agent.table.keys() == {create.handle}


def test_t21_an_old_report_after_a_new_one(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    old = agent.report()
    database.condemn("a")
    agent.hear(database.sync(agent.report()))
    agent.hear(database.sync(agent.report()))
    assert not agent.table and not database.rows
    # It speaks of what is gone: that is asked for once more, is not there, and is forgotten again.
    agent.hear(database.sync(old))
    agent.hear(database.sync(agent.report()))
    assert not agent.table and not database.rows and not database.lost


def test_t22_a_report_twice(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    database.live(agent, "b")
    database.condemn("a")
    report = agent.report()
    first = database.sync(report)
    states = database.states()
    assert database.sync(report) == first and database.states() == states


def test_t23_a_create_that_comes_after_it_was_given_up(database: Database, agent: Agent) -> None:
    create = database.intend("a")
    database.abandon("a")
    agent.hear(database.sync(agent.report()))  # closes it
    assert database.states() == {"a": DESTROYING}, "it may still come, for all that the control plane knows"
    agent.hear(database.sync(agent.report()))
    assert not database.rows
    with pytest.raises(LeaseLost, match="comes too late"):
        agent.make(create)


def test_t23_a_create_that_comes_before_it_is_closed_is_destroyed(database: Database, agent: Agent) -> None:
    create = database.intend("a")
    database.abandon("a")
    agent.make(create)
    with pytest.raises(Conflict, match="given up"):
        control.confirm(database.rows["a"])
    agent.hear(database.sync(agent.report()))
    agent.hear(database.sync(agent.report()))
    assert not agent.table and not database.rows


def test_t24_an_empty_disk_under_the_same_name(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    database.intend("b")
    create = database.intend("c")
    database.abandon("b")
    new = Agent("disk-2")
    assert isinstance(database.register(new), Registered)
    assert not database.rows and database.lost == ["a"]
    with pytest.raises(LeaseLost):
        new.make(create)
    database.live(new, "d")
    assert new.papers.epoch == 2 and database.known.seq == 4, "numbers go on"


def test_t25_a_revenant_behind_a_partition(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    report = agent.report()
    new = Agent("disk-2")
    database.register(new)
    database.live(new, "b")
    before = database.states()
    answer = control.sync(database.known, [*database.rows.values()], report).answer
    assert isinstance(answer, Stale) and worker.must_register(agent.papers, answer)
    agent.restart()
    refused = database.register(agent)
    assert isinstance(refused, Refused) and worker.must_wipe(agent.papers, refused)
    assert not worker.must_wipe(new.papers, refused)
    assert database.states() == before


def test_t25_two_with_one_name_do_not_empty_each_other(database: Database, agent: Agent) -> None:
    said = worker.registration(Agent("disk-2").papers, "w", (), database.known.epoch)
    answer = control.register(database.known, [], said, heard=True).answer
    assert isinstance(answer, Refused) and answer.what is Refusal.NAME_TAKEN


def test_t26_the_control_plane_dies_between_intent_and_send(database: Database, agent: Agent) -> None:
    database.intend("a")
    database.abandon("a")  # by whoever finds its operation
    for _ in range(2):
        agent.hear(database.sync(agent.report()))
    assert not database.rows and not agent.table


def test_t26_the_control_plane_dies_between_send_and_live(database: Database, agent: Agent) -> None:
    create = database.intend("a")
    agent.init(create)
    for _ in range(3):
        agent.hear(database.sync(agent.report()))
        assert database.states() == {"a": CREATING}, "nobody has given it up"
    database.abandon("a")
    agent.hear(database.sync(agent.report()))
    agent.hear(database.sync(agent.report()))
    assert not database.rows and not agent.table


def test_t27_a_list_that_fails_says_nothing_of_what_is_missing(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    database.live(agent, "b")
    agent.hear(database.sync(agent.report()))
    del agent.table["a"]
    database.sync(agent.report(listed=False))
    assert database.states() == {"a": LIVE, "b": LIVE}
    database.sync(agent.report())
    assert database.states() == {"b": LIVE} and database.lost == ["a"]


def test_t28_a_destroy_that_hangs_takes_one_place(database: Database, agent: Agent) -> None:
    for number in range(12):
        database.live(agent, f"sandbox-{number}")
    database.live(agent, "log", kind=Kind.LOG)
    for handle in [*database.rows]:
        database.condemn(handle)
    agent.hear(database.sync(agent.report()), sweep=False)
    hung = {worker.sweep(agent.table, ())[0].handle}
    rounds = 0
    while begun := worker.sweep(agent.table, hung):
        rounds += 1
        assert sum(e.kind is Kind.SANDBOX for e in begun) <= worker.PLACES[Kind.SANDBOX] - 1
        for entry in begun:
            del agent.table[entry.handle]
    assert agent.table.keys() == hung and rounds == 3  # 11 in fours
    database.sync(agent.report())
    assert database.states().keys() == hung


def test_t29_an_hour_of_silence_changes_nothing(database: Database, agent: Agent) -> None:
    """There is no clock in it: silence is that no report comes."""
    database.live(agent, "a")
    database.intend("b")
    before = database.states()
    agent.hear(database.sync(agent.report()))
    assert database.states() == before and not database.lost


def test_t30_gone_then_back(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    late = agent.report()
    database.write(control.gone(database.known, [*database.rows.values()]))
    assert not database.rows and database.lost == ["a"]
    assert isinstance(control.sync(database.known, [], late).answer, Stale)
    agent.restart()
    refused = database.register(agent)
    assert isinstance(refused, Refused) and worker.must_wipe(agent.papers, refused)
    new = Agent("disk-2")
    assert isinstance(database.register(new), Registered)
    assert database.known.standing is Standing.ACTIVE


def test_t31_a_restored_database_destroys_nothing_until_somebody_looks(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    backup = database.member, dict(database.rows)
    database.live(agent, "b")
    agent.hear(database.sync(agent.report()))
    database.member, database.rows = backup
    orders = database.sync(agent.report())
    assert not orders.destroy and "was the database restored?" in database.alarm
    del agent.table["a"]
    for _ in range(3):
        agent.hear(database.sync(agent.report()))
    assert database.states() == {"a": LIVE} and agent.table.keys() == {"b"}
    database.live(agent, "c")  # life goes on, with numbers that nothing has
    database.write(control.acknowledge(database.known, [*database.rows.values()]))
    agent.hear(database.sync(agent.report()))
    agent.hear(database.sync(agent.report()))
    assert database.states() == {"c": LIVE} and agent.table.keys() == {"c"}


def test_t31_a_database_from_before_the_worker_was_known(agent: Agent) -> None:
    agent.restart()
    restored = Database()
    assert isinstance(restored.register(agent), Registered)
    assert restored.known.quarantined and restored.known.epoch == 2


def test_t31_a_database_that_has_forgotten_a_registration(database: Database, agent: Agent) -> None:
    backup = database.known
    agent.restart()
    database.register(agent)
    database.member = backup
    answer = control.sync(database.known, [], agent.report()).answer
    assert isinstance(answer, Stale) and worker.must_register(agent.papers, answer)
    agent.restart()
    assert isinstance(database.register(agent), Registered) and database.known.quarantined


def test_t32_reports_are_spread() -> None:
    """200 workers that all begin at the same moment, for ten minutes."""
    draw = random.Random(32).random
    seconds: Counter[int] = Counter()
    for _ in range(200):
        at = control.first_pause_s(draw())
        while at < 600:
            seconds[int(at)] += 1
            at += control.pause_s(draw())
    mean = seconds.total() / 600
    # Per second there are some 7 only, and the largest of 600 such numbers is far from their mean by chance; so what
    # counts is the peak of ten seconds.
    tens = [sum(seconds[s] for s in range(start, start + 10)) for start in range(0, 600, 10)]
    assert max(tens) / (10 * mean) <= 2.0, tens


def test_t32_the_control_plane_sets_the_pace() -> None:
    assert control.pause_s(0.5, 120.0) == 120.0
    backoff = [control.pause_s(0.5, failures=n) for n in range(40)]
    assert backoff[0] == control.PERIOD_S and backoff == sorted(backoff) and backoff[-1] == control.MAX_BACKOFF_S


def test_t33_children_go_before_parents(database: Database, agent: Agent) -> None:
    for handle, parent in (("a", ""), ("b", "a"), ("c", "b")):
        database.live(agent, handle, parent)
    database.condemn("a")
    assert {*database.states().values()} == {DESTROYING}
    went: list[str] = []
    while database.rows:
        before = [*agent.table]
        agent.hear(database.sync(agent.report(), page=1))
        went += [handle for handle in before if handle not in agent.table]
    assert went == ["c", "b", "a"]


def test_t33_nothing_is_made_in_what_is_to_go(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    create = database.intend("b", "a")
    database.condemn("a")
    with pytest.raises(FailedPrecondition, match="nothing is made in it"):
        database.intend("c", "a")
    agent.hear(database.sync(agent.report()), sweep=False)
    with pytest.raises(LeaseLost):
        agent.make(create)


def test_t33_nothing_is_made_in_what_has_ended_by_itself(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    create = database.intend("b", "a")
    del agent.table["a"]
    with pytest.raises(FailedPrecondition, match="not here"):
        agent.make(create)


def test_t34_deleting_needs_no_room(database: Database, agent: Agent) -> None:
    """On a full disk nothing can be written down: neither that something is to go, nor how far is closed. It goes
    nevertheless, because whoever is told to destroy may do so at once."""
    database.live(agent, "a")
    database.condemn("a")
    orders = database.sync(agent.report())
    doomed = {entry.handle: entry for entry in worker.doomed(agent.table, orders)}
    assert [entry.handle for entry in worker.sweep(doomed, ())] == ["a"]
    del agent.table["a"]
    agent.restart()
    database.register(agent)
    database.sync(agent.report())
    assert not database.rows


def test_t38_what_becomes_live_while_leftovers_are_looked_for(agent: Agent, database: Database) -> None:
    """A driver is listed, then something is made, then what the list has is deleted: unless that is decided when it is
    deleted."""
    create = database.intend("a")
    agent.init(create)
    on_disk = ["a", "left-from-before"]
    agent.table["a"] = replace(agent.table["a"], state=Local.LIVE)
    assert [handle for handle in on_disk if worker.is_leftover(handle, agent.table)] == ["left-from-before"]


# --- what else may be said to the control plane -----------------------------------------------------------


def test_handles_that_nobody_gave_out(database: Database, agent: Agent) -> None:
    """A worker that makes up handles is told to destroy them; one that makes up numbers is looked at by somebody."""
    agent.table["made-up"] = Entry(handle="made-up", create_seq=0, state=Local.LIVE)
    orders = database.sync(agent.report())
    assert orders.destroy == ("made-up",) and not database.alarm
    agent.table["made-up"] = Entry(handle="made-up-too", create_seq=7, state=Local.LIVE)
    assert not database.sync(agent.report()).destroy and database.alarm


@pytest.mark.parametrize("number", [-1, MAX_SEQ + 1])
def test_numbers_that_no_worker_has(database: Database, agent: Agent, number: int) -> None:
    agent.table["a"] = Entry(handle="a", create_seq=number, state=Local.LIVE)
    with pytest.raises(InvalidArgument, match="not within"):
        database.sync(agent.report())


def test_a_handle_twice_and_too_many(database: Database, agent: Agent) -> None:
    entry = Entry(handle="a", create_seq=0, state=Local.LIVE)
    with pytest.raises(InvalidArgument, match="twice"):
        database.sync(replace(agent.report(), inventory=(entry, entry)))
    with pytest.raises(InvalidArgument, match="more than"):
        database.sync(replace(agent.report(), inventory=(entry,) * (control.MAX_INVENTORY + 1)))


def test_a_copied_disk(database: Database, agent: Agent) -> None:
    """Only one of the two goes on; the other empties itself."""
    database.live(agent, "a")
    copy = Agent()
    copy.papers = worker.begin(agent.papers, "claim-of-the-copy")
    assert isinstance(database.register(copy), Registered)
    agent.restart()
    refused = database.register(agent)
    assert isinstance(refused, Refused) and worker.must_wipe(agent.papers, refused)
    assert not worker.must_wipe(copy.papers, refused)


def test_a_worker_that_drains_gets_nothing_new(database: Database, agent: Agent) -> None:
    database.live(agent, "a")
    database.member = replace(database.known, standing=Standing.DRAINING)
    assert database.sync(agent.report()).drain
    with pytest.raises(FailedPrecondition, match="gets nothing new"):
        database.intend("b")


def test_a_thousand_that_went_by_themselves_are_found_within_two_reports(database: Database, agent: Agent) -> None:
    for number in range(1000):
        database.live(agent, f"h{number}")
    agent.table.clear()
    agent.hear(database.sync(agent.report()))
    agent.hear(database.sync(agent.report()))
    assert not database.rows and len(database.lost) == 1000
