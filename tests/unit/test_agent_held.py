"""Snapshots that stay on the worker's disk: kept durably, uploaded later, let go; whoever is killed in between."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_kit import SPEC, Bench, Said, short_directory, until
from msgspec.structs import replace
from obstore.store import LocalStore

from greenroom.agent.agent import Agent
from greenroom.agent.held import Held
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import Conflict, DataLoss, GreenroomError, NotFound, ResourceExhausted, Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import FileDigest, Snapshot, SnapshotState
from greenroom.images.store import DiskImageStore
from greenroom.sandbox.sim import SNAPSHOT_FILE
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.objects import OnBytes, Stop
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import RawDirectory, key_of, make_snapshot, stage


class Slow(ObjectSnapshotStore):
    """A store in a bucket whose uploads wait for ``gate``."""

    def __init__(self, root: Path) -> None:
        super().__init__("", objects=BucketObjects(LocalStore(prefix=root, mkdir=True), "bucket"))
        self.gate = asyncio.Event()
        self.gate.set()
        self.uploads = 0

    async def publish(
        self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None, base: Sequence[FileDigest] = ()
    ) -> Snapshot:
        self.uploads += 1
        await self.gate.wait()
        return await super().publish(snapshot, source, progress, base)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root, Slow(root / "bucket")) as bench:
            yield bench
            cache = bench.root / "w" / "cache"
            await until(lambda: not [*cache.iterdir()])  # whatever became of the wakes


def slow(bench: Bench) -> Slow:
    assert isinstance(bench.snapshots, Slow)
    return bench.snapshots


def file_of(bench: Bench, snapshot: Snapshot) -> Path:
    """Of the one file that a simulated sandbox has."""
    return bench.root / "w" / "held" / key_of(snapshot, SNAPSHOT_FILE)


def leftovers(bench: Bench) -> list[Path]:
    return [path for path in (bench.root / "w" / "held" / "snapshots").rglob("*") if path.is_file()]


async def upload(bench: Bench, snapshot: Snapshot) -> Snapshot:
    answer: api.Published = await bench.call(api.Upload(snapshot_id=snapshot.id))
    return answer.snapshot


async def release(bench: Bench, snapshot: Snapshot) -> None:
    await bench.call(api.Release(snapshot_id=snapshot.id))


async def test_a_whole_life_with_an_agent_that_dies_between_all_steps(bench: Bench) -> None:
    await bench.boot()
    await bench.restart()
    announced = bench.manifest()
    await bench.checkpoint(announced)
    await bench.restart()
    held = await bench.publish(announced)
    assert held.state is SnapshotState.LOCAL and held.worker == "w" and held.files
    assert await slow(bench).list() == []
    staged = bench.root / "w" / "staging" / "a" / held.id / SNAPSHOT_FILE
    assert staged.samefile(file_of(bench, held)), "moved or linked, not copied"
    await bench.restart()
    assert await bench.publish(announced) == held
    await bench.discard()
    assert bench.state() is None
    await bench.restart()
    assert await bench.publish(announced) == held, "also when nothing is staged any more"
    await bench.restore(held)
    assert bench.state() is ResidentState.RUNNING
    await bench.restart()
    await bench.discard("end", 4)
    present = await upload(bench, held)
    assert present == replace(held, state=SnapshotState.PRESENT)
    assert await slow(bench).manifest(held.actor_uid, held.id) == present
    await bench.restart()
    assert await upload(bench, held) == present and slow(bench).uploads == 1
    await bench.restore(held, "again", 5)
    await bench.restart()
    await release(bench, held)
    await release(bench, held)
    assert leftovers(bench) == []
    await bench.restart()
    with pytest.raises(NotFound) as gone:
        await upload(bench, held)
    assert gone.value.reason == "NOT_HELD"
    await bench.restore(present, "from the store", 6)


async def test_what_is_neither_staged_nor_held_can_not_be_kept(bench: Bench) -> None:
    await bench.boot()
    with pytest.raises(NotFound) as missing:
        await bench.publish(bench.manifest())
    assert missing.value.reason == "NOT_STAGED"
    await release(bench, make_snapshot())


async def test_the_restored_actor_is_the_one_that_was_kept(bench: Bench) -> None:
    await bench.boot()
    bench.backend._resident["ns/a"].count = 41
    held = await bench.suspend()
    await bench.restore(held)
    assert bench.backend._resident["ns/a"].count == 41
    assert not (bench.root / "w" / "cache" / held.id).exists() and slow(bench).uploads == 0


async def test_uploads_at_once_are_one_and_who_goes_away_stops_nothing(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    slow(bench).gate.clear()
    asked = [asyncio.create_task(upload(bench, held)) for _ in range(3)]
    await until(lambda: slow(bench).uploads)
    asked[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked[0]
    slow(bench).gate.set()
    first, second = await asyncio.gather(*asked[1:])
    assert first == second == await slow(bench).manifest(held.actor_uid, held.id) and slow(bench).uploads == 1


async def test_a_release_stops_the_upload_first(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    slow(bench).gate.clear()
    asked = asyncio.create_task(upload(bench, held))
    await until(lambda: slow(bench).uploads)
    await release(bench, held)
    with pytest.raises(NotFound) as gone:
        await asked
    assert gone.value.reason == "NOT_HELD"
    slow(bench).gate.set()
    assert await slow(bench).list() == [] and leftovers(bench) == []


async def test_an_upload_under_way_when_the_agent_ends_can_be_asked_for_again(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    slow(bench).gate.clear()
    asked = asyncio.create_task(upload(bench, held))
    await until(lambda: slow(bench).uploads)
    await bench.restart()
    with pytest.raises(Unavailable) as gone:
        await asked
    assert gone.value.reason == "WORKER_DISCONNECTED"
    slow(bench).gate.set()
    assert (await upload(bench, held)).state is SnapshotState.PRESENT


async def test_who_is_not_registered_says_nothing_of_what_it_does_not_have(bench: Bench) -> None:
    """Another process with this worker's name, and an empty disk: what it has not would count as lost."""
    await bench.boot()
    held = await bench.suspend()
    await bench.agent.close(wipe=False)
    config = dataclasses.replace(bench.config, state_dir=bench.root / "another disk")
    stranger = Agent(config, bench.backend, DiskImageStore(bench.root / "images"), bench.snapshots)
    await stranger.open()
    for call in (api.Upload(snapshot_id=held.id), api.Release(snapshot_id=held.id)):
        with pytest.raises(Unavailable) as refused:
            await stranger.handle(call, bench.said)
        assert refused.value.reason == "WORKER_NOT_REGISTERED"
    await stranger.close(wipe=False)
    await bench.start()
    assert await upload(bench, held) == replace(held, state=SnapshotState.PRESENT)


