"""The records that the control plane keeps: what is stored, shown and sent.

All are immutable; a change makes a new record. Times are seconds since the epoch (float, UTC), durations and
sizes carry their unit in the name. ``version`` is the row version: 0 before the record is stored, then every
write adds one and is conditional on the version it was decided from. ``pk`` is what a record is stored under.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all records: immutable, keyword-only, compact as JSON; unknown JSON fields are ignored, so that a
    program one version older can read what a newer one wrote."""


class Key(NamedTuple):
    """Who an actor or template is to people. The uid tells namesakes over time apart."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


# --- actors -----------------------------------------------------------------------------------------------


class ActorState(enum.StrEnum):
    SUSPENDED = "Suspended"
    RESUMING = "Resuming"
    RUNNING = "Running"
    SUSPENDING = "Suspending"
    PAUSING = "Pausing"
    PAUSED = "Paused"
    CRASHED = "Crashed"
    DELETING = "Deleting"


class Endpoint(Record, frozen=True, kw_only=True):
    """Where a running actor takes connections; enough for a router on the same machine to connect by itself.

    Either ``path`` (unix stream socket), or ``host`` and ``port`` (TCP). With ``netns`` (path of a network
    namespace) the socket is to be made inside that namespace, and with ``device`` bound to that interface:
    several actors share one guest address and are told apart by the interface, whose name is never used twice.
    """

    host: str = ""
    port: int = 0
    netns: str = ""
    device: str = ""
    path: str = ""


class Actor(Record, frozen=True, kw_only=True):
    """A stateful process that may sleep.

    ``generation`` is the fencing token: it grows with every lease that is taken on the actor and is never
    reused. ``snapshot`` is the latest verified snapshot ("" means the template's golden one), and
    ``previous_snapshot`` the one before, kept as the way back. ``unsaved_since`` is set while the actor is
    CRASHED: what it did after that time is lost. ``durable_at``: its state of that time is in the snapshot store, so
    that the loss of any worker costs at most what came after; None while only the template's snapshot is.
    ``worker_selector``: labels that a worker must have beside those that the template asks for. ``sandbox``: the handle
    of the sandbox that it is bound to, never used twice, and ``sandbox_seq`` its number (`greenroom.core.gc`).
    """

    namespace: str
    name: str
    uid: str
    template: str
    state: ActorState
    created_at: float
    state_since: float
    reason: str = ""
    message: str = ""
    generation: int = 0
    version: int = 0
    worker: str = ""
    sandbox: str = ""
    sandbox_seq: int = 0
    last_worker: str = ""
    operation: str = ""
    endpoint: Endpoint | None = None
    snapshot: str = ""
    previous_snapshot: str = ""
    wakes: int = 0
    resumed_at: float | None = None
    suspended_at: float | None = None
    unsaved_since: float | None = None
    durable_at: float | None = None
    labels: dict[str, str] = {}
    worker_selector: dict[str, str] = {}
    #: The hidden actor that a template boots once to make its golden snapshot.
    golden: bool = False

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)

    @property
    def pk(self) -> str:
        return f"{self.namespace}/{self.name}"


# --- templates --------------------------------------------------------------------------------------------


class TemplateState(enum.StrEnum):
    PENDING = "Pending"
    PREPARING = "Preparing"
    READY = "Ready"
    FAILED = "Failed"


class OnCrash(enum.StrEnum):
    """What a request for a crashed actor does: ``hold`` answers with an error until somebody resumes it on
    purpose (nothing is ever silently reset); ``restore-last`` wakes it from its last good snapshot; ``boot`` begins
    anew, as an actor that was just created (what it had saved stays as its previous snapshot until it is suspended
    the second time)."""

    HOLD = "hold"
    RESTORE_LAST = "restore-last"
    BOOT = "boot"


class Durability(enum.StrEnum):
    """When a suspend is answered: ``local`` as soon as the snapshot is synced on the worker's own disk, and it is
    uploaded afterwards (until then the loss of the worker loses it: see ``Actor.durable_at``);
    ``acked-after-upload`` when the snapshot store has it."""

    LOCAL = "local"
    ACKED_AFTER_UPLOAD = "acked-after-upload"


class Retention(Record, frozen=True, kw_only=True):
    """Which snapshots of an actor are kept: the ``keep_last`` newest (2 to 1000; two are what an actor wakes from and
    its way back) and those younger than ``keep_for_s`` seconds (0 to ten years). What an actor needs and what has a tag
    is kept in any case; deleting the actor takes all of it."""

    keep_last: int = 2
    keep_for_s: float = 0.0


class Probe(Record, frozen=True, kw_only=True):
    """Readiness: HTTP GET ``path`` on ``port`` answers 200 to 399. ``port`` 0 means the template's first port."""

    path: str = "/"
    port: int = 0
    timeout_s: float = 60.0


class Resources(Record, frozen=True, kw_only=True):
    """Limits of one actor, enforced by cgroups where the backend can."""

    memory_bytes: int = 512 << 20
    cpus: float = 1.0
    pids: int = 512


#: As the ports of a template: those that the image exposes, the lowest first, or 8080 if it exposes none.
IMAGE_PORTS = (0,)


class TemplateSpec(Record, frozen=True, kw_only=True):
    """What actors of one kind are made from. Immutable once applied.

    ``command`` replaces the image's entrypoint and ``args`` its arguments (as in Kubernetes); empty means the
    image's own. ``env`` is added to the image's. ``workdir``, ``user`` and ``stop_signal`` replace the
    image's; empty means its own. ``ports``: the first is where requests go; none means that it takes no requests.
    ``idle_timeout_s``: an actor without an open request for this long is suspended; 0 means never. ``evictable``:
    may be suspended, while it is idle, to make room for another actor. ``worker_selector``: labels that a worker
    must have.
    """

    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = ""
    user: str = ""
    ports: tuple[int, ...] = IMAGE_PORTS
    readyz: Probe = Probe()
    resources: Resources = Resources()
    pool: str = "default"
    idle_timeout_s: float = 300.0
    on_crash: OnCrash = OnCrash.HOLD
    durability: Durability = Durability.ACKED_AFTER_UPLOAD
    retention: Retention = Retention()
    evictable: bool = True
    worker_selector: dict[str, str] = {}
    stop_signal: str = ""


class LayerProgress(Record, frozen=True, kw_only=True):
    """Bytes of one image layer: ``done`` of ``total`` (0 when the registry does not say)."""

    digest: str
    done_bytes: int = 0
    total_bytes: int = 0
    phase: str = "download"


class Template(Record, frozen=True, kw_only=True):
    """``phase`` and ``layers``: how far its preparation is, while it is PREPARING (``resolve``, ``download``,
    ``unpack``, ``boot``, ``snapshot``)."""

    namespace: str
    name: str
    uid: str
    spec: TemplateSpec
    state: TemplateState
    created_at: float
    state_since: float
    reason: str = ""
    message: str = ""
    version: int = 0
    image_digest: str = ""
    golden_snapshot: str = ""
    operation: str = ""
    #: Fencing token of its preparation: grows with every process that takes that up.
    generation: int = 0
    phase: str = ""
    layers: tuple[LayerProgress, ...] = ()

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)

    @property
    def pk(self) -> str:
        return f"{self.namespace}/{self.name}"


