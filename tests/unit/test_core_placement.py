"""Which worker an actor goes to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.errors import FailedPrecondition, ResourceExhausted
from greenroom.core.placement import (
    FAILURES_TO_QUARANTINE,
    FIRST_QUARANTINE_S,
    LAST_QUARANTINE_S,
    MAX_REJECTIONS,
    Demand,
    after_failure,
    after_success,
    can_run,
    choose,
    rank,
    selector,
)
from greenroom.core.records import SnapshotScope, SnapshotState, Worker, WorkerState
from greenroom.testing.contracts.store_world import snapshot, worker

MEMORY = snapshot("s")
DATA = snapshot("s", scope=SnapshotScope.DATA)
NOW = 100.0


def demand(**fields: Any) -> Demand:
    made: dict[str, Any] = {"pool": "default", "snapshot": MEMORY}
    return Demand(**made | fields)


def chosen(*workers: Worker, **fields: Any) -> str:
    """The name, which the order of the workers must not change."""
    names = {choose(order, demand(**fields), NOW)[0].name for order in itertools.permutations(workers)}
    assert len(names) == 1
    return names.pop()


def test_gates() -> None:
    fit = worker("z", capacity=1)
    unfit = (
        worker("a", pool="other", capacity=9),
        worker("b", used=2),
        worker("c", state=WorkerState.DRAINING, capacity=9),
        worker("d", state=WorkerState.STALLED, capacity=9),
        worker("e", fingerprint="f2", capacity=9),
        worker("f", backend="gvisor", capacity=9),
    )
    names = tuple(w.name for w in unfit)
    assert chosen(fit, *unfit[:3], prefer=names) == chosen(fit, *unfit[3:], prefer=names) == "z"
    for one in unfit[:4]:
        with pytest.raises(ResourceExhausted) as full:
            choose([one], demand(), NOW)
        assert full.value.reason == "NO_CAPACITY" and full.value.retry_after_s > 0
    for one in unfit[4:]:
        with pytest.raises(FailedPrecondition, match="snapshot s") as never:
            choose([one], demand(), NOW)
        assert never.value.reason == "NO_COMPATIBLE_WORKER"


def test_preferences_in_their_order() -> None:
    a, b, c = worker("a", capacity=5), worker("b", capacity=9), worker("c", capacity=9, used=3)
    assert chosen(a, b, c) == "b", "most free slots"
    assert chosen(a, replace(b, used=4), c) == "c"
    assert chosen(a, replace(b, used=4), replace(c, used=4)) == "a", "then the name"
    assert chosen(a, b, c, prefer=("x", "c", "a")) == "c", "preferred before free"
    assert chosen(a, b, c, prefer=("c", "a"), avoid=("c",)) == "a", "avoided last of all"
    assert chosen(a, avoid=("a",)) == "a", "but rather than none"
    assert chosen(replace(a, used=5), b, prefer=("a",)) == "b", "a full one is no choice"


def test_what_can_run_what() -> None:
    same, other = worker("w"), worker("w", fingerprint="f2")
    assert can_run(same, MEMORY) and not can_run(other, MEMORY)
    assert can_run(other, DATA) and not can_run(worker("w", backend="gvisor"), DATA)
    assert choose([other], demand(snapshot=None), NOW) == (other, ()), "a boot runs anywhere"


def test_a_pool_without_workers() -> None:
    with pytest.raises(ResourceExhausted, match="0 workers"):
        choose([], demand(), NOW)


# --- labels -----------------------------------------------------------------------------------------------


def test_all_labels_that_are_asked_for_must_be_there() -> None:
    plain = worker("a", capacity=9)
    some = worker("b", labels={"zone": "a"}, capacity=9)
    other = worker("c", labels={"zone": "b", "disk": "ssd"}, capacity=9)
    fit = worker("d", labels={"zone": "a", "disk": "ssd", "more": "x"}, capacity=1)
    wanted = {"zone": "a", "disk": "ssd"}
    assert chosen(plain, some, other, fit, selector=wanted, prefer=("a", "b")) == "d"
    said = {r.worker: r.why for r in rank([plain, some, other, fit], demand(selector=wanted), NOW).rejected}
    assert said == {
        "a": "has no label disk=ssd, zone=a",
        "b": "has no label disk=ssd",
        "c": "has no label zone=a",
    }
    with pytest.raises(FailedPrecondition, match=r"can run it: a: has no label disk=ssd, zone=a") as never:
        choose([plain], demand(selector=wanted, snapshot=None), NOW)
    assert never.value.reason == "NO_COMPATIBLE_WORKER"


def test_selectors_hold_together_and_contradictions_fit_nobody() -> None:
    assert selector() == {} and selector({"a": "1"}, {}) == {"a": "1"}
    assert selector({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == {"a": "1", "b": "2", "c": "3"}
    both = selector({"zone": "a"}, {"zone": "b"})
    with pytest.raises(FailedPrecondition, match="zone=a and b"):
        choose([worker("w1", labels={"zone": "a"}), worker("w2", labels={"zone": "b"})], demand(selector=both), NOW)


# --- what is so for now -----------------------------------------------------------------------------------


def test_only_reachable_workers_are_taken() -> None:
    near, far = worker("near", capacity=1), worker("far", capacity=9)
    assert chosen(near, far) == "far", "anybody, when nobody says who can be reached"
    assert chosen(near, far, reachable=("near", "x"), prefer=("far",)) == "near"
    with pytest.raises(ResourceExhausted, match="far: is not connected") as nobody:
        choose([far], demand(reachable=()), NOW)
    assert nobody.value.reason == "NO_CAPACITY", "another replica may have it"


def test_a_worker_in_quarantine_takes_nobody_while_another_fits() -> None:
    ill, well = worker("ill", failures=3, quarantined_until=NOW + 1), worker("well", used=1)
    assert chosen(ill, well) == "well"
    _, rejected = choose([ill, well], demand(), NOW)
    assert [(r.worker, r.why) for r in rejected] == [("ill", "in quarantine after 3 failures")]
    # What fails everywhere may not be the workers' fault; and to try is better than to do nothing for minutes.
    assert choose([ill, replace(well, used=2)], demand(), NOW)[0] is ill
    assert choose([ill, well], demand(), NOW + 1)[1] == ()


def test_whom_only_some_workers_serve_is_told_which() -> None:
    local = snapshot("s", state=SnapshotState.LOCAL, worker="there")
    there, other = worker("there", used=2), worker("other")
    with pytest.raises(ResourceExhausted) as full:
        choose([there, other], demand(snapshot=local), NOW)
    assert full.value.metadata == {"only": "there"}
    with pytest.raises(ResourceExhausted) as full:
        choose([there, replace(other, used=2)], demand(snapshot=local), NOW)
    assert full.value.metadata == {}, "no room for anybody"


def test_a_local_snapshot_is_restored_where_it_is() -> None:
    local = snapshot("s", state=SnapshotState.LOCAL, worker="there")
    there, other = worker("there", capacity=1), worker("other", capacity=9)
    assert chosen(there, other, snapshot=local, prefer=("other",), avoid=("there",)) == "there"
    with pytest.raises(ResourceExhausted, match="it is on worker there only") as full:
        choose([replace(there, used=1), other], demand(snapshot=local), NOW)
    assert full.value.reason == "NO_CAPACITY", "there may be room later, and everywhere when it is uploaded"
    data = replace(local, scope=SnapshotScope.DATA)
    with pytest.raises(ResourceExhausted):
        choose([other], demand(snapshot=data), NOW)


# --- preference -------------------------------------------------------------------------------------------


def test_suspects_come_after_all_others() -> None:
    suspect, well = worker("a", capacity=9, failures=1), worker("b", used=1)
    assert chosen(suspect, well) == "b"
    assert chosen(suspect, well, prefer=("a",)) == "b", "however much it is preferred"
    assert chosen(suspect, well, avoid=("b",)) == "a", "but before one that has just refused this one"
    assert chosen(suspect, replace(well, used=2)) == "a", "rather than none"


def test_a_worker_that_has_the_image_before_one_that_is_emptier() -> None:
    has, empty = worker("b", used=1, images=("sha256:1", "sha256:0")), worker("a", capacity=9)
    assert chosen(has, empty, image_digest="sha256:0") == "b"
    assert chosen(has, empty, image_digest="sha256:2") == "a" and chosen(has, empty) == "a"
    assert chosen(has, empty, image_digest="sha256:0", prefer=("a",)) == "a", "its snapshot may be there"


def test_the_order_is_the_order_of_choice() -> None:
    workers = [worker("a", used=1), worker("b"), worker("c", failures=1), worker("d", used=2)]
    ranking = rank(workers, demand(avoid=("b",)), NOW)
    assert [w.name for w in ranking.order] == ["a", "c", "b"]
    assert [r.worker for r in ranking.rejected] == ["d"]


# --- what is told -----------------------------------------------------------------------------------------


def test_rejections_are_bounded_and_of_the_pool_only() -> None:
    full = [worker(f"w{i:02}", used=2) for i in range(MAX_REJECTIONS + 5)]
    others = [worker("x", pool="other")]
    fit = worker("z")
    found, rejected = choose([*others, *full, fit], demand(), NOW)
    assert found is fit and len(rejected) == MAX_REJECTIONS
    assert {r.why for r in rejected} == {"is full (2 of 2 slots)"}
    with pytest.raises(ResourceExhausted, match=f"{len(full)} workers, {2 * len(full)} of {2 * len(full)}") as nobody:
        choose([*others, *full], demand(), NOW)
    assert nobody.value.message.count("is full") == MAX_REJECTIONS


def test_one_that_could_and_can_not_now_is_no_reason_to_give_up() -> None:
    can, never = worker("can", used=2), worker("never", fingerprint="f2")
    with pytest.raises(ResourceExhausted, match="1 workers, 2 of 2 slots") as later:
        choose([can, never], demand(), NOW)
    assert "never: can't run the snapshot: it is sim (f2)" in later.value.message


# --- trust ------------------------------------------------------------------------------------------------


def test_failures_in_a_row_lead_to_quarantines_that_double_up_to_a_limit() -> None:
    one = worker("w")
    for number in range(1, FAILURES_TO_QUARANTINE):
        one = after_failure(one, NOW)
        assert (one.failures, one.quarantined_until) == (number, 0.0), "it can be bad luck"
    lengths, now = [], NOW
    for _ in range(8):
        one = after_failure(one, now)
        lengths.append(one.quarantined_until - now)
        assert after_failure(one, now) is one, "what fails meanwhile began before"
        now = one.quarantined_until
    assert lengths[0] == FIRST_QUARANTINE_S and lengths[-1] == LAST_QUARANTINE_S
    for shorter, longer in itertools.pairwise(lengths):
        assert longer == min(2 * shorter, LAST_QUARANTINE_S)
    weeks = after_failure(replace(one, failures=5000), now)
    assert weeks.quarantined_until == now + LAST_QUARANTINE_S


def test_a_failure_before_the_limit_does_not_end_a_quarantine_and_a_success_does() -> None:
    ill = worker("w", failures=0, quarantined_until=NOW + 50)
    assert after_failure(ill, NOW).quarantined_until == NOW + 50
    well = after_success(worker("w", failures=7, quarantined_until=NOW + 50, used=1))
    assert (well.failures, well.quarantined_until, well.used) == (0, 0.0, 1)
    assert choose([after_success(ill)], demand(), NOW)[0].name == "w"