async def test_what_could_not_be_listed_is_not_taken_for_rubbish(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.boot()
    held = await bench.suspend()
    before = leftovers(bench)
    await bench.agent.close(wipe=False)
    scandir, refused = os.scandir, []

    def refuses(path: Any) -> Any:
        if str(path).endswith(f"/held/snapshots/{held.actor_uid}") and not refused:
            refused.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return scandir(path)

    with monkeypatch.context() as full:
        full.setattr(os, "scandir", refuses)
        with pytest.raises(Unavailable, match="Too many open files"):
            await bench.start()
    assert refused and leftovers(bench) == before
    await bench.start()
    assert await upload(bench, held) == replace(held, state=SnapshotState.PRESENT)


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["another byte", "truncated", "missing"])
async def test_a_damaged_one(bench: Bench, damage: str) -> None:
    """Alone it is refused, by name and without a sandbox; where the store has it too, that is taken."""
    await bench.boot()
    bench.backend._resident["ns/a"].count = 41
    held = await bench.suspend()
    path = file_of(bench, held)
    good = path.read_bytes()

    def spoil() -> None:
        path.unlink()
        if damage != "missing":
            path.write_bytes(good.replace(b"41", b"14") if damage == "another byte" else good[:-1])

    spoil()
    with pytest.raises(DataLoss) as lost:
        await bench.restore(held)
    assert lost.value.reason == "SNAPSHOT_CORRUPT" and bench.state() is None
    with pytest.raises(DataLoss):
        await upload(bench, held)
    assert await slow(bench).list() == [], "what has rotted is not published"
    path.write_bytes(good)
    present = await upload(bench, held)
    spoil()
    await bench.restore(present, "again", 4)
    assert bench.backend._resident["ns/a"].count == 41
    assert leftovers(bench) == [], "it is of no use to anybody"