# --- pools and workers ------------------------------------------------------------------------------------


class PoolSpec(Record, frozen=True, kw_only=True):
    """``replicas`` workers (0 to 64 on one machine) of ``slots`` actors each (1 to 10 000), of one backend."""

    replicas: int = 2
    slots: int = 4
    backend: str = "gvisor"


class Pool(Record, frozen=True, kw_only=True):
    """A group of like workers. Pools are named without a namespace on one machine."""

    name: str
    uid: str
    spec: PoolSpec
    created_at: float
    version: int = 0

    @property
    def pk(self) -> str:
        return self.name


class WorkerState(enum.StrEnum):
    ACTIVE = "Active"
    DRAINING = "Draining"  # is emptied, and keeps its disk
    RETIRING = "Retiring"  # is emptied, then wiped and forgotten
    STALLED = "Stalled"  # nobody hears it: what is recorded of it stays as it is
    GONE = "Gone"  # will not come back: nothing of it counts; a tombstone, so that it is told to wipe itself if it does

    @classmethod
    def _missing_(cls, value: object) -> WorkerState | None:
        return cls.STALLED if value == "Disconnected" else None  # what it was called in records that are older


class Worker(Record, frozen=True, kw_only=True):
    """One agent process. ``used`` of ``capacity`` slots are taken; a slot is taken and freed only in the same
    transaction that binds and unbinds an actor, so it can't leak. ``fingerprint`` is what a memory snapshot is
    bound to: a snapshot is only ever restored on a worker of the same fingerprint. ``last_seen``: when any replica of
    the control plane last heard it. ``images``: digests of images that are there already (a hint). ``failures``: how
    many wake-ups in a row have failed there for a reason that is the worker's; until ``quarantined_until`` it gets
    one only when no other worker fits. ``cordon``: why it gets none at all and is emptied ("": it is not): ``asked``,
    ``leaving`` (its agent is to end), ``retiring`` (then it is wiped and forgotten). ``image_bytes``: what its images
    take, of which ``image_over_bytes`` are more than it was told to keep and in use. ``incarnation`` names its state
    disk, ``claim`` and ``epoch`` are of its last registration (`greenroom.core.gc`); ``distrust``: why what is recorded
    of it is not acted on until somebody has looked, "" when it is."""

    name: str
    pool: str
    backend: str
    fingerprint: str
    capacity: int
    used: int = 0
    state: WorkerState = WorkerState.ACTIVE
    message: str = ""
    boot_id: str = ""
    memory_snapshots: bool = True
    registered_at: float = 0.0
    last_seen: float = 0.0
    labels: dict[str, str] = {}
    images: tuple[str, ...] = ()
    failures: int = 0
    quarantined_until: float = 0.0
    cordon: str = ""
    image_bytes: int = 0
    image_over_bytes: int = 0
    incarnation: str = ""
    claim: str = ""
    epoch: int = 0
    distrust: str = ""
    seq_base: int = 0
    version: int = 0

    @property
    def seq(self) -> int:
        """The number of what is placed there by this record (`greenroom.core.gc`)."""
        return self.seq_base + self.version

    @property
    def pk(self) -> str:
        return self.name


