"""What an explanation says in words, for every state that an actor may be in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.cli import story
from greenroom.core.explanation import Explanation
from greenroom.core.records import (
    Actor,
    ActorState,
    Failure,
    Lease,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Rejection,
    SnapshotScope,
    SnapshotState,
    TemplateSpec,
    TemplateState,
)
from greenroom.testing.contracts.store_world import snapshot, template

NOW = 1_000_000.0
TEMPLATE = template("t", spec=TemplateSpec(image="x", idle_timeout_s=0.0, evictable=False))
OWN = snapshot("own", created_at=NOW - 600, worker="w1")
ASLEEP = Actor(
    namespace="ns",
    name="a",
    uid="u",
    template="t",
    state=ActorState.SUSPENDED,
    created_at=NOW - 7200,
    state_since=NOW - 60,
    snapshot="own",
    wakes=3,
    durable_at=NOW - 600,
)


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def told(actor: Actor = ASLEEP, **more: Any) -> Explanation:
    given: dict[str, Any] = {"template": TEMPLATE, "snapshot": OWN, "wakes_on": ("w1", "w2")}
    return Explanation(actor=actor, read_at=NOW, **given | more)


def said(about: str, actor: Actor = ASLEEP, **more: Any) -> list[str]:
    return [text for what, text in story.summary(told(actor, **more)) if what == about]


def operation(kind: OperationKind, **fields: Any) -> Operation:
    made: dict[str, Any] = {"namespace": "ns", "name": "a", "uid": "u", "created_at": NOW - 50, "updated_at": NOW - 40}
    made |= {"id": "op", "deadline_at": NOW + 250, "phase": "fetch", "worker": "w1", "owner": "gr-1/7c41"}
    return Operation(kind=kind, **made | fields)


def busy(state: ActorState) -> Actor:
    return replace(ASLEEP, state=state, operation="op", worker="w1")


# --- now --------------------------------------------------------------------------------------------------------


def test_asleep() -> None:
    assert said("now") == ["asleep since 1970-01-12 13:45:40 (60s ago)"]
    assert said("now", replace(ASLEEP, wakes=0, reason="Created")) == [
        "asleep since 1970-01-12 13:45:40 (60s ago), never awake yet"
    ]
    assert said("now", replace(ASLEEP, reason="NO_CAPACITY", message="no free slot"))[1] == "NO_CAPACITY: no free slot"
    assert said("held by") == [] and said("next") == []


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (ActorState.RUNNING, "awake on w1 since"),
        (ActorState.PAUSED, "frozen in the memory of w1 since 1970-01-12 13:45:40 (60s ago); a request wakes it there"),
        (ActorState.CRASHED, "crashed at 1970-01-12 13:45:40"),
    ],
)
def test_at_rest(state: ActorState, says: str) -> None:
    assert said("now", replace(ASLEEP, state=state, worker="w1"))[0].startswith(says)


@pytest.mark.parametrize("state", [ActorState.RESUMING, ActorState.SUSPENDING, ActorState.PAUSING, ActorState.DELETING])
def test_under_way(state: ActorState) -> None:
    op = operation(OperationKind.RESUME, done_bytes=3 << 20, total_bytes=12 << 20)
    lines = said("now", busy(state), operations=(op,), wakes_on=())
    assert lines == [
        f"{state.lower()} since 1970-01-12 13:45:40 (60s ago)",
        "operation op: phase fetch, on w1, 25% of 12.0 MiB, last moved 40s ago, deadline in 4m",
    ]
    assert said("wakes", busy(state)) == []
    assert said("next", busy(state)) == ["greenroom wait operation op"] + (
        [] if state is ActorState.DELETING else ["greenroom cancel operation op"]
    )


def test_an_operation_that_is_late_or_given_up_or_unknown() -> None:
    late = operation(OperationKind.RESUME, deadline_at=NOW - 7, cancel_requested=True)
    lines = said("now", busy(ActorState.RESUMING), operations=(late,))
    assert lines[1].endswith("past its deadline by 7s")
    assert lines[2] == "somebody has asked to give it up; it is being backed out"
    assert said("now", busy(ActorState.RESUMING))[1] == "operation op has no record here"


def test_who_holds_it() -> None:
    lease = Lease(uid="u", owner="gr-1/7c41", operation="op", generation=3, expires_at=NOW + 20)
    actor = busy(ActorState.RESUMING)
    assert said("held by", actor, lease=lease) == [
        "gr-1/7c41 until 1970-01-12 13:47:00 (in 20s), and longer if it renews; other replicas keep off until then"
    ]
    (over,) = said("held by", actor, lease=replace(lease, expires_at=NOW - 3))
    assert over.startswith("gr-1/7c41 until 3s ago, and no more: the next replica")
    (let_go,) = said("held by", actor)
    assert let_go.startswith("nobody: whoever drove the operation has let go")


# --- waking -----------------------------------------------------------------------------------------------------


def test_where_it_wakes() -> None:
    assert said("wakes") == ["a request wakes it on w1, or on w2"]
    no = (Rejection(worker="w3", why="is Draining"),)
    assert said("wakes", wakes_on=("w1",), rejected=no) == ["a request wakes it on w1", "not on w3: is Draining"]
    assert said("wakes", wakes_on=(), rejected=no) == [
        "nowhere now: a request waits for a place, and is answered 503 when there is none in time",
        "not on w3: is Draining",
    ]
    assert said("next", wakes_on=(), rejected=no) == ["greenroom get workers"]
    (never, _) = said("wakes", wakes_on=(), rejected=no, no_worker_fits=True)
    assert never == "nowhere: no worker of pool default could ever take it; a request is refused at once"
    assert said("wakes", wakes_on=())[0].startswith("nowhere: pool default has no workers")


def test_what_keeps_it_from_waking_anywhere() -> None:
    nothing: dict[str, Any] = {"snapshot": None, "wakes_on": ()}
    assert said("wakes", template=None, **nothing) == ["nowhere: its template t is gone; apply it again"]
    assert said("policy", template=None, **nothing) == []
    assert said("wakes", **nothing) == ["nowhere: the record of its snapshot own is missing; delete it"]
    new = replace(ASLEEP, snapshot="", wakes=0, durable_at=None)
    preparing = replace(TEMPLATE, state=TemplateState.PREPARING, golden_snapshot="")
    assert said("wakes", new, template=preparing, **nothing) == ["nowhere yet: its template t is Preparing"]
    failed = replace(preparing, state=TemplateState.FAILED, message="no such image")
    assert said("wakes", new, template=failed, **nothing) == ["nowhere yet: its template t is Failed: no such image"]
    assert said("next", new, template=failed, **nothing) == ["greenroom describe template t -n ns"]
    condemned = replace(OWN, state=SnapshotState.CONDEMNED)
    assert said("wakes", snapshot=condemned) == ["nowhere: its snapshot own is being deleted"]


@pytest.mark.parametrize(
    ("on_crash", "first", "next_"),
    [
        (OnCrash.HOLD, "resume wakes it on w1, or on w2", ["greenroom resume a -n ns"]),
        (OnCrash.RESTORE_LAST, "a request wakes it on w1, or on w2", []),
        (OnCrash.BOOT, "a request wakes it on w1, or on w2", []),
    ],
)
def test_after_a_crash(on_crash: OnCrash, first: str, next_: list[str]) -> None:
    crashed = replace(
        ASLEEP, state=ActorState.CRASHED, reason="WorkerLost", message="w9 is gone", unsaved_since=NOW - 300
    )
    policy = replace(TEMPLATE, spec=replace(TEMPLATE.spec, on_crash=on_crash))
    assert said("now", crashed) == [
        "crashed at 1970-01-12 13:45:40 (60s ago)",
        "what it did after 1970-01-12 13:41:40 (5m ago) is lost",
        "WorkerLost: w9 is gone",
    ]
    assert said("wakes", crashed, template=policy)[0] == first
    nowhere = said("wakes", crashed, template=policy, wakes_on=(), rejected=(Rejection(worker="w1", why="is full"),))
    held = "a request does not wake it: it is answered 503, because onCrash is hold"
    assert (nowhere[:2] == ["nowhere now", held]) == (on_crash is OnCrash.HOLD)
    assert (held in said("wakes", crashed, template=policy)) == (on_crash is OnCrash.HOLD)
    assert said("next", crashed, template=policy) == next_


# --- what is kept -----------------------------------------------------------------------------------------------


def test_where_its_snapshot_is() -> None:
    of = "own of 1970-01-12 13:36:40 (10m ago), 0 B, memory and files"
    assert said("snapshot") == [f"{of}, in the snapshot store, made on w1"]
    local = replace(OWN, state=SnapshotState.LOCAL)
    assert said("snapshot", snapshot=local) == [f"{of}, only on the disk of w1 until it is uploaded"]
    corrupt = replace(OWN, state=SnapshotState.CORRUPT, scope=SnapshotScope.DATA)
    assert said("snapshot", snapshot=corrupt)[0].endswith(
        "files only, corrupt: the wake-up goes back to the one before, and says so"
    )
    golden = snapshot("golden", golden=True)
    assert said("snapshot", replace(ASLEEP, snapshot=""), snapshot=golden) == [
        "its template's, golden: it has none of its own yet, so it begins anew"
    ]
    crashed = replace(ASLEEP, state=ActorState.CRASHED)
    assert said("snapshot", crashed, snapshot=golden) == ["its template's, golden: onCrash is boot, so it begins anew"]


def test_what_survives_the_loss_of_every_worker() -> None:
    whole = ["if every worker died now, nothing of it would be lost"]
    back = ["if every worker died now, it would go back to how it was at 1970-01-12 13:36:40 (10m ago)"]
    anew = ["if every worker died now, it would begin anew, as it was created"]
    awake = replace(ASLEEP, state=ActorState.RUNNING, worker="w1")
    golden = snapshot("golden", golden=True)
    assert said("survives") == whole
    assert said("survives", replace(ASLEEP, snapshot="", wakes=0, durable_at=None), snapshot=golden) == whole
    assert said("survives", awake) == back
    assert said("survives", snapshot=replace(OWN, state=SnapshotState.LOCAL)) == back
    assert said("survives", replace(awake, durable_at=None)) == anew
    assert said("survives", busy(ActorState.DELETING)) == []


def test_its_policy() -> None:
    assert said("policy", replace(ASLEEP, worker_selector={"gpu": "a100"})) == [
        "onCrash hold, durability acked-after-upload, not suspended when idle, not evictable, pool default, "
        "workers with gpu=a100"
    ]


# --- what happened ----------------------------------------------------------------------------------------------


def test_operations_in_words() -> None:
    ended: dict[str, Any] = {"state": OperationState.DONE, "finished_at": NOW - 38}
    failed = ended | {"state": OperationState.FAILED}
    failed["error"] = Failure(code="UNAVAILABLE", reason="STALLED", message="nothing moved")
    tried: dict[str, Any] = {"attempts": 2, "takeovers": 1, "rejected": (Rejection(worker="w2", why="is full"),)}
    tried["phases"] = (PhaseTime(name="bind", seconds=0.0021), PhaseTime(name="fetch", seconds=11.5))
    asleep = {"from_state": ActorState.SUSPENDED}
    back = {**asleep, "to_state": ActorState.SUSPENDED}
    given_up: dict[str, Any] = {"cause": "idle", "cancel_requested": True, "takeovers": 2}
    created: dict[str, Any] = {"worker": "", "owner": "", "state": OperationState.DONE, "finished_at": NOW - 50}
    operations = (
        operation(OperationKind.CREATE, to_state=ActorState.SUSPENDED, **created),
        operation(OperationKind.RESUME, cause="request", **back, **tried, **failed),
        operation(OperationKind.SUSPEND, from_state=ActorState.RUNNING, **given_up),
        operation(OperationKind.DELETE, **asleep, **ended),
        operation(OperationKind.DELETE, **asleep, **failed),
    )
    lines = [lines for _, lines in story.history(told(operations=operations))]
    assert lines == [
        ["Create   Suspended", "asked by command or API"],
        [
            "Resume   Suspended -> Suspended, FAILED on w1 in 12.0 s",
            "STALLED: nothing moved",
            "a request asked, decided by gr-1/7c41, 2 workers tried, taken over once",
            "not on w2: is full",
            "ms: bind 2.1, fetch 11500.0",
        ],
        [
            "Suspend  Running -> ... on w1 under way for 50s",
            "it was idle, decided by gr-1/7c41, taken over 2 times, cancelled by command or API, phase fetch",
        ],
        ["Delete   Suspended -> gone on w1 in 12.0 s", "asked by command or API, decided by gr-1/7c41"],
        [
            "Delete   Suspended -> not done, FAILED on w1 in 12.0 s",
            "STALLED: nothing moved",
            "asked by command or API, decided by gr-1/7c41",
        ],
    ]


def test_what_each_crash_has_cost() -> None:
    def crash(at: float, reason: str = "WorkerLost") -> Operation:
        return operation(
            OperationKind.CRASH, from_state=ActorState.RUNNING, to_state=ActorState.CRASHED, owner="",
            created_at=at, finished_at=at, state=OperationState.DONE,
            error=Failure(code="UNAVAILABLE", reason=reason, message="m"),
        )  # fmt: skip

    def resume(at: float, before: ActorState = ActorState.SUSPENDED) -> Operation:
        return operation(
            OperationKind.RESUME, from_state=before, to_state=ActorState.RUNNING, state=OperationState.DONE,
            created_at=at - 1, finished_at=at,
        )  # fmt: skip

    def lost(*operations: Operation, actor: Actor = ASLEEP) -> list[str]:
        return [
            line
            for _, lines in story.history(told(actor, operations=operations))
            for line in lines
            if line.endswith("lost")
        ]

    unknown = "what it had not saved was lost"
    assert lost(crash(NOW - 10)) == [unknown], "it ran since a wake-up that is not shown"
    assert lost(resume(NOW - 600), crash(NOW - 500)) == ["what it did after 1970-01-12 13:36:40 was lost"]
    thawed = resume(NOW - 550, ActorState.PAUSED)
    assert lost(resume(NOW - 600), thawed, crash(NOW - 500)) == ["what it did after 1970-01-12 13:36:40 was lost"]
    assert lost(resume(NOW - 600), crash(NOW - 500, "SnapshotLost")) == [unknown]
    crashed = replace(ASLEEP, state=ActorState.CRASHED, unsaved_since=NOW - 300)
    assert lost(resume(NOW - 600), crash(NOW - 500), crash(NOW - 10), actor=crashed) == [
        "what it did after 1970-01-12 13:36:40 was lost",
        "what it did after 1970-01-12 13:41:40 was lost",
    ]
