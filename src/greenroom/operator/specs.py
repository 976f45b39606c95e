"""What the custom resources hold, as records: those of one machine, and what only a cluster has."""

from __future__ import annotations

import enum

from greenroom.core.assets import Asset
from greenroom.core.records import Record

#: Workers of one pool, so that its ledger fits in its status.
MAX_REPLICAS = 1000


class ScaleDown(enum.StrEnum):
    """Which workers go when there are too many: ``cheapest`` (not ready, then idle, then with the fewest actors), or
    only those that ``victims`` names, when somebody else decides."""

    CHEAPEST = "cheapest"
    NAMED = "named"


class WorkerPodSpec(Record, frozen=True, kw_only=True):
    """How a worker's pod is made. ``image``: "" is the installation's. ``storage_bytes``: everything that it writes
    is in one emptyDir of at most this size. ``cpus`` and ``memory_bytes``: requests and, of memory, limits."""

    image: str = ""
    cpus: float = 1.0
    memory_bytes: int = 2 << 30
    storage_bytes: int = 20 << 30
    service_account: str = "greenroom-worker"
    runtime_class: str = ""
    priority_class: str = ""
    node_selector: dict[str, str] = {}
    annotations: dict[str, str] = {}


class WorkerPoolSpec(Record, frozen=True, kw_only=True):
    """As `greenroom.core.records.PoolSpec`, and what only a cluster has.

    ``replicas`` counts between ``min_replicas`` and ``max_replicas``; absent, the operator's autoscaler decides by
    demand, and keeps ``min_free`` slots free. ``max_surge``: pods above ``replicas`` while doomed ones still end
    (absent: as many as ``replicas``). ``max_unavailable``: workers that may be evicted at a time (its
    PodDisruptionBudget). ``grace_s``: how long a worker may take to suspend its actors when it is to end.
    ``sandbox_config``: what its workers run actors with; "" is the one SandboxConfig of its backend, if there is one.
    ``managed_by``: a controller other than this one that looks after the pool, from its beginning to its end.
    """

    replicas: int | None = None
    slots: int = 4
    backend: str = "gvisor"
    min_replicas: int = 0
    max_replicas: int = MAX_REPLICAS
    min_free: int = 0
    suspend: bool = False
    scale_down: ScaleDown = ScaleDown.CHEAPEST
    victims: tuple[str, ...] = ()
    max_surge: int | None = None
    max_unavailable: int = 1
    grace_s: float = 120.0
    sandbox_config: str = ""
    managed_by: str = ""
    worker: WorkerPodSpec = WorkerPodSpec()


class SandboxConfigSpec(Record, frozen=True, kw_only=True):
    """What the workers of one backend run actors with: pinned by digest, so that a snapshot meets what made it."""

    backend: str
    assets: tuple[Asset, ...] = ()
    options: dict[str, str] = {}
