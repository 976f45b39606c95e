"""Which workers wake-ups fail on: after a few failures in a row a worker gets no more for a while.

What is decided is in `greenroom.core.placement` (`after_failure`, `after_success`); here it is written to the worker's
record, beside the operation: nothing depends on it being written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from greenroom.core import placement
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Worker

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


class Trust:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: Workers with failures, as far as this process knows; a wake-up that succeeds there clears them.
        self._suspects: set[str] = set()

    def noted(self, worker: Worker) -> None:
        """A worker's record, as it is now."""
        (self._suspects.add if worker.failures else self._suspects.discard)(worker.name)

    def blame(self, worker: str, error: GreenroomError) -> None:
        """A wake-up failed there for a reason that may be the worker's."""
        log.warning("a wake-up failed on a worker", worker=worker, reason=error.reason, error=error.message)
        self._engine.spawn(self._write(worker, failed=True), f"blame-{worker}")

    def vindicate(self, worker: str) -> None:
        """A wake-up succeeded there."""
        if worker in self._suspects:
            self._suspects.discard(worker)
            self._engine.spawn(self._write(worker, failed=False), f"vindicate-{worker}")

    async def _write(self, name: str, *, failed: bool) -> None:
        def change(worker: Worker) -> Worker:
            now = self._engine.now()
            return placement.after_failure(worker, now) if failed else placement.after_success(worker)

        worker = await self._engine.members.change(name, change)
        if worker is not None:
            self.noted(worker)
            if worker.quarantined_until > self._engine.now():
                log.error("worker is in quarantine", worker=name, failures=worker.failures)
