"""docs/bad-night.md: its commands, typed in the night that it tells of, print what it shows.

After a change of the output: ``REWRITE_DOCS=1 pytest tests/unit/test_bad_night.py``, and read what has become of it.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import bad_night
import pytest
from click.testing import CliRunner
from fake_control import threaded

from greenroom.cli import describe, kinds
from greenroom.cli.main import cli

PAGE = Path(__file__).parents[2] / "docs" / "bad-night.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)

Typed = Callable[[str], str]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Typed]:
    """Types a command line, at the time of that night; what it prints."""

    def clock() -> float:
        return bad_night.NOW

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for module in (kinds, describe):
        stopped = SimpleNamespace(time=clock, strftime=time.strftime, localtime=time.localtime)
        monkeypatch.setattr(module, "time", stopped)

    def run(line: str) -> str:
        program, *args = shlex.split(line)
        assert program == "greenroom"
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0, (line, result.output)
        return result.output

    with threaded(tmp_path, bad_night.furnish, clock) as server:
        monkeypatch.setenv("GREENROOM_SERVER", server.address)
        yield run
    monkeypatch.undo()
    time.tzset()


def test_the_page_shows_what_is_printed(typed: Typed) -> None:
    def again(block: re.Match[str]) -> str:
        commands = [line.removeprefix("$ ") for line in block[1].splitlines() if line.startswith("$ ")]
        shown = "\n".join(f"$ {command}\n{typed(command)}" for command in commands)
        return f"```console\n{shown}```"

    page = PAGE.read_text()
    printed = BLOCK.sub(again, page)
    if "REWRITE_DOCS" in os.environ:
        PAGE.write_text(printed)
    else:
        assert printed == page


def test_an_actor_that_no_worker_could_take(typed: Typed) -> None:
    told = typed("greenroom explain carol")
    assert "wakes      nowhere: no worker of pool default could ever take it; a request is refused at once\n" in told
    assert "not on gr-1-default-0: has no label gpu=a100\n" in told
    assert "workers with gpu=a100,zone=a\n" in told and "it has none of its own yet, so it begins anew" in told


def test_one_that_is_awake(typed: Typed) -> None:
    told = typed("greenroom explain dave")
    assert "now        awake on gr-1-default-0 since 2026-02-14 03:00:00 (13m ago)\n" in told
    assert "survives   if every worker died now, it would begin anew, as it was created\n" in told
    assert "wakes " not in told and "held by" not in told
