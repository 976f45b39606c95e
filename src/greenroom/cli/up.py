"""``greenroom up``: a whole Greenroom on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click


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
@click.option("--api", multiple=True, help="Further API address, host:port on loopback (besides the unix socket).")
@click.option("--operation-deadline", type=float, default=300.0, show_default=True, help="Seconds per operation.")
@click.option(
    "--capacity-wait",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help='Seconds that a wake-up waits for a free slot before it is answered "no capacity".',
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
    operation_deadline: float,
    capacity_wait: float,
    log_level: str,
) -> None:
    """Starts a server with its workers; ends on Ctrl-C, after suspending every running actor."""
    from greenroom.cli.logs import configure
    from greenroom.cli.paths import data_dir
    from greenroom.cli.process import prepare
    from greenroom.cli.server import ServerOptions
    from greenroom.core.records import PoolSpec

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
        log_level=log_level,
        warm=warm,
        operation_deadline_s=operation_deadline,
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
    if not probe.available:
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
