"""The slot ledger alone: whatever a view shows, old, wrong or made up, a decision keeps to what can't be undone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from greenroom.core.ledger import naming, wire
from greenroom.core.ledger.decide import begin_term, decide, divide, rebuild
from greenroom.core.ledger.effects import plan
from greenroom.core.ledger.notes import FENCE_S, FIRST_FAILURE_PAUSE_S, LOOK_AFTER_S, Notes
from greenroom.core.ledger.records import (
    Delete,
    Finish,
    Ledger,
    Look,
    Pod,
    Post,
    Reason,
    Release,
    Repair,
    Slot,
    SlotState,
    Want,
)

UID = "11111111-2222-3333-4444-555555555555"
R, L, D = SlotState.RESERVED, SlotState.LIVE, SlotState.DOOMED


def name(ordinal: int, epoch: int = 1) -> str:
    return naming.pod_name("pool", UID, epoch, ordinal)


def pod(ordinal: int, **given: object) -> Pod:
    fields: dict[str, object] = {"name": name(ordinal), "uid": f"pod-{ordinal}", "owner_uid": UID, "ready": True}
    return Pod(**(fields | given))  # type: ignore[arg-type]


class Bench:
    """One pool, whose ledger is committed at once."""

    def __init__(self, replicas: int = 2, **want: object) -> None:
        self.ledger = Ledger(pool_uid=UID, term=1)
        self.want = Want(replicas=replicas, **want)  # type: ignore[arg-type]
        self.notes = Notes(term=1)
        self.now = 1000.0
        self.cache: list[Pod] = []

    def decide(self) -> Ledger:
        self.ledger = decide("pool", self.ledger, self.want, self.cache, self.notes, self.now, 5000.0)
        return self.ledger

    def effects(self) -> list[object]:
        todo = plan("pool", self.ledger, self.want, self.cache, self.notes, self.now).effects
        for effect in todo:
            self.notes.tried(effect, self.now)
        return list(todo)

    def states(self) -> str:
        return "".join(slot.state for slot in self.ledger.slots)

    def start(self) -> None:
        """All of its workers are live, seen and settled."""
        self.decide()
        for effect in self.effects():
            assert isinstance(effect, Post)
            self.notes.created(effect.slot_id, pod(int(effect.slot_id.partition("-")[2])), self.now)
        self.decide()
        self.cache = [pod(n) for n in range(self.want.replicas)]
        assert self.effects() == []
        assert all(s.settled and s.state is L for s in self.ledger.slots)

    def new_process(self) -> None:
        self.ledger = begin_term(self.ledger)
        self.notes = Notes(term=self.ledger.term)


def test_reserves_then_creates_then_is_at_rest() -> None:
    bench = Bench(3)
    assert bench.decide().next_ordinal == 3 and bench.states() == "RRR"
    assert bench.decide().next_ordinal == 3  # reserved ones count, seen or not
    posts = bench.effects()
    assert [p.name for p in posts if isinstance(p, Post)] == [name(0), name(1), name(2)]
    for n in range(3):
        bench.notes.created(f"1-{n}", pod(n), bench.now)
    before = bench.decide()
    assert bench.states() == "LLL" and bench.effects() == []
    assert bench.decide() == before


def test_t1_a_view_that_never_moves_makes_nothing_twice() -> None:
    bench = Bench(2)
    bench.start()
    bench.cache = []
    for _ in range(200):
        bench.now += 7
        bench.decide()
        for effect in bench.effects():
            assert isinstance(effect, Look)  # nobody acts on a view; the server itself is asked
            bench.notes.saw(effect.slot_id, pod(int(effect.slot_id[2:])), bench.now)
    assert bench.states() == "LL" and bench.ledger.next_ordinal == 2


def test_a_worker_that_ended_is_doomed_and_replaced_in_one_commit() -> None:
    bench = Bench(2)
    bench.start()
    bench.cache[0] = pod(0, ended="Failed", ready=False)
    bench.decide()
    assert [(s.id, s.state, s.reason) for s in bench.ledger.slots] == [
        ("1-0", D, "Failed"),
        ("1-1", L, ""),
        ("1-2", R, ""),
    ]
    assert bench.effects() == [Delete(slot_id="1-0", name=name(0), uid="pod-0"), Post(slot_id="1-2", name=name(2))]


def test_workers_that_end_again_and_again_are_replaced_ever_more_slowly() -> None:
    bench = Bench(1, max_surge=10)
    bench.start()
    pauses = []
    for ordinal in range(5):
        bench.cache = [pod(ordinal, ended="Failed", ready=False)]
        bench.decide()
        began = bench.now
        while bench.ledger.active == 0:
            bench.now = plan("pool", bench.ledger, bench.want, bench.cache, bench.notes, bench.now).again_at
            bench.decide()
        pauses.append(bench.now - began)
        bench.notes.created(f"1-{ordinal + 1}", pod(ordinal + 1), bench.now)
        bench.decide()
    assert pauses == [0, FIRST_FAILURE_PAUSE_S, 2 * FIRST_FAILURE_PAUSE_S, 4 * FIRST_FAILURE_PAUSE_S, 80]


def test_workers_that_never_get_ready_are_not_replaced_nor_joined_by_others() -> None:
    bench = Bench(3)
    bench.start()
    bench.cache = [pod(n, ready=False) for n in range(3)]  # their image can't be pulled
    for _ in range(100):
        bench.now += 60
        bench.decide()
        assert bench.effects() == []
    assert bench.states() == "LLL"
    bench.want = replace(bench.want, replicas=2)
    bench.cache[0] = pod(0)
    bench.decide()
    assert bench.ledger.slots[0].state is L  # who is ready stays


def test_a_settled_worker_that_is_being_deleted_is_released_at_once() -> None:
    bench = Bench(1)
    bench.start()
    bench.cache = [pod(0, deleting=True)]
    bench.decide()
    assert bench.effects() == [Release(slot_id="1-0", name=name(0), uid="pod-0"), Post(slot_id="1-1", name=name(1))]
    bench.cache = []
    assert bench.effects() == [Look(slot_id="1-0", name=name(0))]
    bench.notes.saw("1-0", None, bench.now)
    bench.decide()
    assert [s.id for s in bench.ledger.slots] == ["1-1"]


def test_h_a_worker_whose_creation_was_not_answered_keeps_its_name_until_the_fence_is_over() -> None:
    bench = Bench(1)
    bench.decide()
    bench.effects()
    bench.notes.unanswered("1-0", bench.now)
    bench.now += 1
    bench.cache = [pod(0)]
    bench.decide()
    assert bench.states() == "L" and not bench.ledger.slots[0].settled
    bench.cache = [pod(0, deleting=True)]
    bench.decide()
    assert not any(isinstance(e, Release) for e in bench.effects())
    bench.now += FENCE_S
    assert Release(slot_id="1-0", name=name(0), uid="pod-0") in bench.effects()


def test_h_what_an_earlier_process_may_have_sent_is_waited_for() -> None:
    bench = Bench(1)
    bench.decide()
    bench.new_process()
    bench.want = replace(bench.want, replicas=0)
    bench.decide()
    assert bench.states() == "D" and bench.effects() == []
    bench.notes.saw("1-0", None, bench.now)  # not there now says nothing about later
    bench.decide()
    assert bench.states() == "D"
    bench.now += FENCE_S
    assert bench.effects() == [Look(slot_id="1-0", name=name(0))]
    bench.notes.saw("1-0", None, bench.now)
    assert bench.decide().slots == ()


def test_what_was_never_asked_for_goes_without_a_request() -> None:
    bench = Bench(3)
    bench.decide()
    bench.want = replace(bench.want, replicas=1)
    bench.decide()
    assert [s.id for s in bench.ledger.slots] == ["1-0"] and bench.ledger.next_ordinal == 3


def test_t5_a_late_pod_of_a_doomed_slot_is_met_and_deleted() -> None:
    bench = Bench(1)
    bench.decide()
    bench.effects()
    bench.notes.unanswered("1-0", bench.now)
    bench.want = replace(bench.want, replicas=0)
    bench.decide()
    bench.cache = [pod(0)]
    bench.decide()
    assert bench.effects() == [Delete(slot_id="1-0", name=name(0), uid="pod-0")]


def test_t6_a_name_that_is_taken_costs_a_slot_and_no_foreign_pod() -> None:
    bench = Bench(1)
    bench.decide()
    bench.effects()
    bench.notes.saw("1-0", Pod(name=name(0), uid="foreign", owner_uid=""), bench.now)
    bench.decide()
    assert [(s.id, s.state) for s in bench.ledger.slots] == [("1-0", D), ("1-1", R)]
    assert bench.ledger.slots[0].reason == Reason.NAME_TAKEN
    assert not any(isinstance(e, Delete) for e in bench.effects())
    bench.decide()
    assert [s.id for s in bench.ledger.slots] == ["1-1"]


def test_t7_a_pod_that_never_ends_holds_up_nobody() -> None:
    bench = Bench(2, max_surge=0)
    bench.start()
    bench.cache[0] = pod(0, deleting=True, held=False)
    bench.decide()
    assert bench.states() == "DL"  # no surge is allowed while it should still end
    bench.now = plan("pool", bench.ledger, bench.want, bench.cache, bench.notes, bench.now).again_at
    assert bench.decide().active == 2


def test_t9_pods_of_a_namesake_are_neither_counted_nor_touched() -> None:
    bench = Bench(1)
    bench.cache = [Pod(name=naming.pod_name("pool", "other-uid", 1, 0), uid="old", owner_uid="other-uid")]
    bench.decide()
    assert bench.effects() == [Post(slot_id="1-0", name=name(0))]


def test_t10_labels_that_were_edited_are_put_right() -> None:
    bench = Bench(1)
    bench.start()
    bench.cache = [pod(0, intact=False)]
    assert bench.effects() == [Repair(slot_id="1-0", name=name(0), uid="pod-0")]
    bench.cache = []  # so wrong that it is not selected any more
    assert bench.effects() == [Look(slot_id="1-0", name=name(0))]
    bench.notes.saw("1-0", pod(0, intact=False), bench.now)
    bench.now += LOOK_AFTER_S
    assert bench.decide().active == 1
    assert Repair(slot_id="1-0", name=name(0), uid="pod-0") in bench.effects()


def test_t11_a_pool_that_is_suspended_is_emptied_before_it_goes_on() -> None:
    bench = Bench(1)
    bench.start()
    bench.want = replace(bench.want, suspend=True)
    bench.decide()
    assert bench.states() == "D" and bench.ledger.slots[0].reason == Reason.SUSPENDED
    bench.want = replace(bench.want, suspend=False)
    bench.decide()
    assert bench.states() == "D" and bench.ledger.suspending
    bench.notes.saw("1-0", None, bench.now)
    bench.decide()
    assert [s.id for s in bench.ledger.slots] == ["1-1"] and not bench.ledger.suspending


def test_t12_victims_go_first_and_are_not_taken_twice() -> None:
    bench = Bench(3)
    bench.start()
    bench.want = replace(bench.want, replicas=2, victims=("pod-0",))
    bench.cache[1] = pod(1, ended="Failed", ready=False)
    bench.decide()
    assert [(s.id, s.reason) for s in bench.ledger.slots if s.state is D] == [("1-0", "Named"), ("1-1", "Failed")]
    assert bench.ledger.active == 2


def test_who_names_victims_loses_no_other_worker() -> None:
    bench = Bench(3, named_only=True)
    bench.start()
    bench.want = replace(bench.want, replicas=1)
    bench.decide()
    assert bench.states() == "LLL"
    bench.want = replace(bench.want, victims=("1-2", name(1)))
    bench.decide()
    assert bench.states() == "LDD"


def test_surplus_takes_what_costs_least() -> None:
    bench = Bench(5)
    bench.start()
    bench.cache = [pod(0, actors=0), pod(1, actors=3), pod(2, ready=False), pod(3, actors=1), pod(4)]
    doomed = []
    for replicas in (4, 3, 2, 1):
        bench.want = replace(bench.want, replicas=replicas)
        bench.decide()
        doomed.append(next(s.ordinal for s in bench.ledger.slots if s.state is D and s.ordinal not in doomed))
    assert doomed == [2, 0, 3, 1]


def test_t13_a_lost_ledger_is_made_anew_from_the_pods_and_no_name_comes_twice() -> None:
    ledger = begin_term(rebuild("pool", UID, [pod(3), pod(7, name=name(7, epoch=2))], epoch=3))
    assert [(s.id, s.state, s.pod_uid) for s in ledger.slots] == [("1-3", L, "pod-3"), ("2-7", L, "pod-7")]
    bench = Bench(3)
    bench.ledger, bench.notes = ledger, Notes(term=1)
    bench.cache = [pod(3), pod(7, name=name(7, epoch=2))]
    bench.decide()
    assert [s.id for s in bench.ledger.slots] == ["1-3", "2-7", "3-0"]


def test_a_stray_is_deleted_but_not_what_a_newer_ledger_may_know() -> None:
    bench = Bench(1)
    bench.start()
    bench.ledger = replace(bench.ledger, next_ordinal=5)
    bench.cache += [pod(2), pod(9), pod(4, name=name(4, epoch=2))]
    assert bench.effects() == [Delete(slot_id="", name=name(2), uid="pod-2")]


def test_a_stray_keeps_its_name_until_no_other_can_come() -> None:
    bench = Bench(1)
    bench.start()
    bench.ledger = replace(bench.ledger, next_ordinal=5)
    bench.cache += [pod(2, deleting=True)]
    began = bench.now
    while not (done := bench.effects()):
        bench.now = plan("pool", bench.ledger, bench.want, bench.cache, bench.notes, bench.now).again_at
        bench.decide()
    assert done == [Release(slot_id="", name=name(2), uid="pod-2")] and bench.now == began + FENCE_S


def test_a_deleted_pool_is_let_go_when_it_is_empty() -> None:
    bench = Bench(1)
    bench.start()
    bench.want = replace(bench.want, deleting=True)
    bench.decide()
    assert bench.ledger.slots[0].reason == Reason.POOL_DELETED
    bench.notes.saw("1-0", None, bench.now)
    bench.decide()
    assert bench.effects() == [Finish()]


def test_who_may_take_actors() -> None:
    ledger = Ledger(
        pool_uid=UID,
        next_ordinal=3,
        slots=(
            Slot(epoch=1, ordinal=0, term=1),
            Slot(epoch=1, ordinal=1, term=1, state=L, pod_uid="a"),
            Slot(epoch=1, ordinal=2, term=1, state=D, pod_uid="b"),
        ),
    )
    assert ledger.admits(1, 0, "x") and ledger.admits(1, 1, "a")
    assert not any(
        (ledger.admits(1, 1, "z"), ledger.admits(1, 2, "b"), ledger.admits(1, 9, "x"), ledger.admits(1, 0, ""))
    )


# --- names and wire ---------------------------------------------------------------------------------------


@given(
    st.from_regex(r"[a-z]([a-z0-9-]{0,250}[a-z0-9])?", fullmatch=True),
    st.integers(1, 10**7 - 1),
    st.integers(0, 10**10 - 1),
)
def test_a_name_says_which_slot_it_is_of_and_nobody_elses(pool: str, epoch: int, ordinal: int) -> None:
    made = naming.pod_name(pool, UID, epoch, ordinal)
    assert len(made) <= naming.MAX_NAME_CHARS
    assert naming.place(pool, UID, made) == (epoch, ordinal)
    assert naming.place(pool, UID + "x", made) is None
    assert naming.place(pool + "x", UID, made) is None


@pytest.mark.parametrize("tail", ["", "-1", "-1-", "-1-01", "-0-1", "-01-1", "-1-1-1", "-x-1", "-1--1"])
def test_what_is_not_a_pods_name(tail: str) -> None:
    assert naming.place("pool", UID, naming.prefix("pool", UID) + tail) is None


def _slot(state: SlotState, uid: str, settled: bool, epoch: int, ordinal: int, term: int) -> Slot:
    uid = "" if state is R else uid or "a" if state is L else uid
    return Slot(epoch=epoch, ordinal=ordinal, term=term, state=state, pod_uid=uid, settled=settled and state is not R)


slots = st.builds(
    _slot,
    st.sampled_from(SlotState),
    st.sampled_from(["", "a", "b", "c"]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 30),
    st.integers(0, 5),
)
ledgers = st.builds(
    lambda found, suspending: Ledger(
        pool_uid=UID,
        epoch=3,
        term=5,
        next_ordinal=31,
        suspending=suspending,
        slots=tuple(sorted({s.id: s for s in found}.values(), key=lambda s: (s.epoch, s.ordinal))),
    ),
    st.lists(slots, max_size=12),
    st.booleans(),
)


@given(ledgers)
def test_a_ledger_comes_back_as_it_was(ledger: Ledger) -> None:
    plain = wire.to_plain(ledger)
    assert wire.from_plain(plain, UID) == ledger
    assert wire.from_plain(plain, "other") is None


@given(ledgers, st.data())
def test_a_ledger_that_was_edited_counts_as_lost(ledger: Ledger, data: st.DataObject) -> None:
    plain = wire.to_plain(ledger)
    field = data.draw(st.sampled_from(sorted(plain)))
    plain[field] = data.draw(
        st.one_of(st.none(), st.integers(), st.text(max_size=3)).filter(lambda v: v != plain[field])
    )
    assert wire.from_plain(plain, UID) is None


@pytest.mark.parametrize("garbage", [None, 3, [], {}, {"poolUID": UID}, {"poolUID": UID, "slots": 4, "digest": "x"}])
def test_garbage_counts_as_lost(garbage: object) -> None:
    assert wire.from_plain(garbage, UID) is None


# --- whatever is shown ------------------------------------------------------------------------------------

pods = st.builds(
    Pod,
    name=st.builds(name, st.integers(0, 33), st.integers(1, 4)),
    uid=st.sampled_from(["a", "b", "c", "d", "e"]),
    owner_uid=st.sampled_from([UID, "", "other"]),
    ready=st.booleans(),
    ended=st.sampled_from(["", "Failed", "Succeeded"]),
    deleting=st.booleans(),
    held=st.booleans(),
    intact=st.booleans(),
    actors=st.sampled_from([None, 0, 2]),
)
wants = st.builds(
    Want,
    replicas=st.integers(0, 8),
    suspend=st.booleans(),
    deleting=st.booleans(),
    max_surge=st.sampled_from([None, 0, 1]),
    victims=st.lists(st.sampled_from(["a", "b", "1-3", "3-2", name(2)]), max_size=2).map(tuple),
    named_only=st.booleans(),
)


@settings(max_examples=500, deadline=None)
@given(
    ledgers,
    wants,
    st.lists(pods, max_size=8),
    st.dictionaries(st.builds("{}-{}".format, st.integers(1, 3), st.integers(0, 30)), st.none() | pods, max_size=6),
    st.sets(st.builds("{}-{}".format, st.integers(1, 3), st.integers(0, 30)), max_size=6),
    st.floats(0, 1000),
)
def test_a_decision_keeps_to_what_cannot_be_undone(
    ledger: Ledger, want: Want, shown: list[Pod], asked: dict[str, Pod | None], unknown: set[str], later: float
) -> None:
    notes = Notes(term=5)
    for slot_id, found in asked.items():
        notes.saw(slot_id, found, 0.0)
    for slot_id in unknown:
        notes.sent.add(slot_id)
        notes.unanswered(slot_id, 0.0)
    by_slot, _ = divide("pool", ledger, shown)
    after = decide("pool", ledger, want, shown, notes, later, 5000.0)
    old, new = {s.id: s for s in ledger.slots}, {s.id: s for s in after.slots}
    target = 0 if after.suspending or want.deleting else want.replicas

    assert after.next_ordinal >= ledger.next_ordinal and (after.epoch, after.term) == (ledger.epoch, ledger.term)
    added = [s for s in after.slots if s.id not in old]
    assert {s.ordinal for s in added} == set(range(ledger.next_ordinal, after.next_ordinal))
    if added:
        assert after.active <= target and not any(s.state is D and s.reason == Reason.SURPLUS for s in added)
    order = [R, L, D]
    for slot_id, was in old.items():
        now = new.get(slot_id)
        if now is None:
            # Nothing can come any more, and what came has gone.
            if was.pod_uid:
                assert asked.get(slot_id, "unasked") != "unasked"
                assert (answer := asked[slot_id]) is None or answer.uid != was.pod_uid
            continue
        assert order.index(now.state) >= order.index(was.state)
        assert was.pod_uid in ("", now.pod_uid)
        if now.settled and not was.settled:
            assert was.term == 5 and slot_id not in unknown
        if was.active and not now.active:
            _has_cause(now, want, after, by_slot.get(slot_id), asked.get(slot_id, "unasked"))
    surplus = [s for s in after.slots if s.reason == Reason.SURPLUS and old.get(s.id, s).active]
    if surplus and not ledger.suspending:
        assert after.active == target

    once = decide("pool", after, want, shown, notes, later, 5000.0)
    for slot in once.slots:
        assert slot.id in new or slot.state is R
    todo = plan("pool", after, want, shown, notes, later).effects
    for effect in todo:
        match effect:
            case Post():
                assert new[effect.slot_id].state is R
            case Delete(slot_id=""):
                where = naming.place("pool", UID, effect.name)
                assert where is not None
                found = new.get(f"{where.epoch}-{where.ordinal}")
                assert after.retired(*where) or (found is not None and found.pod_uid not in ("", effect.uid))
            case Delete():
                assert new[effect.slot_id].state is D and new[effect.slot_id].pod_uid == effect.uid
            case Release(slot_id=slot_id) if slot_id:
                slot = new[slot_id]
                assert slot.state is D and (slot.settled or later >= FENCE_S)


def _has_cause(slot: Slot, want: Want, after: Ledger, shown: Pod | None, asked: Pod | str | None) -> None:
    evidence = [p for p in (shown, asked) if isinstance(p, Pod)]
    match slot.reason:
        case Reason.SURPLUS:
            assert after.active >= want.replicas or want.named_only
        case Reason.NAMED:
            assert want.victims
        case Reason.SUSPENDED:
            assert after.suspending
        case Reason.POOL_DELETED:
            assert want.deleting
        case Reason.FAILED | Reason.SUCCEEDED:
            assert any(p.ended for p in evidence)
        case Reason.DELETED:
            assert any(p.deleting for p in evidence)
        case Reason.GONE:
            assert asked is None or (isinstance(asked, Pod) and asked.uid != slot.pod_uid)
        case Reason.NAME_TAKEN:
            assert isinstance(asked, Pod) and not slot.pod_uid
        case other:
            raise AssertionError(other)
