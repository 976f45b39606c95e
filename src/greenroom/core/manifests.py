"""The record of a snapshot, as a suspend announces it and as its worker has made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from greenroom.core.records import (
    Actor,
    Durability,
    FileDigest,
    Operation,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
)

if TYPE_CHECKING:
    pass


def announced(actor: Actor, op: Operation, template: Template | None) -> Snapshot:
    """The manifest as far as the control plane knows it; the worker fills in what it made."""
    return Snapshot(
        id=op.snapshot,
        namespace=actor.namespace,
        actor=actor.name,
        actor_uid=actor.uid,
        template=actor.template,
        generation=op.generation,
        scope=SnapshotScope.MEMORY,
        backend="",
        fingerprint="",
        image_digest=template.image_digest if template else "",
        hostname="",
        created_at=op.created_at,
        golden=actor.golden,
    )


def made(announced: Snapshot, said: Snapshot, worker: str) -> Snapshot:
    """The row of what was made: a worker says what it made, not whose it is."""
    local = said.state is SnapshotState.LOCAL
    return replace(
        announced,
        files=said.files,
        scope=said.scope,
        backend=said.backend,
        fingerprint=said.fingerprint,
        hostname=said.hostname,
        worker=worker,
        state=SnapshotState.LOCAL if local else SnapshotState.PRESENT,
        held=local,
    )


def is_held(actor: Actor, template: Template) -> bool:
    """Whether a suspend is done when the worker's own disk has the snapshot. Every worker needs a golden one."""
    return not actor.golden and template.spec.durability is Durability.LOCAL


def stored(source: Snapshot, actor: Actor) -> tuple[FileDigest, ...]:
    """What the snapshot store has of the actor, and keeps as long as the operation runs."""
    return source.files if source.state is SnapshotState.PRESENT and source.actor_uid == actor.uid else ()
