"""Shows how far operations are, on stderr: bars on a terminal; elsewhere plain lines, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import click

from greenroom.cli.kinds import bytes_of
from greenroom.cli.output import clean
from greenroom.core.quantity import human_bytes
from greenroom.core.records import LayerProgress, Operation

#: Actors that `Several` has a line for; more would push each other off the screen.
MAX_LINES = 10


class Display(Protocol):
    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, operation: Operation) -> None: ...


def on_terminal() -> bool:
    return sys.stderr.isatty()


def display(ref: str) -> Display:
    return Bars(ref) if on_terminal() else Lines(ref)


def live(ref: str) -> Display:
    """As `display`, but where nobody looks on it says nothing: what a script waits for is said when it is there."""
    return Bars(ref) if on_terminal() else Silent()


class Silent:
    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, operation: Operation) -> None:
        pass


class Lines(Silent):
    """A line for each phase, and for each tenth of its bytes: somebody reads it in a log, perhaps while it grows."""

    def __init__(self, ref: str) -> None:
        self._ref = ref
        self._said: set[str] = set()

    def update(self, operation: Operation) -> None:
        if operation.phase:
            self._say(f"phase {operation.phase}")
        done, total = bytes_of(operation)
        if tenths := done * 10 // total if total else 0:
            self._say(f"{operation.phase} {tenths * 10}% of {human_bytes(total)}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            click.echo(f"{self._ref}: {clean(text)}", err=True)


class _Terminal:
    """Lines that are drawn again and again, and gone in the end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[size]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            # What goes to stdout is not this console's: it may be a file.
            redirect_stdout=False,
        )

    def _show(self, task: Any, description: str, done: int, total: int) -> None:
        size = f"{human_bytes(done)} of {human_bytes(total)}" if total else human_bytes(done) if done else ""
        self._progress.update(task, description=clean(description), completed=done, total=total or None, size=size)

    def _add(self, description: str) -> Any:
        return self._progress.add_task(clean(description), total=None, size="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bars(_Terminal):
    """A spinner with the phase, and below it a bar per layer."""

    def __init__(self, ref: str) -> None:
        super().__init__()
        self._ref = ref
        self._head = self._add(ref)
        self._layers: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def update(self, operation: Operation) -> None:
        self._show(self._head, f"{self._ref}  {course(operation)}", *bytes_of(operation))
        for layer in operation.layers:
            if layer.digest not in self._layers:
                self._layers[layer.digest] = self._add(short(layer))
            description = f"  {short(layer)} {layer.phase}"
            self._show(self._layers[layer.digest], description, layer.done_bytes, layer.total_bytes)


class Several(_Terminal):
    """A line for each thing that is waited for, with the operation that holds it up."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[str, Any] = {}
        self._more = self._add("")

    def __enter__(self) -> Several:
        self._progress.start()
        return self

    def update(self, operations: Mapping[str, Operation | None]) -> None:
        """``operations``: by what the line is called; None: no operation has begun on it yet."""
        for gone in [ref for ref in self._lines if ref not in operations]:
            self._progress.remove_task(self._lines.pop(gone))
        for ref, operation in list(operations.items())[:MAX_LINES]:
            if ref not in self._lines:
                self._lines[ref] = self._add(ref)
            what = course(operation) if operation else "waits for its turn"
            self._show(self._lines[ref], f"{ref}  {what}", *(bytes_of(operation) if operation else (0, 0)))
        hidden = len(operations) - MAX_LINES
        self._progress.update(self._more, visible=hidden > 0, description=f"and {hidden} more")


def course(operation: Operation) -> str:
    """Where an operation is, in a few words."""
    words = f"{operation.kind}: {operation.phase or 'begins'}"
    if operation.worker:
        words += f" on {operation.worker}"
    if operation.attempts > 1:
        words += f", attempt {operation.attempts}"
    if operation.cancel_requested:
        words += ", being given up"
    return words


def short(layer: LayerProgress) -> str:
    return clean(layer.digest.removeprefix("sha256:")[:12])
