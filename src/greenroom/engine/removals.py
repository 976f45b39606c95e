"""What this process has destroyed as garbage, and what it could not: the latest for people, and counts for metrics.

Every removal is a line of the log too. Records of it are in memory only: what they speak of is gone, and the log has
it.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from greenroom.core.records import Record

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Removals that are remembered: what somebody asks about was a moment ago.
MAX_REMEMBERED = 1000


class Removal(Record, frozen=True, kw_only=True):
    """``failure``: why it could not be destroyed; "" when it was. ``at``: seconds since the epoch."""

    kind: str
    id: str
    where: str
    at: float
    why: str
    size_bytes: int = 0
    failure: str = ""


class Removals:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._latest: deque[Removal] = deque(maxlen=MAX_REMEMBERED)
        #: By kind, since this process began. (Bytes of what has none, or whose size nobody knows, are 0.)
        self.destroyed: Counter[str] = Counter()
        self.destroyed_bytes: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        #: Comparisons of a worker with the records: that were carried through, and not.
        self.syncs: Counter[str] = Counter({"done": 0, "failed": 0})
        #: How many there ever were: a place in the sequence (`since`).
        self.position = 0

    def add(self, kind: str, id: str, where: str, why: str, *, size_bytes: int = 0) -> None:
        """Something was destroyed. ``where``: a worker's name, or as in `greenroom.core.gc.verdict`."""
        self.destroyed[kind] += 1
        self.destroyed_bytes[kind] += size_bytes
        self._note(Removal(kind=kind, id=id, where=where, at=self._engine.now(), why=why, size_bytes=size_bytes))
        log.info("destroyed", kind=kind, id=id, where=where, why=why, size_bytes=size_bytes)

    def fail(self, kind: str, id: str, where: str, why: str, failure: str) -> None:
        """Something could not be destroyed; it is tried again."""
        self.failed[kind] += 1
        self._note(Removal(kind=kind, id=id, where=where, at=self._engine.now(), why=why, failure=failure))
        log.warning("not destroyed, tries again", kind=kind, id=id, where=where, why=why, error=failure)

    def latest(self, limit: int = MAX_REMEMBERED) -> list[Removal]:
        """Newest first."""
        return list(islice(reversed(self._latest), limit))

    def since(self, position: int) -> list[Removal]:
        """Oldest first, those after that `position`, as far as they are remembered."""
        return self.latest(self.position - position)[::-1]

    def _note(self, removal: Removal) -> None:
        self._latest.append(removal)
        self.position += 1
