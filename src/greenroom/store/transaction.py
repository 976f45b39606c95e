"""What a write does to the rows, once for every embedded store; and what is read for one, for PostgreSQL too.

A store gives `Rows`: synchronous access to its rows inside one transaction. The functions here read through it, decide,
and only then write, so a command that is refused has written nothing. They return what happened as (type, record)
pairs, which the store publishes after the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from msgspec.structs import replace

from greenroom.core.commands import (
    ActorCommand,
    Begin,
    BeginResume,
    Change,
    CreateActor,
    FinishUpload,
    LoseSnapshot,
    OperationCommand,
    Outcome,
    RequestCancel,
    TakeOver,
    View,
)
from greenroom.core.errors import AlreadyExists, Conflict
from greenroom.core.lifecycle import decide
from greenroom.core.records import (
    Actor,
    ActorState,
    Lease,
    Operation,
    OperationState,
    Snapshot,
    Template,
    Worker,
)
from greenroom.store.port import EventType, Free, R, Stored, W

Effects = list[tuple[EventType, Stored]]
T = TypeVar("T")


class Rows(Protocol):
    """The rows of a store within one transaction. ``insert`` of a key that is taken is our own bug; ``replace`` of one
    that is not inserts a lease, and is our own bug for any other record."""

    def read(self, cls: type[R], pk: str) -> R | None: ...
    def operation_of_request(self, request: str) -> Operation | None: ...
    def snapshots_of(self, actor_uid: str) -> Sequence[Snapshot]: ...
    def workers_of(self, pool: str) -> Sequence[Worker]: ...
    def bound_to(self, worker: str) -> int: ...
    def insert(self, record: Stored) -> None: ...
    def replace(self, record: Stored) -> None: ...
    def delete(self, cls: type[Stored], pk: str) -> None: ...


def request_key(namespace: str, request_id: str) -> str:
    """What an operation is found by when its request is repeated; "" for a request without an id."""
    return f"{namespace}/{request_id}" if request_id else ""


# --- lifecycle commands -----------------------------------------------------------------------------------


def apply(rows: Rows, command: ActorCommand) -> tuple[Change, Effects]:
    """Decides ``command`` and writes the change. Raises what `decide` raises; then nothing was written."""
    change = decide(load(rows, command), command)
    return change, (_write(rows, change) if change.outcome is Outcome.CHANGED else [])


def load(rows: Rows, command: ActorCommand) -> View:
    """Reads what ``command`` needs, and no more."""
    needs = command.needs
    actor = rows.read(Actor, str(command.key))
    operation_id = actor.operation if actor is not None else ""
    if isinstance(command, OperationCommand | TakeOver | RequestCancel):
        operation_id = command.operation_id
    operation = rows.read(Operation, operation_id) if operation_id else None

    template: Template | None = None
    if "template" in needs:
        name = command.template if isinstance(command, CreateActor) else actor.template if actor else ""
        template = rows.read(Template, f"{command.key.namespace}/{name}") if name else None
    golden_id = template.golden_snapshot if template else ""
    source_id = (actor.snapshot or golden_id) if actor else ""
    previous_id = actor.previous_snapshot if actor else ""
    chosen = isinstance(command, BeginResume) and command.snapshot_id != ""
    restarts = "restart" in needs and actor is not None and (chosen or actor.state is ActorState.CRASHED)
    named_id = command.snapshot_id if isinstance(command, BeginResume | FinishUpload | LoseSnapshot) else ""
    return View(
        actor=actor,
        operation=operation,
        lease=rows.read(Lease, actor.uid) if actor and "lease" in needs and actor.operation else None,
        prior=_prior(rows, command) if isinstance(command, Begin | CreateActor) else None,
        template=template,
        source=rows.read(Snapshot, source_id) if source_id and "source" in needs else None,
        previous=rows.read(Snapshot, previous_id) if previous_id and ("previous" in needs or restarts) else None,
        golden=rows.read(Snapshot, golden_id) if golden_id and ("golden" in needs or restarts) else None,
        named=rows.read(Snapshot, named_id) if named_id else None,
        owned=tuple(rows.snapshots_of(actor.uid)) if actor and "owned" in needs else (),
        workers=tuple(rows.workers_of(template.spec.pool)) if template and "workers" in needs else (),
        place=rows.read(Worker, actor.worker) if actor and actor.worker and "place" in needs else None,
    )


def _prior(rows: Rows, command: Begin | CreateActor) -> Operation | None:
    prior = rows.read(Operation, command.operation_id)
    if prior is None and command.request_id:
        prior = rows.operation_of_request(request_key(command.key.namespace, command.request_id))
    return prior


def _write(rows: Rows, change: Change) -> Effects:
    """Writes a change. The operation's event comes last: who waits for its end then finds the rest published."""
    effects: Effects = []
    for snapshot in change.snapshots:
        _store(rows, snapshot)
        effects.append((EventType.PUT, snapshot))
    for name, difference in change.slots:
        worker = rows.read(Worker, name)
        if worker is None:  # removed, and its slots with it
            continue
        worker = replace(worker, used=worker.used + difference)
        assert worker.used >= 0, f"worker {name} has more slots freed than were taken"
        rows.replace(worker)
        effects.append((EventType.PUT, worker))
    if change.actor is not None and change.delete_actor:
        rows.delete(Actor, change.actor.pk)
        effects.append((EventType.DELETED, change.actor))
    elif change.actor is not None:
        _store(rows, change.actor)
        effects.append((EventType.PUT, change.actor))
    if change.lease is not None:
        rows.replace(change.lease)
    if change.drop_lease:
        rows.delete(Lease, change.drop_lease)
    if change.operation is not None:
        _store(rows, change.operation)
        effects.append((EventType.PUT, change.operation))
    return effects


