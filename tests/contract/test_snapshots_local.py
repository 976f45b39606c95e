"""The snapshot store over a directory, and over a bucket (obstore's local one, used as if it were far away)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import LocalStore

from greenroom.core.errors import ResourceExhausted
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.port import SnapshotStore
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import SnapshotStoreContract, Stored, make_snapshot, stage


def _stored(root: Path) -> Stored:
    return lambda snapshot_id, name: root / "snapshots" / snapshot_id[:2] / snapshot_id / name


class TestLocal(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        return ObjectSnapshotStore(tmp_path / "store")

    @pytest.fixture
    def stored(self, tmp_path: Path) -> Stored:
        return _stored(tmp_path / "store")

    async def test_same_file_system_is_not_copied(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        source = stage(tmp_path / "stage")
        published = await store.publish(make_snapshot(), source)
        assert stored(published.id, "pages.img").samefile(source / "pages.img")
        assert await store.fetch(published, tmp_path / "cache") == stored(published.id, "pages.img").parent
        assert not (tmp_path / "cache").exists()

    async def test_a_new_store_on_the_same_directory_finds_all(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        again = ObjectSnapshotStore(f"file://{tmp_path / 'store'}")
        assert await again.manifest(published.id) == published


class TestBucket(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        bucket = BucketObjects(LocalStore(prefix=tmp_path / "bucket", mkdir=True), "bucket")
        return ObjectSnapshotStore("", objects=bucket)

    @pytest.fixture
    def stored(self, tmp_path: Path) -> Stored:
        return _stored(tmp_path / "bucket")

    async def test_damaged_cache_is_fetched_anew(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        cached = await store.fetch(published, tmp_path / "cache")
        (cached / "pages.img").write_bytes(b"short")
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [published.id]


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
        files = [path for path in small.rglob("*") if path.is_file()]
        assert {path.parent.name for path in files} == {kept.id}
        await store.verify(kept, await store.fetch(kept, tmp_path / "cache"))
        # There is room again for what fits.
        again = await store.publish(make_snapshot(), stage(tmp_path / "again", {"data": os.urandom(2 << 20)}))
        await store.verify(again, await store.fetch(again, tmp_path / "cache"))
