"""What the control plane and an agent say to each other: one record per call and per answer.

Every call about an actor carries ``operation_id``, ``actor_uid`` and ``generation``. An agent refuses a generation
lower than the highest it has seen for that actor (`LeaseLost`), and answers a known (operation, call) with the
recorded result instead of doing the work again. On the wire a call travels as its class name and its JSON.
"""

from __future__ import annotations

import enum

from greenroom.core.gc.records import Entry, Refused, Register, Registered, Report
from greenroom.core.records import (
    Endpoint,
    Evicted,
    FileDigest,
    ImageCache,
    ImageDetail,
    LayerProgress,
    PhaseTime,
    Record,
    Snapshot,
    TemplateSpec,
)
from greenroom.core.rosters import Berth

#: Entries of one answer to `ListDisk`: some 500 KB.
MAX_DISK_PAGE = 5_000
#: What the phase of a wake begins with while its image is prepared: it waits for that.
WAITS_FOR_IMAGE = "prepare/"


class Identity(Record, frozen=True, kw_only=True):
    """Who a sandbox is. It sees the first four as files below ``/run/greenroom/``, and its host name. ``sandbox``: its
    handle, never used twice; ``create_seq``: its number (`greenroom.core.gc`), 0 for none."""

    namespace: str
    name: str
    uid: str
    generation: int
    sandbox: str = ""
    create_seq: int = 0

    @property
    def handle(self) -> str:
        """An agent that is older than handles has made one sandbox for each actor."""
        return self.sandbox or self.uid

    @property
    def hostname(self) -> str:
        return self.name.lstrip("_")[:63]


class Call(Record, frozen=True, kw_only=True, tag_field="call", tag=True):
    """Base of the calls; ``tag`` is the class name."""


class ActorCall(Call, frozen=True, kw_only=True):
    operation_id: str
    actor_uid: str
    generation: int


# --- calls to an agent ------------------------------------------------------------------------------------


class Present(Call, frozen=True, kw_only=True):
    """Asks whose disk this is; comes first on every connection. ``epoch``: of the worker that the control plane knows
    by this name, which one with an empty disk would replace. -> `Register`"""

    epoch: int = 0


class Enrol(Call, frozen=True, kw_only=True):
    """What the control plane has decided about what was presented. A worker that is told to wipe itself has nothing any
    more, and another disk, when it answers; one whose name is taken ends. -> `Done`"""

    registered: Registered | None = None
    refused: Refused | None = None


class Sync(Call, frozen=True, kw_only=True):
    """What is there? First the worker adopts ``closed_seq``: nothing with that number or a lower one is made there any
    more. Then what is to be destroyed (``destroy``: handles) is on its way out. Then it lists what it has. -> `Synced`

    Attributes:
        epoch: which registration the sender speaks to.
        incarnation: of which disk; a name whose worker was retired begins with the first epoch again. "": an older
            sender says none.
        drain: the worker is being emptied: it keeps nothing warm.
        known: the digest of the last list that the sender has got.

    Raises `Conflict` (reason ``WRONG_EPOCH``) when the worker has another registration, or none: register it.
    """

    epoch: int
    closed_seq: int
    incarnation: str = ""
    destroy: tuple[str, ...] = ()
    drain: bool = False
    known: str = ""


class ListDisk(Call, frozen=True, kw_only=True):
    """What is on the worker's disk beside sandboxes: snapshots that it holds and logs, in the order of their handles,
    at most `MAX_DISK_PAGE` of those after ``after``. -> `Disk`"""

    after: str = ""


class Prepare(Call, frozen=True, kw_only=True):
    """Pulls and unpacks an image (idempotent); progress events carry a `LayerProgress` list. ``digest``: what the
    reference is known to mean; "" to resolve it now. ``pin``: it is kept until somebody unpins it.
    ``peers`` (here and below): base URLs of workers that are asked for layers before the registry. ``id``: for
    `StopPrepare`. -> `Prepared`"""

    image: str
    digest: str = ""
    pin: bool = False
    peers: tuple[str, ...] = ()
    id: str = ""


class StopPrepare(Call, frozen=True, kw_only=True):
    """Nobody wants the `Prepare` of this id any more: it ends (`Cancelled`), unless it has ended; what it fetched stays
    for the next one. What others prepare goes on. -> `Done`"""

    id: str


class ListImages(Call, frozen=True, kw_only=True):
    """-> `ImageCache`"""


class InspectImage(Call, frozen=True, kw_only=True):
    """-> `ImageDetail`"""

    digest: str


