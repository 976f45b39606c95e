"""Where a request would wake an actor, and from what."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.explanation import Explanation, explain
from greenroom.core.records import (
    Actor,
    ActorState,
    OnCrash,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    WorkerState,
)
from greenroom.testing.contracts.store_world import snapshot, worker

GOLDEN = replace(snapshot("golden"), golden=True)
OWN = snapshot("own")
TEMPLATE = Template(
    namespace="default",
    name="t",
    uid="t",
    spec=TemplateSpec(image="x", worker_selector={"zone": "a"}),
    state=TemplateState.READY,
    created_at=0.0,
    state_since=0.0,
    image_digest="sha256:1",
)
ASLEEP = Actor(
    namespace="default",
    name="a",
    uid="u",
    template="t",
    state=ActorState.SUSPENDED,
    created_at=0.0,
    state_since=0.0,
    snapshot="own",
    last_worker="w2",
)
ZONE = {"zone": "a"}


def told(actor: Actor = ASLEEP, **more: Any) -> Explanation:
    given: dict[str, Any] = {"template": TEMPLATE, "own": OWN, "golden": GOLDEN, "workers": [], "lease": None}
    return explain(actor, now=100.0, operations=(), older_operations=0, **given | more)


def test_workers_best_first_and_why_not_the_others() -> None:
    found = told(
        workers=[
            worker("w1", labels=ZONE),
            worker("w2", labels=ZONE),
            worker("w3"),
            worker("w4", labels=ZONE, state=WorkerState.DRAINING),
            worker("w5", labels=ZONE, failures=3, quarantined_until=130.0),
            worker("w6", labels=ZONE, pool="other"),
        ]
    )
    assert found.snapshot is OWN and found.wakes_on == ("w2", "w1"), "where it was before comes first"
    assert {r.worker: r.why for r in found.rejected} == {
        "w3": "has no label zone=a",
        "w4": "is Draining",
        "w5": "in quarantine after 3 failures",
    }


def test_the_actors_own_selector_counts_too() -> None:
    workers = [worker("w1", labels=ZONE), worker("w2", labels={**ZONE, "gpu": "yes"})]
    assert told(replace(ASLEEP, worker_selector={"gpu": "yes"}), workers=workers).wakes_on == ("w2",)


def test_a_snapshot_that_is_on_one_worker_only() -> None:
    local = replace(OWN, state=SnapshotState.LOCAL, worker="w1")
    found = told(own=local, workers=[worker("w1", labels=ZONE), worker("w2", labels=ZONE)])
    assert found.wakes_on == ("w1",) and "is not uploaded yet" in found.rejected[0].why


@pytest.mark.parametrize(
    ("on_crash", "source"), [(OnCrash.HOLD, OWN), (OnCrash.RESTORE_LAST, OWN), (OnCrash.BOOT, GOLDEN)]
)
def test_what_a_crashed_one_would_wake_from(on_crash: OnCrash, source: object) -> None:
    template = replace(TEMPLATE, spec=replace(TEMPLATE.spec, on_crash=on_crash))
    crashed = replace(ASLEEP, state=ActorState.CRASHED)
    found = told(crashed, template=template, workers=[worker("w1", labels=ZONE)])
    assert found.snapshot is source and found.wakes_on == ("w1",)


def test_what_has_nothing_to_wake_from_wakes_nowhere() -> None:
    workers = [worker("w1", labels=ZONE)]
    assert told(replace(ASLEEP, snapshot=""), own=None, workers=workers).snapshot is GOLDEN
    for missing in (told(own=None, workers=workers), told(template=None, workers=workers)):
        assert missing.wakes_on == () and missing.rejected == ()


def test_an_actor_that_has_a_worker_needs_none() -> None:
    awake = replace(ASLEEP, state=ActorState.RUNNING, worker="w1")
    assert told(awake, workers=[worker("w1", labels=ZONE)]).wakes_on == ()
