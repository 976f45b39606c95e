"""Archives on their way into the store: images that are brought to it instead of being pulled.

Below the store's root::

    incoming/<id>    an archive (`greenroom.images.archive`); its lock (flock) is held by who works with it
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from greenroom.core.errors import ResourceExhausted
from greenroom.images.config import invalid
from greenroom.images.download import to_the_end

#: Largest archive that is taken: as much as one image may unpack to.
MAX_ARCHIVE_BYTES = 64 << 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@asynccontextmanager
async def received(root: Path, archive: AsyncIterator[bytes]) -> AsyncIterator[Path]:
    """The archive as a file, which is gone afterwards.

    Raises:
        FailedPrecondition: it is too large (reason ``IMAGE_INVALID``).
        ResourceExhausted: the disk is full (reason ``DISK_FULL``).
    """
    incoming = root / "incoming"
    incoming.mkdir(mode=0o700, exist_ok=True)
    path = incoming / uuid.uuid4().hex
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            await _save(fd, archive)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise ResourceExhausted(
                f"the disk of {root} is full: the archive does not fit; remove images that nobody needs, or add space",
                reason="DISK_FULL",
                retry_after_s=30.0,
            ) from error
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def clear_incoming(root: Path) -> int:
    """Removes what killed processes left; returns how many archives. Blocks."""
    count = 0
    for path in (root / "incoming").glob("*"):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # another process that starts was quicker, or whoever worked with it is done
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody works with it
            path.unlink(missing_ok=True)
            count += 1
    return count


async def _save(fd: int, archive: AsyncIterator[bytes]) -> None:
    size = 0
    async for chunk in archive:
        size += len(chunk)
        if size > MAX_ARCHIVE_BYTES:
            raise invalid(f"the archive is larger than {MAX_ARCHIVE_BYTES} bytes")
        await to_the_end(_write_all, fd, chunk)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
