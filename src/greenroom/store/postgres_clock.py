"""The time as all see it who share a database: the database's clock."""

from __future__ import annotations

import time

#: How fast the clock goes, compared with time, while it is ahead of the database's (whose clock was set back): it
#: never steps back, but gets there.
CATCH_UP = 0.5


class DatabaseClock:
    """An estimate: this machine's monotonic clock and an offset, which is known to lie between two bounds.

    The database's time was read somewhere between a call's start and its end, which bounds the offset; each call
    narrows the bounds, and one that contradicts them (the clocks drift, or the database's was set) replaces them.
    """

    def __init__(self) -> None:
        # Until the database has been asked: this machine's clock.
        offset = time.time() - time.monotonic()
        self._low, self._high = offset, offset
        self._asked = False
        self._last = (time.monotonic(), 0.0)  # when it was read, and what was said

    def learn(self, started: float, said: float, ended: float) -> None:
        """The database ``said`` a time within a call that ``started`` and ``ended`` then (`time.monotonic`)."""
        low, high = said - ended, said - started
        if self._asked and max(low, self._low) <= min(high, self._high):
            low, high = max(low, self._low), min(high, self._high)
        self._low, self._high, self._asked = low, high, True

    def now(self) -> float:
        """Seconds since the epoch. Never less than before."""
        monotonic = time.monotonic()
        now = monotonic + (self._low + self._high) / 2
        then, said = self._last
        if now < said:
            now = said + (monotonic - then) * CATCH_UP
        self._last = monotonic, now
        return now
