"""``greenroom operator``: keeps worker pools and templates of a cluster. Runs in a pod, or where a kubeconfig is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import uuid
from typing import TYPE_CHECKING, Any

import click

from greenroom.cli.app import settings
from greenroom.cli.up_options import metrics_address, seconds, snapshot_place
from greenroom.core.errors import FailedPrecondition
from greenroom.operator.installation import AGENT_IMAGE, CONTROL, TLS_SECRET, TOKEN_SECRET, Installation

if TYPE_CHECKING:
    from greenroom.operator.kubeconfig import Connection

#: How long what is under way may take when it is to end. A lease that is not given back is free after 15 s anyway.
END_TIMEOUT_S = 10.0


@click.command()
@click.option("--kubeconfig", default="", metavar="FILE", help="[default: $KUBECONFIG, else the pod's account].")
@click.option("--context", default="", help="Of the kubeconfig [default: its current one].")
@click.option(
    "-n", "--namespace", default="", metavar="NAME", help="Whose pools and templates [default: the context's]."
)
@click.option(
    "--lease-namespace", default="", metavar="NAME", help="Where operators agree on who acts [default: as above]."
)
@click.option("--server", default="", metavar="ADDRESS", help="The control plane's API [env: GREENROOM_SERVER].")
@click.option("--health", type=metrics_address, default="", metavar="HOST:PORT", help="Where /livez and /readyz are.")
@click.option("--metrics", type=metrics_address, default="", metavar="HOST:PORT", help="Where /metrics is.")
@click.option(
    "--worker-control",
    multiple=True,
    metavar="HOST:PORT",
    default=CONTROL,
    show_default=True,
    help="Where worker pods find the control plane; repeatable.",
)
@click.option("--worker-image", default=AGENT_IMAGE, show_default=True, help="Of pools that name none.")
@click.option("--worker-pull-secret", multiple=True, metavar="SECRET", help="For that image; repeatable.")
@click.option(
    "--worker-tls-secret",
    default=TLS_SECRET,
    show_default=True,
    help='Its ca.crt vouches for the control plane; "": no TLS.',
)
@click.option("--worker-token-secret", default=TOKEN_SECRET, show_default=True, help="Its `agents` lets workers in.")
@click.option(
    "--snapshots", type=snapshot_place, required=True, metavar="URL", help="Where workers keep snapshots, as for `up`."
)
@click.option(
    "--snapshots-secret", default="", metavar="SECRET", help="Environment of workers: the bucket's credentials."
)
@click.option(
    "--cool-down",
    type=seconds(0, 86400),
    default="2m",
    show_default=True,
    help="Autoscaled pools do not shrink within this time after a change, and only by workers that were idle as long.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def operator(log_level: str, server: str, **options: Any) -> None:
    """Keeps the worker pools and templates of a cluster; of several one acts, the others stand by.

    The control plane is found by --server, and shown GREENROOM_TOKEN or GREENROOM_TOKEN_FILE.
    """
    from greenroom.cli.logs import configure
    from greenroom.cli.process import prepare

    configure(log_level)
    prepare()
    settings().server = server or settings().server
    import uvloop

    uvloop.run(_run(**options))


async def _run(
    kubeconfig: str,
    context: str,
    namespace: str,
    lease_namespace: str,
    health: tuple[str, int] | None,
    metrics: tuple[str, int] | None,
    cool_down: float,
    **worker: Any,
) -> None:
    import structlog

    from greenroom.operator import kubeconfig as config
    from greenroom.operator.control import ApiPlane
    from greenroom.operator.operator import Operator
    from greenroom.operator.transport import HttpTransport
    from greenroom.operator.web import OperatorWeb

    log = structlog.get_logger("greenroom.operator")
    stop = _signals()

    def connect() -> Connection:
        return config.load(context, kubeconfig)

    namespace = namespace or connect().namespace
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(settings().connect_async())
        transport = await stack.enter_async_context(HttpTransport(connect))
        acting = Operator(
            transport,
            lease_namespace or namespace,
            identity(),
            namespace=namespace,
            plane=ApiPlane(client),
            installation=_installation(**worker),
            cool_down_s=cool_down,
        )
        web = await stack.enter_async_context(OperatorWeb(acting, health, metrics))
        log.info("operator starts", identity=acting.identity, namespace=namespace, listens=web.addresses)
        await _until(stop, asyncio.create_task(acting.run(), name="operator"))
    log.info("operator has ended", identity=acting.identity)


def _installation(
    worker_control: tuple[str, ...],
    worker_image: str,
    worker_pull_secret: tuple[str, ...],
    worker_tls_secret: str,
    worker_token_secret: str,
    snapshots: str,
    snapshots_secret: str,
) -> Installation:
    return Installation(
        control=tuple(worker_control),
        snapshots=snapshots,
        image=worker_image,
        pull_secrets=tuple(worker_pull_secret),
        tls_secret=worker_tls_secret,
        token_secret=worker_token_secret,
        snapshots_secret=snapshots_secret,
    )


def identity() -> str:
    """Of this process and no other, ever: two of one name would both believe that they lead."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _until(stop: asyncio.Event, work: asyncio.Task[None]) -> None:
    """Until asked to end: then what is under way is cancelled and the lease is given back."""
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not work.done():
        work.cancel()
        _, slow = await asyncio.wait({work}, timeout=END_TIMEOUT_S)
        if slow:
            raise FailedPrecondition(
                "could not end in order: the API server does not answer; its lease runs out by itself"
            )
    if not work.cancelled():
        work.result()
