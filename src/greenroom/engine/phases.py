"""How long the parts of an operation took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenroom.core.records import (
    PhaseTime,
)
from greenroom.engine import clock

if TYPE_CHECKING:
    pass


class Phases:
    """Times of an operation, one after the other, so that they sum to its total."""

    def __init__(self) -> None:
        self._at = clock.monotonic()
        self._phases: list[PhaseTime] = []

    def end(self, name: str) -> None:
        now = clock.monotonic()
        self._phases.append(PhaseTime(name=name, seconds=now - self._at))
        self._at = now

    def took(self, phases: tuple[PhaseTime, ...], rest: str) -> None:
        """Takes over what a worker measured; the remainder since the last mark (messages, waiting) is ``rest``."""
        now = clock.monotonic()
        spent = sum(p.seconds for p in phases)
        self._phases += [PhaseTime(name=rest, seconds=max(0.0, now - self._at - spent)), *phases]
        self._at = now

    def all(self) -> tuple[PhaseTime, ...]:
        return tuple(self._phases)
