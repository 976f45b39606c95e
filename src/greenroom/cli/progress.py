"""Shows how far an operation is: bars with bytes per layer on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

import click

from greenroom.cli.output import clean
from greenroom.cli.quantity import human_bytes
from greenroom.core.records import LayerProgress, Operation


class Display(Protocol):
    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, operation: Operation) -> None: ...


def display(ref: str) -> Display:
    return Bars(ref) if sys.stderr.isatty() else Lines(ref)


class Lines:
    """One line for each phase and each layer that is complete."""

    def __init__(self, ref: str) -> None:
        self._ref = ref
        self._said: set[str] = set()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, operation: Operation) -> None:
        if operation.phase:
            self._say(f"phase {operation.phase}")
        for layer in operation.layers:
            if layer.total_bytes and layer.done_bytes >= layer.total_bytes:
                self._say(f"layer {short(layer)} {layer.phase} {human_bytes(layer.total_bytes)} done")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            click.echo(f"{self._ref}: {clean(text)}", err=True)


class Bars:
    """A spinner with the phase, and below it a bar per layer."""

    def __init__(self, ref: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

        self._ref = ref
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._head = self._progress.add_task(ref, total=None)
        self._layers: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, operation: Operation) -> None:
        done = sum(layer.done_bytes for layer in operation.layers)
        total = sum(layer.total_bytes for layer in operation.layers)
        self._progress.update(
            self._head,
            description=f"{self._ref} {clean(operation.phase)}",
            completed=done,
            total=total or None,
        )
        for layer in operation.layers:
            if layer.digest not in self._layers:
                self._layers[layer.digest] = self._progress.add_task(short(layer), total=None)
            self._progress.update(
                self._layers[layer.digest],  # type: ignore[arg-type]
                description=f"  {short(layer)} {clean(layer.phase)}",
                completed=layer.done_bytes,
                total=layer.total_bytes or None,
            )


def short(layer: LayerProgress) -> str:
    return clean(layer.digest.removeprefix("sha256:")[:12])
