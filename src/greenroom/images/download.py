"""Downloads one blob from one source: pieces side by side, each retried where it broke off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import ParamSpec, Protocol, TypeVar

from greenroom.core.errors import GreenroomError, ResourceExhausted, Unavailable
from greenroom.images.config import Descriptor
from greenroom.images.pieces import MAX_IN_FLIGHT_BYTES, PIECE_BYTES, Partial

Arguments = ParamSpec("Arguments")
Done = TypeVar("Done")

#: Attempts in a row that bring no byte before a download is given up; each byte that arrives starts the count anew.
MAX_FRUITLESS_ATTEMPTS = 5
#: The same for a source after which there is another one to ask. Two, because a connection that was kept open may have
#: been closed by the other side a moment ago.
MAX_FRUITLESS_ATTEMPTS_OF_MANY = 2
#: Pause before attempt n is this times 2**n, so about 8 s in all: a registry that restarts is back by then.
RETRY_BASE_S = 0.25
#: What pauses that a server asks for may come to, from one byte to the next: below the stall timeout of preparations
#: (60 s), which would end them with less to say. Whoever asked is told when to try again.
MAX_PAUSE_S = 40.0


class Interrupted(Exception):
    """A stream broke off or could not be opened, and may well work when it is tried again."""

    retry_after_s = 0.0

    def final(self, what: str) -> GreenroomError:
        """The error for people when it is not tried again."""
        return Unavailable(f"{what}: {self}; check name and network of the registry", reason="REGISTRY_UNAVAILABLE")


class Throttled(Interrupted):
    """The other side wants to be asked less often, or not before ``retry_after_s`` (0: it did not say)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def final(self, what: str) -> GreenroomError:
        return ResourceExhausted(
            f"{what}: {self}; log in for a higher limit, use a mirror, or wait",
            reason="REGISTRY_RATE_LIMIT",
            retry_after_s=self.retry_after_s or 60.0,
        )


class BlobSource(Protocol):
    """Where blobs come from."""

    def open_blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """A stream of the blob's bytes from ``start``, at least up to ``end``, or, where a range can't be had, of all;
        and where it begins (``start`` or 0).

        Raises:
            Interrupted: to be tried again, on opening and while reading.
            NotFound: no such blob.
            DataLoss: the blob's size is not the descriptor's (reason ``SIZE_MISMATCH``).
        """
        ...


class _NoRanges(Exception):
    """The source begins at the start, whatever it is asked."""


def new_budget() -> asyncio.Semaphore:
    """For all downloads of one image: as many pieces as may be under way. Each image has its own, so that one whose
    registry is silent, or sends a byte a minute, takes nothing from the others."""
    return asyncio.Semaphore(MAX_IN_FLIGHT_BYTES // PIECE_BYTES)


class Download:
    """Fills ``partial`` from ``source``.

    Args:
        budget: from `new_budget`.
        progress: called with the bytes that are here or have at least arrived. It only falls when it turns out that the
            source knows no ranges, and so all has to come again: then it says how much has.
        patience: attempts in a row without a byte before it is given up.
    """

    def __init__(
        self,
        partial: Partial,
        source: BlobSource,
        budget: asyncio.Semaphore,
        progress: Callable[[int], None],
        patience: int,
    ) -> None:
        self._partial = partial
        self._source = source
        self._budget = budget
        self._progress = progress
        self._patience = patience
        self._done_bytes = partial.done_bytes

    async def run(self) -> None:
        """Returns when every piece is there; cancellation-safe: whole pieces stay.

        Raises:
            Interrupted: several attempts in a row brought nothing.
            NotFound, DataLoss: as the source says.
            OSError: the disk.
        """
        self._done_bytes = self._partial.done_bytes
        try:
            await self._side_by_side()
        except _NoRanges:
            self._done_bytes = self._partial.done_bytes
            async with self._budget:
                await self._patiently(self._in_one_stream)

    async def _side_by_side(self) -> None:
        missing = self._partial.missing()
        left = iter(missing)

        async def work() -> None:
            for number in left:  # shared: each takes the next
                async with self._budget:
                    await self._piece(number)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(MAX_IN_FLIGHT_BYTES // PIECE_BYTES, len(missing))):
                    group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _piece(self, number: int) -> None:
        start, end = self._partial.bounds(number)
        data = bytearray()

        async def fill() -> None:
            at = start + len(data)
            async with self._source.open_blob(self._partial.descriptor, at, end) as (begin, chunks):
                if begin != at:
                    raise _NoRanges
                async for chunk in chunks:
                    wanted = chunk[: end - start - len(data)]
                    data.extend(wanted)
                    self._arrived(len(wanted))
                    if len(data) == end - start:
                        return
            raise Interrupted(f"a blob ended after {start + len(data)} of {self._partial.descriptor.size} bytes")

        await self._patiently(fill)
        await to_the_end(self._partial.write, number, data)

    async def _in_one_stream(self) -> None:
        """All from the start; pieces that are here pass by, which is progress for whoever looks whether anything moves,
        but none for `_patiently`."""
        number, data = 0, bytearray()
        size = self._partial.descriptor.size
        async with self._source.open_blob(self._partial.descriptor, 0, size) as (begin, chunks):
            assert begin == 0
            async for chunk in chunks:
                data += chunk
                self._progress(min(number * PIECE_BYTES + len(data), size))
                while number * PIECE_BYTES < size:
                    start, end = self._partial.bounds(number)
                    if len(data) < end - start:
                        break
                    piece = bytes(memoryview(data)[: end - start])
                    del data[: end - start]
                    if not self._partial.has(number):
                        await to_the_end(self._partial.write, number, piece)
                        self._done_bytes += len(piece)
                    number += 1
                else:
                    return
        raise Interrupted(f"a blob ended after {number * PIECE_BYTES + len(data)} of {size} bytes")

    async def _patiently(self, attempt: Callable[[], Awaitable[None]]) -> None:
        fruitless, paused_s = 0, 0.0
        while True:
            before = self._done_bytes
            try:
                return await attempt()
            except Interrupted as error:
                # Whatever brought a byte counts: while others get through, this one will.
                fruitless, paused_s = (0, 0.0) if self._done_bytes > before else (fruitless + 1, paused_s)
                paused_s += error.retry_after_s
                if fruitless >= self._patience or paused_s > MAX_PAUSE_S:
                    raise
                await asyncio.sleep(max(RETRY_BASE_S * 2**fruitless, error.retry_after_s))

    def _arrived(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._progress(self._done_bytes)


async def to_the_end(work: Callable[Arguments, Done], *arguments: Arguments.args, **more: Arguments.kwargs) -> Done:
    """Runs a short piece of work in a thread; a caller who is cancelled, however often, waits for its end: what it
    holds for the work (a lock, a descriptor) must not be let go of before."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **more))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return running.result()
    if not running.cancelled():
        running.exception()  # the next attempt meets the same trouble; now the cancellation counts
    raise cancelled
