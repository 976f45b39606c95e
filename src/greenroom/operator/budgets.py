"""A PodDisruptionBudget for each pool, so that a drain of nodes evicts few of its workers at a time.

Source: Kubernetes documentation, "Specifying a Disruption Budget for your Application"; k8s.io/kubernetes,
pkg/controller/disruption. ``maxUnavailable`` is counted from the ``/scale`` of what owns the pods, so from
``spec.replicas`` as it is written. Where the pool has another size (``replicas`` is left out, or is not between
``minReplicas`` and ``maxReplicas``) that would let all of its workers go at once, or none ever; so of such a pool it is
said how many have to stay.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from greenroom.core.errors import AlreadyExists
from greenroom.operator import worker_pod
from greenroom.operator.client import Kube
from greenroom.operator.objects import POOL_LABEL, POOL_UID_LABEL, Key, Meta, PoolObject
from greenroom.operator.specs import WorkerPoolSpec

_log = structlog.get_logger("greenroom.operator")


class BudgetObject(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: dict[str, Any] = {}


def path(namespace: str = "") -> str:
    within = f"namespaces/{namespace}/" if namespace else ""
    return f"/apis/policy/v1/{within}poddisruptionbudgets"


def make(pool: PoolObject, spec: WorkerPoolSpec, desired: int) -> dict[str, Any]:
    meta = pool.metadata
    selector = {"matchLabels": {POOL_UID_LABEL: meta.uid}}
    most = spec.max_unavailable
    as_written = spec.replicas is not None and spec.min_replicas <= spec.replicas <= spec.max_replicas
    bound = {"maxUnavailable": most} if as_written else {"minAvailable": max(0, desired - most)}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": name_of(pool),
            "namespace": meta.namespace,
            "labels": {
                "app.kubernetes.io/name": "greenroom",
                "app.kubernetes.io/managed-by": "greenroom-operator",
                POOL_LABEL: meta.name,
                POOL_UID_LABEL: meta.uid,
            },
            "ownerReferences": worker_pod.owners(meta),
        },
        # A worker that is not ready serves nobody, so it may always go.
        "spec": {**bound, "selector": selector, "unhealthyPodEvictionPolicy": "AlwaysAllow"},
    }


async def ensure(kube: Kube, pool: PoolObject, spec: WorkerPoolSpec, desired: int, shown: BudgetObject | None) -> None:
    """Makes the pool's budget what it is to be; what somebody changed by hand is put right. One of that name that is
    not the pool's is left alone.

    Args:
        shown: what the cache has; when that is right, nothing is asked.
    """
    wanted = make(pool, spec, desired)
    if shown is not None and _is_ours(shown.metadata, pool) and _is_right(shown.metadata, shown.spec, wanted):
        return
    meta = pool.metadata
    place = f"{path(meta.namespace)}/{name_of(pool)}"
    there = await kube.get_raw(place)
    if there is None:
        try:
            await kube.send_raw("POST", path(meta.namespace), wanted)
        except AlreadyExists:
            _log.info("a budget came meanwhile", pool=meta.key)
        return
    found = msgspec.convert(there, BudgetObject)
    if not _is_ours(found.metadata, pool):
        _log.warning("the name of a pool's disruption budget is taken", pool=meta.key)
        return
    if not _is_right(found.metadata, found.spec, wanted):
        metadata = {**there["metadata"], **wanted["metadata"]}
        metadata["labels"] = {**(found.metadata.labels or {}), **wanted["metadata"]["labels"]}
        await kube.send_raw("PUT", place, {**there, "metadata": metadata, "spec": wanted["spec"]})


def name_of(pool: PoolObject) -> str:
    """Not the pool's own name: an installation has budgets of its own, which a pool may be called like."""
    return f"{pool.metadata.name}-workers"


def pool_of(budget: BudgetObject) -> Key | None:
    """By its owner: labels are edited by hand."""
    name = next((o.name for o in budget.metadata.ownerReferences or () if o.kind == "WorkerPool"), "")
    name = name or (budget.metadata.labels or {}).get(POOL_LABEL, "")
    return (budget.metadata.namespace, name) if name else None


def _is_ours(found: Meta, pool: PoolObject) -> bool:
    """Its owner says so or, when somebody has taken that away, its label."""
    uid = pool.metadata.uid
    owners = [owner.uid for owner in found.ownerReferences or ()]
    return uid in owners or (not owners and (found.labels or {}).get(POOL_UID_LABEL) == uid)


def _is_right(found: Meta, spec: dict[str, Any], wanted: dict[str, Any]) -> bool:
    labels = found.labels or {}
    owned = [owner.uid for owner in found.ownerReferences or ()] == [wanted["metadata"]["ownerReferences"][0]["uid"]]
    labelled = all(labels.get(name) == value for name, value in wanted["metadata"]["labels"].items())
    return owned and labelled and spec == wanted["spec"]
