"""The contract of `greenroom.snapshots.port.SnapshotStore`. An adapter's test is its factory and a way to its bytes:

class TestMySnapshots(SnapshotStoreContract):
    @pytest.fixture
    def store(self, tmp_path): ...

    @pytest.fixture
    def raw(self, tmp_path):
        return RawDirectory(where the objects lie as files)
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
from msgspec.structs import replace

from greenroom.core.errors import Conflict, DataLoss, InvalidArgument, NotFound, Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import FileDigest, Snapshot, SnapshotScope, SnapshotState
from greenroom.snapshots.port import SnapshotStore


class Raw(Protocol):
    """Objects past the store."""

    def listed(self) -> list[str]: ...
    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def remove(self, key: str) -> None: ...


class RawDirectory:
    def __init__(self, root: Path) -> None:
        self.root = root

    def listed(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def remove(self, key: str) -> None:
        (self.root / key).unlink()


#: Larger than the pieces that adapters read and upload at a time, and no multiple of them.
_LARGE = bytes(range(256)) * (36 << 10) + b"end"
_FILES = {"checkpoint.img": b"small state", "pages.img": _LARGE, "empty": b""}


def make_snapshot(snapshot_id: str = "", actor_uid: str = "u" * 32) -> Snapshot:
    return Snapshot(
        id=snapshot_id or uuid.uuid4().hex,
        namespace="default",
        actor="ada",
        actor_uid=actor_uid,
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


def key_of(published: Snapshot, name: str) -> str:
    """Where a file of it lies; that of its manifest for "manifest"."""
    if name == "manifest":
        return blobs.manifest_key(published.actor_uid, published.id)
    return next(blobs.blob_key(published.actor_uid, file) for file in published.files if file.name == name)


async def ids(store: SnapshotStore) -> list[str]:
    return [snapshot_id for _, snapshot_id in await store.list()]


def old_layout(raw: Raw, snapshot: Snapshot, files: dict[str, bytes] | None = None) -> Snapshot:
    """A snapshot as the version before has put it there, and its row."""
    made = [
        FileDigest(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted((_FILES if files is None else files).items())
    ]
    snapshot = replace(snapshot, files=tuple(made))
    for name, data in (_FILES if files is None else files).items():
        raw.write(f"{blobs.old_directory(snapshot.id)}/{name}", data)
    data = msgspec.json.encode(snapshot)
    assert b"upload" not in data, "what has its default is not written: just as the version before wrote it"
    raw.write(f"{blobs.old_directory(snapshot.id)}/manifest.json", data)
    return snapshot


async def read(store: SnapshotStore, snapshot: Snapshot) -> Snapshot:
    return await store.manifest(snapshot.actor_uid, snapshot.id)


class SnapshotStoreContract:
    """Every test gets a new, empty store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> SnapshotStore:
        raise NotImplementedError

    @pytest.fixture
    def raw(self, tmp_path: Path) -> Raw:
        raise NotImplementedError

    # --- what goes right --------------------------------------------------------------------------------------

    async def test_published_is_fetched_and_verified(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot = make_snapshot()
        published = await store.publish(snapshot, stage(tmp_path / "stage"))
        assert [replace(file, upload="") for file in published.files] == [
            FileDigest(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(_FILES.items())
        ]
        assert len({file.upload for file in published.files}) == 1 and not blobs.not_there(published, [])
        assert replace(published, files=()) == snapshot
        assert await read(store, snapshot) == published
        assert await store.list() == [(snapshot.actor_uid, snapshot.id)]
        directory = await store.fetch(published, tmp_path / "cache")
        assert directory == tmp_path / "cache" / snapshot.id
        for name, data in _FILES.items():
            assert (directory / name).read_bytes() == data
        await store.verify(published, directory)

    async def test_outlives_the_staged_files(self, store: SnapshotStore, tmp_path: Path) -> None:
        source = stage(tmp_path / "stage")
        published = await store.publish(make_snapshot(), source)
        for file in source.iterdir():
            file.unlink()
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))

    async def test_publishing_again_changes_nothing(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        snapshot, source = make_snapshot(), stage(tmp_path / "stage")
        first = await store.publish(snapshot, source)
        before = raw.listed()
        assert await store.publish(snapshot, source) == first
        assert await store.publish(snapshot, stage(tmp_path / "equal")) == first
        assert raw.listed() == before

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

    async def test_damaged_cache_is_fetched_anew(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        cached = await store.fetch(published, tmp_path / "cache")
        (cached / "pages.img").unlink()
        (cached / "pages.img").write_bytes(b"short")
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [published.id]

    async def test_list_is_sorted(self, store: SnapshotStore, tmp_path: Path) -> None:
        names = sorted((f"{uid:02x}" * 16, f"{n:02x}" * 16) for n in (0x0F, 0xF0, 0x77) for uid in (1, 2))
        for number, (uid, each) in enumerate(reversed(names)):
            await store.publish(make_snapshot(each, uid), stage(tmp_path / f"stage{number}", {"data": b"x"}))
        assert await store.list() == names

    async def test_progress(self, store: SnapshotStore, tmp_path: Path) -> None:
        total = sum(map(len, _FILES.values()))
        source = stage(tmp_path / "stage")
        stored: list[tuple[int, int]] = []
        published = await store.publish(make_snapshot(), source, lambda done, of: stored.append((done, of)))
        assert stored == sorted(stored) and all(done <= of == total for done, of in stored) and stored[-1][0] > 0
        loaded: list[tuple[int, int]] = []
        listener = lambda done, of: loaded.append((done, of))  # noqa: E731
        directory = await store.fetch(published, tmp_path / "cache", listener)
        await store.verify(published, directory, listener)
        assert all(0 < done <= of == total for done, of in loaded) and loaded

    # --- what is shared ---------------------------------------------------------------------------------------

    async def test_an_equal_file_is_not_stored_again(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        first = await store.publish(make_snapshot(), stage(tmp_path / "one"))
        before = set(raw.listed())
        changed = {**_FILES, "checkpoint.img": b"SMALL STATE", "moved.img": _LARGE}
        second = await store.publish(make_snapshot(), stage(tmp_path / "two", changed), base=first.files)
        assert key_of(second, "pages.img") == key_of(second, "moved.img") == key_of(first, "pages.img")
        new = {key_of(second, "manifest"), key_of(second, "checkpoint.img")}
        assert set(raw.listed()) == before | new
        assert not blobs.not_there(second, [first]) and len(blobs.not_there(second, [])) == 3
        # What only the first has goes; what they share stays until the second goes too.
        first = replace(first, state=SnapshotState.CONDEMNED)
        await store.delete(blobs.doomed(first, [first, second]))
        assert set(raw.listed()) == set(blobs.keys_of(second))
        await store.verify(second, await store.fetch(second, tmp_path / "cache"))
        second = replace(second, state=SnapshotState.CONDEMNED)
        await store.delete(blobs.doomed(second, [second]))
        assert raw.listed() == []

    async def test_of_another_actor_nothing_is_shared(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        first = await store.publish(make_snapshot(), stage(tmp_path / "one"))
        second = await store.publish(make_snapshot(actor_uid="v" * 32), stage(tmp_path / "two"))
        assert len(raw.listed()) == 8 and not set(blobs.keys_of(first)) & set(blobs.keys_of(second))

    # --- what is removed --------------------------------------------------------------------------------------

    async def test_deleted_is_gone(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        other = await store.publish(make_snapshot(), stage(tmp_path / "other"))
        for _ in range(2):
            await store.delete(blobs.keys_of(published))
            assert await ids(store) == [other.id] and raw.listed() == sorted(blobs.keys_of(other))
        with pytest.raises(NotFound):
            await read(store, published)
        await store.verify(other, await store.fetch(other, tmp_path / "cache"))

    async def test_only_its_own_objects_are_deleted(self, store: SnapshotStore) -> None:
        for key in (
            "snapshots",
            "snapshots/uu",
            "../x",
            "/etc/passwd",
            "snapshots/uu/../../x",
            "snapshots/ab/" + "u" * 32,
        ):
            with pytest.raises(InvalidArgument):
                await store.delete([key])

    async def test_retracted_is_gone(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        """With what attempts have left that were killed before the manifest."""
        kept = await store.publish(make_snapshot(), stage(tmp_path / "kept"))
        made = await store.publish(make_snapshot(), stage(tmp_path / "stage"), base=kept.files)
        left = replace(kept.files[0], upload=blobs.upload_name(made.id, 7))
        raw.write(blobs.blob_key(made.actor_uid, left), b"half")
        for _ in range(2):
            await store.retract(made.actor_uid, made.id)
            assert raw.listed() == sorted(blobs.keys_of(kept))
        await store.retract("w" * 32, uuid.uuid4().hex)

    async def test_objects_are_listed_by_actor_with_their_age(
        self, store: SnapshotStore, raw: Raw, tmp_path: Path
    ) -> None:
        uids = ["a" * 32, "b" * 32]
        made = [await store.publish(make_snapshot(actor_uid=u), stage(tmp_path / u)) for u in uids for _ in "x"]
        raw.write("snapshots/unknown", b"what is not ours is not listed")
        found = {uid: list(objects) async for uid, objects in store.objects()}
        assert sorted(found) == uids
        for snapshot in made:
            assert sorted(o.key for o in found[snapshot.actor_uid]) == sorted(blobs.keys_of(snapshot))
        assert all(-2 <= o.age_s < 60 for objects in found.values() for o in objects), "seconds may be all it knows"
        assert raw.listed() == sorted([*(k for s in made for k in blobs.keys_of(s)), "snapshots/unknown"])

    # --- what is refused --------------------------------------------------------------------------------------

    async def test_another_content_is_a_conflict(self, store: SnapshotStore, tmp_path: Path) -> None:
        snapshot = make_snapshot()
        first = await store.publish(snapshot, stage(tmp_path / "stage"))
        for number, other in enumerate(
            ({**_FILES, "empty": b"!"}, {"checkpoint.img": b"small state"}, {**_FILES, "more": b""})
        ):
            with pytest.raises(Conflict):
                await store.publish(snapshot, stage(tmp_path / f"other{number}", other))
        assert await read(store, snapshot) == first
        await store.verify(first, await store.fetch(first, tmp_path / "cache"))

    async def test_what_the_version_before_has_put_there(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        old, other = old_layout(raw, make_snapshot()), old_layout(raw, make_snapshot())
        assert await store.list() == sorted([(old.actor_uid, old.id), (old.actor_uid, other.id)])
        assert await read(store, old) == old
        fetched = await store.fetch(old, tmp_path / "cache")
        await store.verify(old, fetched)
        assert [uid async for uid, _ in store.objects()] == [], "nobody can say whose an object is"
        # The next one stores all of it anew: nothing is shared with the old layout.
        new = await store.publish(make_snapshot(), fetched, base=old.files)
        assert all(file.upload for file in new.files) and not blobs.not_there(new, [old])
        over = replace(old, state=SnapshotState.CONDEMNED)
        await store.delete(blobs.doomed(over, [over, other, new]))
        assert raw.listed() == sorted([*blobs.keys_of(other), *blobs.keys_of(new)])
        # What its worker holds in the old layout is brought where its row says.
        again = await store.publish(old, fetched)
        assert again == old and set(blobs.keys_of(old)) <= set(raw.listed())
        await store.retract(old.actor_uid, old.id)
        await store.retract(other.actor_uid, other.id)
        assert raw.listed() == sorted(blobs.keys_of(new))

    async def test_a_row_of_the_version_before_leads_nowhere_else(
        self, store: SnapshotStore, raw: Raw, tmp_path: Path
    ) -> None:
        old = old_layout(raw, make_snapshot())
        for name in ("../x", "manifest.json", ".x", "a/b"):
            forged = replace(old, files=(replace(old.files[0], name=name),))
            with pytest.raises(DataLoss):
                await store.fetch(forged, tmp_path / "cache")
        with pytest.raises(InvalidArgument):
            await store.delete([f"{blobs.old_directory(old.id)}/../x"])

    async def test_a_manifest_that_comes_in_between(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        """Put-if-absent: of another publisher, who was slower to begin and faster to end."""
        snapshot, source = make_snapshot(), stage(tmp_path / "stage")
        other = replace(
            snapshot, files=(FileDigest(name="x", size_bytes=0, sha256="0" * 64, upload=f"{'0' * 32}.{0:08x}"),)
        )
        data, look = msgspec.json.encode(other), store._read  # type: ignore[attr-defined]

        async def late(*about: str) -> Snapshot | None:
            found: Snapshot | None = await look(*about)
            if found is None:
                raw.write(key_of(snapshot, "manifest"), data)
            return found

        store._read = late  # type: ignore[attr-defined]
        with pytest.raises(Conflict, match="somebody else"):
            await store.publish(snapshot, source)
        assert raw.read(key_of(snapshot, "manifest")) == data

    async def test_files_that_are_not_those_of_the_manifest(self, store: SnapshotStore, tmp_path: Path) -> None:
        """The manifest may come with its digests, from where the files have lain: what has rotted is not stored."""
        known = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        moved = replace(known, id=uuid.uuid4().hex)
        rotten = stage(tmp_path / "rotten", {**_FILES, "checkpoint.img": b"SMALL STATE"})
        with pytest.raises(DataLoss) as raised:
            await store.publish(moved, rotten)
        assert raised.value.reason == "SNAPSHOT_CORRUPT"
        assert await ids(store) == [known.id]
        more = stage(tmp_path / "good", {**_FILES, "manifest.json": b"{}"})
        assert await store.publish(moved, more) == moved
        assert await store.publish(moved, more) == moved

    # --- whose store it is ------------------------------------------------------------------------------------

    async def test_the_first_mark_stays(self, store: SnapshotStore) -> None:
        assert await store.mark() == ""
        assert await store.mark("mine") == "mine"
        assert await store.mark("other") == "mine" == await store.mark()
        assert await store.list() == [] and [o async for o in store.objects()] == [], "it is no snapshot's"

    @pytest.mark.parametrize("there", ["", "another installation's"])
    async def test_in_another_store_nothing_is_missing_and_nothing_is_put(
        self, store: SnapshotStore, raw: Raw, tmp_path: Path, there: str
    ) -> None:
        """A disk that is not mounted, or a wrong address: what is not there is not lost."""
        await store.mark("mine")
        store.expect("mine")
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        kept = {key: raw.read(key) for key in raw.listed()}
        for key in kept:
            raw.remove(key)
        if there:
            raw.write("greenroom-store", there.encode())
        store.expect("")  # as a process that begins
        store.expect("mine")

        async def listed() -> object:
            return [o async for o in store.objects()]

        for asked in (
            lambda: store.fetch(published, tmp_path / "cache"),
            lambda: store.manifest(published.actor_uid, published.id),
            lambda: store.publish(make_snapshot(), stage(tmp_path / "more")),
            lambda: store.retract(published.actor_uid, published.id),
            lambda: store.delete(blobs.keys_of(published)),
            store.list,
            listed,
        ):
            with pytest.raises(Unavailable) as away:
                await asked()
            assert away.value.reason == "SNAPSHOT_STORE_AWAY" and (there in away.value.message)
        assert raw.listed() == (["greenroom-store"] if there else [])
        for key, data in kept.items():
            raw.write(key, data)
        assert await store.manifest(published.actor_uid, published.id) == published
        await store.fetch(published, tmp_path / "cache")

    async def test_a_store_that_goes_away_is_noticed_when_something_is_missing(
        self, store: SnapshotStore, raw: Raw, tmp_path: Path
    ) -> None:
        await store.mark("mine")
        store.expect("mine")
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        for key in raw.listed():
            raw.remove(key)
        for asked in (
            lambda: store.fetch(published, tmp_path / "cache"),
            lambda: store.manifest(published.actor_uid, published.id),
        ):
            with pytest.raises(Unavailable):
                await asked()

    async def test_unknown(self, store: SnapshotStore, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            await store.manifest("u" * 32, "ab" * 16)
        await store.delete([blobs.manifest_key("u" * 32, "ab" * 16)])

    @pytest.mark.parametrize("bad", ["", "ab", "../" * 8 + "etc/pass", "AB" * 16, "zz" * 16])
    async def test_only_ids(self, store: SnapshotStore, bad: str) -> None:
        with pytest.raises(InvalidArgument):
            await store.manifest("u" * 32, bad)
        with pytest.raises(InvalidArgument):
            await store.retract("u" * 32, bad)

    @pytest.mark.parametrize("bad", ["", "../../etc", "a/b", ".."])
    async def test_only_uids(self, store: SnapshotStore, bad: str) -> None:
        with pytest.raises(InvalidArgument):
            await store.manifest(bad, "ab" * 16)

    async def test_only_plain_files(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        link = stage(tmp_path / "link")
        (link / "secret").symlink_to("/etc/passwd")
        nested = stage(tmp_path / "nested")
        (nested / "sub").mkdir()
        forged = stage(tmp_path / "forged", {".hidden": b"{}"})
        for source in (link, nested, forged, stage(tmp_path / "nothing", {}), tmp_path / "missing"):
            with pytest.raises(InvalidArgument):
                await store.publish(make_snapshot(), source)
        assert raw.listed() == []

    # --- what goes wrong with the bytes -----------------------------------------------------------------------

    async def test_one_wrong_byte(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        half = len(_LARGE) // 2
        raw.write(key_of(published, "pages.img"), _LARGE[:half] + b"\xff\x00" + _LARGE[half + 2 :])
        with pytest.raises(DataLoss, match=r"pages\.img") as raised:
            await store.verify(published, await store.fetch(published, tmp_path / "cache"))
        assert raised.value.reason == "SNAPSHOT_CORRUPT"

    async def test_truncated(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        raw.write(key_of(published, "pages.img"), _LARGE[:1000])
        with pytest.raises(DataLoss, match=r"pages\.img") as raised:
            await store.fetch(published, tmp_path / "cache")
        assert raised.value.reason == "SNAPSHOT_CORRUPT"
        assert [*(tmp_path / "cache").iterdir()] == []

    async def test_missing_file(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        raw.remove(key_of(published, "checkpoint.img"))
        with pytest.raises(DataLoss, match=r"checkpoint\.img"):
            await store.fetch(published, tmp_path / "cache")
        assert [*(tmp_path / "cache").iterdir()] == []

    async def test_unreadable_manifest(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        key = key_of(published, "manifest")
        whole = raw.read(key)
        for damage in (
            b"",
            b"{",
            whole.replace(published.id.encode(), b"ab" * 16),
            whole.replace(b"u" * 32, b"v" * 32),
        ):
            raw.write(key, damage)
            with pytest.raises(DataLoss):
                await read(store, published)

    async def test_manifest_that_leads_elsewhere(self, store: SnapshotStore, tmp_path: Path) -> None:
        published = await store.publish(make_snapshot(), stage(tmp_path / "stage"))
        good = published.files[0]
        forgeries = [replace(good, name=name) for name in ("../secret", "/etc/passwd", "a/b", "..", ".hidden")]
        forgeries += [replace(good, sha256="../../x"), replace(good, upload="../x"), replace(good, upload="")]
        for file in forgeries:
            forged = replace(published, files=(file,))
            with pytest.raises(DataLoss):
                await store.fetch(forged, tmp_path / "cache")
            with pytest.raises(DataLoss):
                await store.verify(forged, tmp_path)

    async def test_half_published_does_not_exist(self, store: SnapshotStore, raw: Raw, tmp_path: Path) -> None:
        """A publisher that was killed before the manifest left files; the next attempt has others."""
        snapshot = make_snapshot()
        file = FileDigest(
            name="pages.img",
            size_bytes=len(_LARGE),
            sha256=hashlib.sha256(_LARGE).hexdigest(),
            upload=blobs.upload_name(snapshot.id, 1),
        )
        raw.write(blobs.blob_key(snapshot.actor_uid, file), b"half")
        assert await store.list() == []
        with pytest.raises(NotFound):
            await read(store, snapshot)
        published = await store.publish(snapshot, stage(tmp_path / "stage"))
        await store.verify(published, await store.fetch(published, tmp_path / "cache"))

    async def test_cancelled_publish_leaves_nothing_running(
        self, store: SnapshotStore, raw: Raw, tmp_path: Path
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
            if snapshot.id not in await ids(store):
                assert not [key for key in raw.listed() if snapshot.id in key]
            published = await store.publish(snapshot, source)
            await store.verify(published, await store.fetch(published, tmp_path / f"cache-{turns}"))