# --- images on workers ------------------------------------------------------------------------------------


class CachedImage(Record, frozen=True, kw_only=True):
    """An image that a worker has, whole or in part.

    ``references``: names that led to it. ``size_bytes`` are those of the compressed layers as they are fetched,
    ``disk_bytes`` those that removing it would free now (its tree, and the blobs that no other image has). ``users``:
    what runs from it, as ``namespace/name on worker``. ``ready``: unpacked; else it is being prepared, or what is here
    of it waits for the next attempt. What is ``pinned`` or has users is never evicted."""

    digest: str
    references: tuple[str, ...] = ()
    ready: bool = True
    size_bytes: int = 0
    disk_bytes: int = 0
    last_used_at: float = 0.0
    users: tuple[str, ...] = ()
    pinned: bool = False


class ImageCache(Record, frozen=True, kw_only=True):
    """The image store of one or more workers of a machine. ``id`` tells which workers share one. ``high_bytes`` 0: it
    may grow as long as there is room; else what has been unused longest is evicted down to ``low_bytes`` when there is
    more. ``over_bytes``: more than ``high_bytes``, because what is left is in use."""

    id: str
    workers: tuple[str, ...] = ()
    used_bytes: int = 0
    free_bytes: int = 0
    high_bytes: int = 0
    low_bytes: int = 0
    over_bytes: int = 0
    images: tuple[CachedImage, ...] = ()


