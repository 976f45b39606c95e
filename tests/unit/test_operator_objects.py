"""What is read of pods, and the budget that goes along with a pool."""

from __future__ import annotations

from typing import Any

import pytest

from greenroom.operator import budgets
from greenroom.operator.objects import (
    FINALIZER,
    POOL_LABEL,
    POOL_UID_LABEL,
    Meta,
    Owner,
    PodObject,
    PoolObject,
    pool_key,
    to_pod,
)
from greenroom.operator.specs import WorkerPoolSpec

OWNER = Owner(uid="u", name="one", kind="WorkerPool")


def pod(labels: dict[str, str], *owners: Owner) -> PodObject:
    meta = Meta(name="p", uid="1", namespace="ns", labels=labels, ownerReferences=[*owners], finalizers=[FINALIZER])
    return PodObject(meta)


@pytest.mark.parametrize(
    ("labels", "owners", "key", "intact"),
    [
        ({POOL_LABEL: "one", POOL_UID_LABEL: "u"}, [OWNER], "one", True),
        ({POOL_LABEL: "two", POOL_UID_LABEL: "u"}, [OWNER], "one", False),
        ({POOL_UID_LABEL: "u"}, [OWNER], "one", False),
        ({POOL_LABEL: "one", POOL_UID_LABEL: "x"}, [OWNER], "one", False),
        ({POOL_LABEL: "one", POOL_UID_LABEL: "u"}, [], "one", False),
        ({POOL_LABEL: "two", POOL_UID_LABEL: "u"}, [], "two", False),
        ({}, [OWNER], "one", False),
    ],
)
def test_whose_a_pod_is(labels: dict[str, str], owners: list[Owner], key: str, intact: bool) -> None:
    found = pod(labels, *owners)
    assert pool_key(found) == ("ns", key)
    seen = to_pod(found, "u")
    assert seen.owner_uid == "u" and seen.intact is intact


@pytest.mark.parametrize(
    ("spec", "size", "bound"),
    [
        # The cluster counts from `spec.replicas`, so that has to be the pool's size.
        ({"replicas": 3}, 3, {"maxUnavailable": 1}),
        ({"replicas": 3, "min_replicas": 3, "max_replicas": 3}, 3, {"maxUnavailable": 1}),
        ({"replicas": 1, "min_replicas": 3}, 3, {"minAvailable": 2}),
        ({"replicas": 0, "min_replicas": 3}, 3, {"minAvailable": 2}),
        ({"replicas": 10, "max_replicas": 5}, 5, {"minAvailable": 4}),
        ({"min_replicas": 3}, 4, {"minAvailable": 3}),
        ({"max_unavailable": 9}, 4, {"minAvailable": 0}),
    ],
)
def test_how_many_workers_may_be_evicted(spec: dict[str, Any], size: int, bound: dict[str, int]) -> None:
    pool = PoolObject(Meta(name="greenroom", uid="u", namespace="ns"))
    made = budgets.make(pool, WorkerPoolSpec(**spec), size)
    assert {k: v for k, v in made["spec"].items() if k.endswith("vailable")} == bound
    assert made["metadata"]["name"] == "greenroom-workers", "the installation has one that is called greenroom"
