"""The snapshot store: verified files first, the manifest last and only once.

Layout, the same in a directory and in a bucket (`greenroom.core.gc.blobs` has the keys, and the rules that keep what is
shared)::

    snapshots/<last two of uid>/<actor uid>/<sha256>.<snapshot id>.<attempt>   a file's content
    snapshots/<last two of uid>/<actor uid>/<snapshot id>.json                 greenroom.core.records.Snapshot

All that an actor has lies in one place. What the version before has put there is kept as it lies::

    snapshots/<first two of id>/<snapshot id>/<file>, with a manifest.json

One snapshot has one writer (the operation that makes it); within one process
calls about a snapshot are put in a row.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import secrets
import shutil
from collections.abc import Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from greenroom.core.errors import Conflict, DataLoss, InvalidArgument, NotFound, Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import FileDigest, Snapshot
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.local import LocalObjects, digest_file
from greenroom.snapshots.objects import Meter, Objects, OnBytes, Stop, disk_full
from greenroom.snapshots.port import StoredObject
from greenroom.snapshots.threads import all_of, in_thread
from greenroom.snapshots.transfers import open_bucket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

#: A manifest is about 1 KB; what is larger is no manifest.
MAX_MANIFEST_BYTES = 1 << 20

#: Files of one snapshot. A sandbox backend writes a handful; the bound keeps a manifest small.
MAX_FILES = 256

#: What the store is known by lies under this name, beside the snapshots. So many bytes are looked at.
MARK, MAX_MARK_BYTES = "greenroom-store", 256

#: Objects that are listed at a time.
LIST_PAGE = 1000

#: A snapshot up to this size is verified without threads: 0.2 ms, about what handing it to one costs.
INLINE_BYTES = 256 << 10

#: Whose a snapshot is that says it no more: its manifest is damaged, and in the layout before its key does not say it.
UNKNOWN = "unknown"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ObjectSnapshotStore:
    """`greenroom.snapshots.port.SnapshotStore` over a directory or a bucket.

    In a directory on the file system where snapshots are staged, publishing links the staged files instead of
    copying them: their maker must not change them afterwards (removing them is fine).

    Args:
        location: a path, a ``file://`` URL, or a bucket's URL such as ``s3://bucket/prefix``, with credentials from
            the environment.
        objects: used instead of ``location`` when given.
    """

    def __init__(self, location: str | Path, *, objects: Objects | None = None) -> None:
        self._objects = objects or _open(location)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._expected = ""
        self._recognised = False

    async def mark(self, value: str = "") -> str:
        def look(stop: Stop) -> str:
            found = self._mark()
            if not found and value:
                self._objects.put_new(MARK, value.encode(), f".{MARK}.{secrets.token_hex(8)}")
                found = self._mark()
            return found

        with self._refusals():
            return await in_thread(look)

    def expect(self, mark: str) -> None:
        if mark != self._expected:
            self._expected, self._recognised = mark, False

    def _mark(self) -> str:
        found = self._objects.get(MARK, MAX_MARK_BYTES)
        return "" if found is None else found.decode(errors="replace").strip()

    def _recognise(self, *, again: bool = False) -> None:
        """Raises `Unavailable` if this is not the store that is expected. A directory may come and go with what is
        mounted there, so it is asked each time; a bucket once, and ``again`` when something is missing."""
        if not self._expected or (self._recognised and not again and not self._objects.is_near):
            return
        with self._refusals():
            found = self._mark()
        self._recognised = found == self._expected
        if self._recognised:
            return
        what = f"belongs to another installation (its {MARK} says {found!r})" if found else f"has no object {MARK}"
        raise Unavailable(
            f"{self._objects} is not the snapshot store of this installation: it {what}; see that it is mounted, and "
            "that its address is the right one",
            reason="SNAPSHOT_STORE_AWAY",
        )

    async def _look(self, *, again: bool = False) -> None:
        """As `_recognise`; in a thread where it takes long."""
        if self._objects.is_near:  # 16 µs; to hand it to a thread takes 130
            self._recognise()
        elif self._expected and (again or not self._recognised):
            await in_thread(lambda stop: self._recognise(again=again))

    async def publish(
        self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None, base: Sequence[FileDigest] = ()
    ) -> Snapshot:
        _check_id(snapshot.actor_uid, snapshot.id)
        _check_names(snapshot)
        key, *_ = blobs.keys_of(snapshot)
        async with self._in_turn(snapshot.id):
            files = {file.name: file.size_bytes for file in snapshot.files}
            if not files:
                files = await in_thread(lambda stop: _scan(source))
            await self._look()
            meter = Meter(sum(files.values()), progress) if progress else None
            if (published := await self._read(snapshot.actor_uid, snapshot.id, key)) is not None:
                return await self._same_or_conflict(published, source, [*files], meter)
            try:
                return await self._publish(_Upload(snapshot, base), source, [*files], meter)
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise disk_full(str(self._objects)) from error
                raise

    async def _publish(self, upload: _Upload, source: Path, names: Sequence[str], meter: Meter | None) -> Snapshot:
        snapshot = upload.snapshot
        key, *_ = blobs.keys_of(snapshot)
        prefix = key.rpartition("/")[0]
        try:
            stored = await all_of(self._put_file(upload, prefix, source / name, meter) for name in names)
            manifest = msgspec.structs.replace(snapshot, files=tuple(stored))
            await in_thread(lambda stop: self._objects.seal(prefix))
        except BaseException:
            # Shielded, so that a cancelled publish does not leave gigabytes behind either. What has keys from before
            # is put under them again the next time; and the rows of its actor speak of it.
            if not snapshot.files:
                await asyncio.shield(in_thread(lambda stop: self._objects.delete([*upload.put])))
            raise
        # From here on it may exist, whatever becomes of this call: nothing of it is deleted any more.
        data = msgspec.json.format(msgspec.json.encode(manifest))
        if await in_thread(lambda stop: self._objects.put_new(key, data, _staged(snapshot.id))):
            return manifest
        published = await self._read(snapshot.actor_uid, snapshot.id, key)  # perhaps by this call, which was sent twice
        if published != manifest:
            raise Conflict(f"snapshot {snapshot.id} was published by somebody else at the same time")
        return manifest

    async def retract(self, actor_uid: str, snapshot_id: str) -> None:
        _check_id(actor_uid, snapshot_id)

        def remove(stop: Stop) -> None:
            for prefix in (blobs.directory(actor_uid), blobs.old_directory(snapshot_id)):
                listed = [(stored.key, blobs.place_of(stored.key)) for stored in self._objects.list(prefix)]
                its = [(key, place) for key, place in listed if place is not None and place.snapshot_id == snapshot_id]
                self._objects.delete([key for key, place in sorted(its, key=lambda one: not one[1].is_manifest)])

        await self._look()
        async with self._in_turn(snapshot_id):
            await in_thread(remove)

    async def manifest(self, actor_uid: str, snapshot_id: str) -> Snapshot:
        _check_id(actor_uid, snapshot_id)
        for key in (blobs.manifest_key(actor_uid, snapshot_id), blobs.old_manifest_key(snapshot_id)):
            found = await self._read(actor_uid, snapshot_id, key)
            if found is not None:
                break
        else:
            await self._look(again=True)
            raise NotFound(f"no snapshot {snapshot_id} in {self._objects}", reason="SNAPSHOT_NOT_FOUND")
        return found

    @property
    def is_near(self) -> bool:
        return self._objects.is_near

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        _check_id(snapshot.actor_uid, snapshot.id)
        _check_names(snapshot)
        target = cache / snapshot.id
        meter = Meter(snapshot.size_bytes, progress) if progress else None
        async with self._in_turn(snapshot.id):
            if self._objects.is_near:  # a few links: cheaper than telling a thread to make them
                return self._download(snapshot, target, Stop(meter))
            return await in_thread(lambda stop: self._download(snapshot, target, stop), meter)

    async def verify(self, snapshot: Snapshot, directory: Path, progress: OnBytes | None = None) -> None:
        _check_names(snapshot)
        meter = Meter(snapshot.size_bytes, progress) if progress else None
        if snapshot.size_bytes <= INLINE_BYTES:
            problems: Sequence[str | None] = [_compare(file, directory, Stop()) for file in snapshot.files]
        else:
            problems = await all_of(_compare_in_thread(file, directory, meter) for file in snapshot.files)
        for problem in problems:
            if problem is not None:
                raise _corrupt(snapshot, problem)

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            if blobs.place_of(key) is None:
                raise InvalidArgument(f"{key!r} is no key of a snapshot's object")
        await self._look()
        with self._refusals():
            await in_thread(lambda stop: self._objects.delete(keys))

    async def list(self) -> list[tuple[str, str]]:
        await self._look()
        with self._refusals():
            keys = await in_thread(lambda stop: [stored.key for stored in self._objects.list(blobs.PREFIX)])
        places = (blobs.place_of(key) for key in keys)
        found = [p for p in places if p is not None and p.is_manifest]
        return sorted([(p.actor_uid or await self._owner(p.snapshot_id), p.snapshot_id) for p in found])

    async def remove_unfinished(self) -> None:
        """Removes what has no manifest in the layout before, whose keys say to nobody else whose it is. Only while
        nobody of that version writes here."""
        with self._refusals():
            keys = await in_thread(lambda stop: [stored.key for stored in self._objects.list(blobs.PREFIX)])
        old = {key: place for key in keys if (place := blobs.place_of(key)) is not None and not place.actor_uid}
        whole = {place.snapshot_id for place in old.values() if place.is_manifest}
        await self.delete([key for key, place in old.items() if place.snapshot_id not in whole])

    async def _owner(self, snapshot_id: str) -> str:
        """Uid of the actor of a snapshot in the layout before, whose keys do not say it."""
        key = blobs.old_manifest_key(snapshot_id)
        data = await in_thread(lambda stop: self._objects.get(key, MAX_MANIFEST_BYTES))
        try:
            uid = msgspec.json.decode(data or b"", type=_Owned).actor_uid
        except (msgspec.DecodeError, msgspec.ValidationError):
            return UNKNOWN
        return uid if blobs.is_uid(uid) else UNKNOWN

    async def objects(self) -> AsyncIterator[tuple[str, Sequence[StoredObject]]]:
        await self._look(again=True)
        with self._refusals():
            now = await in_thread(lambda stop: self._objects.clock())
        listing = iter(self._objects.list(blobs.PREFIX))
        uid, found = "", list[StoredObject]()
        while True:
            with self._refusals():
                page = await in_thread(lambda stop: [*itertools.islice(listing, LIST_PAGE)])
            if not page:
                break
            for key, modified_at in page:
                place = blobs.place_of(key)
                if place is None or not place.actor_uid:
                    continue
                if place.actor_uid != uid:
                    if found:
                        yield uid, found
                    uid, found = place.actor_uid, []
                found.append(StoredObject(key, now - modified_at))
        if found:
            yield uid, found

    # --- parts -----------------------------------------------------------------------------------------------

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What a file system does not let be done is said as of any other store that does not do it just now."""
        try:
            yield
        except OSError as error:
            raise Unavailable(f"{self._objects}: {error}", reason="SNAPSHOT_STORE_REFUSES") from error

    @asynccontextmanager
    async def _in_turn(self, snapshot_id: str) -> AsyncIterator[None]:
        lock = self._locks.get(snapshot_id)
        if lock is None:
            lock = self._locks[snapshot_id] = asyncio.Lock()
        async with lock:
            yield

    async def _put_file(self, upload: _Upload, prefix: str, source: Path, meter: Meter | None) -> FileDigest:
        """Where the manifest says already what the file is, it has to be so, and gets the key that it says."""
        file: FileDigest | None = None

        def name(size_bytes: int, sha256: str) -> str:
            nonlocal file
            file, is_new = upload.place(source, size_bytes, sha256)
            if not is_new:
                return ""
            key = f"{prefix}/{blobs.blob_name(sha256, file.upload) if file.upload else file.name}"
            upload.put.add(key)
            return key.rpartition("/")[2]

        staged = _staged(upload.snapshot.id)
        await in_thread(lambda stop: self._objects.put_file(prefix, source, staged, name, stop), meter)
        assert file is not None
        return file

    async def _read(self, actor_uid: str, snapshot_id: str, key: str) -> Snapshot | None:
        data = await in_thread(lambda stop: self._objects.get(key, MAX_MANIFEST_BYTES))
        if data is None:
            return None
        try:
            if len(data) > MAX_MANIFEST_BYTES:
                raise msgspec.DecodeError(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
            found = msgspec.json.decode(data, type=Snapshot)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataLoss(
                f"the manifest of snapshot {snapshot_id} can't be read: {error}", reason="SNAPSHOT_CORRUPT"
            ) from error
        if (found.actor_uid, found.id) != (actor_uid, snapshot_id):
            raise DataLoss(f"the manifest of snapshot {snapshot_id} is that of {found.id}", reason="SNAPSHOT_CORRUPT")
        _check_names(found)
        return found

    async def _same_or_conflict(
        self, published: Snapshot, source: Path, names: Sequence[str], meter: Meter | None
    ) -> Snapshot:
        """The published manifest, if ``source`` has just these files."""
        same = names == [file.name for file in published.files] and not any(
            await all_of(_compare_in_thread(file, source, meter) for file in published.files)
        )
        if not same:
            raise Conflict(f"snapshot {published.id} is already published with another content; snapshots never change")
        return published

    def _download(self, snapshot: Snapshot, target: Path, stop: Stop) -> Path:
        if target.is_dir():
            try:
                _check_sizes(snapshot, target)
                return target
            except DataLoss:
                shutil.rmtree(target)  # the cache is damaged, not the store
        # Links are made in one go, which nobody of this process sees half done.
        near = self._objects.is_near
        staged = target if near else target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            staged.mkdir(mode=0o700, parents=True)
            for file in snapshot.files:
                key = blobs.file_key(snapshot, file)
                size = self._objects.download(key, staged / file.name, stop)
                if size is None:
                    self._recognise(again=True)
                    raise _corrupt(snapshot, f"{file.name} is missing: {self._objects}/{key}")
                if size != file.size_bytes:
                    raise _corrupt(
                        snapshot, f"{file.name} has {size} bytes instead of {file.size_bytes}: {self._objects}/{key}"
                    )
            if not near:
                staged.rename(target)
        except BaseException as error:
            shutil.rmtree(staged, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise disk_full(str(target.parent)) from error
            raise
        return target


class _Owned(msgspec.Struct):
    actor_uid: str


class _Upload:
    """One attempt to publish a snapshot. ``put``: keys that it may have put."""

    def __init__(self, snapshot: Snapshot, base: Sequence[FileDigest]) -> None:
        self.snapshot = snapshot
        self.put: set[str] = set()
        self._known = {file.name: file for file in snapshot.files}
        self._base = base
        self._name = blobs.upload_name(snapshot.id, secrets.randbits(32))

    def place(self, source: Path, size_bytes: int, sha256: str) -> tuple[FileDigest, bool]:
        """Under which upload a file is, or is to be, stored; and whether it has to be put there. Raises `DataLoss` when
        it is not the file that the manifest speaks of."""
        if (known := self._known.get(source.name)) is not None:
            if (known.size_bytes, known.sha256) != (size_bytes, sha256):
                raise _corrupt(self.snapshot, f"{source} is another file than its manifest says")
            return known, True
        reused = blobs.reusable(self._base, size_bytes, sha256)
        upload = reused.upload if reused else self._name
        file = FileDigest(name=source.name, size_bytes=size_bytes, sha256=sha256, upload=upload)
        return file, reused is None


def _open(location: str | Path) -> Objects:
    text = str(location)
    if text.startswith("file://"):
        return LocalObjects(Path(text.removeprefix("file://")))
    if "://" in text:
        return BucketObjects(open_bucket(text), text)
    return LocalObjects(Path(location))


def _staged(snapshot_id: str) -> str:
    return blobs.staged_name(snapshot_id, secrets.token_hex(8))


def _check_id(actor_uid: str, snapshot_id: str) -> None:
    if not blobs.ID.fullmatch(snapshot_id):
        raise InvalidArgument(f"snapshot id {snapshot_id!r} is not 32 lower-case hex digits")
    if not blobs.is_uid(actor_uid):
        raise InvalidArgument(f"{actor_uid!r} is no uid of an actor")


def _scan(source: Path) -> dict[str, int]:
    """Sizes in bytes of the plain files in ``source``, by name, sorted.

    Raises:
        InvalidArgument: there is something else, nothing at all, or too much.
    """
    try:
        entries = sorted(source.iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidArgument(f"{source} is no directory of snapshot files") from error
    for entry in entries:
        if entry.is_symlink() or not entry.is_file() or not blobs.is_file_name(entry.name):
            raise InvalidArgument(f"{entry} can't be part of a snapshot: only plain files with plain names can")
    if not 1 <= len(entries) <= MAX_FILES:
        raise InvalidArgument(f"{source} has {len(entries)} files; a snapshot has 1 to {MAX_FILES}")
    return {entry.name: entry.stat().st_size for entry in entries}


def _check_names(snapshot: Snapshot) -> None:
    """A manifest that was tampered with must not lead out of its directory."""
    for file in snapshot.files:
        if not blobs.is_file_name(file.name):
            raise _corrupt(snapshot, f"{file.name!r} is no name of a snapshot file")
        if not blobs.has_place(snapshot, file):
            raise _corrupt(snapshot, f"{file.name} has no place in the store: {file.sha256!r}, {file.upload!r}")


def _check_sizes(snapshot: Snapshot, directory: Path) -> None:
    for file in snapshot.files:
        path = directory / file.name
        try:
            size = path.stat().st_size  # where no link to the file could be made, one to its name was
        except FileNotFoundError:
            raise _corrupt(snapshot, f"{path} is missing") from None
        if size != file.size_bytes:
            raise _corrupt(snapshot, f"{path} has {size} bytes instead of {file.size_bytes}")


async def _compare_in_thread(file: FileDigest, directory: Path, meter: Meter | None) -> str | None:
    return await in_thread(lambda stop: _compare(file, directory, stop), meter)


def _compare(file: FileDigest, directory: Path, stop: Stop) -> str | None:
    """What is wrong with the file, or None."""
    path = directory / file.name
    try:
        size, digest = digest_file(path, stop)
    except FileNotFoundError:
        return f"{path} is missing"
    if size != file.size_bytes:
        return f"{path} has {size} bytes instead of {file.size_bytes}"
    return None if digest == file.sha256 else f"{path} has SHA-256 {digest} instead of {file.sha256}"


def _corrupt(snapshot: Snapshot, problem: str) -> DataLoss:
    return DataLoss(
        f"snapshot {snapshot.id} of {snapshot.namespace}/{snapshot.actor} is damaged: {problem}",
        reason="SNAPSHOT_CORRUPT",
        metadata={"snapshot": snapshot.id},
    )
