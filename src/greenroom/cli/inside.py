"""Into an actor: ``exec``, ``logs``, ``stats`` and ``url``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.api.execution import CHUNK_BYTES, execute
from greenroom.cli import kinds
from greenroom.cli.app import Settings, common, duration, pair, settings, with_output
from greenroom.cli.output import Table
from greenroom.core.errors import FailedPrecondition
from greenroom.core.quantity import human_bytes
from greenroom.core.records import Key


def _actor(name: str) -> str:
    return name.removeprefix("actor/")


@click.command("exec", context_settings={"ignore_unknown_options": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARG...]")
@click.option("-i", "--stdin", "interactive", is_flag=True, help="Pass this program's input on.")
@click.option("-e", "--env", type=pair, multiple=True, metavar="NAME=VALUE", help="Added to its environment.")
@click.option("-w", "--workdir", default="", help="Where it runs.")
@click.option("--timeout", type=duration, metavar="DURATION", default=0.0, help="Kill it after this long.")
@common
def exec_(
    name: str,
    command: tuple[str, ...],
    interactive: bool,
    env: tuple[tuple[str, str], ...],
    workdir: str,
    timeout: float,
) -> None:
    """Runs a command in an actor, waking it first; exits with the command's exit code.

    \b
    greenroom exec mine -- ls -l /data
    greenroom exec -i mine -- sh -c 'cat > /data/x' < x
    """
    options = settings()
    start = pb.ExecStart(
        namespace=options.namespace,
        name=_actor(name),
        argv=command,
        env=dict(env),
        cwd=workdir,
        timeout=convert.duration(timeout),
    )
    out, err = sys.stdout.buffer, sys.stderr.buffer
    with options.connect() as client:
        for frame in execute(client, start, _stdin() if interactive else (), options.request_timeout_s):
            if frame.WhichOneof("frame") == "exit_code":
                raise SystemExit(frame.exit_code)
            _write(out, frame.stdout)
            _write(err, frame.stderr)


def _stdin() -> Iterator[bytes]:
    if not hasattr(sys.stdin, "fileno"):
        return
    number = sys.stdin.fileno()
    while data := os.read(number, CHUNK_BYTES):
        yield data


def _write(stream: Any, data: bytes) -> None:
    if data:
        stream.write(data)
        stream.flush()


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--tail", type=click.IntRange(-1), default=-1, help="Only the last lines [default: all that are kept].")
@common
def logs(name: str, follow: bool, tail: int) -> None:
    """Shows what an actor has written to stdout and stderr, asleep or not."""
    options = settings()
    request = pb.LogsRequest(namespace=options.namespace, name=_actor(name), tail_lines=tail, follow=follow)
    out = sys.stdout.buffer
    timeout_s = options.request_timeout_s or (None if follow else options.read_timeout_s)
    with options.connect() as client, client.actors.Logs(request, timeout=timeout_s) as stream:
        for message in stream:
            _write(out, message.data)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@with_output("table", "json")
@common
def stats(names: tuple[str, ...], all_namespaces: bool, output: str) -> None:
    """Shows memory, CPU time and processes of running actors."""
    options = settings()
    with options.connect() as client:
        if names:
            wanted = [Key(options.namespace, _actor(n)) for n in names]
        else:
            namespace = "" if all_namespaces else options.namespace
            found = kinds.ACTORS.fetch_all(client, namespace, options.read_timeout_s, state="Running")
            wanted = [Key(a.namespace, a.name) for a in found]
        rows = list(_usage(client, options, wanted, strict=bool(names)))
    if output == "json":
        import json

        click.echo(json.dumps([{"namespace": k.namespace, "name": k.name, **_plain(s)} for k, s in rows], indent=2))
        return
    if not rows:
        click.echo("no actor is running", err=True)
        return
    table = Table([*(["NAMESPACE"] if all_namespaces else []), "NAME", "MEMORY", "CPU", "PROCESSES"])
    table.print(
        [
            *([key.namespace] if all_namespaces else []),
            key.name,
            human_bytes(used.memory_bytes),
            f"{used.cpu_seconds:.2f} s",
            str(used.pids),
        ]
        for key, used in rows
    )


def _usage(client: Client, options: Settings, wanted: Iterable[Key], *, strict: bool) -> Iterator[tuple[Key, Any]]:
    for key in wanted:
        request = pb.GetActorRequest(namespace=key.namespace, name=key.name)
        try:
            yield key, client.actors.GetActorStats(request, timeout=options.read_timeout_s)
        except FailedPrecondition:
            if strict:
                raise  # otherwise: it fell asleep after it was listed


def _plain(used: Any) -> dict[str, Any]:
    return {"memoryBytes": used.memory_bytes, "cpuSeconds": used.cpu_seconds, "processes": used.pids}


@click.command()
@click.argument("name")
@click.option("--port", type=click.IntRange(1, 65535), help="Another port than the template's first.")
@common
def url(name: str, port: int | None) -> None:
    """Shows where an actor answers HTTP requests; a request wakes it."""
    from greenroom.sdk.common import actor_url, get_request

    options = settings()
    key = Key(options.namespace, _actor(name))
    with options.connect() as client:
        client.actors.GetActor(get_request(key), timeout=options.read_timeout_s)
        info = client.system.GetServerInfo(pb.GetServerInfoRequest(), timeout=options.read_timeout_s)
    click.echo(actor_url(info, key, port))
