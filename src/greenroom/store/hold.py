"""The exclusive hold of a data directory: one server at a time, and the second is told who the first is."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import sys
from pathlib import Path

import msgspec

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record

HOLD_FILE = "held-by"


class Holder(Record, frozen=True, kw_only=True):
    pid: int
    command: str
    since: str


class Hold:
    """An advisory lock (``flock``) on a file in the directory. The kernel drops it when the process ends, however it
    ends, so a file that a dead process left behind does not count. What the file says is for people only."""

    def __init__(self, directory: Path) -> None:
        """Raises:
        FailedPrecondition: another process holds it (reason ``DATA_DIR_IN_USE``; ``metadata``: ``pid``, ``since``).
        """
        self._path = directory / HOLD_FILE
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = _in_use(directory, os.pread(self._fd, 4096, 0))
            os.close(self._fd)
            raise error from None
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = Holder(pid=os.getpid(), command=" ".join(sys.argv)[:1000], since=since)
        said = msgspec.json.encode(holder) + b"\n"
        try:
            os.pwrite(self._fd, said, 0)  # in place, which a full disk allows
            os.ftruncate(self._fd, len(said))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.close(self._fd)
                raise

    def release(self) -> None:
        """Idempotent. The file stays: without it two processes could lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _in_use(directory: Path, said: bytes) -> FailedPrecondition:
    try:
        holder = msgspec.json.decode(said, type=Holder)
    except msgspec.DecodeError:  # it is being written just now
        return FailedPrecondition(f"data directory {directory} is in use by another server", reason="DATA_DIR_IN_USE")
    return FailedPrecondition(
        f"data directory {directory} is in use by process {holder.pid} ({holder.command}) since {holder.since}; "
        "stop that server, or use another data directory",
        reason="DATA_DIR_IN_USE",
        metadata={"pid": str(holder.pid), "since": holder.since},
    )
