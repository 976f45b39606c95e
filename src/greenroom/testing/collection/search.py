"""Breadth-first search of all states that a model can get into."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Violation(Exception):
    """A promise is broken. ``steps``: the shortest way to there."""

    def __init__(self, promise: str, steps: tuple[str, ...] = ()) -> None:
        super().__init__(promise, steps)
        self.promise = promise
        self.steps = steps

    def __str__(self) -> str:
        return "\n".join([f"{self.promise}, after {len(self.steps)} steps:", *(f"  {step}" for step in self.steps)])


class Model(Protocol[S]):
    """States are compared by value. Both methods raise `Violation` without steps."""

    def initial(self) -> S: ...

    def successors(self, state: S) -> Iterator[tuple[str, S]]:
        """Everything that can happen next, with its name."""

    def check(self, state: S) -> None:
        """What must hold of every state."""


class Found(NamedTuple):
    states: int
    transitions: int
    depth: int
    seconds: float


class _Step(NamedTuple):
    parent: int
    label: str


class Search(Generic[S]):
    """Of a state that was seen only its hash is kept: of a million states two share theirs with a chance of less than
    one in ten million."""

    def __init__(self, model: Model[S], limit: int) -> None:
        """``limit``: states after which the search is given up, because the model is not as small as it should be."""
        self._model = model
        self._limit = limit
        self._steps: list[_Step] = []

    def run(self) -> Found:
        """Raises `Violation`, with the steps."""
        began = time.monotonic()
        start = self._model.initial()
        seen, layer, depth, transitions = {hash(start)}, [(start, self._step(-1, ""))], 0, 0
        self._check(start, 0)
        while layer:
            following: list[tuple[S, int]] = []
            for state, number in layer:
                successors = self._model.successors(state)
                while True:
                    try:
                        label, after = next(successors)
                    except StopIteration:
                        break
                    except Violation as found:
                        raise Violation(found.promise, self._way(number)) from None
                    transitions += 1
                    if (value := hash(after)) in seen:
                        continue
                    seen.add(value)
                    assert len(seen) <= self._limit, f"more than {self._limit} states"
                    step = self._step(number, label)
                    self._check(after, step)
                    following.append((after, step))
            layer = following
            depth += bool(layer)
        return Found(len(seen), transitions, depth, time.monotonic() - began)

    def _step(self, parent: int, label: str) -> int:
        self._steps.append(_Step(parent, label))
        return len(self._steps) - 1

    def _check(self, state: S, number: int) -> None:
        try:
            self._model.check(state)
        except Violation as found:
            raise Violation(found.promise, self._way(number)) from None

    def _way(self, number: int) -> tuple[str, ...]:
        labels: list[str] = []
        while number > 0:
            labels.append(self._steps[number].label)
            number = self._steps[number].parent
        return tuple(reversed(labels))
