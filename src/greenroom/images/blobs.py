"""Content-addressed blobs on disk, and the locks that several processes share.

Below the store's root::

    blobs/sha256/<hex>   a whole, verified blob; never changed
    partial/<hex>        a download under way or cut off (`greenroom.images.pieces`)
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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from greenroom.core.errors import DataLoss, GreenroomError
from greenroom.images import pieces, space
from greenroom.images.config import MAX_JSON_BYTES, Descriptor
from greenroom.images.download import (
    MAX_FRUITLESS_ATTEMPTS,
    MAX_FRUITLESS_ATTEMPTS_OF_MANY,
    BlobSource,
    Download,
    Interrupted,
    to_the_end,
)
from greenroom.images.pieces import Partial

#: How often somebody who waits for a lock may look how far its holder is.
WAITING_PERIOD_S = 0.25
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class BlobStore:
    """The blobs, partial downloads and locks below ``root``, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        private(root)
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

    def find_manifest(self, digest: str) -> bytes | None:
        """A manifest that is here and is what it was when it was stored."""
        try:
            with self.path(digest).open("rb") as file:
                data = file.read(MAX_JSON_BYTES + 1)
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == hex_of(digest) else None

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
    async def locked(self, digest: str, waiting: Callable[[], None] | None = None) -> AsyncIterator[int]:
        """Holds the digest's lock among all processes that share the store; yields the lock's descriptor, which a
        child may inherit to hold it too. ``waiting`` is called now and then while somebody else has it."""
        taking = asyncio.create_task(_flock(self._locks / hex_of(digest)), name=f"lock-{digest[:24]}")
        try:
            while waiting is not None and not (await asyncio.wait([taking], timeout=WAITING_PERIOD_S))[0]:
                waiting()
            fd = await taking
        except BaseException:
            taking.cancel()
            await asyncio.wait([taking])
            if not taking.cancelled() and taking.exception() is None:
                os.close(taking.result())
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def done_bytes(self, descriptor: Descriptor) -> int:
        """How much of the blob is here, also while another process fetches it. Costs microseconds."""
        if self.has(descriptor):
            return descriptor.size
        return pieces.done_bytes(self._partial / hex_of(descriptor.digest), descriptor)

    async def fetch(
        self,
        descriptor: Descriptor,
        sources: Sequence[BlobSource],
        budget: asyncio.Semaphore,
        progress: Callable[[int], None],
    ) -> None:
        """Makes sure that the blob is here. Goes on with a partial download, of whichever process and source; a
        cancelled one stays for the next.

        Args:
            sources: asked in this order; what the first brings the next goes on with. The last one's error counts.
            budget: pieces that may be under way, of all blobs that are fetched with it.
            progress: called with the bytes that are here, often; while what is here is read again for the digest, with
                those that were.

        Raises:
            DataLoss: the bytes are not what the digest says (reason ``DIGEST_MISMATCH``); they are discarded. Or the
                blob is longer or shorter than the descriptor says (reason ``SIZE_MISMATCH``).
            ResourceExhausted: the disk is full (reason ``DISK_FULL``); what was there of the blob is removed.
            Interrupted: several attempts brought nothing.
        """
        async with self.locked(descriptor.digest):
            if self.has(descriptor):
                progress(descriptor.size)
                return
            loop = asyncio.get_running_loop()

            def hashed(done: int) -> None:  # in the thread that reads
                loop.call_soon_threadsafe(progress, done)

            partial = Partial(self._partial / hex_of(descriptor.digest), descriptor, hashed)
            try:
                await to_the_end(partial.open)
                if self._lacking(partial) > 0:  # better said now than after half of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                await self._download(partial, sources, budget, progress)
                await to_the_end(partial.commit, self.path(descriptor.digest))
                await asyncio.to_thread(sync_directory, self._blobs)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                full = space.disk_full(f"blob {descriptor.digest}", self._partial, _left(partial))
                partial.discard()
                raise full from error
            finally:
                partial.close()

    async def _download(
        self,
        partial: Partial,
        sources: Sequence[BlobSource],
        budget: asyncio.Semaphore,
        progress: Callable[[int], None],
    ) -> None:
        for source in sources[:-1]:
            try:
                download = Download(partial, source, budget, progress, MAX_FRUITLESS_ATTEMPTS_OF_MANY)
                return await self._finish(download, partial)
            except (Interrupted, GreenroomError):
                continue  # whatever it is, the next one may do better
        await self._finish(Download(partial, sources[-1], budget, progress, MAX_FRUITLESS_ATTEMPTS), partial)

    async def _finish(self, download: Download, partial: Partial) -> None:
        others_pieces = partial.done_bytes > 0
        while True:
            await download.run()
            found = partial.wrong_digest()
            if found is None:
                return
            await to_the_end(partial.restart)
            if not others_pieces:
                raise DataLoss(
                    f"blob {partial.descriptor.digest}: what arrived has the digest {found}; something on the "
                    "way changes bytes, or the registry has lost them",
                    reason="DIGEST_MISMATCH",
                )
            # What an earlier process left may be damaged (a power cut), or another source may have lied: once more, all
            # from this one.
            others_pieces = False

    def _lacking(self, partial: Partial) -> int:
        """Bytes that the blob still needs and the disk does not have; negative: room that is left."""
        return _left(partial) - space.free_bytes(self._partial)


def private(root: Path) -> None:
    """Makes the directory of a store, for this user alone, if it is not there."""
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)


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


def _left(partial: Partial) -> int:
    """Bytes that are still to be written."""
    return partial.descriptor.size - partial.done_bytes


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
