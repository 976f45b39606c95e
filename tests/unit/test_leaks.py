"""The comparison of what there is with what should be finds each kind of leak, and nothing where there is none."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import msgspec
import pytest
from core_views import actor
from msgspec.structs import replace

from greenroom.core.gc import blobs
from greenroom.core.gc.blobs import manifest_key
from greenroom.core.records import (
    ActorState,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    PoolSpec,
    Replica,
    SnapshotState,
    TemplateState,
    WorkerState,
)
from greenroom.images.uses import Uses, holder_of, user_of
from greenroom.store.sqlite import SqliteStore
from greenroom.store.sqlite_file import DATABASE_FILE
from greenroom.testing.contracts.store_world import operation, snapshot, template, worker
from greenroom.testing.leaks import Wanted, differences, leaks, read
from greenroom.testing.leaks.compare import objects_of
from greenroom.testing.leaks.places import Machine, Place, Sandbox, look
from greenroom.testing.leaks.rows import Rows

GOLDEN = snapshot("golden", namespace="ns", golden=True, version=1)
ASLEEP = snapshot("asleep", namespace="ns", actor="a", actor_uid="u", version=1)
HELD = replace(ASLEEP, id="e" * 32, held=True, worker="p-0")

MORE = f"{blobs.directory('u')}/{blobs.blob_name('0' * 64, blobs.upload_name(HELD.id, 1))}"

#: ``a`` runs on p-0, ``b`` sleeps and its snapshot is held there; p-0 has a warm sandbox too.
ROWS = Rows(
    actors=(
        actor(ActorState.RUNNING, worker="p-0", snapshot="asleep"),
        actor(ActorState.SUSPENDED, name="b", uid="v", snapshot=HELD.id),
    ),
    templates=(template(namespace="ns", golden_snapshot="golden", state=TemplateState.READY),),
    snapshots=(GOLDEN, ASLEEP, HELD),
    workers=(worker("p-0", used=1, state=WorkerState.ACTIVE, backend="gvisor"),),
    pools=(Pool(name="p", uid="1", spec=PoolSpec(replicas=1), created_at=1.0),),
)
PLACE = Place(
    state_dir=Path("/w/p-0"),
    sandboxes=(Sandbox("s1", "u", 7, 70, "gr1"), Sandbox("s2", "", 8, 80, "gr2")),
    held=frozenset(blobs.keys_of(HELD)),
    logs={"u": 8, "v": 1},
    devices=frozenset({"gr1", "gr2"}),
    cgroups=frozenset({"s1", "s2"}),
    netns=True,
    processes={"s1": (7, 17), "s2": (8,)},
    uses=frozenset({"u", "warm"}),
    is_holder=True,
)
MACHINE = Machine(
    places={"p-0": PLACE},
    agents={"p-0": 1},
    objects=frozenset(key for s in (GOLDEN, ASLEEP, HELD) for key in objects_of(s)),
)


def test_nothing_where_there_is_none() -> None:
    assert differences(ROWS, MACHINE) == []


def there(**changes: Any) -> list[str]:
    return differences(ROWS, with_(MACHINE, places={"p-0": with_(PLACE, **changes)}))


def at(place: Place, **changes: Any) -> list[str]:
    return differences(ROWS, with_(MACHINE, places={"p-0": PLACE, "p-1": with_(place, **changes)}))


GONE = Place(state_dir=Path("/w/p-1"), exists=False)
BOX = Sandbox("s3", "x", 9, 90)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sandboxes": (*PLACE.sandboxes, BOX)}, "sandbox: 1 of actor x on worker p-0, where there should be 0"),
        ({"sandboxes": (*PLACE.sandboxes, with_(BOX, uid="u"))}, "sandbox: 2 of actor u on worker p-0, where there s"),
        ({"sandboxes": PLACE.sandboxes[1:]}, "lost: the sandbox of actor ns/a, which is Running on worker p-0"),
        ({"sandboxes": (with_(PLACE.sandboxes[0], pid=0), PLACE.sandboxes[1])}, "sandbox: s1 of worker p-0 has no pro"),
        ({"broken": ("s4",)}, "sandbox: directory s4 of worker p-0, which says nothing"),
        ({"processes": {"s9": (99,)}}, "process: 99 of sandbox s9 of worker p-0, which is not there"),
        ({"devices": frozenset({"gr1", "gr2", "gr3"})}, "interface: gr3 of worker p-0"),
        ({"devices": frozenset({"gr2"})}, "lost: interface gr1 of a sandbox on worker p-0"),
        ({"cgroups": frozenset({"s5"})}, "cgroup: s5 of worker p-0"),
        (
            {"held": PLACE.held | {blobs.manifest_key("u", "f" * 32)}},
            f"held copy: {'f' * 32} on worker p-0, of which no row says so",
        ),
        ({"held": PLACE.held | {MORE}}, f"held copy: {HELD.id} on worker p-0, has more files than its row says"),
        ({"staged": frozenset({"u"})}, "staged: of actor ns/a (u) on worker p-0"),
        ({"cached": frozenset({"c"})}, "cached: c on worker p-0"),
        ({"logs": {"x": 1}}, "log: of actor x on worker p-0, which is deleted"),
        ({"logs": {"u": 9}}, "log: 9 files of actor ns/a (u) on worker p-0, where 8 are kept"),
        ({"uses": PLACE.uses | {"v"}}, "image use: by actor ns/b (v), which has no sandbox on worker p-0"),
        ({"sandboxes": PLACE.sandboxes[:1]}, "image use: by warm sandboxes of worker p-0, which has none"),
        ({"unfinished": ("welcome.new",)}, "unfinished: welcome.new of worker p-0"),
        ({"exists": False}, "lost: the state directory of worker p-0"),
    ],
)
def test_on_a_worker(changes: dict[str, Any], said: str) -> None:
    assert any(line.startswith(said) for line in there(**changes)), there(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exists": True}, "directory: /w/p-1 of worker p-1, which is no more"),
        ({"netns": True}, "network namespace: of worker p-1, which is no more"),
        ({"cgroups": frozenset({"s"})}, "cgroup: s of worker p-1, which is no more"),
        ({"processes": {"s": (5,)}}, "process: 5 of sandbox s of worker p-1, which is no more"),
        ({"is_holder": True}, "image use: by worker p-1, which is no more"),
    ],
)
def test_of_a_worker_that_is_gone(changes: dict[str, Any], said: str) -> None:
    assert at(GONE) == []
    assert at(GONE, **changes) == [said]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agents": {"p-0": 2}}, "process: 2 agents of worker p-0, where there should be 1"),
        ({"agents": {"p-0": 1, "p-1": 1}}, "process: 1 agents of worker p-1, where there should be 0"),
        ({"processes": {4: "tar --create\n"}}, "process: 4, tar --create"),
        ({"mounts": ("/m",)}, "mount: /m"),
        ({"holders": frozenset({"h"})}, "image use: holder h is no worker"),
        ({"objects": MACHINE.objects | {"snapshots/aa/b/.f.1"}}, "object: snapshots/aa/b/.f.1 belongs to no snapshot"),
        (
            {"objects": MACHINE.objects - {manifest_key("u", "asleep")}},
            f"lost: object {manifest_key('u', 'asleep')} of snapshot asleep of ns/a",
        ),
    ],
)
def test_on_the_machine(changes: dict[str, Any], said: str) -> None:
    assert differences(ROWS, with_(MACHINE, **changes)) == [said]


LOCAL = replace(HELD, id="other", state=SnapshotState.LOCAL)
RUNS = operation("op", kind=OperationKind.RESUME, namespace="ns", name="a", uid="u")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"snapshots": (*ROWS.snapshots, replace(ASLEEP, id="old"))}, "snapshot row: old of ns/a, which nothing needs"),
        ({"snapshots": (GOLDEN, HELD)}, "lost: snapshot asleep, which actor ns/a needs, has no row"),
        ({"snapshots": (ASLEEP, HELD)}, "lost: snapshot golden, which template ns/t needs, has no row"),
        ({"snapshots": (*ROWS.snapshots, LOCAL)}, "lost: other of ns/a, which only worker p-0 had"),
        ({"snapshots": (*ROWS.snapshots, LOCAL)}, "under way: snapshot other of ns/a is Local"),
        ({"templates": ()}, "actor row: ns/a is of template t, which is not there"),
        ({"operations": (RUNS,)}, "under way: Resume of ns/a (op, begun)"),
        (
            {"leases": (Lease(uid="u", owner="one", operation="op", generation=1, expires_at=1.0),)},
            "lease row: of actor u for operation op, which does not run",
        ),
        ({"workers": (replace(ROWS.workers[0], used=2),)}, "slots: 2 of worker p-0 are taken, by 1 actors"),
        ({"workers": ()}, "slots: 1 actors are bound to worker p-0, which has no row"),
        ({"workers": ()}, "worker row: p-0, which is wanted, is missing"),
        ({"workers": (*ROWS.workers, worker("p-1"))}, "worker row: p-1 is in no pool any more"),
        (
            {"workers": (replace(ROWS.workers[0], state=WorkerState.STALLED),)},
            "under way: worker p-0 is Stalled",
        ),
        (
            {"actors": (*ROWS.actors, actor(ActorState.RESUMING, name="c", uid="w"))},
            "under way: actor ns/c is Resuming",
        ),
        (
            {"actors": (*ROWS.actors, actor(ActorState.SUSPENDED, name="g", uid="w", golden=True))},
            "actor row: ns/g made a golden snapshot, and nobody prepares its template any more",
        ),
    ],
)
def test_in_the_database(changes: dict[str, Any], said: str) -> None:
    assert said in differences(with_(ROWS, **changes), MACHINE)


def test_of_replicas_and_operations() -> None:
    ended: list[Operation] = [replace(RUNS, id=str(n), state=OperationState.DONE) for n in range(11_001)]
    found = differences(
        with_(
            ROWS, replicas=(Replica(name="a", incarnation="1"), Replica(name="b", incarnation="1")), operations=ended
        ),
        MACHINE,
        Wanted(replicas={"a"}),
    )
    assert found == ["operation rows: 11001, where 10000 are kept", "replica row: b runs no more"]


# --- and it is read as it is ------------------------------------------------------------------------------


async def test_rows_are_read_beside_the_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / DATABASE_FILE)
    store = await SqliteStore.open(tmp_path)
    await store.put(ROWS.pools[0])
    await store.put(template(namespace="ns"))
    rows = read(tmp_path / DATABASE_FILE)
    await store.close()
    assert [pool.name for pool in rows.pools] == ["p"] and [t.name for t in rows.templates] == ["t"]
    assert dict(rows.counts)["pools"] == 1 and dict(rows.counts)["leases"] == 0


async def empty_database(data: Path) -> None:
    data.mkdir()
    await (await SqliteStore.open(data)).close()


def test_a_data_directory_is_looked_at_whole(tmp_path: Path) -> None:
    data = tmp_path / "d"
    asyncio.run(empty_database(data))
    assert leaks(data) == []
    place = data / "workers" / "p-0"
    for name in ("logs/u/000000000001", "staging/u/s.json", "held/snapshots/ab/abc/manifest.json", "cache/abc/f"):
        (place / name).parent.mkdir(parents=True)
        (place / name).write_bytes(b"")
    (data / "snapshots/snapshots/ab/abc").mkdir(parents=True)
    (data / "snapshots/snapshots/ab/abc/.f.1").write_bytes(b"")
    uses, holder = Uses(data / "images"), holder_of("p-0", place)
    uses.open("sha256:" + "0" * 64)
    uses.add("sha256:" + "0" * 64, user_of(holder, "u"))
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(place / "sandboxes" / "sandboxes" / ("ab" * 16))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        gone = leaks(data)
        wanted = differences(
            Rows(),
            look(data, {"p-0": place}, data / "images", data / "snapshots"),
            Wanted(workers={"p-0"}),
        )
        process.communicate(b"")
    assert gone == [
        f"directory: {place} of worker p-0, which is no more",
        "image use: by worker p-0, which is no more",
        "object: snapshots/ab/abc/.f.1 belongs to no snapshot",
        f"process: {process.pid} of sandbox {'ab' * 16} of worker p-0, which is no more",
    ]
    assert wanted == [
        "cached: abc on worker p-0",
        "held copy: snapshots/ab/abc/manifest.json on worker p-0, of which no row says so",
        "image use: by actor u, which has no sandbox on worker p-0",
        "log: of actor u on worker p-0, which is deleted",
        "object: snapshots/ab/abc/.f.1 belongs to no snapshot",
        f"process: {process.pid} of sandbox {'ab' * 16} of worker p-0, which is not there",
        "staged: of actor u on worker p-0",
        "worker row: p-0, which is wanted, is missing",
    ]
    assert leaks(data)[0].startswith("directory: ")


def test_a_process_that_only_looks_is_none_of_them(tmp_path: Path) -> None:
    """The one that runs this may name the directory."""
    script = """
import msgspec, sys
from pathlib import Path
from greenroom.testing.leaks.places import look
data = Path(sys.argv[1])
sys.stdout.buffer.write(msgspec.json.encode(sorted(look(data, {}, data, data).processes.values())))
"""
    said = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, env=os.environ
    )
    assert msgspec.json.decode(said.stdout) == []
