"""Commands that change actors: ``create``, ``delete``, ``resume``, ``suspend``, ``pause``."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import INTERRUPTED, Settings, common, duration, pair, settings
from greenroom.cli.follow import Patience
from greenroom.cli.kinds import Kind
from greenroom.cli.output import complain
from greenroom.core.errors import GreenroomError, rebuild
from greenroom.core.records import Operation, OperationState

#: With --no-wait: long enough to learn that it was refused.
NO_WAIT_S = 1.0
#: A call may take this much longer than the wait that it asks for.
CALL_MARGIN_S = 10.0
#: Actors that are changed at once; the others wait their turn here instead of in the server.
MAX_AT_ONCE = 64
EXIT_TIMEOUT = 124


@click.group()
def create() -> None:
    """Makes an actor from a template (templates and pools are made with `apply`)."""


@create.command("actor")
@click.argument("name")
@click.option("-t", "--template", required=True, help="Template to make it from.")
@click.option(
    "-l", "--label", "labels", type=pair, metavar="KEY=VALUE", multiple=True, help="Label to attach; repeatable."
)
@click.option(
    "--worker-selector",
    "selector",
    type=pair,
    metavar="KEY=VALUE",
    multiple=True,
    help="Label that its worker must have, beside those that the template asks for; repeatable.",
)
@common
def create_actor(
    name: str, template: str, labels: Sequence[tuple[str, str]], selector: Sequence[tuple[str, str]]
) -> None:
    """Makes an actor, asleep. It wakes when a request or a command for it comes."""
    options = settings()
    request = pb.CreateActorRequest(
        namespace=options.namespace,
        name=name,
        template=template,
        labels=dict(labels),
        worker_selector=dict(selector),
        request_id=secrets.token_hex(16),
    )
    with options.connect() as client:
        client.actors.CreateActor(request, timeout=options.read_timeout_s)
    click.echo(f"actor/{name} created")


def _waiting(command: Any) -> Any:
    command = click.option(
        "--timeout",
        type=duration,
        metavar="DURATION",
        # Operations end by themselves, and one that waits for its image may take this long.
        default=3600.0,
        show_default="1h",
        help="How long to wait; it goes on after that.",
    )(command)
    return click.option("--wait/--no-wait", "wait", default=True, help="Wait until it is done [default: wait].")(
        command
    )


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--snapshot",
    default="",
    metavar="ID",
    help="Wake it from this one of its own snapshots; the present one becomes its way back.",
)
@_waiting
@common
def resume(names: tuple[str, ...], snapshot: str, wait: bool, timeout: float) -> None:
    """Wakes actors; crashed ones go back to their last snapshot."""
    if snapshot and len(names) > 1:
        raise click.UsageError("a snapshot is one actor's: give one NAME with --snapshot")
    change("ResumeActor", "resumed", "running already", plain_names(names), wait, timeout, snapshot)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_waiting
@common
def suspend(names: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Saves actors' memory and files, and frees their place on the worker."""
    change("SuspendActor", "suspended", "suspended already", plain_names(names), wait, timeout)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_waiting
