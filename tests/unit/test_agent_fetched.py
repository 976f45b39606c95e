"""The files of snapshots on a worker while they are read: shared, and gone with the last who reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_kit import Bench, short_directory, until
from msgspec.structs import replace
from obstore.store import LocalStore

from greenroom.agent.fetched import Fetched
from greenroom.core.errors import DataLoss, GreenroomError
from greenroom.core.records import Snapshot, SnapshotState
from greenroom.sandbox.sim import SNAPSHOT_FILE, MethodScript, ScriptedFailure, SimScript
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import RawDirectory, key_of


@pytest.fixture(params=["directory", "bucket"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    with short_directory() as root:
        bucket = BucketObjects(LocalStore(prefix=root / "store", mkdir=True), "bucket")
        store = ObjectSnapshotStore(root / "store", objects=bucket if request.param == "bucket" else None)
        async with Bench(root, store) as bench:
            yield bench


def cached(bench: Bench) -> list[Path]:
    return [*(bench.root / "w" / "cache").iterdir()]


async def asleep(bench: Bench) -> Snapshot:
    await bench.boot()
    saved = await bench.suspend(hold=False)
    assert saved.state is SnapshotState.PRESENT
    return saved


async def test_nothing_stays_after_a_wake(bench: Bench) -> None:
    saved = await asleep(bench)
    await bench.restore(saved)
    await until(lambda: not cached(bench))


async def test_nothing_stays_after_a_failed_wake(bench: Bench) -> None:
    saved = await asleep(bench)
    failing = SimScript(methods={"restore": MethodScript(failures=(ScriptedFailure(code="INTERNAL"),))})
    bench.backend.script = failing
    with pytest.raises(GreenroomError):
        await bench.restore(saved)
    await until(lambda: not cached(bench))
    bench.backend.script = SimScript()
    raw = RawDirectory(bench.root / "store")
    raw.write(key_of(saved, SNAPSHOT_FILE), b"{}")
    with pytest.raises(DataLoss):
        await bench.restore(saved, "again", 4)
    raw.remove(key_of(saved, SNAPSHOT_FILE))
    with pytest.raises(DataLoss):
        await bench.restore(saved, "and again", 5)
    await until(lambda: not cached(bench))


async def test_nothing_stays_of_an_agent_that_was_killed(bench: Bench) -> None:
    saved = await asleep(bench)
    await bench.snapshots.fetch(saved, bench.root / "w" / "cache")
    (bench.root / "w" / "cache" / ".gone-0123").mkdir()
    assert len(cached(bench)) == 2
    await bench.restart()
    assert cached(bench) == []
    await bench.restore(saved)


async def test_many_who_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    fetched, begun, go = Fetched(tmp_path / "cache"), 0, asyncio.Event()
    await fetched.clear()
    place = tmp_path / "cache" / "a"

    async def fetch(cache: Path) -> Path:
        nonlocal begun
        begun += not place.exists()
        await go.wait()
        place.mkdir(exist_ok=True)
        (place / "f").write_bytes(b"x")
        return place

    async def read() -> bytes:
        async with fetched.reading("a", fetch) as directory:
            await asyncio.sleep(0)
            return (directory / "f").read_bytes()

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.sleep(0)
    readers[0].cancel()
    go.set()
    assert await asyncio.gather(*readers[1:]) == [b"x", b"x"]
    assert not place.exists()
    assert await read() == b"x" and begun == 4, "made anew"
    await until(lambda: not [*(tmp_path / "cache").iterdir()])


async def test_a_held_one_is_read_like_the_others(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    await bench.restore(held)
    await bench.discard("end", 4)
    await bench.restore(replace(held, state=SnapshotState.PRESENT), "again", 5)
    await until(lambda: not cached(bench) and not [*(bench.root / "w" / "held" / "uploads").iterdir()])
