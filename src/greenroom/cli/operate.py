"""Commands of whoever looks after a Greenroom: ``cancel``, ``drain``, ``tag`` and ``untag``. More are in
`greenroom.cli.decommission`."""

from __future__ import annotations

import time
from contextlib import nullcontext

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import INTERRUPTED, Settings, common, duration, settings
from greenroom.cli.follow import POLL_S, follow, running
from greenroom.cli.kinds import Kind
from greenroom.cli.output import complain
from greenroom.cli.progress import Several, live, on_terminal
from greenroom.core.errors import Cancelled, DeadlineExceeded, FailedPrecondition, NotFound
from greenroom.core.records import Operation, OperationState, Snapshot, SnapshotState, Worker, WorkerState


def only(kind: Kind, what: tuple[str, ...], verb: str) -> list[str]:
    """The names in ``TYPE NAME...`` or ``TYPE/NAME...``, all of one type."""
    wanted = kinds.targets(what)
    if any(found is not kind for found, _ in wanted):
        raise click.UsageError(f"only {kind.names[1]} can be {verb}")
    if not all(name for _, name in wanted):
        raise click.UsageError(f"say which {kind.name}; `greenroom get {kind.names[1]}` lists them")
    return [name for _, name in wanted]


# --- cancel -----------------------------------------------------------------------------------------------------


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="operation ID... | operation/ID...")
@click.option("--wait/--no-wait", "wait", default=True, help="Wait until it is backed out [default: wait].")
@click.option(
    "--timeout", type=duration, metavar="DURATION", default=60.0, show_default="1m", help="How long to wait for each."
)
@common
def cancel(what: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Gives operations up: what they have begun is backed out, and the actor is as it was before.

    A delete can't be taken back. An operation may also be done before anybody hears of it: then it exits with 4.
    """
    options, code = settings(), 0
    with options.connect() as client:
        for operation_id in only(kinds.OPERATIONS, what, "cancelled"):
            failed = _cancel(client, options, operation_id, wait, timeout)
            code = code or failed
    if code:
        raise SystemExit(code)


def _cancel(client: Client, options: Settings, operation_id: str, wait: bool, timeout_s: float) -> int:
    ref = f"operation/{operation_id}"
    request = pb.GetOperationRequest(id=operation_id)
    asked = client.operations.CancelOperation(request, timeout=options.read_timeout_s)
    operation: Operation | None = convert.from_message(Operation, asked)
    assert operation is not None
    if operation.state is not OperationState.RUNNING:
        click.echo(f"{ref} ({operation.kind} of {operation.key}) had ended already: {operation.state}", err=True)
        return 0 if _is_cancelled(operation) else FailedPrecondition.exit_code
    if not wait:
        click.echo(f"{ref} is being given up; watch it with `greenroom wait operation {operation_id}`")
        return 0
    try:
        operation = follow(client, operation_id, timeout_s, live(ref))
    except DeadlineExceeded as error:
        if error.reason != "REQUEST_TIMEOUT":
            raise
        raise DeadlineExceeded(
            f"{ref} was asked to be given up, and is not backed out after {timeout_s:g} s; it will be: its worker may "
            f"have to answer first. `greenroom describe operation {operation_id}` tells how far it is"
        ) from None
    except KeyboardInterrupt:
        click.echo(f"{ref} is being given up all the same", err=True)
        raise SystemExit(INTERRUPTED) from None
    if operation is None or operation.state is OperationState.RUNNING:
        raise NotFound(f"{ref} was dropped meanwhile")
    if _is_cancelled(operation):
        left = f"; {operation.key} is {operation.to_state}" if operation.to_state else ""
        click.echo(f"{ref} cancelled ({operation.kind} of {operation.key}{left})")
        return 0
    how = f"has failed: {operation.error.message}" if operation.error else "was done before it could be cancelled"
    complain(f"{ref} ({operation.kind} of {operation.key}) {how}")
    return FailedPrecondition.exit_code


def _is_cancelled(operation: Operation) -> bool:
    return operation.error is not None and operation.error.code == Cancelled.code


# --- drain ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="worker NAME... | worker/NAME...")
@click.option("--undo", is_flag=True, help="Let it take actors again.")
@click.option("--wait", "wait", is_flag=True, help="Wait until no actor is there any more.")
@click.option(
    "--timeout", type=duration, metavar="DURATION", default=300.0, show_default="5m", help="How long to wait for each."
)
@common
def drain(what: tuple[str, ...], undo: bool, wait: bool, timeout: float) -> None:
    """Empties workers, for example before their machine is serviced: no actor is woken there any more, and those that
    are awake are suspended. A request wakes them on another worker."""
    if undo and wait:
        raise click.UsageError("--undo has nothing to wait for")
    options = settings()
    with options.connect() as client:
        names = only(kinds.WORKERS, what, "drained")
        for name in names:
            request = pb.DrainWorkerRequest(name=name, undo=undo)
            answer = client.workers.DrainWorker(request, timeout=options.read_timeout_s)
            worker = convert.from_message(Worker, answer)
            click.echo(f"worker/{name} takes actors again" if undo else f"worker/{name} draining, {slots(worker)}")
        for name in names if wait else ():
            wait_until_empty(client, options, name, timeout, "drain")
            click.echo(f"worker/{name} is empty")


def slots(worker: Worker) -> str:
    return f"{worker.used} of {worker.capacity} slots taken"


def wait_until_empty(client: Client, options: Settings, name: str, timeout_s: float, what: str) -> None:
    """For a ``what``, as a drain. Asks again and again instead of watching: how far each actor is has to be asked for
    anyway."""
    end = time.monotonic() + timeout_s
    with Several() if on_terminal() else nullcontext() as shown:
        while (worker := kinds.WORKERS.fetch(client, "", name, options.read_timeout_s)).used:
            if worker.state is WorkerState.ACTIVE:
                raise FailedPrecondition(f"worker/{name} takes actors again: somebody has undone the {what}")
            if time.monotonic() > end:
                raise DeadlineExceeded(
                    f"worker/{name}: {slots(worker)} after {timeout_s:g} s; it goes on, and "
                    f"`greenroom describe worker {name}` lists the actors that are still there"
                )
            if shown is not None:
                operations = running(client, "")
                there = kinds.ACTORS.fetch_all(client, "", options.read_timeout_s, worker=name)
                shown.update({f"actor/{actor.key}": operations.get(str(actor.key)) for actor in there})
            time.sleep(POLL_S)


# --- tags -------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("what", nargs=2, metavar="snapshot ID | snapshot/ID")
@click.argument("name", default="")
@common
def tag(what: tuple[str, str], name: str) -> None:
    """Gives a snapshot a name, which keeps it whatever its template's retention says.

    It goes when its actor is deleted, or when its last tag is taken away and nothing else keeps it.
    """
    _tag(what, name, undo=False)


@click.command()
@click.argument("what", nargs=2, metavar="snapshot ID | snapshot/ID")
@click.argument("name", default="")
@common
def untag(what: tuple[str, str], name: str) -> None:
    """Takes a name of a snapshot away; the snapshot goes when nothing else keeps it."""
    _tag(what, name, undo=True)


def _tag(what: tuple[str, str], name: str, *, undo: bool) -> None:
    if "/" in what[0] and not name:  # snapshot/ID NAME
        what, name = (what[0],), what[1]  # type: ignore[assignment]
    if not name:
        raise click.UsageError("say which name")
    options = settings()
    with options.connect() as client:
        [snapshot_id] = only(kinds.SNAPSHOTS, what, "tagged")
        request = pb.TagSnapshotRequest(id=snapshot_id, tag=name, undo=undo)
        answer = client.snapshots.TagSnapshot(request, timeout=options.read_timeout_s)
    after = convert.from_message(Snapshot, answer)
    if undo and after.state is SnapshotState.CONDEMNED:
        click.echo(f"snapshot/{snapshot_id} untagged; nothing else keeps it, it is deleted")
    else:
        click.echo(f"snapshot/{snapshot_id} {'untagged' if undo else 'tagged'} {name}")
