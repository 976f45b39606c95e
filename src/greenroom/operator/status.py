"""A pool's status: counts and conditions beside the ledger. The same state makes the same status, so that nothing is
written while nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from greenroom.core.ledger import wire
from greenroom.core.ledger.records import Ledger, Pod, SlotState, Want
from greenroom.operator.objects import POOL_UID_LABEL

#: Of messages of the API server, which may be long.
MAX_MESSAGE_CHARS = 500


def make(
    ledger: Ledger,
    want: Want,
    shown: Iterable[Pod],
    before: Mapping[str, Any],
    *,
    generation: int,
    refusal: str,
    stale: bool,
    rebuilt: str,
    trouble: str = "",
    wall: float,
) -> dict[str, Any]:
    """The whole status.

    Args:
        before: the one that there is; times of conditions that have not changed are kept.
        refusal: what the API server last refused to create a pod with; "" when it does not.
        stale: the cache has heard nothing for long.
        rebuilt: how the ledger was lost and made anew, "" when it was not.
        trouble: why the control plane does not know of the pool's workers; "" when it does.
    """
    pods = {pod.uid: pod for pod in shown}
    ready = sum(slot.state is SlotState.LIVE and _ready(pods.get(slot.pod_uid)) for slot in ledger.slots)
    target = 0 if ledger.suspending or want.deleting else want.replicas
    ending = sum(not slot.active for slot in ledger.slots)
    named = sorted(slot.id for slot in ledger.slots if slot.reason == "Named")
    full = ready >= target and ledger.active == target
    stuck = next((f"; {pod.name}: {pod.stuck}" for pod in _by_name(pods) if pod.stuck and not pod.deleting), "")
    conditions = [
        _condition("Ready", full, "AllReady" if full else "NotReady", f"{ready} of {target} workers are ready{stuck}"),
        _condition(
            "Progressing", not full or ending > 0, "Working" if not full or ending else "AtRest", f"{ending} are ending"
        ),
        _condition("ReplicaFailure", bool(refusal), "FailedCreate" if refusal else "NoFailure", refusal),
        _condition("Suspending", ledger.suspending and bool(ledger.slots), "Suspend", ""),
        _condition("Suspended", ledger.suspending and not ledger.slots, "Suspend", ""),
        _condition("CacheStale", stale, "NothingHeard" if stale else "Follows", ""),
    ]
    if trouble or _find(before, "Registered"):
        conditions.append(_condition("Registered", not trouble, "Refused" if trouble else "Told", trouble))
    if rebuilt or _find(before, "LedgerRebuilt"):
        kept = _find(before, "LedgerRebuilt") or {}
        message = rebuilt or str(kept.get("message") or "")
        conditions.append(_condition("LedgerRebuilt", True, "LedgerLost", message))
    return {
        "observedGeneration": max(generation, int(before.get("observedGeneration") or 0)),
        "replicas": ledger.active,
        "readyReplicas": ready,
        "desiredReplicas": target,
        "endingReplicas": ending,
        "victims": named,
        "selector": f"{POOL_UID_LABEL}={ledger.pool_uid}",
        "conditions": [_timed(condition, before, wall) for condition in conditions],
        "ledger": wire.to_plain(ledger),
    }


def _by_name(pods: Mapping[str, Pod]) -> list[Pod]:
    return sorted(pods.values(), key=lambda pod: pod.name)


def _ready(pod: Pod | None) -> bool:
    return pod is not None and pod.ready and not pod.deleting


def _condition(kind: str, holds: bool, reason: str, message: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": "True" if holds else "False",
        "reason": reason,
        "message": message[:MAX_MESSAGE_CHARS],
    }


def _find(status: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    found = status.get("conditions")
    if not isinstance(found, list):
        return None
    return next((c for c in found if isinstance(c, dict) and c.get("type") == kind), None)


def _timed(condition: dict[str, str], before: Mapping[str, Any], wall: float) -> dict[str, str]:
    was = _find(before, condition["type"])
    if was is not None and was.get("status") == condition["status"] and was.get("lastTransitionTime"):
        return {**condition, "lastTransitionTime": str(was["lastTransitionTime"])}
    when = datetime.fromtimestamp(int(wall), tz=UTC).isoformat().replace("+00:00", "Z")
    return {**condition, "lastTransitionTime": when}
