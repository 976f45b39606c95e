"""``doctor``: what this machine can run, what is missing, the way out, and what works all the same. Changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from greenroom.cli.app import Settings, common, settings, with_output
from greenroom.cli.output import clean
from greenroom.cli.paths import data_dir, default_server
from greenroom.core.errors import GreenroomError
from greenroom.core.quantity import human_bytes

#: A probe is documented to take a few seconds.
PROBE_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 10.0
SERVER_TIMEOUT_S = 2.0
#: One Python image unpacked, its layers, and the snapshots of a few dozen actors.
MIN_FREE_BYTES = 4 << 30
#: Backends that run nothing: they don't make a machine fit.
SIMULATIONS = frozenset({"sim"})

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


@dataclass(frozen=True, slots=True)
class Finding:
    """``needed`` says what does not work without it; "" when it is only told."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    needed: str = ""


@dataclass(frozen=True, slots=True)
class BackendFinding:
    name: str
    available: bool
    version: str
    isolation: str
    memory_snapshots: bool
    security_boundary: bool
    checks: tuple[Finding, ...]


@click.command()
@with_output("text", "json", default="text")
@common
def doctor(output: str) -> None:
    """Checks what this machine can run, and says what is missing. Exits with 0 if a backend works."""
    options = settings()
    findings = [
        _python(),
        _root(),
        _network_namespaces(),
        _user_namespaces(),
        _cgroups(),
        _data_dir(),
        _disk(),
        _server(options),
    ]
    backends = asyncio.run(_backends())
    works = [b for b in backends if b.available and b.name not in SIMULATIONS]
    if output == "json":
        report = {"ok": bool(works), "checks": list(map(asdict, findings)), "backends": list(map(asdict, backends))}
        click.echo(json.dumps(report, indent=2))
    else:
        _print(findings, backends, works)
    if not works:
        raise SystemExit(1)


# --- the machine ------------------------------------------------------------------------------------------------


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer", "everything")


def _root() -> Finding:
    root = os.geteuid() == 0
    detail = "running as root" if root else f"running as uid {os.geteuid()}"
    return Finding(
        "root",
        root,
        detail,
        "run `sudo greenroom up`, or use a backend that needs no root",
        "network and memory limits",
    )


def _network_namespaces() -> Finding:
    why = _unshare(_CLONE_NEWNET)
    return Finding(
        "network namespaces",
        not why,
        why or "can be made",
        "run as root (in a container: with --cap-add SYS_ADMIN,NET_ADMIN)",
        "actors with a network of their own",
    )


def _user_namespaces() -> Finding:
    why = _unshare(_CLONE_NEWUSER)
    return Finding(
        "user namespaces",
        not why,
        why or "can be made",
        "as root: sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000",
        "running without root",
    )


def _unshare(flag: int) -> str:
    """Why a namespace can't be made, "" if it can; tried in a process of its own."""
    code = f"import ctypes, os, sys; c = ctypes.CDLL(None, use_errno=True); r = c.unshare({flag})"
    code += "; sys.exit(os.strerror(ctypes.get_errno()) if r else 0)"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def _cgroups() -> Finding:
    from greenroom.sandbox.gvisor.cgroups import Cgroups

    check = Cgroups.detect("doctor").check()
    return Finding(check.name, check.ok, check.detail, check.hint, "memory, CPU and process limits")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _data_dir() -> Finding:
    path = data_dir()
    nearest = _existing(path)
    usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    state = "is there" if path.exists() else "will be made"
    detail = f"{path} {state}" if usable else f"{path}: {nearest} is not writable"
    return Finding("data directory", usable, detail, "set GREENROOM_HOME to a directory of yours", "greenroom up")


def _disk() -> Finding:
    nearest = _existing(data_dir())
    free = shutil.disk_usage(nearest).free
    detail = f"{human_bytes(free)} free for {data_dir()}"
    hint = f"free some space, at least {human_bytes(MIN_FREE_BYTES)}, or set GREENROOM_HOME to a larger disk"
    return Finding("disk", free >= MIN_FREE_BYTES, detail, hint, "images and snapshots")


def _server(options: Settings) -> Finding:
    from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb

    address = options.server or default_server()
    try:
        with options.connect() as client:
            info = client.system.GetServerInfo(pb.GetServerInfoRequest(), timeout=SERVER_TIMEOUT_S)
    except GreenroomError as error:
        return Finding("server", False, error.message)
    return Finding("server", True, f"version {info.version} answers at {address}")


# --- the backends -----------------------------------------------------------------------------------------------


async def _backends() -> list[BackendFinding]:
    from greenroom.sandbox import registry

    return list(await asyncio.gather(*(_backend(name) for name in registry.names())))


async def _backend(name: str) -> BackendFinding:
    from greenroom.core.records import SnapshotScope
    from greenroom.sandbox import registry

    try:
        backend = registry.load(name)
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            probe = await backend.probe()
    except TimeoutError:
        return _broken(name, f"its probe took longer than {PROBE_TIMEOUT_S:g} s")
    except Exception as error:  # a plug-in may be broken in any way; that is what is to be told
        return _broken(name, f"can't be loaded: {type(error).__name__}: {error}")
    can = backend.capabilities
    return BackendFinding(
        name=name,
        available=probe.available,
        version=probe.version,
        isolation=can.isolation,
        memory_snapshots=can.scope is SnapshotScope.MEMORY,
        security_boundary=can.security_boundary,
        checks=tuple(Finding(c.name, c.ok, c.detail, c.hint) for c in probe.checks),
    )


def _broken(name: str, why: str) -> BackendFinding:
    return BackendFinding(name, False, "", "", False, False, (Finding("load", False, why),))


# --- for people -------------------------------------------------------------------------------------------------


def _print(findings: list[Finding], backends: list[BackendFinding], works: list[BackendFinding]) -> None:
    for finding in findings:
        _line(finding, "  ", finding.needed)
    for backend in backends:
        _mark(backend.available, f"backend {backend.name}", backend.version or "can't run here", "  ")
        for check in backend.checks:
            _line(check, "      ", f"backend {backend.name}")
    click.echo()
    if works:
        click.echo("What works here:")
        for backend in works:
            click.echo(f"  {backend.name}: {_powers(backend)}")
        best = next((b for b in works if b.security_boundary), works[0])
        click.echo(f"Start with: greenroom up{'' if best.name == 'gvisor' else f' --backend {best.name}'}")
    else:
        click.echo("No backend works here; the ways out are above.")


def _powers(backend: BackendFinding) -> str:
    memory = "sleeping actors keep memory and files" if backend.memory_snapshots else "sleeping actors keep files only"
    boundary = "safe for hostile code" if backend.security_boundary else "no security boundary: only for your own code"
    return f"{memory}; {boundary}"


def _line(finding: Finding, indent: str, needed: str) -> None:
    _mark(finding.ok, finding.name, finding.detail, indent)
    if not finding.ok and finding.hint:
        click.echo(f"{indent}        way out: {clean(finding.hint)}")
    if not finding.ok and needed and indent == "  ":
        click.echo(f"{indent}        without it: no {clean(needed)}")


def _mark(ok: bool, name: str, detail: str, indent: str) -> None:
    word = click.style("ok  ", fg="green") if ok else click.style("no  ", fg="yellow")
    click.echo(f"{indent}{word}  {name}: {clean(detail)}")
