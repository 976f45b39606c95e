"""What the snapshot store asks of the place where objects are kept. All calls block and are made from threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from greenroom.core.errors import GreenroomError, ResourceExhausted, Unavailable

#: Bytes that are read, hashed and written at a time: large enough that the interpreter's share vanishes, small
#: enough that a hundred transfers side by side stay below 100 MiB.
CHUNK_BYTES = 1 << 20
#: Between two calls of one transfer's listener: what a person can follow, and nothing beside a chunk's own cost.
PROGRESS_PERIOD_S = 0.1

OnBytes = Callable[[int, int], None]
"""Called in the event loop with (bytes done, bytes in all), at most ten times a second while they move."""


class Stopped(Exception):
    """The caller gave up; raised inside the worker thread only."""


class Meter:
    """Adds up what the threads of one transfer have moved and tells the listener in the loop that made it."""

    def __init__(self, total_bytes: int, listener: OnBytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._total = total_bytes
        self._lock = threading.Lock()
        self._done = 0.0
        self._next = 0.0

    def move(self, count: float) -> None:
        """From any thread."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + PROGRESS_PERIOD_S
            done = int(self._done)
        self._loop.call_soon_threadsafe(self._listener, done, self._total)


class Stop:
    """Lets an awaiting task end the thread that works for it, between two chunks; the thread says how far it is."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._event = threading.Event()
        self._meter = meter

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped

    def moved(self, count: float) -> None:
        """So many of the transfer's bytes are done; where each has to pass twice, half of them the first time."""
        if self._meter is not None:
            self._meter.move(count)


class Stored(NamedTuple):
    """An object in a list. ``modified_at``: when it was put there, by the clock of the place where it is (seconds)."""

    key: str
    modified_at: float


class Objects(Protocol):
    """A flat name space of immutable objects. Keys are relative paths of plain names joined by ``/``.

    Everything that returns has happened durably. A full store raises `OSError` with ``ENOSPC`` or `disk_full()`.

    ``is_near``: objects are files of this machine, and `download` costs next to nothing.
    """

    is_near: bool

    def put_file(
        self, prefix: str, source: Path, staged: str, name: Callable[[int, str], str], stop: Stop
    ) -> tuple[int, str]:
        """Stores ``source`` below ``prefix``, over what an earlier attempt left there; returns (size in bytes, SHA-256
        in hex) of what is stored, as read back from it. By the time it returns ``stop.moved`` has heard of as many
        bytes.

        Args:
            staged: a name of its own that it may have there meanwhile.
            name: what it is to be called, by its size and SHA-256; "": it need not be stored. What it raises goes
                through, and then nothing was stored.
        """

    def seal(self, prefix: str) -> None:
        """Makes the names of everything that is directly below ``prefix`` durable."""

    def put_new(self, key: str, data: bytes, staged: str) -> bool:
        """Stores ``data`` unless the key exists; returns whether it did. Atomic: never half visible. ``staged``: a name
        of its own that it may have beside it meanwhile."""

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        """The object, or None; never more than ``limit_bytes`` + 1 bytes of it."""

    def download(self, key: str, target: Path, stop: Stop) -> int | None:
        """Writes the object to a new file, with ``stop.moved``, or lets it lead there; returns its size, or None when
        there is no such object."""

    def delete(self, keys: Sequence[str]) -> None:
        """Idempotent. Raises when any of them may still be there."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Everything below the directory ``prefix``; what lies in one directory comes together."""

    def clock(self) -> float:
        """Now, by the clock that `list` takes its times from (seconds since the epoch)."""


def garbled(where: str, source: Path) -> GreenroomError:
    """The error of a store that has something else than what was put there. The source is as good as it was."""
    return Unavailable(
        f"the snapshot store does not keep what is put there: {where} differs from {source}; check its disks",
        reason="SNAPSHOT_STORE_REFUSES",
    )


def disk_full(where: str) -> GreenroomError:
    """The error of a store without room."""
    return ResourceExhausted(
        f"the snapshot store {where} is full: free space there, or delete actors that are not needed",
        reason="DISK_FULL",
        retry_after_s=30.0,
    )
