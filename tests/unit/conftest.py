"""For the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import Shell
from fake_control import threaded


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    with threaded(tmp_path) as server:
        monkeypatch.setenv("GREENROOM_SERVER", server.address)
        yield Shell(server)


@pytest.fixture
def mine(shell: Shell) -> Shell:
    shell("create", "actor", "mine", "-t", "counter", "-l", "team=x")
    return shell
