"""For all tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# What `make setup` put into .tools is found without the Makefile too.
os.environ["PATH"] += f":{Path(__file__).parents[1] / '.tools' / 'bin'}"


@pytest.fixture(autouse=True)
def _no_zombies_of_others(request: pytest.FixtureRequest) -> None:
    """Sandboxes of servers that another test has killed are inherited by this process when it is a subreaper, as the
    gVisor backend makes it. Tests that look for what a backend forgot to reap are not to find those."""
    if request.node.get_closest_marker("gvisor"):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
                state, parent = rest.split()[:2]
                if name == "exe" and state == "Z" and parent == str(os.getpid()):
                    os.waitpid(int(stat.parent.name), os.WNOHANG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """In continuous integration everything can be had, so a test that was skipped was not run: a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report
