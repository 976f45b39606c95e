"""Where a message's body ends, and how it is framed anew. Pure.

A decoder takes what arrived and gives the payload; what lies behind the body's end is in ``rest``. Nothing of the
sender's framing goes on: chunk extensions are dropped and chunks are cut anew, so what the next reader sees is what was
decided here.

Source: RFC 9112 sections 6 and 7.1.
"""

from __future__ import annotations

import re
from typing import Final

from greenroom.gateway.heads import CHUNKED, UNTIL_CLOSE, BadMessage, parse_trailers

#: A chunk's size line with its extensions, which nobody uses.
MAX_CHUNK_LINE: Final = 256
MAX_TRAILER_BYTES: Final = 8192
# 15 hex digits: 1 EiB, and no overflow anywhere.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")

_SMALL_SIZES = {form % size: size for size in range(1, 256) for form in (b"%x", b"%X")}

# Where a chunked body is, when not inside a chunk's payload (then: the bytes left of it).
_SIZE_LINE: Final = 0
_CHUNK_END: Final = -1
_TRAILERS: Final = -2


class LengthBody:
    """``length`` bytes."""

    __slots__ = ("_left", "done", "rest")
    trailers: tuple[bytes, ...] = ()

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if len(data) < self._left:
            self._left -= len(data)
            return data
        self.done = True
        if len(data) > self._left:
            self.rest = data[self._left :]
            data = data[: self._left]
        self._left = 0
        return data


class UntilCloseBody:
    """Everything until the sender closes; ``done`` is set by who sees that."""

    __slots__ = ("done", "rest")
    trailers: tuple[bytes, ...] = ()

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data


def _small_chunks(data: bytes, here: int, payload: list[bytes]) -> int:
    """Takes chunks of up to 255 bytes that are there in whole, from the end of one (``here``) to the end of another.
    Only for speed: a sender may cut its body into a great many, and the event loop waits."""
    size = len(data)
    while data.startswith(b"\r\n", here):
        end = data.find(b"\r\n", here + 2, here + 6)
        length = _SMALL_SIZES.get(data[here + 2 : end]) if end > 0 else None
        if length is None or end + 2 + length > size:
            break
        here = end + 2 + length
        payload.append(data[end + 2 : here])
    return here


class ChunkedBody:
    """Chunks, read strictly: lines end in CR LF, sizes are hexadecimal digits and nothing else."""

    __slots__ = ("_at", "_kept", "done", "rest", "trailers")

    def __init__(self) -> None:
        self._at = _SIZE_LINE
        #: An incomplete line, chunk end or trailer section; never payload, so it is short.
        self._kept = b""
        self.done = False
        self.rest = b""
        self.trailers: tuple[bytes, ...] = ()

    def feed(self, data: bytes) -> bytes:
        """
        Raises:
            BadMessage: this is no chunked body.
        """
        if self._kept:
            data = self._kept + data
        payload: list[bytes] = []
        here = 0
        before = -1
        while here != before and here < len(data) and not self.done:
            before = here
            if self._at > 0:
                payload.append(data[here : here + self._at])
                here += len(payload[-1])
                self._at = self._at - len(payload[-1]) or _CHUNK_END
            elif self._at == _TRAILERS:
                here = self._trailer_section(data, here)
            else:
                if self._at == _CHUNK_END:
                    here = _small_chunks(data, here, payload)
                here = self._size_line(data, here)
        if self.done:
            self.rest = data[here:]
        self._kept = data[here:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _size_line(self, data: bytes, here: int) -> int:
        """Reads the next chunk's size, and before it the end of the last one; ``here`` if they are not whole yet."""
        line = here
        if self._at == _CHUNK_END:
            end_of_chunk = data[here : here + 2]
            if not b"\r\n".startswith(end_of_chunk):
                raise BadMessage("a chunk does not end where its size says")
            if len(end_of_chunk) < 2:
                return here
            line += 2
        end = data.find(b"\r\n", line, line + MAX_CHUNK_LINE)
        if end < 0:
            if len(data) - line >= MAX_CHUNK_LINE:
                raise BadMessage(f"the size line of a chunk is longer than {MAX_CHUNK_LINE} bytes")
            return here
        match = _CHUNK_LINE.fullmatch(data, line, end)
        if match is None:
            raise BadMessage("the size of a chunk is not a hexadecimal number")
        self._at = int(match[1], 16) or _TRAILERS
        return end + 2

    def _trailer_section(self, data: bytes, here: int) -> int:
        if data.startswith(b"\r\n", here):
            self.done = True
            return here + 2
        end = data.find(b"\r\n\r\n", here, here + MAX_TRAILER_BYTES)
        if end < 0:
            if len(data) - here >= MAX_TRAILER_BYTES:
                raise BadMessage(f"the trailers are longer than {MAX_TRAILER_BYTES} bytes")
            return here
        self.trailers = parse_trailers(data[here : end + 4])
        self.done = True
        return end + 4


Body = LengthBody | UntilCloseBody | ChunkedBody


def decoder(framing: int) -> Body:
    """For a length in bytes, `CHUNKED` or `UNTIL_CLOSE`."""
    if framing == CHUNKED:
        return ChunkedBody()
    return UntilCloseBody() if framing == UNTIL_CLOSE else LengthBody(framing)


def chunk(payload: bytes) -> bytes:
    """``payload`` (not empty: that would be the end) as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def last_chunk(trailers: tuple[bytes, ...] = ()) -> bytes:
    """The end of a chunked body; ``trailers`` are whole lines."""
    return b"0\r\n%b\r\n" % b"".join(trailers)
