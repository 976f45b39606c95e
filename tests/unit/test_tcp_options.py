"""Options about TCP, and what is refused of them."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from greenroom.cli import agent as agent_command
from greenroom.cli import tcp
from greenroom.cli.up import up


@pytest.mark.parametrize(
    ("value", "found"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:7", ("::1", 7)), ("fd00::1:7", ("fd00::1", 7)), ("", None)],
)
def test_addresses_to_listen_on(value: str, found: tuple[str, int] | None) -> None:
    assert tcp.host_port(value) == found


@pytest.mark.parametrize("value", ["7434", ":7434", "host:", "host:http", "host:65536", "host:-1"])
def test_what_is_no_address(value: str) -> None:
    with pytest.raises(click.BadParameter, match="is not HOST:PORT"):
        tcp.host_port(value)


def test_several_addresses_in_one_variable() -> None:
    assert tcp.addresses(["a:1,b:2", "unix:/x  c:3,"]) == ("a:1", "b:2", "unix:/x", "c:3")


def test_others_are_told_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tcp.told_host(("10.0.0.1", 1), "--agents") == "10.0.0.1"
    monkeypatch.setattr(socket, "gethostname", lambda: "10.0.0.9")
    assert tcp.told_host(("0.0.0.0", 1), "--agents") == "10.0.0.9"
    monkeypatch.setenv("GREENROOM_POD_IP", "10.0.0.2")
    assert tcp.told_host(("::", 1), "--agents") == "10.0.0.2"
    monkeypatch.delenv("GREENROOM_POD_IP")
    monkeypatch.setattr(socket, "gethostname", lambda: "fd00::9")
    assert tcp.told_host(("::", 1), "--agents") == "fd00::9", "where there is IPv6 alone"
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.1.1")
    with pytest.raises(click.UsageError, match="GREENROOM_POD_IP"):
        tcp.told_host(("0.0.0.0", 1), "--agents")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-cert=a"], "--tls-cert and --tls-key belong together"),
        (["--api-token-file=a"], "--api-token-file: a token is only sent over TLS"),
        (["--agent-token-file=a"], "--agent-token-file: a token is only sent over TLS"),
        (["--agents=7434"], "is not HOST:PORT"),
        (["--rosters", "--workers=2"], "--rosters and --workers contradict each other"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, options: list[str], says: str) -> None:
    found = CliRunner().invoke(up, [f"--data={tmp_path}", *options])
    assert found.exit_code == 2 and says in " ".join(found.output.split())


def test_every_option_of_an_agent_is_a_variable_too() -> None:
    contract = """WORKER POOL BACKEND SLOTS WARM STATE_DIR IMAGES SNAPSHOTS CONTROL CA TOKEN_FILE EPOCH ORDINAL POD_UID
    POOL_UID SERVE HEALTH DRAIN_TIMEOUT"""
    variables = {option.envvar for option in agent_command.agent.params}
    assert {f"GREENROOM_{name}" for name in contract.split()} <= variables
