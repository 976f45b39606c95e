"""Bytes that have arrived and that nobody has taken yet."""

from __future__ import annotations

import re

from greenroom.gateway.heads import HEAD_END

_EMPTY_LINES = re.compile(rb"(?:\r\n)*")


class HeadTooLarge(Exception):
    pass


class Inbox:
    """A small buffer that finds where a message head ends, looking at each byte once however slowly they come."""

    __slots__ = ("_data", "_searched")

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""
        self._searched = 0

    def __len__(self) -> int:
        return len(self._data)

    def add(self, data: bytes) -> None:
        if not self._data:
            self._data = data
        elif isinstance(self._data, bytearray):
            self._data += data
        else:
            self._data = bytearray(self._data)
            self._data += data

    def take_head(self, limit: int) -> bytes | None:
        """Everything up to and with the first empty line; None while there is none. Empty lines in front are dropped
        (RFC 9112 2.2).

        Raises:
            HeadTooLarge: there are ``limit`` bytes without an end.
        """
        data = self._data
        if data[:2] == b"\r\n":
            self._data = data = data[_EMPTY_LINES.match(data).end() :]  # type: ignore[union-attr]
            self._searched = 0
        end = data.find(HEAD_END, self._searched)
        if end < 0 or end + 4 > limit:
            if len(data) >= limit:
                raise HeadTooLarge
            self._searched = max(0, len(data) - 3)
            return None
        self._searched = 0
        end += 4
        if end == len(data):
            self._data = b""
            return bytes(data)
        self._data = data[end:]
        return bytes(data[:end])

    def take_all(self) -> bytes:
        data, self._data, self._searched = self._data, b"", 0
        return bytes(data)
