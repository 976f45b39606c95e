"""A further command in a sandbox, and the pipes to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from greenroom.core.errors import Unavailable
from greenroom.sandbox.gvisor.control import Started
from greenroom.sandbox.reaper import readable, writable

#: As much as a pipe holds.
CHUNK_BYTES = 1 << 16
#: Chunks that wait for the reader of `PipeSession.output`; then the command itself has to wait.
MAX_CHUNKS = 16
KILLED = 137
#: What a command that took too long has written may still be read for so long: children that it left behind keep its
#: pipes open, perhaps for ever.
LAST_OUTPUT_S = 1.0


class PipeSession:
    """An `ExecSession` over three pipes. Made by `open_session`."""

    def __init__(self, started: Started, stdin: int, outputs: dict[int, int], timeout_s: float) -> None:
        self._started = started
        self._stdin = stdin
        self._chunks: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(MAX_CHUNKS)
        self._pumps = [asyncio.ensure_future(self._pump(stream, fd)) for stream, fd in outputs.items()]
        self._code = asyncio.ensure_future(started.wait())
        self._everything = asyncio.gather(self._code, *self._pumps, return_exceptions=True)
        if timeout_s:
            limit = asyncio.ensure_future(self._end_in_time(timeout_s))
            self._everything.add_done_callback(lambda _: limit.cancel())

    @property
    def running(self) -> bool:
        return not self._code.done()

    async def write(self, data: bytes) -> None:
        """See `ExecSession.write`.

        Raises:
            Unavailable: the command reads no more (reason ``STDIN_CLOSED``).
        """
        if not data:
            self._close_stdin()
            return
        if self._stdin < 0:
            raise Unavailable("stdin of the command is closed", reason="STDIN_CLOSED")
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._stdin, left) :]
            except BlockingIOError:
                await writable(self._stdin)
            except BrokenPipeError as e:
                self._close_stdin()
                raise Unavailable("the command has closed its stdin", reason="STDIN_CLOSED") from e

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        open_streams = len(self._pumps)
        while open_streams:
            stream, chunk = await self._chunks.get()
            if chunk:
                yield stream, chunk
            else:
                open_streams -= 1

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    async def kill(self) -> None:
        if self.running:
            await self._started.kill()

    def abort(self) -> None:
        """See `ExecSession.abort`. Also when the sandbox is gone."""
        self._close_stdin()
        for pump in self._pumps:
            pump.cancel()

    def when_done(self, callback: Callable[[], object]) -> None:
        """Calls back once the command has ended and its output is read, or the session is aborted."""

        def done(_: object) -> None:
            self._close_stdin()
            callback()

        self._everything.add_done_callback(done)

    async def _end_in_time(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)
        try:
            await self.kill()
            await asyncio.wait(self._pumps, timeout=LAST_OUTPUT_S)
        finally:
            for pump in self._pumps:
                pump.cancel()

    async def _pump(self, stream: int, fd: int) -> None:
        try:
            while True:
                await readable(fd)
                chunk = os.read(fd, CHUNK_BYTES)
                await self._chunks.put((stream, chunk))
                if not chunk:
                    return
        except asyncio.CancelledError:
            self._end_at_once(stream)
            raise
        finally:
            os.close(fd)

    def _end_at_once(self, stream: int) -> None:
        if self._chunks.full():
            self._chunks.get_nowait()  # nobody was reading
        self._chunks.put_nowait((stream, b""))

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1


async def open_session(start: Callable[[tuple[int, ...]], Awaitable[Started]], timeout_s: float) -> PipeSession:
    """Makes the pipes, and calls ``start`` with the command's ends of them. ``timeout_s`` 0 means none."""
    fds: list[int] = []
    try:
        for _ in range(3):
            fds += os.pipe2(os.O_CLOEXEC)
        stdin_read, stdin_write, out_read, out_write, err_read, err_write = fds
        for fd in (stdin_write, out_read, err_read):
            os.set_blocking(fd, False)
        started = await start((stdin_read, out_write, err_write))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    for fd in (stdin_read, out_write, err_write):
        os.close(fd)
    return PipeSession(started, stdin_write, {1: out_read, 2: err_read}, timeout_s)
