"""A blob on its way: a file that is filled piece by piece, in any order, and goes on after any interruption.

The file has room for the whole blob and, behind it, one byte a piece that says whether the piece is there::

    | piece 0 | piece 1 | ... | piece n-1 | marks: n bytes |      under way
    | piece 0 | piece 1 | ... | piece n-1 |                       whole and verified, about to be renamed

A piece's mark is written after the piece, so a process may be killed at any instant: what is marked is there, and what
was under way, at most `MAX_IN_FLIGHT_BYTES` for an image, is fetched again. (After a power cut marks
may have reached the disk before their pieces. Then the digest is wrong, and the blob is fetched from its start.)
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from greenroom.images.config import Descriptor

#: A piece is asked for with one request. Smaller ones cost more requests, larger ones lose more when all is killed.
PIECE_BYTES = 1 << 20
#: Of all blobs of an image, what is asked for at a time: what memory holds, and what a kill loses. On a link of 10
#: Mbit/s and 400 ms (0.5 MB on the way) pieces side by side hide the round trips; a faster one as long carries 10 MB/s.
MAX_IN_FLIGHT_BYTES = 4 << 20

#: Pieces of which it is told that they were read again: every 0.1 s or so. More than are under way at a time, so it is
#: not told of the few that came before their turn.
TOLD_PIECES = 16

_HERE = b"\1"


class Partial:
    """The blob ``descriptor``, on its way in the file ``path``. Its methods block; `write` may be called from several
    threads at a time.

    The digest is computed while pieces come: of a piece that continues what was hashed at once, of one that is ahead
    when those before it are there.

    Args:
        hashed: called, from whichever thread, while many pieces are read again for the digest, with the bytes up to
            there. With gigabytes that takes longer than anybody waits without hearing of something that moves.
    """

    def __init__(self, path: Path, descriptor: Descriptor, hashed: Callable[[int], None] = lambda done: None) -> None:
        self.descriptor = descriptor
        self._tell_hashed = hashed
        self.done_bytes = 0
        self._path = path
        self._count = _count(descriptor.size)
        self._marks = bytearray(self._count)
        self._hash = hashlib.sha256()
        self._hashed = 0  # pieces, from the first
        self._turn = threading.Lock()
        self._fd = -1

    def open(self) -> None:
        """Takes up what an earlier attempt left; the caller holds the digest's lock."""
        size = self.descriptor.size
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        length = os.fstat(self._fd).st_size
        if length == size + self._count:
            self._marks = bytearray(_read(self._fd, self._count, size))
        elif length == size:
            self._marks = bytearray(_HERE * self._count)
        else:
            self.restart()
        self.done_bytes = sum(self._length(n) for n in range(self._count) if self._marks[n])
        self._hash_on(-1, b"")

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not there, ascending."""
        return [number for number in range(self._count) if not self._marks[number]]

    def has(self, number: int) -> bool:
        return bool(self._marks[number])

    def bounds(self, number: int) -> tuple[int, int]:
        """Where the piece begins and ends in the blob."""
        return number * PIECE_BYTES, number * PIECE_BYTES + self._length(number)

    def write(self, number: int, data: bytes | bytearray) -> None:
        """Stores a whole piece that is missing."""
        start, end = self.bounds(number)
        assert len(data) == end - start and not self._marks[number]
        _write(self._fd, data, start)
        _write(self._fd, _HERE, self.descriptor.size + number)
        with self._turn:
            self._marks[number] = 1
            self.done_bytes += len(data)
            self._hash_on(number, data)

    def restart(self) -> None:
        """Forgets all that is there."""
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self.descriptor.size + self._count)
        self._marks = bytearray(self._count)
        self._hash = hashlib.sha256()
        self._hashed = 0
        self.done_bytes = 0

    def wrong_digest(self) -> str | None:
        """The digest of the whole blob, if it is not the right one."""
        assert self._hashed == self._count
        found = f"sha256:{self._hash.hexdigest()}"
        return None if found == self.descriptor.digest else found

    def commit(self, target: Path) -> None:
        """Makes the whole, verified blob durable under its final name."""
        os.ftruncate(self._fd, self.descriptor.size)
        os.fsync(self._fd)
        self._path.rename(target)

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _length(self, number: int) -> int:
        return min(PIECE_BYTES, self.descriptor.size - number * PIECE_BYTES)

    def _hash_on(self, number: int, data: bytes | bytearray) -> None:
        first = self._hashed
        while self._hashed < self._count and self._marks[self._hashed]:
            # What is not at hand was written a moment ago, so it comes from the page cache.
            start, end = self.bounds(self._hashed)
            self._hash.update(data if self._hashed == number else _read(self._fd, end - start, start))
            self._hashed += 1
            if (self._hashed - first) % TOLD_PIECES == 0:
                self._tell_hashed(end)


def done_bytes(path: Path, descriptor: Descriptor) -> int:
    """How much of a blob is in the file that another process fills; a snapshot, 0 if there is no such file."""
    count = _count(descriptor.size)
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length == descriptor.size:
                return length
            if length != descriptor.size + count:
                return 0
            marks = os.pread(file.fileno(), count, descriptor.size)
    except FileNotFoundError:
        return 0
    return min(marks.count(_HERE) * PIECE_BYTES, descriptor.size)


def _count(size_bytes: int) -> int:
    return -(-size_bytes // PIECE_BYTES)


def _read(fd: int, size_bytes: int, offset: int) -> bytes:
    """All of it: nobody shortens the file meanwhile."""
    data = os.pread(fd, size_bytes, offset)
    while len(data) < size_bytes:
        more = os.pread(fd, size_bytes - len(data), offset + len(data))
        assert more
        data += more
    return data


def _write(fd: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
