"""What the snapshot store asks of the place where objects are kept. All calls block and are made from threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from greenroom.core.errors import GreenroomError, ResourceExhausted

#: Bytes that are read, hashed and written at a time: large enough that the interpreter's share vanishes, small
#: enough that a hundred transfers side by side stay below 100 MiB.
CHUNK_BYTES = 1 << 20


class Stopped(Exception):
    """The caller gave up; raised inside the worker thread only."""


class Stop:
    """Lets an awaiting task end the thread that works for it, between two chunks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped


class Objects(Protocol):
    """A flat name space of immutable objects. Keys are relative paths of plain names joined by ``/``.

    Everything that returns has happened durably. A full store raises `OSError` with ``ENOSPC`` or `disk_full()`.
    """

    def put_file(self, key: str, source: Path, stop: Stop) -> tuple[int, str]:
        """Stores ``source``, over what an earlier attempt left there; returns (size in bytes, SHA-256 in hex) of
        what is stored, as read back from it."""

    def seal(self, prefix: str) -> None:
        """Makes the names of everything below ``prefix`` durable."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Stores ``data`` unless the key exists; returns whether it did. Atomic: never half visible."""

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        """The object, or None; never more than ``limit_bytes`` + 1 bytes of it."""

    def directory(self, prefix: str) -> Path | None:
        """Where the objects below ``prefix`` lie as files on this machine, or None when they do not."""

    def download(self, key: str, target: Path, stop: Stop) -> int | None:
        """Writes the object to a new file; returns its size, or None when there is no such object."""

    def delete(self, key: str) -> None:
        """Idempotent."""

    def delete_below(self, prefix: str) -> None:
        """Idempotent."""

    def list(self, prefix: str) -> Iterator[str]:
        """Every key below ``prefix``."""


def disk_full(where: str) -> GreenroomError:
    """The error of a store without room."""
    return ResourceExhausted(
        f"the snapshot store {where} is full: free space there, or delete actors that are not needed",
        reason="DISK_FULL",
        retry_after_s=30.0,
    )
