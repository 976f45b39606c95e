"""What `up` is asked for, and what it makes of it. No server is started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import pytest
import uvloop
from click.testing import CliRunner

from greenroom.cli import logs, process
from greenroom.cli.main import cli
from greenroom.cli.server import ServerOptions
from greenroom.cli.up_options import check_marks
from greenroom.core.records import OperationKind

PG = "postgresql://greenroom:hunter2@db.example.org/greenroom"


class Up:
    """Types ``greenroom up ...``."""

    def __init__(self) -> None:
        self.seen: list[ServerOptions] = []

    def __call__(self, *args: str) -> ServerOptions:
        result = CliRunner().invoke(cli, ["up", *args])
        assert result.exit_code == 0, result.output
        assert "hunter2" not in result.output
        return self.seen.pop()

    def refused(self, *args: str) -> str:
        result = CliRunner().invoke(cli, ["up", *args])
        assert result.exit_code == 2 and not self.seen, result.output
        assert "hunter2" not in result.output and "Traceback" not in result.output
        assert len(result.stderr.splitlines()) <= 2
        return result.stderr


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Up:
    typed = Up()

    def run(coroutine: Coroutine[Any, Any, None]) -> None:
        assert coroutine.cr_frame is not None
        typed.seen.append(coroutine.cr_frame.f_locals["options"])
        coroutine.close()

    def nothing(*args: object) -> None: ...

    limit: Callable[[], int] = lambda: 1024  # noqa: E731
    monkeypatch.delenv("GREENROOM_STORE", raising=False)
    monkeypatch.setattr(uvloop, "run", run)
    monkeypatch.setattr(process, "prepare", limit)
    monkeypatch.setattr(logs, "configure", nothing)
    return typed


def test_what_is_there_without_options(up: Up) -> None:
    got = up()
    assert got == ServerOptions(data_dir=got.data_dir, max_files=1024)
    assert got.name == "server" and got.operation_deadline_s == 300.0 and not got.no_workers


def test_a_shared_store_may_be_away_for_longer(up: Up) -> None:
    assert up(f"--store={PG}", "--snapshots=s3://b/p").worker_return_s == 2 * up().worker_return_s


def test_all_of_it(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    got = up(
        f"--store={PG}", "--snapshots=s3://bucket/prefix", "--images=images", "--name=gr-1", "--label", "zone=a",
        "-l", "example.org/gpu=a100", "--lease-ttl=10s", "--stall-timeout=2m", "--worker-return", "7.5",
        "--operation-deadline=100", "--operation-deadline=Resume=60", "--operation-deadline=prepare=2h",
    )  # fmt: skip
    assert (got.store, got.snapshots, got.images, got.name) == (PG, "s3://bucket/prefix", tmp_path / "images", "gr-1")
    assert got.labels == {"zone": "a", "example.org/gpu": "a100"}
    assert (got.lease_ttl_s, got.stall_s, got.worker_return_s, got.operation_deadline_s) == (10.0, 120.0, 7.5, 100.0)
    assert got.deadlines_s == {OperationKind.RESUME: 60.0, OperationKind.PREPARE: 7200.0}
    assert "hunter2" not in repr(got)


def test_the_store_may_be_in_the_environment(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_STORE", PG)
    assert up("--snapshots=/shared").store == PG
    assert up("--store=postgres://other/db", "--snapshots=/shared").store == "postgres://other/db"
    monkeypatch.setenv("GREENROOM_STORE", "mysql://u:hunter2@h/d")
    assert "GREENROOM_STORE" in up.refused("--snapshots=/shared")
    monkeypatch.setenv("GREENROOM_STORE", "")
    assert up().store == ""


def test_a_replica_is_called_as_its_host(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    for host, name in (("Web_01.example.org", "web-01"), ("x" * 80, "x" * 63), ("gr-2", "gr-2")):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert up(f"--store={PG}", "--snapshots=/shared").name == name
        assert up().name == "server", "one server that has its store for itself needs no name"
    monkeypatch.setattr(socket, "gethostname", lambda: "__.example.org")
    assert "'__.example.org', which makes no name for this replica; give it one with --name" in up.refused(
        f"--store={PG}", "--snapshots=/shared"
    )


def test_snapshots_in_a_directory_are_absolute(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert up("--snapshots=shared/snapshots").snapshots == f"{tmp_path}/shared/snapshots"
    assert up("--snapshots=file:///shared").snapshots == "file:///shared"


def test_without_workers(up: Up) -> None:
    assert up("--no-workers").no_workers
    shaped = up("--no-workers", "--workers=0", "--slots=7", "--backend=process")
    assert (shaped.pool.replicas, shaped.pool.slots, shaped.pool.backend) == (0, 7, "process")
    for contrary in ("--workers=1", "--warm=0", "--label=a=b"):
        option = contrary.split("=")[0]
        assert f"--no-workers and {option} contradict each other" in up.refused("--no-workers", contrary)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["--store=mysql://u:hunter2@h/d"],
            "'--store' (env var: 'GREENROOM_STORE'): there is no store for 'mysql' URLs",
        ),
        (["--store=host=h password=hunter2"], "is not a URL; write postgresql://USER@HOST:PORT/DATABASE, or leave it"),
        (["--store=hunter2 hunter2://x"], "is not a URL"),
        (["--store=postgresql://u:hunter2@h:port/d"], "its port is not a number up to 65535"),
        ([f"--store={PG}"], "--snapshots is missing: replicas that share a store must share"),
        (["--snapshots=ftp://host/dir"], "there are no snapshots at 'ftp' URLs; use a directory, or a URL that begins"),
        (["--name=Web_01"], "replica name 'Web_01' is not a DNS label"),
        (["--name="], "replica name '' is not a DNS label"),
        (["--lease-ttl=0.5"], "'--lease-ttl': must be between 1 and 3600 seconds, not 0.5"),
        (["--lease-ttl=2h"], "must be between 1 and 3600 seconds, not 7200"),
        (["--lease-ttl=soon"], "'soon' is not a duration"),
        (["--stall-timeout=0"], "'--stall-timeout': must be between 1 and 3600 seconds, not 0"),
        (["--capacity-wait=inf"], "'inf' is not a duration"),
        (["--capacity-wait=86401"], "must be between 0 and 86400 seconds, not 86401"),
        (["--worker-return=-1s"], "'-1s' is not a duration"),
        (["--operation-deadline=fly=60"], "there is no operation 'fly' that takes time; use one of resume, suspend,"),
        (["--operation-deadline=create=60"], "there is no operation 'create' that takes time"),
        (["--operation-deadline=resume="], "'' is not a duration"),
        (["--operation-deadline=0"], "must be between 1 and 86400 seconds, not 0"),
        (["--label=zone"], "'zone' is not key=value"),
        (["--label=zone=a b"], "--label: label zone=a b is not valid: use letters, digits"),
        (["--listen=nowhere"], "--listen 'nowhere' is not host:port"),
    ],
)
def test_what_is_refused_says_what_to_write(up: Up, args: list[str], says: str) -> None:
    assert says in up.refused(*args)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_peers_are_told_an_address_that_they_can_ask(address: str) -> None:
    result = CliRunner().invoke(cli, ["up", f"--peers={address}"])
    assert result.exit_code == 2
    assert "each would ask itself" in result.output


@pytest.mark.parametrize(("marks", "wrong"), [((5, 5, 0), "--images-low"), ((5, 4, 4), "--images-limit")])
def test_marks_of_images_are_in_order(marks: tuple[int, int, int], wrong: str) -> None:
    check_marks(5, 4, 5)
    check_marks(5, 0, 0)
    check_marks(0, 0, 5)
    with pytest.raises(click.UsageError, match=wrong):
        check_marks(*marks)