def _store(rows: Rows, record: Actor | Operation | Snapshot) -> None:
    if record.version == 1:
        rows.insert(record)
    else:
        rows.replace(record)


# --- single records ---------------------------------------------------------------------------------------


def put(rows: Rows, record: W) -> tuple[W, Effects]:
    """As `greenroom.store.port.Store.put`."""
    stored = rows.read(type(record), record.pk)
    check_put(record, stored.version if stored is not None else None)
    if isinstance(record, Worker):
        used = stored.used if isinstance(stored, Worker) else rows.bound_to(record.name)
        record = replace(record, used=used)
    record = replace(record, version=record.version + 1)
    if stored is None:
        rows.insert(record)
    else:
        rows.replace(record)
    return record, [(EventType.PUT, record)]


def remove(rows: Rows, record: Free) -> tuple[None, Effects]:
    """As `greenroom.store.port.Store.remove`."""
    stored: Free | None = rows.read(type(record), record.pk)  # type: ignore[type-var]  # one class of the union
    if stored is None:
        return None, []
    check_remove(record, stored.version)
    rows.delete(type(record), record.pk)
    return None, [(EventType.DELETED, stored)]


def drop_operations(rows: Rows, ids: Sequence[str]) -> tuple[int, Effects]:
    """Deletes those of the operations that are finished; returns how many."""
    effects: Effects = []
    for operation_id in ids:
        operation = rows.read(Operation, operation_id)
        if operation is not None and operation.state is not OperationState.RUNNING:
            rows.delete(Operation, operation_id)
            effects.append((EventType.DELETED, operation))
    return len(effects), effects


def check_put(record: Free, stored: int | None) -> None:
    """Raises what `put` raises when ``stored`` is the version that there is."""
    kind = type(record).__name__.lower()
    if record.version == 0 and stored is not None:
        raise AlreadyExists(f"{kind} {record.pk} exists already; read it, then change it")
    if record.version != 0 and stored != record.version:
        raise _changed(kind, record.pk, record.version, stored)


def check_remove(record: Free, stored: int) -> None:
    """Raises what `remove` raises when ``stored`` is the version that there is."""
    if stored != record.version:
        raise _changed(type(record).__name__.lower(), record.pk, record.version, stored)


def _changed(kind: str, pk: str, version: int, stored: int | None) -> Conflict:
    now = "it is gone" if stored is None else f"it is at version {stored}"
    return Conflict(
        f"{kind} {pk} was changed by somebody else since version {version}: {now}; read it again",
        reason="VERSION_CONFLICT",
    )
