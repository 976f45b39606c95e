"""Options of ``up`` and ``agent`` about what is reached over TCP: read, checked, and refused with the way out."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from greenroom.api.access import Guard

F = TypeVar("F", bound=Callable[..., object])

#: The address of this machine that others reach it at, where it listens on all that it has. A pod is told its own.
POD_IP_VARIABLE = "GREENROOM_POD_IP"
_EVERY_ADDRESS = ("0.0.0.0", "::")
_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Listeners:
    """``agents``: where the control plane takes agents on TCP ("": only on its socket), and ``agents_host``: what they
    are told that its host is."""

    agents: str = ""
    agents_host: str = ""
    agent_guard: Guard | None = None
    api_guard: Guard | None = None


def host_port(value: str | tuple[str, int]) -> tuple[str, int] | None:
    """The type of addresses that are listened on; "" for None."""
    if not value or isinstance(value, tuple):
        return value or None
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is not HOST:PORT, for example 127.0.0.1:0 for any port")
    return host.strip("[]"), int(port)


def joined(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def told_host(address: tuple[str, int], option: str) -> str:
    """What others are told that the host of an address is; where every address of this machine is listened on,
    GREENROOM_POD_IP, or what the machine's own name means, which in a pod is its address.

    Raises:
        click.UsageError: neither says which one others reach.
    """
    if address[0] not in _EVERY_ADDRESS:
        return address[0]
    told = os.environ.get(POD_IP_VARIABLE, "") or _own_address()
    if not told:
        raise click.UsageError(
            f"{option} {joined(address)}: others have to be told one address, and this is every one of this machine; "
            f"write that one, or set {POD_IP_VARIABLE} to it"
        )
    return told


def _own_address() -> str:
    """Of either family; "" when this machine's name leads to nothing that others could reach."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:
        return ""
    parsed = [ipaddress.ip_address(str(address).partition("%")[0]) for address in found]
    return next((str(address) for address in parsed if not (address.is_loopback or address.is_link_local)), "")


def addresses(values: Sequence[str]) -> tuple[str, ...]:
    """Each value may be several, with commas or spaces between them."""
    return tuple(part for value in values for part in re.split(r"[,\s]+", value) if part)


def tcp_options(command: F) -> F:
    """Those of ``up``."""
    for option in (
        click.option(
            "--rosters",
            is_flag=True,
            help="Take only workers that an operator has said their pool may have (AdmitWorkers), and keep none here.",
        ),
        click.option("--api-token-file", type=_FILE, help="Tokens that --api asks for, one a line, all of them good."),
        click.option("--agent-token-file", type=_FILE, help="The same for --agents."),
        click.option("--tls-key", type=_FILE, help="The key of --tls-cert (PEM)."),
        click.option(
            "--tls-cert",
            type=_FILE,
            help="Certificate (PEM) of --agents and --api. These files are read again when they change.",
        ),
        click.option(
            "--agents",
            type=host_port,
            metavar="HOST:PORT",
            default="",
            help="Where agents on other machines connect, besides the unix socket.",
        ),
    ):
        command = option(command)
    return command


def listeners(
    agents: tuple[str, int] | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    agent_token_file: Path | None,
    api_token_file: Path | None,
) -> Listeners:
    """Raises `click.UsageError` for what does not go together."""
    from greenroom.api.access import Guard

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together: give both, or neither")
    if tls_cert is None or tls_key is None:
        for option, file in (("--agent-token-file", agent_token_file), ("--api-token-file", api_token_file)):
            if file:
                raise click.UsageError(f"{option}: a token is only sent over TLS; add --tls-cert and --tls-key")
        agent_guard = api_guard = None
    else:
        cert, key = tls_cert.absolute(), tls_key.absolute()
        agent_guard = Guard(cert, key, agent_token_file and agent_token_file.absolute())
        api_guard = Guard(cert, key, api_token_file and api_token_file.absolute())
    return Listeners(
        agents=joined(agents) if agents else "",
        agents_host=told_host(agents, "--agents") if agents else "",
        agent_guard=agent_guard,
        api_guard=api_guard,
    )