class RemoveImage(Call, frozen=True, kw_only=True):
    """Removes an image; unknown is success. ``unpin``: also one that is pinned. -> `Done`

    Raises `FailedPrecondition` (reason ``IMAGE_IN_USE``).
    """

    digest: str
    unpin: bool = False


class CoolImage(Call, frozen=True, kw_only=True):
    """Ends the warm sandboxes of this image, if there are any, so that it may be removed. -> `Done`"""

    digest: str


class PinImage(Call, frozen=True, kw_only=True):
    """Keeps an image whatever comes, or no longer. -> `Done`"""

    digest: str
    undo: bool = False


class PruneImages(Call, frozen=True, kw_only=True):
    """Removes every image that nobody uses and that is not pinned, or only says which these are. -> `Evicted`"""

    dry_run: bool = False


class ImportImage(Call, frozen=True, kw_only=True):
    """Takes an image over from an archive. Stream: data frames of the archive (OCI layout or docker archive, as tar),
    an empty one at its end. ``name``: what it is called here; no registry is asked about it. ``tag``: which one of the
    archive ("": its only one). It is pinned: it can't be pulled again. -> `Prepared`"""

    name: str
    tag: str = ""


class Start(ActorCall, frozen=True, kw_only=True):
    """Cold start: boots the image and returns once the readiness probe answers. -> `Started`"""

    identity: Identity
    spec: TemplateSpec
    image_digest: str
    peers: tuple[str, ...] = ()


class Restore(ActorCall, frozen=True, kw_only=True):
    """Wakes from a snapshot; the files are verified against the manifest before success is reported. -> `Started`

    Raises `DataLoss` (reason ``SNAPSHOT_CORRUPT``) when a file is not what the manifest says.
    """

    identity: Identity
    spec: TemplateSpec
    image_digest: str
    snapshot: Snapshot
    peers: tuple[str, ...] = ()


class Checkpoint(ActorCall, frozen=True, kw_only=True):
    """Freezes the sandbox and writes its snapshot to the worker's own disk. The sandbox stays frozen: `Thaw` undoes,
    `Discard` ends it. On an error it is running again. -> `Checkpointed`"""

    snapshot: Snapshot


class Publish(ActorCall, frozen=True, kw_only=True):
    """Uploads what `Checkpoint` wrote, with sizes and digests verified. The sandbox stays frozen. With ``hold`` it is
    kept on the worker's own disk instead, synced and with its digests, and outlives the sandbox: the manifest says
    ``LOCAL``, and `Upload` brings it to the snapshot store later. ``base``: files that the actor has in the snapshot
    store; they stay until the operation has ended, and what is equal to one of them is not stored again.
    -> `Published`"""

    snapshot_id: str
    hold: bool = False
    base: tuple[FileDigest, ...] = ()


class Upload(Call, frozen=True, kw_only=True):
    """Brings a snapshot that is held here to the snapshot store, verified; it is held on until `Release`. Idempotent.
    Not fenced: a snapshot never changes, whatever its actor does meanwhile. -> `Published`

    Raises `NotFound` (reason ``NOT_HELD``) when it is not held here.
    """

    snapshot_id: str


class Release(Call, frozen=True, kw_only=True):
    """Removes a snapshot that is held here; unknown is success. -> `Done`"""

    snapshot_id: str


class Discard(ActorCall, frozen=True, kw_only=True):
    """Destroys the sandbox and the worker's local snapshot files; unknown is success. The operation has ended on this
    worker: a `Start` or `Restore` of it that comes later is refused (`LeaseLost`). ``forget``: the actor is being
    deleted, its logs go too. -> `Done`"""

    forget: bool = False


class Freeze(ActorCall, frozen=True, kw_only=True):
    """Stops the sandbox's CPU, memory stays; what a suspend that is off wrote to the worker's disk is removed.
    Idempotent. -> `Done`"""


class Thaw(ActorCall, frozen=True, kw_only=True):
    """Lets a frozen sandbox go on; what a suspend that is off wrote to the worker's disk is removed first.
    Idempotent. -> `Started` with the endpoint.

    ``epoch`` (not -1): refused (`FailedPrecondition`, reason ``STALE_EPOCH``) unless the agent is in that epoch still
    and not alone: what the sender knows of the actor is from before the agent froze it.
    """

    epoch: int = -1


class ListResident(Call, frozen=True, kw_only=True):
    """-> `Residents`"""


class Warm(Call, frozen=True, kw_only=True):
    """Hint: actors of this template will wake here; keep sandboxes ready for it. -> `Done`"""

    spec: TemplateSpec
    image_digest: str
    peers: tuple[str, ...] = ()