class ImageDetail(Record, frozen=True, kw_only=True):
    """What an image says about how to run it, and what it is made of (digests of its layers, the lowest first)."""

    image: CachedImage
    layers: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    exposed_ports: tuple[int, ...] = ()
    stop_signal: str = ""


class PullProgress(Record, frozen=True, kw_only=True):
    """How far a worker is with an image. The last one is ``done``, with digest and size, or has an ``error``."""

    worker: str
    phase: str = ""
    layers: tuple[LayerProgress, ...] = ()
    done: bool = False
    digest: str = ""
    size_bytes: int = 0
    error: Failure | None = None


class Evicted(Record, frozen=True, kw_only=True):
    """What an eviction removed, or would remove; and what it could not, with the reason: ``digest: why``."""

    removed: tuple[CachedImage, ...] = ()
    kept: tuple[str, ...] = ()
    freed_bytes: int = 0
    over_bytes: int = 0


# --- the control plane itself -----------------------------------------------------------------------------


class Replica(Record, frozen=True, kw_only=True):
    """One process of the control plane, among those that share a store. ``incarnation`` is new with each process of
    the name. ``link``: where agents connect to it; ``place``: where it is (`greenroom.sandbox.dial.place`), "" when it
    has not said so. It counts as gone ``seen_at`` plus a lease's life later.
    ``worker_return_s``: how long it gives a worker that is away. ``uses``: actors (uid) that were in use through it
    since it last said so, and when (epoch seconds), so that no other replica takes them for idle. By pool: ``waiting``,
    how many wake-ups wait for a slot there, and ``wakes_per_s``, how many came to a good end there lately."""

    name: str
    incarnation: str
    link: str = ""
    place: str = ""
    started_at: float = 0.0
    seen_at: float = 0.0
    worker_return_s: float = 0.0
    uses: dict[str, float] = {}
    waiting: dict[str, int] = {}
    wakes_per_s: dict[str, float] = {}
    version: int = 0

    @property
    def pk(self) -> str:
        return self.name


# --- snapshots --------------------------------------------------------------------------------------------


class SnapshotState(enum.StrEnum):
    LOCAL = "Local"  # on the disk of the worker that made it, and nowhere else yet
    PRESENT = "Present"
    CORRUPT = "Corrupt"
    CONDEMNED = "Condemned"


class SnapshotScope(enum.StrEnum):
    MEMORY = "memory"  # memory and file system: the actor goes on exactly where it was
    DATA = "data"  # files only: the actor's process starts anew over them


class FileDigest(Record, frozen=True, kw_only=True):
    """``upload``: which upload put it into the snapshot store (see `greenroom.core.gc.blobs`); it may be that of an
    earlier snapshot of the same actor, which had the same file."""

    name: str
    size_bytes: int
    sha256: str
    upload: str = ""


class Snapshot(Record, frozen=True, kw_only=True):
    """The manifest of one snapshot; stored beside its files as well as in the database.

    ``backend`` and ``fingerprint`` say what made it and hence where it can run; ``image_digest`` which root
    file system lies under it; ``hostname`` what the frozen memory believes its host is called.
    """

    id: str
    namespace: str
    actor: str
    actor_uid: str
    template: str
    generation: int
    scope: SnapshotScope
    backend: str
    fingerprint: str
    image_digest: str
    hostname: str
    created_at: float
    parent: str = ""
    worker: str = ""
    files: tuple[FileDigest, ...] = ()
    state: SnapshotState = SnapshotState.PRESENT
    golden: bool = False
    #: The worker that made it keeps a copy on its own disk.
    held: bool = False
    #: Names that people gave it; while it has any it is kept, whatever its template's retention says.
    tags: tuple[str, ...] = ()
    version: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    @property
    def pk(self) -> str:
        return self.id


