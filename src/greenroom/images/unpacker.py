"""Starts the unpacker (`greenroom.images.unpack`) and follows what it reports."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

import msgspec

from greenroom.core.errors import Internal, rebuild
from greenroom.images.unpack import Job, Report

#: What a dying unpacker said on stderr goes into the error, up to this many bytes from its end.
_SHOWN_STDERR_BYTES = 500


async def run_unpacker(job: Job, progress: Callable[[int, int], None], lock_fd: int) -> None:
    """Unpacks in a child process; when this returns or raises, also by cancellation, the child is gone.

    Args:
        progress: called with (number of the layer, compressed bytes read of it).
        lock_fd: the image's lock. The child inherits it: should this process be killed, the next one waits until
            the child, too, is gone.

    Raises:
        GreenroomError: what `greenroom.images.unpack.unpack` raises.
        Internal: the child died.
    """
    with tempfile.TemporaryFile() as stderr:
        # -P: the working directory is nobody's library. utf8: names are bytes, and go through unharmed.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-X", "utf8", "-m", "greenroom.images.unpack"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
            pass_fds=(lock_fd,),
        )
        try:
            last = await _follow(process, job, progress)
            status = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await asyncio.shield(process.wait())
        if last.failure is not None:
            failure = last.failure
            raise rebuild(failure.code, failure.reason, failure.message, failure.metadata)
        if not last.finished or status != 0:
            stderr.seek(0)
            said = stderr.read()[-_SHOWN_STDERR_BYTES:].decode(errors="replace").strip()
            raise Internal(f"the image unpacker died with status {status}: {said or 'it said nothing'}")


async def _follow(process: Process, job: Job, progress: Callable[[int, int], None]) -> Report:
    """Hands the job over; returns the last report."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once: its status tells
        process.stdin.write(msgspec.json.encode(job))
        await process.stdin.drain()
        process.stdin.close()
    last = Report()
    async for line in process.stdout:
        last = msgspec.json.decode(line, type=Report)
        if not last.finished and last.failure is None:
            progress(last.layer, last.read_bytes)
    return last