class Exec(Call, frozen=True, kw_only=True):
    """Runs a command in the sandbox. Stream: data frames of stdin one way, stdout and stderr the other. ->
    `Exited`"""

    actor_uid: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = ""
    timeout_s: float = 0.0


class Logs(Call, frozen=True, kw_only=True):
    """Streams what the actor wrote to stdout and stderr: the last ``tail_lines`` (-1: all that is kept), then, with
    ``follow``, what comes. -> `Done`"""

    actor_uid: str
    tail_lines: int = -1
    follow: bool = False


class Stats(Call, frozen=True, kw_only=True):
    """-> `ActorStats`"""

    actor_uid: str


class Shutdown(Call, frozen=True, kw_only=True):
    """The agent destroys its pooled sandboxes and network and ends. With ``wipe`` also every resident actor. With
    ``erase`` its state disk too: when it answers, all of it is gone. -> `Done`

    ``epoch``, ``incarnation``, ``closed_seq``: with ``erase``, as in `Sync`: nothing of a higher number is to be
    erased.

    Raises, with ``erase``: `Conflict` (reason ``WRONG_EPOCH``) as `Sync`; `FailedPrecondition` (reason
    ``WORKER_IN_USE``) when something was made here since that was decided, or (``STILL_MOUNTED``) when something is
    mounted below the disk; `DataLoss` when it can't be removed. It is the same worker still when its agent begins anew.
    """

    wipe: bool = False
    erase: bool = False
    epoch: int = -1
    closed_seq: int = -1
    incarnation: str = ""


# --- answers ----------------------------------------------------------------------------------------------


class Done(Record, frozen=True, kw_only=True):
    phases: tuple[PhaseTime, ...] = ()


class Prepared(Record, frozen=True, kw_only=True):
    image_digest: str
    size_bytes: int


class Started(Record, frozen=True, kw_only=True):
    """``warm``: whether a pre-created sandbox was waiting. ``phases`` in the order they happened."""

    endpoint: Endpoint
    phases: tuple[PhaseTime, ...] = ()
    warm: bool = False


class Checkpointed(Record, frozen=True, kw_only=True):
    size_bytes: int
    phases: tuple[PhaseTime, ...] = ()


class Published(Record, frozen=True, kw_only=True):
    snapshot: Snapshot
    phases: tuple[PhaseTime, ...] = ()


class ResidentState(enum.StrEnum):
    STARTING = "Starting"
    RUNNING = "Running"
    FROZEN = "Frozen"


class Resident(Record, frozen=True, kw_only=True):
    """A sandbox that exists on the worker now. ``operation_id`` is the last operation that touched it; ``sandbox`` its
    handle."""

    actor_uid: str
    namespace: str
    name: str
    generation: int
    state: ResidentState
    endpoint: Endpoint | None = None
    operation_id: str = ""
    sandbox: str = ""


class Residents(Record, frozen=True, kw_only=True):
    """``epoch``: grows each time the agent freezes what runs on it because it is alone; survives its restart."""

    epoch: int = 0
    residents: tuple[Resident, ...] = ()


class Disk(Record, frozen=True, kw_only=True):
    """``more``: there are more after the last of them."""

    entries: tuple[Entry, ...] = ()
    more: bool = False


class Synced(Record, frozen=True, kw_only=True):
    """``digest``: of ``report.inventory`` (sandboxes) and ``residents``, which are left out (``same``) when it is what
    the sender knew. ``disk``: a digest of the names of everything that `ListDisk` lists; "" when that can't be listed.
    ``alone_epoch``: as `Residents.epoch`."""

    report: Report
    digest: str
    disk: str = ""
    same: bool = False
    alone_epoch: int = 0
    residents: tuple[Resident, ...] = ()


class Exited(Record, frozen=True, kw_only=True):
    """``code`` is the exit status, or 128 + signal number."""

    code: int


class ActorStats(Record, frozen=True, kw_only=True):
    memory_bytes: int = 0
    cpu_seconds: float = 0.0
    pids: int = 0


# --- what an agent says unasked ---------------------------------------------------------------------------


class Entrance(Record, frozen=True, kw_only=True):
    """Where an agent lets gateways on other machines in (`greenroom.agent.entrance`): ``fingerprint`` is the SHA-256
    of its certificate (hexadecimal), ``ticket`` what it asks for. Said over the link alone, and kept nowhere."""

    host: str
    port: int
    fingerprint: str
    ticket: str

    def __repr__(self) -> str:  # the ticket is in no log
        return f"Entrance({self.host}:{self.port})"


