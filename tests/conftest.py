"""For all tests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import settings

from greenroom.testing import defects
from greenroom.testing.postgres import PostgresServer, find_programs

# What `make setup` put into .tools is found without the Makefile too.
os.environ["PATH"] += f":{Path(__file__).parents[1] / '.tools' / 'bin'}"
# A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says how busy the machine is. Hypothesis' own profile for continuous integration thinks so
# too, and stays where it is chosen; so does one that `--hypothesis-profile` names.
settings.register_profile("here", deadline=None)
if settings.get_current_profile_name() == "default":
    settings.load_profile("here")


@pytest.fixture(autouse=True)
def _no_zombies_of_others(request: pytest.FixtureRequest) -> None:
    """Sandboxes of servers that another test has killed are inherited by this process when it is a subreaper, as the
    gVisor backend makes it. Tests that look for what a backend forgot to reap are not to find those."""
    if request.node.get_closest_marker("gvisor"):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = stat.read_text(errors="replace").partition("(")[2].rpartition(")")
                state, parent = rest.split()[:2]
                if name == "exe" and state == "Z" and parent == str(os.getpid()):
                    os.waitpid(int(stat.parent.name), os.WNOHANG)


@pytest.fixture(autouse=True)
def _defects_are_raised() -> Iterator[None]:
    """An operator goes on after a defect, and its test is to fail."""
    with defects.raised():
        yield


#: Of a test that runs into grpcio's race (see the marker in pyproject.toml); it fails in one of some fifty runs.
GRPC_RACE_TRIES = 3


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Runs a test that is marked ``grpc_race`` again when it fails. No other test is run twice."""
    if item.get_closest_marker("grpc_race") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for attempt in range(1, GRPC_RACE_TRIES + 1):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not any(report.failed for report in reports) or attempt == GRPC_RACE_TRIES:
            break
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """In continuous integration everything can be had, so a test that was skipped was not run: a failure. But for
    another processor, and a whole Kubernetes API server, which no package registry has."""
    report = yield
    if (
        report.skipped
        and os.environ.get("CI")
        and not item.get_closest_marker("other_processor")
        and not item.get_closest_marker("kube_apiserver")
        and not hasattr(report, "wasxfail")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if find_programs() is None:
        pytest.skip("no PostgreSQL server; scripts/setup.sh --test gets one")
    with PostgresServer(tcp=True) as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)
