"""The snapshot store: verified files first, the manifest last and only once.

Layout, the same in a directory and in a bucket (an id is 32 hex digits, and its first two spread the directories)::

    snapshots/<id[0:2]>/<id>/<file>         as the sandbox backend wrote it
    snapshots/<id[0:2]>/<id>/manifest.json  greenroom.core.records.Snapshot

The namespace is in the manifest and not in the path: every call finds a snapshot by its id alone. One id has one
writer (the operation that made it); within one process calls about an id are put in a row.
"""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec
from obstore.store import from_url

from greenroom.core.errors import Conflict, DataLoss, InvalidArgument, NotFound
from greenroom.core.records import FileDigest, Snapshot
from greenroom.snapshots.bucket import BucketObjects
from greenroom.snapshots.local import LocalObjects, digest_file
from greenroom.snapshots.objects import Meter, Objects, OnBytes, Stop, disk_full
from greenroom.snapshots.threads import all_of, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_ID = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PREFIX = "snapshots"
_MANIFEST = "manifest.json"

#: A manifest is about 1 KB; what is larger is no manifest.
MAX_MANIFEST_BYTES = 1 << 20

#: Files of one snapshot. A sandbox backend writes a handful; the bound keeps a manifest small.
MAX_FILES = 256

#: A snapshot up to this size is verified without threads: 0.2 ms, about what handing it to one costs.
INLINE_BYTES = 256 << 10

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

    async def publish(self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None) -> Snapshot:
        prefix = _prefix(snapshot.id)
        async with self._in_turn(snapshot.id):
            files = {file.name: file.size_bytes for file in snapshot.files}
            if not files:
                files = await in_thread(lambda stop: _scan(source))
            meter = Meter(sum(files.values()), progress) if progress else None
            if (published := await self._read(snapshot.id)) is not None:
                return await self._same_or_conflict(published, source, [*files], meter)
            try:
                _check_names(snapshot)
                stored = await all_of(self._put_file(f"{prefix}/{name}", source / name, meter) for name in files)
                if snapshot.files and tuple(stored) != snapshot.files:
                    raise _corrupt(snapshot, f"{source} holds other files than its manifest says")
                manifest = msgspec.structs.replace(snapshot, files=tuple(stored))
                created = await in_thread(lambda stop: self._commit(prefix, manifest))
            except BaseException as error:
                # Shielded, so that a cancelled publish does not leave gigabytes behind either.
                await asyncio.shield(in_thread(lambda stop: self._remove_unpublished(prefix)))
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise disk_full(str(self._objects)) from error
                raise
            if not created:
                raise Conflict(f"snapshot {snapshot.id} was published by somebody else at the same time")
            return manifest

    async def manifest(self, snapshot_id: str) -> Snapshot:
        found = await self._read(snapshot_id)
        if found is None:
            raise NotFound(f"no snapshot {snapshot_id} in {self._objects}", reason="SNAPSHOT_NOT_FOUND")
        return found

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        _check_names(snapshot)
        prefix = _prefix(snapshot.id)
        if (local := self._objects.directory(prefix)) is not None:
            _check_sizes(snapshot, local)  # a few stat calls: cheaper than telling a thread to make them
            return local
        target = cache / snapshot.id
        meter = Meter(snapshot.size_bytes, progress) if progress else None
        async with self._in_turn(snapshot.id):
            return await in_thread(lambda stop: self._download(snapshot, prefix, target, stop), meter)

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

    async def delete(self, snapshot_id: str) -> None:
        prefix = _prefix(snapshot_id)
        async with self._in_turn(snapshot_id):
            await in_thread(lambda stop: self._objects.delete(f"{prefix}/{_MANIFEST}"))
            await in_thread(lambda stop: self._objects.delete_below(prefix))

    async def list(self) -> list[str]:
        keys = await in_thread(lambda stop: [key.split("/") for key in self._objects.list(_PREFIX)])
        return sorted(k[2] for k in keys if len(k) == 4 and k[3] == _MANIFEST and _ID.fullmatch(k[2]))

    async def remove_unfinished(self) -> None:
        """Removes what publishers left that were killed. Only while nobody else publishes here."""
        keys = await in_thread(lambda stop: [key.split("/") for key in self._objects.list(_PREFIX)])
        for snapshot_id in {k[2] for k in keys if len(k) == 4} - {*await self.list()}:
            await asyncio.to_thread(self._objects.delete_below, _prefix(snapshot_id))

    # --- parts -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _in_turn(self, snapshot_id: str) -> AsyncIterator[None]:
        lock = self._locks.get(snapshot_id)
        if lock is None:
            lock = self._locks[snapshot_id] = asyncio.Lock()
        async with lock:
            yield

    def _commit(self, prefix: str, manifest: Snapshot) -> bool:
        self._objects.seal(prefix)
        return self._objects.put_new(f"{prefix}/{_MANIFEST}", msgspec.json.format(msgspec.json.encode(manifest)))

    def _remove_unpublished(self, prefix: str) -> None:
        """Without a manifest nothing of it counts; with one (cancelled at the very end) all of it does."""
        if self._objects.get(f"{prefix}/{_MANIFEST}", MAX_MANIFEST_BYTES) is None:
            self._objects.delete_below(prefix)

    async def _put_file(self, key: str, source: Path, meter: Meter | None) -> FileDigest:
        size, digest = await in_thread(lambda stop: self._objects.put_file(key, source, stop), meter)
        return FileDigest(name=source.name, size_bytes=size, sha256=digest)

    async def _read(self, snapshot_id: str) -> Snapshot | None:
        key = f"{_prefix(snapshot_id)}/{_MANIFEST}"
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
        if found.id != snapshot_id:
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

    def _download(self, snapshot: Snapshot, prefix: str, target: Path, stop: Stop) -> Path:
        if target.is_dir():
            try:
                _check_sizes(snapshot, target)
                return target
            except DataLoss:
                shutil.rmtree(target)  # the cache is damaged, not the store
        staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            staged.mkdir(mode=0o700, parents=True)
            for file in snapshot.files:
                if self._objects.download(f"{prefix}/{file.name}", staged / file.name, stop) is None:
                    raise _corrupt(snapshot, f"{file.name} is missing in {self._objects}")
            _check_sizes(snapshot, staged)
            staged.rename(target)
        except BaseException as error:
            shutil.rmtree(staged, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise disk_full(str(target.parent)) from error
            raise
        return target


def _open(location: str | Path) -> Objects:
    text = str(location)
    if text.startswith("file://"):
        return LocalObjects(Path(text.removeprefix("file://")))
    if "://" in text:
        return BucketObjects(from_url(text), text)
    return LocalObjects(Path(location))


def _prefix(snapshot_id: str) -> str:
    if not _ID.fullmatch(snapshot_id):
        raise InvalidArgument(f"snapshot id {snapshot_id!r} is not 32 lower-case hex digits")
    return f"{_PREFIX}/{snapshot_id[:2]}/{snapshot_id}"


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
        if entry.is_symlink() or not entry.is_file() or not _FILE_NAME.fullmatch(entry.name) or entry.name == _MANIFEST:
            raise InvalidArgument(f"{entry} can't be part of a snapshot: only plain files with plain names can")
    if not 1 <= len(entries) <= MAX_FILES:
        raise InvalidArgument(f"{source} has {len(entries)} files; a snapshot has 1 to {MAX_FILES}")
    return {entry.name: entry.stat().st_size for entry in entries}


def _check_names(snapshot: Snapshot) -> None:
    """A manifest that was tampered with must not lead out of its directory."""
    for file in snapshot.files:
        if not _FILE_NAME.fullmatch(file.name) or file.name == _MANIFEST:
            raise _corrupt(snapshot, f"{file.name!r} is no name of a snapshot file")


def _check_sizes(snapshot: Snapshot, directory: Path) -> None:
    for file in snapshot.files:
        path = directory / file.name
        try:
            size = path.stat(follow_symlinks=False).st_size
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