class Hello(Record, frozen=True, kw_only=True):
    """First frame of an agent: who it is and what lives on it. ``boot_id`` is new with each agent process.
    ``blobs``: base URL where other workers get image layers; "": nowhere. ``berth``: which slot of its pool's ledger it
    has, where an operator keeps it. ``place``: names the machine, and what of it the worker sees, as
    `greenroom.sandbox.dial.place` does; whoever is at the same one reaches actors directly ("": everybody does), and
    who is elsewhere by the ``entrance``."""

    worker: str
    pool: str
    backend: str
    fingerprint: str
    capacity: int
    boot_id: str
    memory_snapshots: bool
    freeze: bool
    blobs: str = ""
    residents: tuple[Resident, ...] = ()
    labels: dict[str, str] = {}
    images: tuple[str, ...] = ()
    image_bytes: int = 0
    image_over_bytes: int = 0
    berth: Berth = Berth()
    place: str = ""
    entrance: Entrance | None = None


class Heartbeat(Record, frozen=True, kw_only=True):
    """Sent every ``Welcome.heartbeat_s`` on every link. ``residents``: what lives there now."""

    boot_id: str
    residents: tuple[Resident, ...] = ()
    images: tuple[str, ...] = ()
    image_bytes: int = 0
    image_over_bytes: int = 0


class Leaving(Record, frozen=True, kw_only=True):
    """The agent was asked to end: its actors are to be suspended, then it is to be sent a `Shutdown`."""

    boot_id: str


class Progress(Record, frozen=True, kw_only=True):
    """How far a call is; sent at most ten times a second, and at least once a second while something moves.
    ``done_bytes`` of ``total_bytes`` (0: not known) of the phase."""

    phase: str
    layers: tuple[LayerProgress, ...] = ()
    done_bytes: int = 0
    total_bytes: int = 0


class SandboxExited(Record, frozen=True, kw_only=True):
    """A resident ended by itself."""

    actor_uid: str
    generation: int
    code: int
    last_lines: str = ""


# --- what the control plane says unasked ------------------------------------------------------------------


class Welcome(Record, frozen=True, kw_only=True):
    """The answer to `Hello`, and to a `Heartbeat` while it is written down that the worker lives (no answer comes when
    the replica doesn't reach the store: others may then count the worker as lost).

    Attributes:
        replica: who answers.
        links: addresses of all replicas of the control plane; the agent keeps a link to each.
        heartbeat_s: how often the agent is to say that it lives.
        alone_s: an agent none of whose heartbeats of this long ago or less was answered is alone: it freezes what runs
            on it, for it may count as lost and its actors may wake elsewhere. They go on when a replica says so
            (`Thaw`). Counted from when the answered heartbeat was *sent*. 0: never.
        snapshot_mark: what the snapshot store is known by (`greenroom.core.marks`); "" while that is not known.
    """

    replica: str = ""
    links: tuple[str, ...] = ()
    heartbeat_s: float = 3.0
    alone_s: float = 0.0
    snapshot_mark: str = ""


AgentCall = (
    Present
    | Enrol
    | Sync
    | ListDisk
    | Prepare
    | StopPrepare
    | ListImages
    | InspectImage
    | RemoveImage
    | CoolImage
    | PinImage
    | PruneImages
    | ImportImage
    | Start
    | Restore
    | Checkpoint
    | Publish
    | Upload
    | Release
    | Discard
    | Freeze
    | Thaw
    | ListResident
    | Warm
    | Exec
    | Logs
    | Stats
    | Shutdown
)
"""Everything that can be asked of an agent."""

#: Calls with data frames beside the answer.
StreamingCall = Exec | Logs | ImportImage

#: What each call answers with.
ANSWERS: dict[str, type[Record]] = {
    "Present": Register,
    "Enrol": Done,
    "Sync": Synced,
    "ListDisk": Disk,
    "Prepare": Prepared,
    "StopPrepare": Done,
    "ListImages": ImageCache,
    "InspectImage": ImageDetail,
    "RemoveImage": Done,
    "CoolImage": Done,
    "PinImage": Done,
    "PruneImages": Evicted,
    "ImportImage": Prepared,
    "Start": Started,
    "Restore": Started,
    "Checkpoint": Checkpointed,
    "Publish": Published,
    "Upload": Published,
    "Release": Done,
    "Discard": Done,
    "Freeze": Done,
    "Thaw": Started,
    "ListResident": Residents,
    "Warm": Done,
    "Exec": Exited,
    "Logs": Done,
    "Stats": ActorStats,
    "Shutdown": Done,
}