async def test_a_damaged_one_while_the_store_does_not_answer_is_not_given_up(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    present = await upload(bench, held)
    file_of(bench, held).write_bytes(b"{}")

    async def down(actor_uid: str, snapshot_id: str) -> Snapshot:
        raise Unavailable("the store is away")

    manifest, slow(bench).manifest = slow(bench).manifest, down  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await bench.restore(present)
    slow(bench).manifest = manifest  # type: ignore[method-assign]
    await bench.restore(present, "again", 4)


@pytest.mark.parametrize(
    "says",
    [
        NotFound("none of that name"),
        Unavailable("the store is away"),
        DataLoss("its manifest can't be read", reason="SNAPSHOT_CORRUPT"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda says: type(says).__name__,
)
async def test_a_damaged_one_is_let_go_of_only_when_the_store_is_known_to_have_it(
    bench: Bench, says: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged copy is better than none: somebody may mend it, and most of it is there."""
    await bench.boot()
    held = await bench.suspend()
    present = await upload(bench, held)
    file_of(bench, held).write_bytes(b"{}")
    before = leftovers(bench)

    async def manifest(actor_uid: str, snapshot_id: str) -> Snapshot:
        raise says

    with monkeypatch.context() as store:
        store.setattr(slow(bench), "manifest", manifest)
        with pytest.raises(GreenroomError):
            await bench.restore(present)
    assert held.id in bench.agent._held and leftovers(bench) == before and bench.state() is None
    await bench.restore(present, "again", 4)
    assert held.id not in bench.agent._held and leftovers(bench) == []
    assert bench.state() is ResidentState.RUNNING


async def test_another_content_under_the_same_id_is_refused(bench: Bench, tmp_path: Path) -> None:
    await bench.boot()
    held = await bench.suspend()
    await ObjectSnapshotStore.publish(slow(bench), replace(held, files=()), stage(tmp_path / "x", {"f": b"other"}))
    with pytest.raises(Conflict):
        await upload(bench, held)


async def test_half_made_ones_are_removed_and_others_stay(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    of_another = blobs.blob_key("b", replace(held.files[0], upload=blobs.upload_name("ab" * 16, 1)))
    of_the_same = blobs.blob_key("a", replace(held.files[0], upload=blobs.upload_name("ab" * 16, 1)))
    raw = RawDirectory(bench.root / "w" / "held")
    before = raw.listed()
    for key in (of_another, of_the_same, f"{blobs.directory('a')}/.0123"):
        raw.write(key, b"half")
    await bench.restart()
    assert raw.listed() == before
    assert (await upload(bench, held)).state is SnapshotState.PRESENT


# --- a disk that is full, a process that is killed --------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "greenroom-test", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    """Staged on another file system, so that it has to be copied: the one way to need room."""
    held = Held(small / "held", "w", ObjectSnapshotStore(tmp_path / "store"))
    await held.open()
    kept = await held.keep(make_snapshot(), stage(tmp_path / "fits", {"f": os.urandom(1 << 20)}))
    with pytest.raises(ResourceExhausted) as full:
        await held.keep(make_snapshot(), stage(tmp_path / "large", {"a": b"1", "f": os.urandom(4 << 20)}))
    assert full.value.reason == "DISK_FULL"
    assert RawDirectory(small / "held").listed() == sorted(blobs.keys_of(kept)), "nothing of it remains"
    assert (await held.upload(kept.id, lambda done, total: None)).state is SnapshotState.PRESENT
    again = Held(small / "held", "w", ObjectSnapshotStore(tmp_path / "store"))
    await again.open()
    assert kept.id in again


_KEEPER = """
import asyncio, sys
from pathlib import Path
from msgspec.json import decode
from greenroom.agent.held import Held
from greenroom.core.records import Snapshot
from greenroom.snapshots.store import ObjectSnapshotStore

async def main(root, source, snapshot):
    held = Held(root / "held", "w", ObjectSnapshotStore(root / "store"))
    await held.open()
    print("begins", flush=True)
    await held.keep(snapshot, source)
    print("kept", flush=True)
    await held.upload(snapshot.id, lambda done, total: None)
    print("uploaded", flush=True)

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), decode(sys.argv[3], type=Snapshot)))
"""


@pytest.mark.parametrize("after_ms", [0, 3, 10, 30, 60, 120])
async def test_a_process_that_is_killed_at_any_moment(tmp_path: Path, after_ms: int) -> None:
    """``kill -9``: what was said to be kept is there and whole; else it is kept anew; nothing half made stays."""
    source = stage(tmp_path / "stage", {"a": os.urandom(1 << 20), "f": os.urandom(24 << 20)})
    snapshot = make_snapshot()
    arguments = [str(tmp_path), str(source), msgspec.json.encode(snapshot).decode()]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _KEEPER, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begins\n"
    await asyncio.sleep(after_ms / 1000)
    with contextlib.suppress(ProcessLookupError):  # it was quick
        process.send_signal(signal.SIGKILL)
    said = await process.stdout.read()
    await process.wait()
    store = ObjectSnapshotStore(tmp_path / "store")
    held = Held(tmp_path / "held", "w", store)
    await held.open()
    if b"kept" in said:
        assert snapshot.id in held
    if b"uploaded" in said:
        assert await store.list() == [(snapshot.actor_uid, snapshot.id)]
    kept = await held.keep(snapshot, source)
    await store.verify(kept, await held.fetch(kept, tmp_path / "read"))
    present = await held.upload(kept.id, lambda done, total: None)
    assert present.files == kept.files and await store.list() == [(snapshot.actor_uid, snapshot.id)]


async def test_progress_of_a_long_upload(tmp_path: Path) -> None:
    """In a bucket that takes its time; the calls of several replicas all hear of it."""
    with short_directory() as root:
        async with Bench(root, _dripping(root / "bucket")) as bench:
            await bench.boot()
            announced = bench.manifest()
            await bench.checkpoint(announced)
            staged = bench.root / "w" / "staging" / "a" / announced.id
            (staged / "pages").write_bytes(os.urandom(6 << 20))
            held = await bench.publish(announced)
            await bench.discard()
            heard = [Said(), Said()]
            await asyncio.gather(*(bench.agent.handle(api.Upload(snapshot_id=held.id), said) for said in heard))
            for said in heard:
                said.check_rate()
                done = [p.done_bytes for _, p in said.progresses]
                assert said.phases == ["upload"] and len(done) >= 2 and done == sorted(done)
                assert {p.total_bytes for _, p in said.progresses} == {held.size_bytes}
            fetched = Said()
            bench.agent._held._ids.clear()  # as on another worker
            bench.said = fetched
            await bench.restore(replace(held, state=SnapshotState.PRESENT))
            fetched.check_rate()
            assert "fetch" in fetched.phases


def _dripping(root: Path) -> ObjectSnapshotStore:
    loop = asyncio.get_running_loop()

    def drip(stop: Stop, seconds: float) -> None:
        """Each piece takes so long by the clock of those who hear of it, who may be later than this thread."""
        moved = stop.moved

        def slowly(count: float) -> None:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(seconds), loop).result()
            moved(count)

        stop.moved = slowly  # type: ignore[method-assign]

    class Dripping(BucketObjects):
        def put_file(
            self, prefix: str, source: Path, staged: str, name: Callable[[int, str], str], stop: Stop
        ) -> tuple[int, str]:
            drip(stop, 0.1)
            return super().put_file(prefix, source, staged, name, stop)

        def download(self, key: str, target: Path, stop: Stop) -> int | None:
            drip(stop, 0.2)
            return super().download(key, target, stop)

    return ObjectSnapshotStore("", objects=Dripping(LocalStore(prefix=root, mkdir=True), "bucket"))


async def test_errors_of_the_disk_are_said(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()

    async def broken(actor_uid: str, snapshot_id: str) -> Snapshot:
        raise OSError(5, "Input/output error")

    slow(bench).manifest = broken  # type: ignore[method-assign]
    with pytest.raises(GreenroomError) as failed:
        await upload(bench, held)
    assert failed.value.reason == "WORKER_IO"


async def test_a_removal_that_failed_is_not_done_at_the_next_try(bench: Bench) -> None:
    await bench.call(api.Start(**bench.ids(), identity=bench.identity(), spec=SPEC, image_digest=""))
    saved = await bench.suspend()
    local = bench.agent._held._local
    retract = local.retract

    async def fails(*_: str) -> None:
        raise Unavailable("the disk does not answer")

    local.retract = fails  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await bench.call(api.Release(snapshot_id=saved.id))
    local.retract = retract  # type: ignore[method-assign]
    await bench.call(api.Release(snapshot_id=saved.id))
    assert not await local.list()


async def test_a_copy_that_was_given_up_while_it_was_written_is_known_and_let_go(tmp_path: Path) -> None:
    """The suspend was cancelled; what a thread writes all the same is found without a restart of the agent."""
    held = Held(tmp_path / "held", "w", ObjectSnapshotStore(tmp_path / "s"))
    await held.open()
    objects = held._local._objects
    put_new, writes, goes_on = objects.put_new, threading.Event(), threading.Event()

    def late(key: str, data: bytes, staged: str) -> bool:
        writes.set()
        goes_on.wait(10)
        return put_new(key, data, staged)

    objects.put_new = late  # type: ignore[method-assign]
    snapshot = make_snapshot()
    keeping = asyncio.create_task(held.keep(snapshot, stage(tmp_path / "staged")))
    assert await asyncio.to_thread(writes.wait, 10)
    keeping.cancel()
    await asyncio.sleep(0)
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    assert held.ids() == {snapshot.id}
    await held.release(snapshot.id)
    assert not [path for path in (tmp_path / "held" / "snapshots").rglob("*") if path.is_file()]
