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
#: Of a pool: the highest epoch that its ledger ever had, kept apart from the ledger for when that is lost.
EPOCH_ANNOTATION = f"{GROUP}/epoch"


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


class _PodStatus(msgspec.Struct, frozen=True):
    phase: str = ""
    conditions: list[_Condition] | None = None


class PodObject(msgspec.Struct, frozen=True):
    metadata: Meta
    status: _PodStatus = _PodStatus()


class PoolObject(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}


def pool_key(pod: PodObject) -> Key | None:
    """Which pool a pod is of, by its label or its owner."""
    meta = pod.metadata
    name = (meta.labels or {}).get(POOL_LABEL)
    if not name:
        name = next((o.name for o in meta.ownerReferences or () if o.kind == "WorkerPool"), "")
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
    pools = [owner.uid for owner in meta.ownerReferences or () if owner.kind == "WorkerPool"]
    owned = pool_uid in pools
    held = FINALIZER in (meta.finalizers or ())
    ours = owned or labelled == pool_uid or (held and not labelled and not pools)
    whole = labelled == pool_uid and owned and held and bool(labels.get(POOL_LABEL))
    ready = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())
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
    )
