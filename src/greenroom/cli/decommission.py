"""Commands for workers that end for good, or are to be trusted again: ``retire``, ``forget``, ``acknowledge``."""

from __future__ import annotations

import time

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import Settings, common, duration, settings
from greenroom.cli.follow import POLL_S
from greenroom.cli.operate import only, slots, wait_until_empty
from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, NotFound
from greenroom.core.quantity import human_age
from greenroom.core.records import Worker, WorkerState

_WHAT = "worker NAME... | worker/NAME..."


@click.command()
@click.argument("what", nargs=-1, required=True, metavar=_WHAT)
@click.option("--wait", "wait", is_flag=True, help="Wait until nothing of it is left, and show how far it is.")
@click.option(
    "--timeout", type=duration, metavar="DURATION", default=300.0, show_default="5m", help="How long to wait for each."
)
@common
def retire(what: tuple[str, ...], wait: bool, timeout: float) -> None:
    """Ends workers for good, and loses nothing: their actors are suspended, what only they have is uploaded, then the
    agent erases its state directory and ends, and the worker is forgotten.

    `greenroom drain worker NAME --undo` takes it back until the directory is erased. A worker of a pool of `greenroom
    up` is replaced by one with an empty directory; to have fewer, make the pool smaller.
    """
    options = settings()
    with options.connect() as client:
        names = only(kinds.WORKERS, what, "retired")
        for name in names:
            answer = client.workers.RetireWorker(pb.RetireWorkerRequest(name=name), timeout=options.read_timeout_s)
            worker = convert.from_message(Worker, answer)
            click.echo(f"worker/{name} retiring, {slots(worker)}")
            if worker.state is WorkerState.STALLED:
                click.echo(
                    f"worker/{name} is not heard since {human_age(time.time() - worker.last_seen)}: it goes on when it "
                    f"is back; if it will not be, `greenroom forget worker {name}`",
                    err=True,
                )
        for name in names if wait else ():
            _wait_until_retired(client, options, name, timeout)


def _wait_until_retired(client: Client, options: Settings, name: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    try:
        incarnation = kinds.WORKERS.fetch(client, "", name, options.read_timeout_s).incarnation
        wait_until_empty(client, options, name, timeout_s, "retirement")
        while (worker := kinds.WORKERS.fetch(client, "", name, options.read_timeout_s)).incarnation == incarnation:
            if worker.state is WorkerState.ACTIVE:
                raise FailedPrecondition(f"worker/{name} takes actors again: somebody has undone the retirement")
            if worker.state is WorkerState.GONE:
                click.echo(f"worker/{name} is gone: {worker.message}")
                return
            if time.monotonic() > end:
                raise DeadlineExceeded(
                    f"worker/{name} is empty and has not ended after {timeout_s:g} s; it goes on, and `greenroom gc "
                    f"--explain worker/{name}` tells what it waits for"
                )
            time.sleep(POLL_S)
        click.echo(f"worker/{name} has retired; another one with an empty disk has its name")
    except NotFound:
        click.echo(f"worker/{name} has retired")


@click.command()
@click.argument("what", nargs=-1, required=True, metavar=_WHAT)
@click.option("--yes", "yes", is_flag=True, help="Also when something is lost with it.")
@common
def forget(what: tuple[str, ...], yes: bool) -> None:
    """Says that workers that nobody hears will not come back. Their actors may wake elsewhere, from their last
    snapshot; snapshots that were on their disks only are lost. Refused for a worker that may still be heard: `greenroom
    retire` ends such a one and loses nothing.

    What is left is a tombstone: a worker that comes back after all is told to wipe itself. On one that is Gone already
    the command removes the tombstone.
    """
    options = settings()
    with options.connect() as client:
        for name in only(kinds.WORKERS, what, "forgotten"):
            request = pb.ForgetWorkerRequest(name=name, accept_loss=yes)
            answer = client.workers.ForgetWorker(request, timeout=options.request_timeout_s)
            if answer.removed:
                click.echo(f"worker/{name} forgotten")
                continue
            click.echo(f"worker/{name} is gone; should it come back, it wipes itself")
            for actor in answer.lost_actors:
                click.echo(f"actor/{actor} lost what it did since it woke", err=True)
            for snapshot in answer.lost_snapshots:
                click.echo(f"snapshot/{snapshot} lost: it was nowhere else", err=True)


@click.command()
@click.argument("what", nargs=-1, required=True, metavar=_WHAT)
@common
def acknowledge(what: tuple[str, ...]) -> None:
    """Says that the database is right as it is, after it was restored to an earlier state: what it does not know on
    these workers may be destroyed. Until then nothing is destroyed or given up there (`distrust` in `greenroom describe
    worker`)."""
    options = settings()
    with options.connect() as client:
        for name in only(kinds.WORKERS, what, "acknowledged"):
            before = kinds.WORKERS.fetch(client, "", name, options.read_timeout_s)
            request = pb.AcknowledgeWorkerRequest(name=name)
            client.workers.AcknowledgeWorker(request, timeout=options.read_timeout_s)
            said = (
                "acknowledged: what the database does not know there goes now"
                if before.distrust
                else ("is trusted already; nothing to do")
            )
            click.echo(f"worker/{name} {said}")