# --- operations and leases --------------------------------------------------------------------------------


class OperationKind(enum.StrEnum):
    CREATE = "Create"
    RESUME = "Resume"
    SUSPEND = "Suspend"
    PAUSE = "Pause"
    DELETE = "Delete"
    PREPARE = "Prepare"  # a template: image, first boot, golden snapshot
    CRASH = "Crash"  # nobody asked for it: an incarnation was lost, or what it had saved; recorded, ended at once


class OperationState(enum.StrEnum):
    RUNNING = "Running"
    DONE = "Done"
    FAILED = "Failed"


class Failure(Record, frozen=True, kw_only=True):
    """An error as stored in an operation: gRPC code name, stable reason, message, further facts."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str] = {}


class Rejection(Record, frozen=True, kw_only=True):
    """A worker that an operation could not have, and why."""

    worker: str
    why: str


class PhaseTime(Record, frozen=True, kw_only=True):
    """One phase of an operation and how long it took; phases follow each other, so they sum to the total."""

    name: str
    seconds: float


class Operation(Record, frozen=True, kw_only=True):
    """One mutation as a row: it goes on when its caller gives up and when the control plane restarts.

    ``phase`` is the last step that is known to have been begun. ``cause`` says who asked: ``request``, ``api``,
    ``idle``, ``capacity``, ``recovery``, ``shutdown``, ``drain``, ``template``. ``owner``: the control-plane process
    that decides about it, ``attempts`` on how many workers it was tried, ``takeovers`` how often another process has
    taken it over. ``done_bytes`` of ``total_bytes`` (0: not known) in this phase.
    """

    id: str
    kind: OperationKind
    namespace: str
    name: str
    uid: str
    created_at: float
    updated_at: float
    deadline_at: float
    state: OperationState = OperationState.RUNNING
    phase: str = ""
    request_id: str = ""
    cause: str = "api"
    generation: int = 0
    attempts: int = 1
    worker: str = ""
    snapshot: str = ""
    #: The state that the actor was in before, and goes back to when a resume or a pause is backed out.
    from_state: ActorState | None = None
    #: The state that it left the actor in, when it has ended; None when it left none.
    to_state: ActorState | None = None
    owner: str = ""
    takeovers: int = 0
    rejected: tuple[Rejection, ...] = ()
    #: The snapshot was asked for: backed out, the actor goes back to the one that it would have woken from.
    chosen: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    #: Somebody has asked to give it up; its driver backs it out.
    cancel_requested: bool = False
    #: What was asked for with ``request_id`` beside the thing itself, as a digest: the same id may only be used to ask
    #: for the same.
    request_digest: str = ""
    #: Until when its driver holds a preparation (other kinds have a `Lease`).
    held_until: float = 0.0
    error: Failure | None = None
    phases: tuple[PhaseTime, ...] = ()
    layers: tuple[LayerProgress, ...] = ()
    finished_at: float | None = None
    version: int = 0

    @property
    def attempt(self) -> str:
        """What workers know it by. Each attempt on another worker is an operation of its own to them: what was ended
        there with the attempt before stays ended. Also the handle of the sandbox that it makes."""
        return attempt_id(self.id, self.attempts)

    @property
    def key(self) -> Key:
        return Key(self.namespace, self.name)

    @property
    def pk(self) -> str:
        return self.id


def attempt_id(operation_id: str, attempt: int) -> str:
    """See `Operation.attempt`."""
    return operation_id if attempt == 1 else f"{operation_id}-{attempt}"


class Lease(Record, frozen=True, kw_only=True):
    """The right to change one actor, held by one operation of one control-plane process until ``expires_at``."""

    uid: str
    owner: str
    operation: str
    generation: int
    expires_at: float

    @property
    def pk(self) -> str:
        return self.uid
