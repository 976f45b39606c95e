"""Why something is kept, and why it goes: every reason."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.gc import verdict
from greenroom.core.gc.verdict import Goes, Kept, There
from greenroom.core.records import (
    Actor,
    ActorState,
    CachedImage,
    ImageCache,
    Operation,
    OperationKind,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)

NOW = 1_000_000.0


def actor(state: ActorState = ActorState.SUSPENDED, **more: Any) -> Actor:
    return Actor(namespace="n", name="a", uid="u", template="t", state=state, created_at=1, state_since=1, **more)


def snapshot(state: SnapshotState = SnapshotState.PRESENT, **more: Any) -> Snapshot:
    fields: dict[str, Any] = {"id": "s", "worker": "w"} | more
    return Snapshot(
        namespace="n",
        actor="a",
        actor_uid="u",
        template="t",
        generation=1,
        scope=SnapshotScope.MEMORY,
        backend="sim",
        fingerprint="f",
        image_digest="",
        hostname="a",
        created_at=1,
        state=state,
        **fields,
    )


def operation(kind: OperationKind = OperationKind.SUSPEND, **more: Any) -> Operation:
    return Operation(
        id="o", kind=kind, namespace="n", name="a", uid="u", created_at=1, updated_at=1, deadline_at=9, **more
    )


def template(**more: Any) -> Template:
    spec = TemplateSpec(image="i")
    return Template(
        namespace="n", name="t", uid="tu", spec=spec, state=TemplateState.READY, created_at=1, state_since=1, **more
    )


def worker(state: WorkerState = WorkerState.ACTIVE, **more: Any) -> Worker:
    return Worker(
        name="w", pool="p", backend="sim", fingerprint="f", capacity=4, state=state, last_seen=NOW - 3, **more
    )


STALLED, GONE = worker(WorkerState.STALLED), worker(WorkerState.GONE, message="somebody has said so")
DISTRUSTED = worker(distrust="the database is older than it")


@pytest.mark.parametrize(
    ("said", "goes", "says"),
    [
        (verdict.actor(actor(), None), False, "it is Suspended, and an actor stays until somebody deletes it"),
        (verdict.actor(actor(golden=True), None), False, "template n/t is prepared with it"),
        (verdict.actor(actor(ActorState.DELETING), operation()), True, "operation o deletes it"),
        (verdict.actor(actor(ActorState.DELETING), None), True, "that has failed once"),
        (verdict.template(template(), 2), False, "2 actors are made from it"),
        (verdict.template(template(), 0), False, "no actor is made from it"),
    ],
)
def test_records(said: verdict.Verdict, goes: bool, says: str) -> None:
    assert isinstance(said, Goes if goes else Kept) and says in said.why


@pytest.mark.parametrize(
    ("record", "goes", "says"),
    [
        (worker(), None, "it is Active, and was heard 3 s ago"),
        (worker(WorkerState.DRAINING, cordon="asked"), None, "is being emptied (asked), and keeps its disk"),
        (worker(WorkerState.RETIRING, cordon="retiring", used=2), "when 2 actors are suspended", "being retired"),
        (worker(WorkerState.RETIRING, cordon="retiring"), "when what only it has is uploaded", "being retired"),
        (STALLED, None, "`greenroom forget worker w` says that it is gone, or it has been silent for 600 s"),
        (
            worker(WorkerState.STALLED, cordon="retiring"),
            "when it has been silent for long enough",
            "it was being retired, and nobody hears it",
        ),
        (worker(WorkerState.STALLED, cordon="retiring", used=1), None, "nobody has heard it since 1970-01-12"),
        (GONE, None, "it is gone (somebody has said so); the tombstone tells it to wipe itself"),
        (DISTRUSTED, None, "nothing on worker w is destroyed: the database is older than it; `greenroom acknowledge"),
    ],
)
def test_workers(record: Worker, goes: str | None, says: str) -> None:
    said = verdict.worker(record, NOW, gone_s=600)
    assert says in said.why and (said.when if isinstance(said, Goes) else None) == goes


def about(snapshot: Snapshot, **more: Any) -> verdict.Verdict:
    facts: dict[str, Any] = {
        "owner": actor(snapshot="x", previous_snapshot="y"),
        "template": template(golden_snapshot="g"),
        "operations": (),
        "holder": worker(),
    } | more
    return verdict.snapshot(snapshot, **facts)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (about(snapshot(id="x")), "actor n/a wakes from it"),
        (about(snapshot(SnapshotState.LOCAL, id="x")), "wakes from it; it is on worker w only"),
        (about(snapshot(id="y")), "it is the way back of actor n/a"),
        (about(snapshot(id="g", golden=True)), "it is the golden snapshot of template n/t"),
        (
            about(snapshot(golden=True), template=template(operation="o2")),
            "template n/t is being prepared, by operation o2",
        ),
        (about(snapshot(), operations=[operation(snapshot="s")]), "operation o (Suspend) works with it"),
        (about(snapshot(), owner=None, operations=[operation(snapshot="s")]), "operation o (Suspend) works with it"),
        (about(snapshot(SnapshotState.CORRUPT)), "it is corrupt or lost, and shows what has happened"),
        (about(snapshot(), tags=["release"]), "it has a tag (release)"),
        (about(snapshot()), "template n/t keeps it (`retention`)"),
    ],
)
def test_snapshots_that_are_kept(said: verdict.Verdict, says: str) -> None:
    assert isinstance(said, Kept) and says in said.why


@pytest.mark.parametrize(
    ("said", "says", "when"),
    [
        (about(snapshot(SnapshotState.CONDEMNED)), "it is condemned", "next round"),
        (about(snapshot(SnapshotState.CONDEMNED, id="x")), "it is condemned", "next round"),
        (about(snapshot(SnapshotState.CONDEMNED, held=True), holder=STALLED), "it is condemned", "is stalled, is back"),
        (about(snapshot(SnapshotState.CONDEMNED, held=True), holder=GONE), "it is condemned", "next round"),
        (about(snapshot(), owner=None), "its actor n/a does not exist any more", "next round"),
        (about(snapshot(golden=True), template=None), "which does not exist any more", "next round"),
        (about(snapshot(golden=True)), "has another golden snapshot", "when the template is prepared again"),
        (about(snapshot(), is_over=True), "template n/t keeps it no longer", "next round"),
    ],
)
def test_snapshots_that_go(said: verdict.Verdict, says: str, when: str) -> None:
    assert isinstance(said, Goes) and says in said.why and when in said.when


@pytest.mark.parametrize(
    ("said", "goes", "says"),
    [
        (verdict.stored([snapshot()], None, 0, 90000), None, "snapshot s of actor n/a consists of it"),
        (
            verdict.stored([snapshot(SnapshotState.CONDEMNED), snapshot(id="z")], None, 0, 90000),
            None,
            "snapshot z of actor n/a consists of it",
        ),
        (verdict.stored([], operation(), 0, 90000), None, "operation o (Suspend) is uploading"),
        (
            verdict.stored([snapshot(SnapshotState.CONDEMNED)], None, 0, 90000),
            "with the next round",
            "snapshot s, which alone consists of it, is condemned",
        ),
        (verdict.stored([], None, 0, 90000), "when it is older than 25 h and two scrubs have found it", "no snapshot"),
        (verdict.stored([], None, 90001, 90000), "when two scrubs have found it", "no snapshot refers to it"),
    ],
)
def test_objects_of_the_snapshot_store(said: verdict.Verdict, goes: str | None, says: str) -> None:
    assert says in said.why and (said.when if isinstance(said, Goes) else None) == goes


BOX = There(worker="w", kind="sandbox", id="h", owner="u")
RUNS = actor(ActorState.RUNNING, worker="w", sandbox="h")


@pytest.mark.parametrize(
    ("said", "goes", "says"),
    [
        (verdict.sandbox(BOX, worker(), RUNS), None, "actor n/a is Running in it"),
        (
            verdict.sandbox(BOX, worker(), actor(ActorState.SUSPENDING, worker="w", sandbox="h", operation="o")),
            None,
            "operation o holds actor n/a, which is Suspending there",
        ),
        (
            verdict.sandbox(BOX, worker(), replace(RUNS, sandbox="i")),
            "with the next round",
            "actor n/a has another sandbox there, i",
        ),
        (verdict.sandbox(BOX, DISTRUSTED, None), None, "nothing on worker w is destroyed"),
        (verdict.sandbox(BOX, worker(), None), "with the next round", "its actor does not exist any more"),
        (verdict.sandbox(BOX, worker(), actor()), "with the next round", "actor n/a is Suspended, and on no worker"),
        (
            verdict.sandbox(BOX, worker(), replace(RUNS, worker="v")),
            "with the next round",
            "actor n/a is Running on worker v",
        ),
        (verdict.sandbox(BOX, STALLED, None), "when worker w, which is stalled, is heard again", "does not exist"),
        (verdict.sandbox(BOX, GONE, None), "when worker w, which is gone, comes back and wipes itself", "not exist"),
        (verdict.sandbox(BOX, None, None), "when worker w, which is gone, comes back and wipes itself", "not exist"),
    ],
)
def test_sandboxes(said: verdict.Verdict, goes: str | None, says: str) -> None:
    assert says in said.why and (said.when if isinstance(said, Goes) else None) == goes


COPY = There(worker="w", kind="copy", id="s", owner="s")
LOCAL = snapshot(SnapshotState.LOCAL)


@pytest.mark.parametrize(
    ("said", "goes", "says"),
    [
        (verdict.copy(COPY, worker(), LOCAL, None), False, "it is the only copy of a snapshot of actor n/a"),
        (verdict.copy(COPY, worker(), snapshot(held=True), None), False, "wakes from it here without a download"),
        (verdict.copy(COPY, worker(), None, operation()), False, "operation o (Suspend) works with it"),
        (verdict.copy(COPY, DISTRUSTED, None, None), False, "nothing on worker w is destroyed"),
        (verdict.copy(COPY, worker(), None, None), True, "no snapshot of that id exists"),
        (verdict.copy(COPY, worker(), snapshot(SnapshotState.CONDEMNED), None), True, "snapshot s is condemned"),
        (verdict.copy(COPY, worker(), snapshot(SnapshotState.CORRUPT), None), True, "snapshot s is corrupt"),
    ],
)
def test_copies_on_workers(said: verdict.Verdict, goes: bool, says: str) -> None:
    assert isinstance(said, Goes if goes else Kept) and says in said.why


@pytest.mark.parametrize(
    ("fields", "high", "goes", "says"),
    [
        ({"pinned": True}, 0, "", "it is pinned"),
        ({"users": ("n/a on w",)}, 0, "", "n/a on w runs from it"),
        ({}, 0, "when somebody says `greenroom images prune`", "nobody uses it"),
        ({"ready": False}, 1 << 30, "--images-high", "it is here in part only"),
    ],
)
def test_images(fields: dict[str, Any], high: int, goes: str, says: str) -> None:
    said = verdict.image(ImageCache(id="c", high_bytes=high), CachedImage(digest="d", **fields))
    assert says in said.why and (goes in said.when if isinstance(said, Goes) else not goes)


def test_a_verdict_as_a_record() -> None:
    kept = verdict.judged("actor", "n/a", "database", Kept(why="so"), made_at=3.0)
    assert (kept.goes, kept.when, kept.made_at) == (False, "", 3.0)
    goes = verdict.judged("snapshot", "s", "snapshot store", Goes(why="so"), size_bytes=7)
    assert (goes.goes, goes.when, goes.size_bytes) == (True, "with the next round", 7)