@common
def pause(names: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Freezes actors where they are: quick to wake, but they keep their place."""
    change("PauseActor", "paused", "paused already", plain_names(names), wait, timeout)


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="TYPE NAME... | TYPE/NAME...")
@_waiting
@common
def delete(what: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Deletes actors (with their snapshots), templates or pools."""
    wanted = kinds.targets(what)
    for kind, name in wanted:
        if not name:
            raise click.UsageError(f"say which: delete {kind.name} NAME")
        if kind not in (kinds.ACTORS, kinds.TEMPLATES, kinds.POOLS):
            raise click.UsageError(f"{kind.names[1]} can't be deleted; they go by themselves")
    actors = [name for kind, name in wanted if kind is kinds.ACTORS]
    if actors:
        change("DeleteActor", "deleted", "deleted already", actors, wait, timeout)
    options = settings()
    with options.connect() as client:
        for kind, name in wanted:
            if kind is not kinds.ACTORS:
                _delete(client, options, kind, name)
                click.echo(f"{kind.name}/{name} deleted")


def _delete(client: Client, options: Settings, kind: Kind, name: str) -> None:
    if kind is kinds.TEMPLATES:
        request = pb.DeleteTemplateRequest(namespace=options.namespace, name=name)
        client.templates.DeleteTemplate(request, timeout=options.read_timeout_s)
    else:
        client.pools.DeletePool(pb.DeletePoolRequest(name=name), timeout=options.read_timeout_s)


def plain_names(names: tuple[str, ...]) -> list[str]:
    """``NAME`` or ``actor/NAME``."""
    plain = []
    for name in names:
        kind, slash, rest = name.partition("/")
        if slash and kinds.find(kind) is not kinds.ACTORS:
            raise click.UsageError(f"{name!r} is not an actor")
        plain.append(rest if slash else name)
    return plain


def change(
    method: str, done: str, already: str, names: list[str], wait: bool, timeout_s: float, snapshot: str = ""
) -> None:
    """Starts the operations together and reports each; exits with the code of the first that failed."""
    options = settings()
    code = 0
    with options.connect() as client:
        for start in range(0, len(names), MAX_AT_ONCE):
            left = names[start : start + MAX_AT_ONCE]  # those that are not reported yet
            try:
                failed = _change(client, options, method, (done, already), left, wait, timeout_s, snapshot)
            except KeyboardInterrupt:
                _interrupted(client, options, left)
            code = code or failed
    if code:
        raise SystemExit(code)


def _change(
    client: Client,
    options: Settings,
    method: str,
    words: tuple[str, str],
    left: list[str],
    wait: bool,
    timeout_s: float,
    snapshot: str,
) -> int:
    """As `change`, for those of ``left``, which loses who is reported. Returns the code of the first that failed."""
    wait_s = timeout_s if wait else NO_WAIT_S
    code = 0
    call = getattr(client.actors, method)
    futures = [
        call.future(
            pb.ActorRequest(
                namespace=options.namespace,
                name=name,
                request_id=secrets.token_hex(16),
                wait=convert.duration(wait_s),
                snapshot=snapshot,
            ),
            timeout=options.request_timeout_s or wait_s + CALL_MARGIN_S,
        )
        for name in left
    ]
    waiting = list(zip(left, futures, strict=True))
    patience = Patience(client, options.namespace)
    for name, future in waiting:
        try:
            operation = convert.from_message(Operation, patience.result(future, waiting if wait else ()))
            reported = _report(operation, f"actor/{name}", *words, wait)
            code = code or reported
            if method == "ResumeActor" and operation.state is OperationState.DONE:
                _say_if_gone_back(client, options, name)
        except GreenroomError as error:
            if error.reason == "STILL_WAITING" and not wait:
                click.echo(f"actor/{name} begun")
            else:
                complain(f"error: {error.message}")
                code = code or error.exit_code
                if error.reason == "SERVER_NOT_RUNNING":
                    raise SystemExit(code) from None
        left.remove(name)
    return code


def _report(operation: Operation, ref: str, done: str, already: str, wait: bool) -> int:
    if operation.error is not None:
        failure = operation.error
        complain(f"error: {ref}: {failure.message}")
        return rebuild(failure.code, failure.reason, failure.message, failure.metadata).exit_code
    if operation.state is OperationState.RUNNING:
        how = f"`greenroom wait operation {operation.id}`"
        if not wait:
            click.echo(f"{ref} begun; watch it with {how}")
            return 0
        click.echo(f"{ref}: still in phase {operation.phase!r} and going on; watch it with {how}", err=True)
        return EXIT_TIMEOUT
    if operation.cause == "already":
        click.echo(f"{ref} {already}")
    else:
        took = f" ({kinds.took(operation)})" if operation.finished_at else ""
        click.echo(f"{ref} {done}{took}")
    return 0


def _say_if_gone_back(client: Client, options: Settings, name: str) -> None:
    """A snapshot that was corrupt costs what the actor did since the one before: whoever wakes it is told."""
    actor = kinds.ACTORS.fetch(client, options.namespace, name, options.read_timeout_s)
    if actor.reason == "SnapshotCorrupt":
        complain(f"actor/{name}: {actor.message}")


def _interrupted(client: Client, options: Settings, names: list[str]) -> None:
    """Ctrl-C only ends the waiting. Says how to find what goes on."""
    for name in names[:3]:
        operation = _attempt(
            lambda name=name: (
                client.actors.GetActor(  # type: ignore[misc]
                    pb.GetActorRequest(namespace=options.namespace, name=name), timeout=10.0
                ).operation
            )
        )
        how = f"`greenroom wait operation {operation}`" if operation else f"`greenroom describe actor {name}`"
        click.echo(f"actor/{name}: no longer waiting; the operation goes on, watch it with {how}", err=True)
    raise SystemExit(INTERRUPTED)


def _attempt(call: Callable[[], str]) -> str:
    try:
        return call()
    except GreenroomError:
        return ""
