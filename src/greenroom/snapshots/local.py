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
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from greenroom.core.errors import DataLoss
from greenroom.snapshots.objects import CHUNK_BYTES, Stop


class LocalObjects:
    """Objects below ``root``, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        _make_directories(self._root)

    def __str__(self) -> str:
        return str(self._root)

    def put_file(self, key: str, source: Path, stop: Stop) -> tuple[int, str]:
        target = self._root / key
        _make_directories(target.parent)
        target.unlink(missing_ok=True)
        copied = None
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # another file system, or one without hard links, or too many links
            copied = _copy(source, target, stop)
        stored = _digest_and_sync(target, stop, share=1.0 if copied is None else 0.5)
        if copied is not None and copied != stored:
            raise DataLoss(
                f"{target}: what was stored differs from {source}; check the disk", reason="SNAPSHOT_CORRUPT"
            )
        return stored

    def seal(self, prefix: str) -> None:
        _sync_directory(self._root / prefix)

    def put_new(self, key: str, data: bytes) -> bool:
        target = self._root / key
        _make_directories(target.parent)
        staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(staged, target)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
        _sync_directory(target.parent)
        return True

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        try:
            with (self._root / key).open("rb") as file:
                return file.read(limit_bytes + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def directory(self, prefix: str) -> Path | None:
        return self._root / prefix

    def download(self, key: str, target: Path, stop: Stop) -> int | None:
        raise AssertionError("local objects are used where they lie")

    def delete(self, key: str) -> None:
        target = self._root / key
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
            _sync_directory(target.parent)

    def delete_below(self, prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / prefix)

    def list(self, prefix: str) -> Iterator[str]:
        for directory, _, names in os.walk(self._root / prefix):
            for name in names:
                yield (Path(directory) / name).relative_to(self._root).as_posix()


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
