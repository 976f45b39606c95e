"""The snapshot store over a directory, and over a bucket (obstore's local one, used as if it were far away)."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import LocalStore

from greenroom.core.errors import ResourceExhausted, Unavailable
from greenroom.core.gc import blobs
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.port import SnapshotStore
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import (
    Raw,
    RawDirectory,
    SnapshotStoreContract,
    key_of,
    make_snapshot,
    stage,
)


class TestLocal(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        return ObjectSnapshotStore(tmp_path / "store")

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        return RawDirectory(tmp_path / "store")

    async def test_same_file_system_is_not_copied(self, store: SnapshotStore, tmp_path: Path) -> None:
        source = stage(tmp_path / "stage")
        published = await store.publish(make_snapshot(), source)
        stored = tmp_path / "store" / key_of(published, "pages.img")
        assert stored.samefile(source / "pages.img")
        fetched = await store.fetch(published, tmp_path / "cache")
        assert stored.samefile(fetched / "pages.img")
        # What is read stays, whatever becomes of the snapshot.
        await store.delete(blobs.keys_of(published))
        await store.verify(published, fetched)

    async def test_on_another_file_system_what_somebody_reads_is_not_made_anew(
        self, store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))

        def refuses(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuses)
        fetched = await store.fetch(published, tmp_path / "cache")
        assert all(path.is_symlink() for path in fetched.iterdir())
        reading = os.open(fetched, os.O_RDONLY)
        try:
            before = {entry.name for entry in os.scandir(reading)}
            assert await store.fetch(published, tmp_path / "cache") == fetched
            assert before and {entry.name for entry in os.scandir(reading)} == before
        finally:
            os.close(reading)
        await store.verify(published, fetched)

    async def test_a_deletion_that_the_file_system_refuses_is_a_store_that_refuses(
        self, store: SnapshotStore, tmp_path: Path
    ) -> None:
        one, two = [await store.publish(make_snapshot(), stage(tmp_path / n)) for n in ("one", "two")]
        stuck = tmp_path / "store" / key_of(one, "pages.img")
        stuck.unlink()
        stuck.mkdir()  # which no `unlink` removes, not even root's
        (stuck / "x").touch()
        with pytest.raises(Unavailable) as refused:
            await store.delete(blobs.keys_of(one))
        assert refused.value.reason == "SNAPSHOT_STORE_REFUSES" and str(stuck) in refused.value.message
        await store.delete(blobs.keys_of(two))

    async def test_nothing_stays_of_an_actor_not_even_its_directory(self, store: SnapshotStore, tmp_path: Path) -> None:
        made = [await store.publish(make_snapshot(), stage(tmp_path / n)) for n in ("one", "two")]
        for snapshot in made:
            await store.delete(blobs.keys_of(snapshot))
        assert [*(tmp_path / "store" / "snapshots" / "uu").iterdir()] == []

    async def test_publishing_while_the_directory_goes(self, store: SnapshotStore, tmp_path: Path) -> None:
        """Each deletes what it published, and the directory with it if it can, while the others publish."""

        async def come_and_go(number: int) -> None:
            for turn in range(10):
                published = await store.publish(make_snapshot(), stage(tmp_path / f"{number}-{turn}", {"f": b"x"}))
                await store.verify(published, await store.fetch(published, tmp_path / "cache"))
                await store.delete(blobs.keys_of(published))

        await asyncio.gather(*map(come_and_go, range(4)))

    async def test_what_a_killed_publisher_left_is_listed(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        left = f"{blobs.directory(published.actor_uid)}/.{0:016x}"
        RawDirectory(tmp_path / "store").write(left, b"half")
        [(_, objects)] = [found async for found in store.objects()]
        keys = [o.key for o in objects]
        assert blobs.strays(keys, [published], set()) == [left]
        await store.delete([left])

    async def test_a_new_store_on_the_same_directory_finds_all(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        again = ObjectSnapshotStore(f"file://{tmp_path / 'store'}")
        assert await again.manifest(published.actor_uid, published.id) == published


class TestBucket(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        bucket = BucketObjects(LocalStore(prefix=tmp_path / "bucket", mkdir=True), "bucket")
        return ObjectSnapshotStore("", objects=bucket)

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        return RawDirectory(tmp_path / "bucket")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
class TestFull:
    """A store on a file system of 4 MiB, another one than that of the staged files, so that it has to copy."""

    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        mount = tmp_path / "small"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "greenroom-test", str(mount)], check=True)
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    @pytest.mark.parametrize("kind", ["local", "bucket"])
    async def test_full_disk(self, small: Path, tmp_path: Path, kind: str) -> None:
        bucket = BucketObjects(LocalStore(prefix=small, mkdir=True), "bucket") if kind == "bucket" else None
        store = ObjectSnapshotStore(small, objects=bucket)
        kept = await store.publish(make_snapshot(), stage(tmp_path / "fits", {"data": bytes(1 << 20)}))
        with pytest.raises(ResourceExhausted) as raised:
            await store.publish(
                make_snapshot(), stage(tmp_path / "stage", {"first": b"1", "second": os.urandom(5 << 20)})
            )
        assert raised.value.reason == "DISK_FULL"
        assert RawDirectory(small).listed() == sorted(blobs.keys_of(kept))
        await store.verify(kept, await store.fetch(kept, tmp_path / "cache"))
        # There is room again for what fits.
        again = await store.publish(make_snapshot(), stage(tmp_path / "again", {"data": os.urandom(2 << 20)}))
        await store.verify(again, await store.fetch(again, tmp_path / "cache"))
