"""A table on a terminal that follows what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from greenroom.cli.kinds import Column, Kind
from greenroom.cli.output import clean
from greenroom.core.records import OperationState, TemplateState

#: Drawn so often: ages count seconds.
DRAWS_PER_S = 2
#: Lines of the screen that are not for rows: titles, what is left out, the cursor.
OTHER_LINES = 4
GAP = 3
UNDER_WAY = (OperationState.RUNNING, TemplateState.PENDING, TemplateState.PREPARING)
#: Columns that a narrow screen does without, the first one first: better none than a piece of each.
DISPENSABLE = ("POOL", "TAKEOVERS", "ATTEMPTS", "OWNER", "TOOK", "CAUSE", "WORKER", "ID")


class LiveTable:
    """Operations or templates: all that are under way, as far as the screen reaches, and above them the latest of those
    that have ended. It stays on the screen when it ends."""

    def __init__(self, kind: Kind, columns: list[Column], records: Iterable[Any]) -> None:
        self._kind, self._columns = kind, columns
        self._records = {record.pk: record for record in records}
        self._console = Console()
        self._live = Live(
            get_renderable=self.draw, console=self._console, refresh_per_second=DRAWS_PER_S, redirect_stdout=False
        )

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def change(self, record: Any, deleted: bool) -> None:
        if deleted:
            self._records.pop(record.pk, None)
        else:
            self._records[record.pk] = record

    def draw(self) -> Table:
        """Called by the thread that draws, too."""
        records = sorted(list(self._records.values()), key=lambda r: r.pk)
        running = [r for r in records if r.state in UNDER_WAY]
        ended = [r for r in records if r.state not in UNDER_WAY]
        room = max(1, self._console.height - OTHER_LINES)
        # The oldest that are under way are the ones to worry about; of the others the latest are news.
        shown = ended[len(ended) - max(0, min(len(ended), room - len(running))) :] + running[:room]
        titles = [title for title, _ in self._columns]
        rows = [[clean(cell) or "-" for cell in self._kind.row(record, self._columns)] for record in shown]
        left_out = _left_out(titles, rows, self._console.width)
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), caption_justify="left")
        for title in titles:
            if title not in left_out:
                table.add_column(title, no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for title, cell in zip(titles, row, strict=True) if title not in left_out))
        notes = [f"and {len(running) - room} more under way"] if len(running) > room else []
        notes += [f"on a wider screen also: {', '.join(left_out)}"] if left_out else []
        table.caption = "; ".join(notes) or None
        return table


def _left_out(titles: list[str], rows: list[list[str]], width: int) -> list[str]:
    """The titles of the columns that there is no room for."""
    widths = {title: max(len(title), *(len(row[i]) for row in rows)) for i, title in enumerate(titles) if rows}
    left_out = []
    for title in DISPENSABLE:
        if sum(widths.values()) + GAP * len(widths) <= width:
            break
        if title in widths:
            del widths[title]
            left_out.append(title)
    return left_out
