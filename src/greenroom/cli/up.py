"""``greenroom up``: a whole Greenroom on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click

from greenroom.cli.app import pair
from greenroom.cli.tcp import listeners, tcp_options
from greenroom.cli.up_options import (
    check_marks,
    deadline,
    deadlines,
    image_options,
    metrics_address,
    name_for,
    replica_name,
    seconds,
    snapshot_place,
    store_url,
    worker_labels,
)
from greenroom.core.gc.blobs import SCRUB_AGE_S
from greenroom.core.records import OperationKind

#: Default of --worker-return. With a database of its own, which fails over in less than half a minute, twice as much.
WORKER_RETURN_S = 15.0
WORKER_RETURN_SHARED_S = 30.0


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=None, help="Data directory [default: see README].")
@click.option("--workers", type=click.IntRange(0, 64), default=None, help="Workers of pool 'default' [default: 2].")
@click.option("--slots", type=click.IntRange(1, 10_000), default=None, help="Actors awake per worker [default: 4].")
@click.option(
    "--warm", type=click.IntRange(0, 1000), default=None, help="Sandboxes kept ready per worker [default: 2 per CPU]."
)
@click.option("--backend", default=None, help="Sandbox backend of pool 'default' [default: gvisor].")
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="Where the HTTP gateway listens.")
@click.option("--domain", default="localhost", show_default=True, help="What actors' host names end in.")
@click.option(
    "--api",
    multiple=True,
    metavar="HOST:PORT",
    help="Further API address, besides the unix socket; repeatable. Only on loopback without the next options.",
)
@tcp_options
@click.option(
    "--store",
    type=store_url,
    metavar="URL",
    envvar="GREENROOM_STORE",
    show_envvar=True,
    default="",
    help="postgresql://USER@HOST/DATABASE, which any number of replicas share [default: SQLite in the data directory]. "
    "A password is safer in the environment, or in PGPASSWORD or ~/.pgpass.",
)
@click.option(
    "--snapshots",
    type=snapshot_place,
    metavar="DIR|URL",
    default="",
    help="Where sleeping actors are kept, as s3://BUCKET/PREFIX; the same for all replicas and workers that share a "
    "store [default: in the data directory].",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Where images are kept; servers of one machine may share it [default: in the data directory].",
)
@image_options
@click.option(
    "--name",
    type=replica_name,
    metavar="NAME",
    default=None,
    help="What this replica is called among those that share the store [default: with PostgreSQL the host's name].",
)
@click.option("--no-workers", is_flag=True, help="Keep no workers here: others connect, or other replicas have them.")
@click.option(
    "-l",
    "--label",
    "labels",
    type=pair,
    metavar="KEY=VALUE",
    multiple=True,
    help="Label of this server's workers, for templates and actors to ask for; repeatable.",
)
@click.option(
    "--operation-deadline",
    "deadline_options",
    type=deadline,
    metavar="[KIND=]SECONDS",
    multiple=True,
    help="How long one operation on an actor may take [default: 300], or one of a kind, as resume=60 or prepare=7200; "
    "repeatable.",
)
@click.option(
    "--stall-timeout",
    type=seconds(1, 3600),
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help="An operation in which nothing moves for so long, no bytes and no phase, is backed out.",
)
@click.option(
    "--lease-ttl",
    type=seconds(1, 3600),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="How long other replicas leave the operations of one that died alone.",
)
@click.option(
    "--worker-return",
    type=seconds(1, 3600),
    metavar="SECONDS",
    default=None,
    help="How long a worker that went away may take to come back before its actors count as lost; when the store is "
    "away for half of it, awake actors freeze. Halve it at most from one start to the next: agents go by what they "
    "heard last  [default: 15, with PostgreSQL 30].",
)
@click.option(
    "--worker-gone",
    type=seconds(10, 366 * 86400),
    metavar="SECONDS",
    default=86400.0,
    show_default="1 day",
    help="A worker that nobody has heard for so long is gone, with what only its disk has; `greenroom forget` says so "
    "earlier.",
)
@click.option(
    "--compare-every",
    type=seconds(1, 86400),
    metavar="SECONDS",
    default=30.0,
    show_default="30 seconds",
    help="How often what is on each worker is compared with the records, whatever was lost on the way.",
)
@click.option(
    "--scrub-every",
    type=seconds(1, 30 * 86400),
    metavar="SECONDS",
    default=6 * 3600.0,
    show_default="6 hours",
    help="How often the snapshot store is looked through for what belongs to nobody.",
)
@click.option(
    "--scrub-age",
    type=seconds(1, 366 * 86400),
    metavar="SECONDS",
    default=SCRUB_AGE_S,
    show_default="25 hours",
    help="What belongs to nobody there is left alone until it is so old; longer than clocks may be wrong by.",
)
@click.option(
    "--capacity-wait",
    type=seconds(0, 86400),
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help='Seconds that a wake-up waits for a free slot before it is answered "no capacity".',
)
@click.option(
    "--metrics",
    type=metrics_address,
    metavar="HOST:PORT",
    default="",
    help="Where Prometheus gets figures (/metrics), as 127.0.0.1:9464; without a login  [default: nowhere].",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def up(
    data: Path | None,
    workers: int | None,
    slots: int | None,
    warm: int | None,
    backend: str | None,
    listen: str,
    domain: str,
    api: tuple[str, ...],
    agents: tuple[str, int] | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    agent_token_file: Path | None,
    api_token_file: Path | None,
    rosters: bool,
    store: str,
    snapshots: str,
    images: Path | None,
    images_high: int,
    images_low: int,
    peers: tuple[str, int] | None,
    name: str | None,
    no_workers: bool,
    labels: tuple[tuple[str, str], ...],
    deadline_options: tuple[tuple[OperationKind | None, float], ...],
    stall_timeout: float,
    lease_ttl: float,
    worker_return: float | None,
    worker_gone: float,
    compare_every: float,
    scrub_every: float,
    scrub_age: float,
    capacity_wait: float,
    metrics: tuple[str, int] | None,
    log_level: str,
) -> None:
    """Starts a server with its workers; ends on Ctrl-C, after suspending every running actor."""
    from greenroom.cli.logs import configure
    from greenroom.cli.paths import data_dir
    from greenroom.cli.process import prepare
    from greenroom.cli.server import ServerOptions
    from greenroom.core.records import PoolSpec

    # --slots and --backend are the pool's, which workers elsewhere belong to.
    own = {"--workers": bool(workers), "--warm": warm is not None, "--label": bool(labels)}
    if (no_workers or rosters) and (contrary := [option for option, given in own.items() if given]):
        which = "--no-workers" if no_workers else "--rosters"
        raise click.UsageError(f"{which} and {contrary[0]} contradict each other: leave one of them out")
    if store and not snapshots:
        raise click.UsageError(
            "--snapshots is missing: replicas that share a store must share the snapshots of its actors too; give a "
            "directory that all of them have, or a bucket as s3://BUCKET/PREFIX"
        )
    check_marks(images_high, images_low)
    if peers and peers[1]:
        raise click.UsageError(f"--peers {peers[0]}:{peers[1]}: each worker needs a port of its own; write port 0")
    deadline_s, deadlines_s = deadlines(deadline_options)
    return_s = worker_return or (WORKER_RETURN_SHARED_S if store else WORKER_RETURN_S)
    if worker_gone < return_s:
        raise click.UsageError(
            f"--worker-gone ({worker_gone:g} s) has to be at least --worker-return ({return_s:g} s): a worker is lost "
            "before it can be gone"
        )
    listening = listeners(agents, tls_cert, tls_key, agent_token_file, api_token_file)
    configure(log_level)
    files = prepare()
    default = PoolSpec()
    options = ServerOptions(
        data_dir=(data or data_dir()).absolute(),
        pool=PoolSpec(
            replicas=default.replicas if workers is None else workers,
            slots=slots or default.slots,
            backend=backend or default.backend,
        ),
        resize=not (workers is None and slots is None and backend is None),
        listen=_address(listen),
        domain=domain,
        api=api,
        listeners=listening,
        rosters=rosters,
        log_level=log_level,
        warm=warm,
        store=store,
        snapshots=snapshots,
        images=images.expanduser().absolute() if images else None,
        images_high=images_high,
        images_low=images_low,
        peers=peers,
        metrics=metrics,
        name=name_for(store, name),
        no_workers=no_workers or rosters,  # pools are the operator's, and none kept here would be on a roster
        labels=worker_labels(labels),
        lease_ttl_s=lease_ttl,
        stall_s=stall_timeout,
        worker_return_s=return_s,
        worker_gone_s=worker_gone,
        reconcile_s=compare_every,
        scrub_s=scrub_every,
        scrub_age_s=scrub_age,
        operation_deadline_s=deadline_s,
        deadlines_s=deadlines_s,
        capacity_wait_s=capacity_wait,
        max_files=files,
    )
    import uvloop

    uvloop.run(_run(options))


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise click.UsageError(f"--listen {text!r} is not host:port, for example 127.0.0.1:8080")
    return host or "127.0.0.1", int(port)


class Stop:
    """What Ctrl-C, SIGTERM and the end of the terminal mean: the first time end in order, the second time hurry."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.again = asyncio.Event()

    def ask(self) -> None:
        (self.again if self.asked.is_set() else self.asked).set()


