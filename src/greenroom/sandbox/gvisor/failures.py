"""What gVisor and the kernel say when something fails, as the errors of the port."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from greenroom.sandbox.gvisor.urpc import UrpcClosed, UrpcError

#: gVisor writes a checkpoint in pieces; less than one of them is no room.
FULL_BYTES = 1 << 20


@contextlib.contextmanager
def sandbox_errors(sid: str, doing: str, command: str = "") -> Iterator[None]:
    """Turns what the sandbox says into the errors of the port."""
    try:
        yield
    except UrpcClosed as e:
        raise Unavailable(f"sandbox {sid} is gone: {doing} failed ({e})", reason="SANDBOX_GONE") from e
    except TimeoutError as e:
        raise Unavailable(f"sandbox {sid} does not answer: {doing} failed", reason="SANDBOX_STUCK") from e
    except OSError as e:
        raise storage_error(e, doing) from e
    except UrpcError as e:
        text = e.message.lower()
        if "no space left" in text or "quota exceeded" in text:
            raise _disk_full(doing, e) from e
        if command and ("no such file" in text or "not found" in text or "permission denied" in text):
            raise FailedPrecondition(
                f"the sandbox has no program {command!r} ({e})",
                reason="COMMAND_NOT_FOUND",
                metadata={"command": command},
            ) from e
        said = str(e).splitlines()[0]  # gVisor's own failures come with the stacks of its threads
        raise Internal(f"{doing} failed in sandbox {sid}: {said}") from e


def disk_is_full(directory: Path) -> bool:
    """Whether a write there must have failed. On a full disk gVisor's checkpoint does not always say so: it may also
    report a failure of its own."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize < FULL_BYTES


def why_not_running(error: Exception, source: Path | None, log: str, memory_bytes: int) -> Exception:
    """Why an actor did not start, or did not wake from ``source``.

    Args:
        log: what runsc said last.
        memory_bytes: the limit, when the kernel has killed something for want of memory; else 0.
    """
    if isinstance(error, GreenroomError):
        return error
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return storage_error(error, "giving the sandbox its identity")
    said = f"{error or 'no answer in time'}; runsc says: {log}"
    if memory_bytes:
        return ResourceExhausted(
            f"the memory limit of {memory_bytes >> 20} MiB does not suffice; raise the template's resources ({said})",
            reason="OUT_OF_MEMORY",
        )
    if isinstance(error, TimeoutError):
        return Unavailable(f"the sandbox does not answer: {said}", reason="SANDBOX_STUCK")
    if source is not None:
        return DataLoss(f"snapshot {source} can't be restored: {said}", reason="SNAPSHOT_UNREADABLE")
    return FailedPrecondition(f"the sandbox did not start: {said}", reason="START_FAILED")


def storage_error(error: OSError, doing: str) -> ResourceExhausted | Internal:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(doing, error)
    return Internal(f"{doing} failed: {error}")


def _disk_full(doing: str, error: Exception) -> ResourceExhausted:
    return ResourceExhausted(
        f"the worker's disk is full: {doing} failed ({error}); delete actors, or free some space", reason="DISK_FULL"
    )
