"""Content-addressed blobs on disk, and the locks that several processes share.

Below the store's root::

    blobs/sha256/<hex>   a whole, verified blob; never changed
    partial/<hex>        a download under way or cut off; goes on where it stopped
    locks/<hex>          taken (flock) while somebody works on this digest

A lock lives with its open file, so a process that dies lets go of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from greenroom.core.errors import DataLoss, ResourceExhausted
from greenroom.images.config import Descriptor

#: Bytes that are hashed and written at a time, in a thread.
CHUNK_BYTES = 1 << 20
#: Attempts in a row that bring no byte before a download is given up; each byte that arrives starts the count anew.
MAX_FRUITLESS_ATTEMPTS = 5
#: Pause before attempt n is this times 2**n, so about 8 s in all: a registry that restarts is back by then.
RETRY_BASE_S = 0.25
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Interrupted(Exception):
    """A stream broke off or could not be opened, and may well work when it is tried again."""


class BlobSource(Protocol):
    """Where blobs come from."""

    def open_blob(
        self, descriptor: Descriptor, offset: int
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """A stream of the blob, from ``offset`` or, where that can't be had, from the start; and from where it is.

        Raises:
            Interrupted: to be tried again, on opening and while reading.
            NotFound: no such blob.
        """
        ...


class BlobStore:
    """The blobs, partial downloads and locks below ``root``, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._partial = root / "partial"
        self._locks = root / "locks"
        for directory in (self._blobs, self._partial, self._locks):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._blobs / hex_of(digest)

    def has(self, descriptor: Descriptor) -> bool:
        try:
            return self.path(descriptor.digest).stat().st_size == descriptor.size
        except FileNotFoundError:
            return False

    def read(self, digest: str) -> bytes:
        """A small blob (config or manifest) whole."""
        return self.path(digest).read_bytes()

    def write(self, data: bytes) -> str:
        """Stores a small blob; returns its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if not self.path(digest).exists():
            write_atomically(self.path(digest), data)
        return digest

    def digests(self) -> set[str]:
        """Of all blobs that are here, whole or in part."""
        names = {path.name for path in self._blobs.iterdir()} | {path.name for path in self._partial.iterdir()}
        return {f"sha256:{name.partition('.')[0]}" for name in names if not name.startswith(".")}

    def disk_bytes_of(self, digest: str) -> int:
        """What the blob takes on disk, whole or in part."""
        return sum(_disk_bytes(directory / hex_of(digest)) for directory in (self._blobs, self._partial))

    def arrived_bytes(self, digest: str) -> int:
        """How much of the blob is here, whoever fetches it: for those who wait for its lock."""
        return self.disk_bytes_of(digest)

    def disk_bytes(self) -> int:
        """Of all of them."""
        return sum(self.disk_bytes_of(digest) for digest in self.digests())

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)
        (self._partial / hex_of(digest)).unlink(missing_ok=True)

    def remove_if_damaged(self, digest: str) -> None:
        """Reads the blob once more, and removes it if it is not what it was when it was stored."""
        with contextlib.suppress(FileNotFoundError):
            with self.path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != hex_of(digest):
                self.remove(digest)

    @asynccontextmanager
    async def locked(self, digest: str) -> AsyncIterator[int]:
        """Holds the digest's lock among all processes that share the store; yields the lock's descriptor, which a
        child may inherit to hold it too."""
        fd = await _flock(self._locks / hex_of(digest))
        try:
            yield fd
        finally:
            os.close(fd)

    async def fetch(self, descriptor: Descriptor, source: BlobSource, progress: Callable[[int], None]) -> None:
        """Makes sure that the blob is here. Goes on with a partial download, of whichever process; a cancelled one
        stays for the next.

        Args:
            progress: called with the bytes that are here, often.

        Raises:
            DataLoss: the bytes are not what the digest says (reason ``DIGEST_MISMATCH``); they are discarded.
            ResourceExhausted: the disk is full (reason ``DISK_FULL``); what was there of the blob is removed.
            Interrupted: several attempts brought nothing; chained to the reason.
        """
        async with self.locked(descriptor.digest):
            if self.has(descriptor):
                progress(descriptor.size)
                return
            partial = _Partial(self._partial / hex_of(descriptor.digest), descriptor)
            try:
                await asyncio.to_thread(partial.open)
                await self._download(partial, source, progress)
                await asyncio.to_thread(partial.commit, self.path(descriptor.digest))
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                partial.discard()
                raise ResourceExhausted(
                    f"the disk is full while fetching {descriptor.digest} ({descriptor.size} bytes): free space or "
                    "remove images",
                    reason="DISK_FULL",
                    retry_after_s=30.0,
                ) from error
            finally:
                partial.close()

    async def _download(self, partial: _Partial, source: BlobSource, progress: Callable[[int], None]) -> None:
        fruitless = 0
        resumed = partial.size > 0
        while True:
            before = partial.size
            try:
                await self._stream(partial, source, progress)
            except Interrupted:
                fruitless = 0 if partial.size > before else fruitless + 1
                if fruitless >= MAX_FRUITLESS_ATTEMPTS:
                    raise
                await asyncio.sleep(RETRY_BASE_S * 2**fruitless)
                continue
            wrong = partial.problem()
            if wrong is None:
                return
            await asyncio.to_thread(partial.restart)
            if not resumed:
                raise DataLoss(f"blob {partial.descriptor.digest}: {wrong}", reason="DIGEST_MISMATCH")
            # What an earlier process left may be damaged (a power cut): once more, from the start.
            resumed = False

    async def _stream(self, partial: _Partial, source: BlobSource, progress: Callable[[int], None]) -> None:
        if partial.size >= partial.descriptor.size:
            return
        async with source.open_blob(partial.descriptor, partial.size) as (offset, chunks):
            if offset != partial.size:
                await asyncio.to_thread(partial.restart)
            pending: list[bytes] = []
            pending_bytes = 0
            try:
                async for chunk in chunks:
                    pending.append(chunk)
                    pending_bytes += len(chunk)
                    if pending_bytes >= CHUNK_BYTES:
                        data, pending, pending_bytes = pending, [], 0
                        await _to_the_end(partial.append, data)
                        progress(partial.size)
                    if partial.size + pending_bytes > partial.descriptor.size:
                        break  # longer than it may be; `problem` says so
            finally:
                if pending:  # also when it broke off: each byte that came is kept
                    await _to_the_end(partial.append, pending)
                    progress(partial.size)
        if partial.size < partial.descriptor.size:
            raise Interrupted(f"it ended after {partial.size} of {partial.descriptor.size} bytes")


class _Partial:
    """A blob on its way: a file that grows, and the hash of what is in it. Its methods block."""

    def __init__(self, path: Path, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256()
        self._fd = -1

    def open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        buffer = bytearray(CHUNK_BYTES)
        while count := os.readv(self._fd, [buffer]):
            self._hash.update(memoryview(buffer)[:count])
            self.size += count
        if self.size > self.descriptor.size:
            self.restart()

    def append(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            view = memoryview(chunk)
            while len(view):
                written = os.write(self._fd, view)
                self._hash.update(view[:written])
                self.size += written
                view = view[written:]

    def restart(self) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.size = 0

    def problem(self) -> str | None:
        if self.size != self.descriptor.size:
            return f"it is longer than the {self.descriptor.size} bytes that the manifest says"
        found = f"sha256:{self._hash.hexdigest()}"
        return None if found == self.descriptor.digest else f"what arrived has the digest {found}"

    def commit(self, target: Path) -> None:
        os.fsync(self._fd)
        self._path.rename(target)
        sync_directory(target.parent)

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def try_lock(root: Path, digest: str) -> int | None:
    """Takes the lock of a digest in the store below ``root`` if nobody has it; its descriptor, to be closed by the
    caller, or None."""
    fd = os.open(root / "locks" / hex_of(digest), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def hex_of(digest: str) -> str:
    """The digest as a file name: without the colon, which separates directories in mount options."""
    return digest.removeprefix("sha256:")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file so that there is either the old one or the whole new one, also after a power cut."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(path)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def _to_the_end(work: Callable[[list[bytes]], None], data: list[bytes]) -> None:
    """Runs a short piece of work in a thread; a cancelled caller waits for its end, so that nothing writes after."""
    running = asyncio.ensure_future(asyncio.to_thread(work, data))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # the next attempt meets the same trouble; now the cancellation counts
        raise


async def _flock(path: Path) -> int:
    """Takes the lock, waiting for as long as it takes; returns its descriptor, to be closed by the caller.

    A waiting flock can't be called off, so it waits in a thread of its own, which closes the file by itself if nobody
    wants the lock any more when it comes.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    loop = asyncio.get_running_loop()
    taken: asyncio.Future[int] = loop.create_future()

    def deliver() -> None:
        if taken.done():
            os.close(fd)
        else:
            taken.set_result(fd)

    def wait() -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed
            os.close(fd)

    threading.Thread(target=wait, name=f"flock-{path.name[:12]}", daemon=True).start()
    try:
        return await taken
    except asyncio.CancelledError:
        if taken.done() and not taken.cancelled():
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
