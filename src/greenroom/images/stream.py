"""Byte streams that archives are read from: in large pieces, without copying, and in constant memory."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

PIECE_BYTES = 1 << 20
#: Pieces that are read ahead. Three keep both sides busy when one has a slow moment.
_PIECES_AHEAD = 3


class Malformed(Exception):
    """The stream is no tar archive, or it ends too early. ``name``: of the entry where that was seen, if it has one."""

    def __init__(self, why: str, name: str = "") -> None:
        super().__init__(why)
        self.name = name


class Readable(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Source:
    """A stream of which any number of bytes can be taken.

    Args:
        more: the next piece, empty at the end; it must stay as it is until the next is asked for.
    """

    def __init__(self, more: Callable[[], memoryview]) -> None:
        self._more = more
        self._piece = memoryview(b"")
        self._at = 0
        self._ended = False

    def _fill(self) -> bool:
        if not self._ended:
            self._piece, self._at = self._more(), 0
            self._ended = not self._piece
        return not self._ended

    def piece(self, most: int) -> memoryview:
        """The next bytes, at least one and at most ``most``; valid until more is asked for.

        Raises:
            Malformed: there are none.
        """
        if self._at == len(self._piece) and not self._fill():
            raise Malformed("the archive ends too early")
        piece = self._piece[self._at : self._at + most]
        self._at += len(piece)
        return piece

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes. Raises as `piece` does."""
        at, end = self._at, self._at + size
        if end <= len(self._piece):
            self._at = end
            return bytes(self._piece[at:end])
        taken = bytearray()
        while len(taken) < size:
            taken += self.piece(size - len(taken))
        return bytes(taken)

    def skip(self, size: int) -> None:
        """Raises as `piece` does."""
        while size > 0:
            size -= len(self.piece(size))

    def at_end(self) -> bool:
        return self._at == len(self._piece) and not self._fill()

    def drain(self) -> None:
        """Reads what is left (padding), so that all of it has been seen."""
        while self._fill():
            pass


class Data:
    """The data of one entry: can be iterated over once, each piece valid until the next. ``left``: bytes to come."""

    __slots__ = ("_source", "left")

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self.left = size

    def __iter__(self) -> Iterator[memoryview]:
        while self.left:
            piece = self._source.piece(self.left)
            self.left -= len(piece)
            yield piece


class ReadAhead:
    """Reads a stream in a thread of its own. Decompressing and hashing let go of Python's lock, so they go on while the
    files before are written. To be closed (a context manager).

    Args:
        stream: only ever read in the thread.
        seen: called with every piece, in the thread; what it raises, the reader gets.
    """

    def __init__(self, stream: Readable, seen: Callable[[memoryview], None]) -> None:
        self._stream = stream
        self._seen = seen
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[memoryview, memoryview] | BaseException] = queue.SimpleQueue()
        self._lent: memoryview | None = None
        for _ in range(_PIECES_AHEAD + 1):
            self._free.put(memoryview(bytearray(PIECE_BYTES)))
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._free.put(None)
        self._thread.join()

    def more(self) -> memoryview:
        """The next piece, for `Source`. Raises what reading raised; not to be called after that, or after the end."""
        if self._lent is not None:
            self._free.put(self._lent)
            self._lent = None
        got = self._full.get()
        if isinstance(got, BaseException):
            raise got
        self._lent, piece = got
        return piece

    def _run(self) -> None:
        try:
            while (buffer := self._free.get()) is not None:
                piece = buffer[: self._stream.readinto(buffer) or 0]
                self._seen(piece)
                self._full.put((buffer, piece))
                if not piece:
                    return
        except BaseException as error:  # whatever it is, it is the reader's
            self._full.put(error)


class FileSource(Source):
    """A file, in which skipping costs nothing. ``fd`` is the caller's; its position is not used."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0
        self._size = os.fstat(fd).st_size
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        super().__init__(self._read)

    def position(self) -> int:
        """Offset in the file of the next byte."""
        return self._offset - (len(self._piece) - self._at)

    def skip(self, size: int) -> None:
        buffered = min(size, len(self._piece) - self._at)
        self._at += buffered
        self._offset += size - buffered
        if self._offset > self._size:
            raise Malformed("the archive ends too early")

    def _read(self) -> memoryview:
        count = os.preadv(self._fd, [self._buffer], self._offset)
        self._offset += count
        return self._buffer[:count]