async def _run(options: object) -> None:
    from greenroom.cli.server import Server, ServerOptions
    from greenroom.core.errors import FailedPrecondition
    from greenroom.sandbox import registry

    assert isinstance(options, ServerOptions)
    probe = await registry.load(options.pool.backend).probe()
    if not (probe.available or options.no_workers or options.pool.replicas == 0):
        raise FailedPrecondition(
            f"backend {options.pool.backend!r} can't run here: {probe.reason}. `greenroom doctor` tells what is "
            "missing; `greenroom up --backend process` needs no root (and is no security boundary)",
            reason="BACKEND_UNAVAILABLE",
        )
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.ask)
    server = Server(options)
    await server.start()
    awake: list[str] = []
    try:
        host, port = server.gateway_address
        click.echo(
            f"greenroom is up; actors answer at http://NAME.NAMESPACE.{options.domain}:{port} ({host})", err=True
        )
        click.echo("next: greenroom apply -f template.yaml; Ctrl-C suspends every actor and ends", err=True)
        await stop.asked.wait()
        click.echo("suspending the running actors and ending ... (again: leave them running and end now)", err=True)
    finally:
        awake = await server.close(hurry=stop.again)
    if awake:
        raise FailedPrecondition(
            f"could not be suspended: {', '.join(awake)}; the lines above say why. Nothing of them is lost: their "
            "sandboxes go on running, and the next `greenroom up` with this data directory takes them over",
            reason="NOT_SUSPENDED",
        )
