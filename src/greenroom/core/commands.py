"""What can be done to an actor, as records: the commands, the `View` that a store reads for one, and the `Change` that
it writes. `greenroom.core.lifecycle` decides what becomes of them.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from greenroom.core.records import (
    Actor,
    ActorState,
    Endpoint,
    Failure,
    Key,
    LayerProgress,
    Lease,
    Operation,
    OperationKind,
    PhaseTime,
    Record,
    Snapshot,
    Template,
    Worker,
)

# --- commands ---------------------------------------------------------------------------------------------


class Command(Record, frozen=True, kw_only=True):
    """``needs``: which parts of the `View` the store must load beside actor and operation; "restart": golden and
    previous, of an actor that has crashed."""

    needs: ClassVar[frozenset[str]] = frozenset()
    key: Key
    now: float


class CreateActor(Command, frozen=True, kw_only=True):
    kind: ClassVar[OperationKind] = OperationKind.CREATE
    needs = frozenset({"template", "prior"})
    operation_id: str
    uid: str
    template: str
    request_id: str = ""
    labels: dict[str, str] = {}
    worker_selector: dict[str, str] = {}
    golden: bool = False
    #: See `Operation.request_digest`.
    request_digest: str = ""


class Begin(Command, frozen=True, kw_only=True):
    """Starts an operation: takes the lease for ``lease_ttl_s``, bumps the generation, writes the operation row.

    ``uid`` may be "" (whoever has the name now). A repeated ``request_id`` or ``operation_id`` returns the operation of
    the first time.
    """

    kind: ClassVar[OperationKind]
    needs = frozenset({"prior", "lease"})
    operation_id: str
    owner: str
    request_id: str = ""
    cause: str = "api"
    uid: str = ""
    lease_ttl_s: float = 30.0
    deadline_s: float = 300.0


class BeginResume(Begin, frozen=True, kw_only=True):
    """``prefer``, ``avoid``, ``reachable``: see `placement.Demand`."""

    kind = OperationKind.RESUME
    needs = frozenset({"prior", "lease", "template", "source", "restart", "workers"})
    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    reachable: tuple[str, ...] | None = None
    #: Not asked for by a person: an actor that crashed and whose template says ``hold`` stays as it is.
    hold_crashed: bool = False
    #: Which of its own snapshots it is to wake from; the present one becomes its way back. "": the present one.
    snapshot_id: str = ""


class BeginSuspend(Begin, frozen=True, kw_only=True):
    """``snapshot_id``: what the new snapshot will be called. ``Change.source`` is the one that the actor woke from; its
    files need not be stored again."""

    kind = OperationKind.SUSPEND
    needs = frozenset({"prior", "lease", "source"})
    snapshot_id: str


class BeginPause(Begin, frozen=True, kw_only=True):
    kind = OperationKind.PAUSE


class BeginDelete(Begin, frozen=True, kw_only=True):
    kind = OperationKind.DELETE


class OperationCommand(Command, frozen=True, kw_only=True):
    operation_id: str
    generation: int


class FinishResume(OperationCommand, frozen=True, kw_only=True):
    endpoint: Endpoint
    phases: tuple[PhaseTime, ...] = ()


class FinishSuspend(OperationCommand, frozen=True, kw_only=True):
    """The new snapshot is verified: it becomes the actor's latest, and the slot is free. Of the snapshots before it the
    newest one that is not only on a worker's disk is kept as the way back. ``keeps``: its template's retention keeps
    more than that, and `Expire` decides about the others. ``ran_on``: why the suspend failed, of an actor that may have
    run on after its snapshot, and is lost: it is CRASHED, with that snapshot as what is left of it."""

    needs = frozenset({"previous", "source"})
    snapshot: Snapshot
    phases: tuple[PhaseTime, ...] = ()
    keeps: bool = False
    ran_on: Failure | None = None


class FinishPause(OperationCommand, frozen=True, kw_only=True):
    phases: tuple[PhaseTime, ...] = ()


class FinishDelete(OperationCommand, frozen=True, kw_only=True):
    needs = frozenset({"owned"})
    phases: tuple[PhaseTime, ...] = ()


class BackOut(OperationCommand, frozen=True, kw_only=True):
    """Ends an operation that failed; the actor goes to ``to_state``, which frees its slot unless that is bound.

    ``to_state`` is where the actor came from, or CRASHED when its live incarnation was lost meanwhile; a failed
    checkpoint may also leave it RUNNING. A failed delete stays DELETING, keeps its slot, and may be begun again.
    Without an ``endpoint`` the one that it had stays. When the snapshot that it should go back to was lost meanwhile,
    it is CRASHED instead.
    """

    needs = frozenset({"source", "previous"})
    to_state: ActorState
    error: Failure
    endpoint: Endpoint | None = None
    phases: tuple[PhaseTime, ...] = ()


class Rebind(OperationCommand, frozen=True, kw_only=True):
    """A resume failed on its worker before the sandbox started (``why``): tries the next one, in the same operation.
    ``attempts``: the operation's before that, so that one that comes late, or twice, moves nothing."""

    needs = frozenset({"template", "source", "workers"})
    attempts: int = 1
    avoid: tuple[str, ...] = ()
    reachable: tuple[str, ...] | None = None
    why: str = ""


