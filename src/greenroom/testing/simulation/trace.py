"""What happened, as one hash that two runs of a seed must share, and as lines for people."""

from __future__ import annotations

import hashlib
from collections.abc import Callable


class Trace:
    """Args:
    now: virtual seconds.
    keep: keeps the lines too.
    """

    def __init__(self, now: Callable[[], float], *, keep: bool = False) -> None:
        self._now = now
        self._hash = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.lines: list[str] = []

    def __call__(self, *what: object) -> None:
        line = f"{self._now():.6f} {' '.join(map(str, what))}"
        self._hash.update(line.encode())
        if self._keep:
            self.lines.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()
