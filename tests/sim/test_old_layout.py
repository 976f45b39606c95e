"""An upgrade from the version before: what it saved wakes, is saved anew, and is collected; what only a worker has is
uploaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from greenroom.core.errors import Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import Durability, Snapshot, SnapshotState
from greenroom.testing.contracts.snapshots import RawDirectory, old_layout
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import SimWorld


async def moved_back(world: SimWorld, root: Path) -> list[Snapshot]:
    """What lies below ``root``, and its rows, as the version before would have written them."""
    raw, done = RawDirectory(root), []
    for row in await list_all(world.store, Snapshot):
        keys = blobs.keys_of(row)
        if not set(keys) <= set(raw.listed()):
            continue
        files = {file.name: raw.read(key) for file, key in zip(row.files, keys[1:], strict=True)}
        manifest = replace(row, version=0)
        old = old_layout(raw, manifest, files)
        for key in keys:
            raw.remove(key)
        done.append(await world.store.put(replace(old, version=row.version)))
    return done


async def until_only(world: SimWorld, root: Path, old: set[str]) -> None:
    """Until nothing else is left in the old layout."""
    async with asyncio.timeout(60):
        while {
            p.snapshot_id for k in RawDirectory(root).listed() if (p := blobs.place_of(k)) and not p.actor_uid
        } != old:
            await asyncio.sleep(0.002)


async def test_it_wakes_is_saved_anew_and_is_collected(make_world: Callable[..., Any]) -> None:
    async with make_world(workers=1) as world:
        await world.apply()
        key = await world.create("a")
        await world.request(key)
        await world.engine.suspend(key)
        store = world.root / "snapshots"
        old = await moved_back(world, store)
        assert len(old) == 2 and any(s.golden for s in old)
        for count in (2, 3, 4):
            assert (await world.request(key)).count == count
            await world.engine.suspend(key)
        await until_only(world, store, {s.id for s in old if s.golden})
        other = await world.create("b")
        assert (await world.request(other)).count == 1, "from the golden snapshot"
        await world.engine.collection.scrub()
        await world.settle()


async def test_what_only_a_worker_has_is_uploaded(make_world: Callable[..., Any]) -> None:
    async with make_world(workers=1) as world:
        await world.apply(durability=Durability.LOCAL)
        key = await world.create("a")
        await world.request(key)
        publish, world.snapshots.publish = world.snapshots.publish, refused
        await world.engine.suspend(key)
        await world.kill_agent("w0")
        held = world.root / "w0" / "held"
        (old,) = await moved_back(world, held)
        assert old.state is SnapshotState.LOCAL
        RawDirectory(held).write(f"{blobs.old_directory('0' * 32)}/unfinished", b"half")
        world.snapshots.publish = publish
        await world.start_agent("w0")
        async with asyncio.timeout(60):
            while (await world.store.get(Snapshot, old.id)).state is SnapshotState.LOCAL:
                await asyncio.sleep(0.002)
        assert await world.snapshots.manifest(old.actor_uid, old.id)
        await until_only(world, held, {old.id})
        for count in (2, 3, 4):
            assert (await world.request(key)).count == count
            await world.engine.suspend(key)
        await until_only(world, held, set())
        await until_only(world, world.root / "snapshots", set())
        await world.settle()


async def refused(*_: Any, **__: Any) -> Snapshot:
    raise Unavailable("the bucket is away")