class FallBack(OperationCommand, frozen=True, kw_only=True):
    """The snapshot that a resume wanted is corrupt: it is marked so, and the one before takes its place (the golden one
    when there is none before that is good). Said so in the actor's reason and message. When the worker can't run the
    older one, the resume is bound to another in the same step."""

    needs = frozenset({"source", "previous", "golden", "template", "workers"})
    snapshot_id: str
    detail: str
    reachable: tuple[str, ...] | None = None


class Advance(OperationCommand, frozen=True, kw_only=True):
    """Records how far an operation is."""

    phase: str
    layers: tuple[LayerProgress, ...] = ()
    done_bytes: int = 0
    total_bytes: int = 0


class TakeOver(Command, frozen=True, kw_only=True):
    """Takes an operation over from an owner that is gone; the generation grows, so the old owner is fenced."""

    needs = frozenset({"lease"})
    operation_id: str
    owner: str
    lease_ttl_s: float = 30.0
    #: Also when the lease has not run out: only for an owner that is known to be dead.
    force: bool = False


class RenewLease(OperationCommand, frozen=True, kw_only=True):
    """Extends the lease; one that has run out is lost, whether or not somebody took it."""

    needs = frozenset({"lease"})
    owner: str
    lease_ttl_s: float = 30.0


class ReleaseLease(OperationCommand, frozen=True, kw_only=True):
    """The owner can't go on (it does not reach the worker) and gives the operation to whoever takes it over. Does
    nothing when the lease is not ``owner``'s."""

    needs = frozenset({"lease"})
    owner: str


class RequestCancel(Command, frozen=True, kw_only=True):
    """Asks the driver of an operation, wherever it runs, to back it out. An operation that has ended is an answer; a
    delete can't be taken back."""

    operation_id: str


class Crash(Command, frozen=True, kw_only=True):
    """The live incarnation is gone. Changes nothing unless the actor is running or paused on that worker with a
    generation not above ``generation``. Recorded as the operation ``operation_id``.

    ``lost``: because its worker counts as lost. Then only while the worker's record says STALLED or GONE: who hears the
    worker writes that first, and what goes on there is not crashed by a decision that is late.
    """

    needs = frozenset({"source", "previous", "place"})
    operation_id: str
    uid: str
    worker: str
    generation: int
    reason: str
    message: str
    lost: bool = False


class Reunite(Command, frozen=True, kw_only=True):
    """A worker that was away has come back with the actor, frozen: it goes on, in a new generation. Changes nothing
    unless it is RUNNING there in exactly this one."""

    uid: str
    worker: str
    generation: int


