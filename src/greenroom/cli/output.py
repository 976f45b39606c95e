"""How records are printed: aligned tables, JSON, YAML, names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

#: Messages may come out of a sandbox: nothing in them may steer the terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    return _CONTROL.sub("?", text.replace("\n", " ").replace("\t", " "))


def complain(message: str) -> None:
    """Says on stderr what is wrong; lines stay lines."""
    click.echo("\n".join(map(clean, message.split("\n"))), err=True)


class Table:
    """Aligned columns. Rows that come later (`row`) keep the widths of the first ones where they fit."""

    GAP = 3

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = titles
        self._widths = [len(t) for t in titles]

    def print(self, rows: Iterable[Sequence[str]], *, header: bool = True) -> None:
        cleaned = [[clean(cell) or "-" for cell in row] for row in rows]
        for row in cleaned:
            self._widths = [max(w, len(cell)) for w, cell in zip(self._widths, row, strict=True)]
        if header:
            self._line(self._titles)
        for row in cleaned:
            self._line(row)

    def row(self, row: Sequence[str]) -> None:
        self._line([clean(cell) or "-" for cell in row])

    def _line(self, cells: Sequence[str]) -> None:
        gap = " " * self.GAP
        click.echo(gap.join(cell.ljust(w) for cell, w in zip(cells, self._widths, strict=True)).rstrip())


def pairs(rows: Iterable[tuple[str, str]], indent: str = "") -> None:
    """``Name:   value`` lines."""
    shown = [(name, clean(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0) + 1
    for name, value in shown:
        click.echo(f"{indent}{(name + ':').ljust(width)}   {value or '-'}")


def dump(documents: list[dict[str, Any]], output: str, *, single: bool) -> None:
    """As JSON or YAML; several as one Kubernetes-style List (JSON) or as documents (YAML, which can be applied)."""
    if output == "json":
        shown: Any = documents[0] if single else {"apiVersion": "v1", "kind": "List", "items": documents}
        click.echo(json.dumps(shown, indent=2))
        return
    import yaml

    click.echo("---\n".join(yaml.safe_dump(d, sort_keys=False, allow_unicode=True) for d in documents), nl=False)
