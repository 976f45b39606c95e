"""Objects as files of a local directory, made durable.

`obstore.LocalStore` is not used here for two measured reasons. It never calls ``fsync``, so that a power cut may
leave an empty file behind a call that had returned. And it copies: putting a 256 MB file takes 306 ms before the
158 ms of the sync, where a hard link of a file that its maker has finished with takes 0.2 ms. A file on another
file system is copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from greenroom.snapshots.objects import CHUNK_BYTES, Stop, Stored, garbled

_T = TypeVar("_T")

#: How often a directory that somebody else removes is made again.
MAX_TRIES = 10


class LocalObjects:
    """Objects below ``root``, which is made if it is not there. What is on its way has a name that begins with a dot. A
    directory goes with its last object; who wants to put one there at that moment makes it again."""

    is_near = True

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        _make_directories(self._root)

    def __str__(self) -> str:
        return str(self._root)

    def put_file(
        self, prefix: str, source: Path, staged: str, name: Callable[[int, str], str], stop: Stop
    ) -> tuple[int, str]:
        directory = self._root / prefix
        on_its_way = directory / staged
        copied = None
        try:
            try:
                _into(directory, lambda: os.link(source, on_its_way, follow_symlinks=False))
            except OSError:  # another file system, or one without hard links, or too many links
                copied = _into(directory, lambda: _copy(source, on_its_way, stop))
            stored = _digest_and_sync(on_its_way, stop, share=1.0 if copied is None else 0.5)
            if copied is not None and copied != stored:
                raise garbled(str(on_its_way), source)
            if called := name(*stored):
                on_its_way.replace(directory / called)
        finally:
            on_its_way.unlink(missing_ok=True)  # also after it was renamed over another link to the same file
        return stored

    def seal(self, prefix: str) -> None:
        _sync_directory(self._root / prefix)

    def put_new(self, key: str, data: bytes, staged: str) -> bool:
        target = self._root / key
        on_its_way = target.with_name(staged)
        try:
            with _into(target.parent, lambda: on_its_way.open("xb")) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(on_its_way, target)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        finally:
            on_its_way.unlink(missing_ok=True)
        _sync_directory(target.parent)
        return True

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        try:
            with (self._root / key).open("rb") as file:
                return file.read(limit_bytes + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def download(self, key: str, target: Path, stop: Stop) -> int | None:
        source = self._root / key
        try:
            size = source.stat().st_size
            try:
                os.link(source, target)
            except FileNotFoundError:
                raise
            except OSError:  # as for `put_file`; the file lies there as long as who reads it needs it
                target.symlink_to(source)
        except FileNotFoundError:
            return None
        stop.moved(size)
        return size

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)
        for directory in {(self._root / key).parent for key in keys}:
            with contextlib.suppress(FileNotFoundError):
                _sync_directory(directory)
            with contextlib.suppress(OSError):  # there is more in it
                directory.rmdir()

    def list(self, prefix: str) -> Iterator[Stored]:
        for directory, below, names in os.walk(self._root / prefix, onerror=_unless_gone):
            below.sort()
            for name in sorted(names):
                path = Path(directory) / name
                with contextlib.suppress(FileNotFoundError):
                    yield Stored(path.relative_to(self._root).as_posix(), path.lstat().st_mtime)

    def clock(self) -> float:
        mark = self._root / ".clock"  # one name: nothing is left by whoever is killed here, but for the next to remove
        with mark.open("wb") as file:
            os.utime(file.fileno())
            now = os.fstat(file.fileno()).st_mtime
        mark.unlink(missing_ok=True)
        return now


def _unless_gone(error: OSError) -> None:
    """What can't be listed is not empty: absence decides what is removed."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _into(directory: Path, put: Callable[[], _T]) -> _T:
    """Puts something into a directory, which may be missing, and may be removed as long as it is empty."""
    for _ in range(MAX_TRIES):
        try:
            return put()
        except FileNotFoundError:
            _make_directories(directory)
    return put()


def _make_directories(path: Path) -> None:
    """As ``mkdir -p``, with every new name synced."""
    if path.is_dir():
        return
    _make_directories(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)  # memory of actors: nobody else's to read
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy(source: Path, target: Path, stop: Stop) -> tuple[int, str]:
    """Copies and returns (size, digest) of what was read."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        buffer = bytearray(CHUNK_BYTES)
        view = memoryview(buffer)
        while count := reader.readinto(buffer):
            stop.check()
            digest.update(view[:count])
            written = 0
            while written < count:  # a raw write may be short when the disk is nearly full
                written += writer.write(view[written:count])
            size += count
            stop.moved(count / 2)  # and half when it is read back
    return size, digest.hexdigest()


def _digest_and_sync(path: Path, stop: Stop, share: float) -> tuple[int, str]:
    """Hashes the file while the kernel writes it out: the two take about as long and use different parts."""
    with path.open("rb", buffering=0) as file:
        failure: list[OSError] = []

        def sync() -> None:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                failure.append(error)

        syncing = threading.Thread(target=sync, name="snapshot-sync")
        syncing.start()
        try:
            result = digest_file(path, stop, share)
        finally:
            syncing.join()
        if failure:
            raise failure[0]
        return result


def digest_file(path: Path, stop: Stop, share: float = 1.0) -> tuple[int, str]:
    """(size in bytes, SHA-256 in hex) of a file. ``share``: of each byte's progress.

    Raises:
        OSError: it can't be read.
    """
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            stop.check()
            digest.update(view[:count])
            size += count
            stop.moved(count * share)
    return size, digest.hexdigest()