class FinishUpload(Command, frozen=True, kw_only=True):
    """A snapshot that was on one worker's disk only is in the snapshot store now."""

    needs = frozenset({"named"})
    snapshot_id: str


class LoseSnapshot(Command, frozen=True, kw_only=True):
    """A snapshot that was on one worker's disk only is lost with that worker: marked so, and the actor that would have
    woken from it is CRASHED and goes back to the one before. Recorded as the operation ``operation_id``."""

    needs = frozenset({"named", "previous"})
    operation_id: str
    snapshot_id: str
    message: str


class Expire(Command, frozen=True, kw_only=True):
    """Condemns those snapshots of an actor that its template keeps no longer."""

    needs = frozenset({"template", "owned"})
    uid: str


class TagSnapshot(Command, frozen=True, kw_only=True):
    """Gives a snapshot of the actor a name, which pins it; or takes one away (``undo``), and then condemns it when
    nothing else keeps it. Doing either twice changes nothing."""

    needs = frozenset({"template", "owned"})
    snapshot_id: str
    tag: str
    undo: bool = False


ActorCommand = (
    CreateActor
    | BeginResume
    | BeginSuspend
    | BeginPause
    | BeginDelete
    | FinishResume
    | FinishSuspend
    | FinishPause
    | FinishDelete
    | BackOut
    | Rebind
    | FallBack
    | Advance
    | TakeOver
    | RenewLease
    | ReleaseLease
    | RequestCancel
    | Crash
    | Reunite
    | FinishUpload
    | LoseSnapshot
    | Expire
    | TagSnapshot
)


# --- what is read and what is written ---------------------------------------------------------------------


class View(Record, frozen=True, kw_only=True):
    """What the store read in the transaction.

    Attributes:
        actor: by the key.
        operation: the one that an `OperationCommand`, `TakeOver` or `RequestCancel` names; for the others that of
            ``actor.operation``.
        lease: of the actor's uid.
        prior: the operation with the id of the command, else the one in the namespace that was recorded with the
            command's (non-empty) request id.
        template: the actor's (for `CreateActor`: the named one).
        source: the snapshot a resume would start from: the actor's, else (with the template) the golden one.
        previous: the record of ``actor.previous_snapshot``.
        golden: the template's golden snapshot.
        named: the snapshot that the command names.
        owned: all snapshots of the actor's uid.
        workers: of the template's pool.
        place: the worker that the actor is on.
    """

    actor: Actor | None = None
    lease: Lease | None = None
    operation: Operation | None = None
    prior: Operation | None = None
    template: Template | None = None
    source: Snapshot | None = None
    previous: Snapshot | None = None
    golden: Snapshot | None = None
    named: Snapshot | None = None
    owned: tuple[Snapshot, ...] = ()
    workers: tuple[Worker, ...] = ()
    place: Worker | None = None


class Outcome(enum.StrEnum):
    CHANGED = "changed"
    JOINED = "joined"  # an operation of that kind is already under way: `operation`
    REPEATED = "repeated"  # this request, or this step of an operation, was done before: `operation`
    ALREADY = "already"  # the actor is in the wanted state; nothing to do


class Change(Record, frozen=True, kw_only=True):
    """What to write, and what the caller wants to know. Nothing is written unless ``outcome`` is CHANGED.

    ``slots``: (worker name, +1 or -1). ``drop_lease``: uid. Versions are raised here already.
    """

    outcome: Outcome = Outcome.CHANGED
    actor: Actor | None = None
    delete_actor: bool = False
    operation: Operation | None = None
    lease: Lease | None = None
    drop_lease: str = ""
    slots: tuple[tuple[str, int], ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    #: For the caller, not written:
    current: Operation | None = None
    template: Template | None = None
    source: Snapshot | None = None
