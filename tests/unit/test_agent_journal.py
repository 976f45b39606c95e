from __future__ import annotations

import os
from pathlib import Path

import pytest

from greenroom.agent import journal as module
from greenroom.agent.journal import Journal


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal")
    first.raise_fence("a", 3)
    first.raise_fence("a", 2)
    first.raise_fence("b", 1)
    first.record("op", "Restore", b'{"x":1}')
    first.end_operation("b", "op")
    again = Journal(tmp_path / "journal")  # the first one was never closed: the process died
    assert (again.generation("a"), again.generation("b")) == (3, 1)
    assert (again.ended("a"), again.ended("b")) == ("", "op")
    again.raise_fence("b", 2)
    assert again.ended("b") == "", "a later owner may do it again"
    assert again.answer("op", "Restore") == b'{"x":1}'
    assert again.answer("op", "Discard") is None


def test_a_torn_last_line_was_never_acted_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path).raise_fence("a", 3)
    with path.open("ab") as file:
        file.write(b'{"type":"fence","actor_uid":"a","gener')
    assert Journal(path).generation("a") == 3
    assert Journal(path).generation("a") == 3, "and is gone after that"


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'garbage\n{"type":"fence","actor_uid":"a","generation":1}\n')
    assert Journal(path).generation("a") == 1


def test_on_a_full_disk_it_goes_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.raise_fence("a", 1)
    whole = os.write

    def full(fd: int, data: bytes) -> int:
        return whole(fd, data[:10])

    monkeypatch.setattr(os, "write", full)
    journal.raise_fence("a", 2)
    assert journal.generation("a") == 2
    assert Journal(path).generation("a") == 1, "no half line is left"
    monkeypatch.setattr(os, "write", whole)
    journal.record("op", "Thaw", b"{}")
    again = Journal(path)
    assert (again.generation("a"), again.answer("op", "Thaw")) == (2, b"{}")


def test_it_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REWRITE_BYTES", 10_000)
    monkeypatch.setattr(module, "KEPT_RESULTS", 10)
    monkeypatch.setattr(module, "KEPT_FENCES", 10)
    path = tmp_path / "journal"
    journal = Journal(path)
    for n in range(1, 1001):
        journal.raise_fence("a", n)
        journal.raise_fence(f"a{n}", 1)
        journal.record(f"op{n}", "Restore", b"{}")
    assert path.stat().st_size < 12_000
    again = Journal(path)
    assert again.generation("a") == 1000
    assert (again.generation("a1000"), again.generation("a1")) == (1, 0)
    assert again.answer("op1000", "Restore") == b"{}"
    assert again.answer("op990", "Restore") is None
