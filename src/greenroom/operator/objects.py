"""Objects of the API, as far as they are read: a few fields of each, which is what makes an event cheap."""

from __future__ import annotations

from typing import Any

import msgspec

from greenroom.core.ledger.records import Pod

GROUP = "greenroom.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
#: Labels of worker pods. The pool's uid is what counts; the rest is for people.
POOL_LABEL = f"{GROUP}/pool"
POOL_UID_LABEL = f"{GROUP}/pool-uid"
EPOCH_LABEL = f"{GROUP}/epoch"
ORDINAL_LABEL = f"{GROUP}/ordinal"
#: Keeps a pod's name occupied (see `greenroom.core.ledger`), and a pool until its workers have ended.
FINALIZER = f"{GROUP}/worker"
POOL_FINALIZER = f"{GROUP}/workers"
#: Keeps an ActorTemplate until the control plane has deleted its template.
TEMPLATE_FINALIZER = f"{GROUP}/template"
#: Of a pool: the highest epoch that its ledger ever had, kept apart from the ledger for when that is lost.
EPOCH_ANNOTATION = f"{GROUP}/epoch"
#: Of a pool without ``replicas``: what the autoscaler has decided (`greenroom.operator.scaled`).
SCALED_ANNOTATION = f"{GROUP}/scaled"


class Owner(msgspec.Struct, frozen=True, gc=False):
    uid: str = ""
    name: str = ""
    kind: str = ""


class Meta(msgspec.Struct, frozen=True):
    name: str
    uid: str = ""
    namespace: str = ""
    resourceVersion: str = ""
    generation: int = 0
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    finalizers: list[str] | None = None
    ownerReferences: list[Owner] | None = None
    deletionTimestamp: str | None = None

    @property
    def key(self) -> Key:
        return self.namespace, self.name


#: Namespace and name.
Key = tuple[str, str]


class Named(msgspec.Struct, frozen=True):
    """An object of which only the metadata matter."""

    metadata: Meta


class _Condition(msgspec.Struct, frozen=True, gc=False):
    type: str
    status: str
    reason: str | None = None
    message: str | None = None


class _Waiting(msgspec.Struct, frozen=True, gc=False):
    reason: str = ""
    message: str = ""


class _State(msgspec.Struct, frozen=True, gc=False):
    waiting: _Waiting | None = None


class _Container(msgspec.Struct, frozen=True):
    state: _State | None = None


class _PodStatus(msgspec.Struct, frozen=True):
    phase: str = ""
    conditions: list[_Condition] | None = None
    containerStatuses: list[_Container] | None = None
    initContainerStatuses: list[_Container] | None = None


class PodObject(msgspec.Struct, frozen=True):
    metadata: Meta
    status: _PodStatus = _PodStatus()


class PoolObject(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}


class TemplateObject(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}


def pool_key(pod: PodObject) -> Key | None:
    """Which pool a pod is of, by its owner or, when somebody has taken that away, its label."""
    meta = pod.metadata
    name = next((o.name for o in meta.ownerReferences or () if o.kind == "WorkerPool"), "")
    name = name or (meta.labels or {}).get(POOL_LABEL, "")
    return (meta.namespace, name) if name else None


def uids_of(pod: PodObject) -> set[str]:
    """All pools that its label or its owners name."""
    return {owner.uid for owner in pod.metadata.ownerReferences or ()} | {
        (pod.metadata.labels or {}).get(POOL_UID_LABEL, "")
    }


def to_pod(pod: PodObject, pool_uid: str, actors: int | None = None) -> Pod:
    """As the ledger sees it, on behalf of that pool. It is the pool's when its label or an owner says so, or when
    neither names another and it has our finalizer: people edit any of them. (Its name says so too: `naming.place`.)"""
    meta = pod.metadata
    labels = meta.labels or {}
    labelled = labels.get(POOL_UID_LABEL, "")
    pools = {owner.uid: owner.name for owner in meta.ownerReferences or () if owner.kind == "WorkerPool"}
    owned = pool_uid in pools
    held = FINALIZER in (meta.finalizers or ())
    ours = owned or labelled == pool_uid or (held and not labelled and not pools)
    whole = labelled == pool_uid and owned and held and labels.get(POOL_LABEL) == pools[pool_uid]
    conditions = pod.status.conditions or ()
    ready = any(c.type == "Ready" and c.status == "True" for c in conditions)
    return Pod(
        name=meta.name,
        uid=meta.uid,
        owner_uid=pool_uid if ours else "",
        ready=ready,
        ended=pod.status.phase if pod.status.phase in ("Failed", "Succeeded") else "",
        deleting=meta.deletionTimestamp is not None,
        held=held,
        intact=whole,
        actors=actors,
        stuck=_stuck(pod.status),
    )


#: Why a container does not begin, when that is nothing that passes by itself within seconds.
_STUCK = {
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
}


def _stuck(status: _PodStatus) -> str:
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.reason == "Unschedulable":
            return f"Unschedulable: {condition.message or ''}"
    for container in (*(status.initContainerStatuses or ()), *(status.containerStatuses or ())):
        waiting = container.state.waiting if container.state is not None else None
        if waiting is not None and waiting.reason in _STUCK:
            return f"{waiting.reason}: {waiting.message}" if waiting.message else waiting.reason
    return ""
