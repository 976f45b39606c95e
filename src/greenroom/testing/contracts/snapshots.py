"""The contract of `greenroom.snapshots.port.SnapshotStore`. An adapter's test is its factory and a way to its bytes:

class TestMySnapshots(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path): ...

    @pytest.fixture
    def stored(self, tmp_path):
        return lambda snapshot_id, name: path of the stored file
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from greenroom.core.errors import Conflict, DataLoss, InvalidArgument, NotFound
from greenroom.core.records import FileDigest, Snapshot, SnapshotScope
from greenroom.snapshots.port import SnapshotStore

Stored = Callable[[str, str], Path]

#: Larger than the pieces that adapters read and upload at a time, and no multiple of them.
_LARGE = bytes(range(256)) * (36 << 10) + b"end"
_FILES = {"checkpoint.img": b"small state", "pages.img": _LARGE, "empty": b""}


def make_snapshot(snapshot_id: str = "") -> Snapshot:
    return Snapshot(
        id=snapshot_id or uuid.uuid4().hex,
        namespace="default",
        actor="ada",
        actor_uid="u" * 32,
        template="counter",
        generation=7,
        scope=SnapshotScope.MEMORY,
        backend="gvisor",
        fingerprint="f",
        image_digest="sha256:" + "0" * 64,
        hostname="ada",
        created_at=1_700_000_000.25,
    )


def stage(directory: Path, files: dict[str, bytes] | None = None) -> Path:
    """What a sandbox backend would have written: files that nobody changes any more."""
    directory.mkdir(parents=True)
    for name, data in (_FILES if files is None else files).items():
        (directory / name).write_bytes(data)
    return directory


class SnapshotStoreContract:
    """Every test gets a new, empty store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        raise NotImplementedError

    @pytest.fixture
    def stored(self, tmp_path: Path) -> Stored:
        raise NotImplementedError

    # --- what goes right --------------------------------------------------------------------------------------

    async def test_published_is_fetched_and_verified(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot = make_snapshot()
        published = await store.publish(snapshot, stage(tmp_path / "stage"))
        assert published.files == tuple(
            FileDigest(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(_FILES.items())
        )
        assert msgspec.structs.replace(published, files=()) == snapshot
        assert await store.manifest(snapshot.id) == published
        assert await store.list() == [snapshot.id]
        directory = await store.fetch(published, tmp_path / "cache")
        for name, data in _FILES.items():
            assert (directory / name).read_bytes() == data
        await store.verify(published, directory)

    async def test_outlives_the_staged_files(self, store: SnapshotStore, tmp_path: Path) -> None:
        source = stage(tmp_path / "stage")
        published = await store.publish(make_snapshot(), source)
        for file in source.iterdir():
            file.unlink()
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))

    async def test_publishing_again_changes_nothing(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot, source = make_snapshot(), stage(tmp_path / "stage")
        first = await store.publish(snapshot, source)
        assert await store.publish(snapshot, source) == first
        assert await store.publish(snapshot, stage(tmp_path / "equal")) == first
        assert await store.list() == [snapshot.id]

    async def test_published_at_once_by_two(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot, source = make_snapshot(), stage(tmp_path / "stage")
        first, second = await asyncio.gather(store.publish(snapshot, source), store.publish(snapshot, source))
        assert first == second
        await store.verify(first, await store.fetch(first, tmp_path / "cache"))

    async def test_fetching_twice_gives_the_same_place(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        fetches = (store.fetch(published, tmp_path / "cache") for _ in range(3))
        first, second, third = await asyncio.gather(*fetches)
        assert first == second == third

    async def test_list_is_sorted(self, store: SnapshotStore, tmp_path: Path) -> None:
        ids = sorted(f"{n:02x}" * 16 for n in (0x0F, 0xF0, 0x77))
        for number, each in enumerate(reversed(ids)):
            await store.publish(make_snapshot(each), stage(tmp_path / f"stage{number}", {"data": b"x"}))
        assert await store.list() == ids

    async def test_deleted_is_gone(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        await store.delete(published.id)
        await store.delete(published.id)
        assert await store.list() == []
        assert not stored(published.id, "pages.img").exists()
        with pytest.raises(NotFound):
            await store.manifest(published.id)
        # The id is free again: nothing of the old content is in the way.
        again = await store.publish(make_snapshot(published.id), stage(tmp_path / "other", {"data": b"other"}))
        await store.verify(again, await store.fetch(again, tmp_path / "cache2"))

    async def test_progress(self, store: SnapshotStore, tmp_path: Path) -> None:
        total = sum(map(len, _FILES.values()))
        source = stage(tmp_path / "stage")
        stored: list[tuple[int, int]] = []
        published = await store.publish(make_snapshot(), source, lambda done, of: stored.append((done, of)))
        assert stored == sorted(stored) and all(done <= of == total for done, of in stored) and stored[-1][0] > 0
        read: list[tuple[int, int]] = []
        listener = lambda done, of: read.append((done, of))  # noqa: E731
        directory = await store.fetch(published, tmp_path / "cache", listener)
        await store.verify(published, directory, listener)
        assert all(0 < done <= of == total for done, of in read) and read

    # --- what is refused --------------------------------------------------------------------------------------

    async def test_another_content_is_a_conflict(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot = make_snapshot()
        first = await store.publish(snapshot, stage(tmp_path / "stage"))
        for number, other in enumerate(
            ({**_FILES, "empty": b"!"}, {"checkpoint.img": b"small state"}, {**_FILES, "more": b""})
        ):
            with pytest.raises(Conflict):
                await store.publish(snapshot, stage(tmp_path / f"other{number}", other))
        assert await store.manifest(snapshot.id) == first
        await store.verify(first, await store.fetch(first, tmp_path / "cache"))

    async def test_files_that_are_not_those_of_the_manifest(self, store: SnapshotStore, tmp_path: Path) -> None:
        """The manifest may come with its digests, from where the files have lain: what has rotted is not stored."""
        known = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        moved = msgspec.structs.replace(known, id=uuid.uuid4().hex)
        rotten = stage(tmp_path / "rotten", {**_FILES, "checkpoint.img": b"SMALL STATE"})
        with pytest.raises(DataLoss) as raised:
            await store.publish(moved, rotten)
        assert raised.value.reason == "SNAPSHOT_CORRUPT"
        assert await store.list() == [known.id]
        more = stage(tmp_path / "good", {**_FILES, "manifest.json": b"{}"})
        assert await store.publish(moved, more) == moved
        assert await store.publish(moved, more) == moved

    async def test_unknown(self, store: SnapshotStore, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            await store.manifest("ab" * 16)
        await store.delete("ab" * 16)

    @pytest.mark.parametrize("bad", ["", "ab", "../" * 8 + "etc/pass", "AB" * 16, "zz" * 16])
    async def test_only_ids(self, store: SnapshotStore, bad: str) -> None:
        with pytest.raises(InvalidArgument):
            await store.manifest(bad)

    async def test_only_plain_files(self, store: SnapshotStore, tmp_path: Path) -> None:
        link = stage(tmp_path / "link")
        (link / "secret").symlink_to("/etc/passwd")
        nested = stage(tmp_path / "nested")
        (nested / "sub").mkdir()
        forged = stage(tmp_path / "forged", {"manifest.json": b"{}"})
        for source in (link, nested, forged, stage(tmp_path / "nothing", {}), tmp_path / "missing"):
            with pytest.raises(InvalidArgument):
                await store.publish(make_snapshot(), source)
        assert await store.list() == []

    # --- what goes wrong with the bytes -----------------------------------------------------------------------

    async def test_one_wrong_byte(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        with stored(published.id, "pages.img").open("r+b") as file:
            file.seek(len(_LARGE) // 2)
            file.write(b"\xff\x00")
        with pytest.raises(DataLoss, match=r"pages\.img") as raised:
            await store.verify(published, await store.fetch(published, tmp_path / "cache"))
        assert raised.value.reason == "SNAPSHOT_CORRUPT"

    async def test_truncated(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        with stored(published.id, "pages.img").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(DataLoss, match=r"pages\.img") as raised:
            await store.fetch(published, tmp_path / "cache")
        assert raised.value.reason == "SNAPSHOT_CORRUPT"

    async def test_missing_file(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        stored(published.id, "checkpoint.img").unlink()
        with pytest.raises(DataLoss, match=r"checkpoint\.img"):
            await store.fetch(published, tmp_path / "cache")

    async def test_unreadable_manifest(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        manifest = stored(published.id, "manifest.json")
        for damage in (b"", b"{", manifest.read_bytes().replace(published.id.encode(), b"ab" * 16)):
            manifest.write_bytes(damage)
            with pytest.raises(DataLoss):
                await store.manifest(published.id)

    async def test_manifest_that_leads_elsewhere(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        for name in ("../secret", "/etc/passwd", "a/b", "..", "manifest.json"):
            forged = msgspec.structs.replace(published, files=(FileDigest(name=name, size_bytes=0, sha256="0" * 64),))
            with pytest.raises(DataLoss):
                await store.fetch(forged, tmp_path / "cache")
            with pytest.raises(DataLoss):
                await store.verify(forged, tmp_path)

    async def test_half_published_does_not_exist(self, store: SnapshotStore, stored: Stored, tmp_path: Path) -> None:
        """A publisher that was killed before the manifest left files, which the next attempt writes over."""
        snapshot = make_snapshot()
        leftover = stored(snapshot.id, "pages.img")
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half")
        assert await store.list() == []
        with pytest.raises(NotFound):
            await store.manifest(snapshot.id)
        published = await store.publish(snapshot, stage(tmp_path / "stage"))
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))

    async def test_cancelled_publish_leaves_nothing_running(
        self, store: SnapshotStore, stored: Stored, tmp_path: Path
    ) -> None:
        """Cancelled at different points, it is published as a whole or not at all, and can be published again."""
        source = stage(tmp_path / "stage")
        for turns in range(0, 40, 3):
            snapshot = make_snapshot()
            publishing = asyncio.create_task(store.publish(snapshot, source))
            for _ in range(turns):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.wait([publishing])
            if snapshot.id not in await store.list():
                assert not stored(snapshot.id, "pages.img").exists()
            published = await store.publish(snapshot, source)
            await store.verify(published, await store.fetch(published, tmp_path / "cache"))
