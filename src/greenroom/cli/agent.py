"""``greenroom agent``: one worker's process. ``greenroom up`` starts them; in a cluster a pod does."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from greenroom.cli.app import pair
from greenroom.cli.tcp import addresses, host_port, told_host
from greenroom.cli.up_options import check_marks, image_options, seconds, size_bytes

if TYPE_CHECKING:
    from greenroom.agent.agent import Agent
    from greenroom.agent.links import Links

F = TypeVar("F", bound=Callable[..., object])

_PR_SET_PDEATHSIG = 1
#: Asks an agent to end in order: its actors are suspended first, where a control plane is connected. A second one is as
#: `END_SIGNAL`. It is what a pod that is to end is sent.
LEAVE_SIGNAL = signal.SIGTERM
#: Ends an agent at once; actors are left running, for the next agent process. (So does Ctrl-C, which is of no use to
#: programs: what a shell runs in the background is born deaf to it.)
END_SIGNAL = signal.SIGUSR2
#: Ends an agent together with everything that runs on it.
WIPE_SIGNAL = signal.SIGUSR1
#: What agents that give each other layers have in common, so that nobody else is given any.
PEER_TOKEN_VARIABLE = "GREENROOM_PEER_TOKEN"
#: How long an agent that was asked to end waits for its actors to be suspended. Suspending takes a second or two each,
#: some at a time; a pod is given 30 s by default, so its grace period has to be set with this.
DRAIN_TIMEOUT_S = 60.0

_FILE = click.Path(path_type=Path, dir_okay=False)


def option(name: str, **more: Any) -> Callable[[F], F]:
    """One that a pod may also set as a variable of its environment: ``--state-dir`` is GREENROOM_STATE_DIR."""
    variable = f"GREENROOM_{name.removeprefix('--').replace('-', '_').upper()}"
    return click.option(name, envvar=variable, show_envvar=True, **more)


@click.command(hidden=True)
@option("--worker", required=True, help="Name of the worker, unique among all that the control plane knows.")
@option("--pool", required=True)
@option("--backend", required=True, help="A sandbox backend by its entry point's name.")
@option("--slots", type=click.IntRange(1, 10_000), required=True, help="Actors awake at a time.")
@option("--warm", type=click.IntRange(0, 1000), default=None, help="Sandboxes kept ready.")
@option("--state-dir", type=click.Path(path_type=Path), required=True, help="The worker's own directory.")
@option("--images", type=click.Path(path_type=Path), required=True, help="Image store; agents may share one.")
@image_options
@option(
    "--images-limit",
    type=size_bytes,
    metavar="SIZE",
    default=0,
    help="An image that would make it more than this is refused, where the disk has room that is not the worker's  "
    "[default: no limit].",
)
@option("--snapshots", required=True, help="Snapshot store: a directory or a URL.")
@option(
    "--control",
    required=True,
    multiple=True,
    help="Where a replica of the control plane takes agents, as unix:/path/agents.sock or HOST:PORT; repeatable. The "
    "others are learned from it.",
)
@option("--ca", type=_FILE, default=None, help="Certificates (PEM) of the authority of replicas on TCP.")
@option("--token-file", type=_FILE, default=None, help="With the token that they ask for in its first line.")
@option("--pool-uid", default="", help="Of the pool, where an operator keeps it; likewise the next three.")
@option("--epoch", type=click.IntRange(min=0), default=0, help="Of the slot of the pool's ledger that this worker has.")
@option("--ordinal", type=click.IntRange(min=0), default=0, help="Of that slot.")
@option("--pod-uid", default="", help="Of this worker's pod.")
@option(
    "--serve",
    type=host_port,
    metavar="HOST:PORT",
    default="",
    help="Where gateways on other machines are let in to actors that are awake here; port 0 for any. GREENROOM_POD_IP "
    "is the address that they are told when HOST is 0.0.0.0.",
)
@option("--health", type=host_port, metavar="HOST:PORT", default="", help="Where /livez and /readyz are answered.")
@click.option(
    "--label", "labels", type=pair, metavar="KEY=VALUE", multiple=True, help="What templates may ask for; repeatable."
)
@option(
    "--drain-timeout",
    type=seconds(0, 86400),
    metavar="SECONDS",
    default=DRAIN_TIMEOUT_S,
    show_default=True,
    help="On SIGTERM: how long to wait, in seconds, until the actors are suspended. A second SIGTERM hurries.",
)
@click.option(
    "--erase",
    is_flag=True,
    help="End what an earlier agent has left running here, remove the state directory, and end.",
)
@click.option("--parent", type=int, default=0, help="End when this process, the parent, ends (its pid).")
@click.option("--log-level", default="info")
def agent(parent: int, log_level: str, **options: object) -> None:
    """Runs one worker."""
    from greenroom.cli.logs import configure
    from greenroom.cli.process import prepare

    configure(log_level)
    prepare()
    if parent:
        _end_with(parent)
    import uvloop

    raise SystemExit(uvloop.run(_serve(**options)))  # type: ignore[arg-type]


def _end_with(parent: int) -> None:
    """This process is killed when its parent dies, whatever it dies of. Nothing is lost: sandboxes go on, and the next
    agent takes them over. Source: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the server that started this agent has ended")


async def _serve(
    worker: str,
    pool: str,
    backend: str,
    slots: int,
    warm: int | None,
    state_dir: Path,
    images: Path,
    images_high: int,
    images_low: int,
    images_limit: int,
    peers: tuple[str, int] | None,
    snapshots: str,
    control: Sequence[str],
    ca: Path | None,
    token_file: Path | None,
    pool_uid: str,
    epoch: int,
    ordinal: int,
    pod_uid: str,
    serve: tuple[str, int] | None,
    health: tuple[str, int] | None,
    labels: Sequence[tuple[str, str]],
    drain_timeout: float,
    erase: bool,
) -> int:
    import structlog

    from greenroom.agent.agent import DEFAULT_WARM, Agent, AgentConfig
    from greenroom.agent.health import HealthServer
    from greenroom.agent.links import Links
    from greenroom.api.access import Access
    from greenroom.core.errors import FailedPrecondition, GreenroomError
    from greenroom.core.rosters import Berth
    from greenroom.images.peers import PeerServer
    from greenroom.images.registries import Registries
    from greenroom.images.store import DiskImageStore
    from greenroom.sandbox import dial, registry
    from greenroom.sandbox.reaper import become_subreaper
    from greenroom.snapshots.store import ObjectSnapshotStore

    log = structlog.get_logger(__name__)
    become_subreaper()  # sandboxes are orphans of the commands that made them
    config = AgentConfig(
        worker=worker,
        pool=pool,
        capacity=slots,
        state_dir=state_dir,
        warm=DEFAULT_WARM if warm is None else warm,
        labels=dict(labels),
        berth=Berth(pool_uid=pool_uid, epoch=epoch, ordinal=ordinal, pod_uid=pod_uid),
        place=dial.place(),
    )
    access = replace(Access.from_environment(), ca=ca, token_file=token_file)
    told = told_host(serve, "--serve") if serve else ""
    check_marks(images_high, images_low, images_limit)
    peers = None if erase else peers
    token = os.environ.get(PEER_TOKEN_VARIABLE, "")
    server = PeerServer(images, token=token) if peers else None
    if server is not None and peers is not None:
        try:
            config = replace(config, blobs=await server.start(*peers))
        except OSError as error:
            log.error("can't serve image layers to other workers", address=peers, error=str(error))
            return FailedPrecondition.exit_code
    # Before anything is made: a signal that comes while it opens is obeyed when it is open, and has cleaned up after
    # an earlier agent.
    signals = _Signals()
    try:
        image_store = DiskImageStore(
            images,
            registries=Registries.from_environment(),
            peer_token=token,
            high_bytes=images_high,
            low_bytes=images_low,
            limit_bytes=images_limit,
        )
        worker_agent = Agent(config, registry.load(backend), image_store, ObjectSnapshotStore(snapshots))
        await worker_agent.open()
        if erase:
            await worker_agent.erase()
            return 0
    except GreenroomError as error:
        log.error("the worker can't start", error=error.message, reason=error.reason)
        return error.exit_code
    except OSError as error:
        log.error("the worker can't start: free some space, or look at its disk", error=str(error))
        return FailedPrecondition.exit_code
    links = Links(worker_agent, addresses(control), access)
    healthy = HealthServer(lambda: worker_agent.unready() or ("" if links.is_up else "no replica is connected"))
    try:
        if health:
            await healthy.start(*health)
        if serve:
            await worker_agent.let_in(*serve, told)
    except OSError as error:
        log.error("can't listen", serve=serve, health=health, error=str(error))
        await worker_agent.close(wipe=False)
        return FailedPrecondition.exit_code
    links.start()
    wipe = await _told_to_end(worker_agent, links, signals, drain_timeout, is_pod=bool(pod_uid))
    await links.close()
    await healthy.close()
    if server is not None:
        await server.close()
    await worker_agent.close(wipe=wipe)
    return 0


class _Signals:
    """``leave`` resolves when this process is asked to end, ``end`` (with whether everything goes) when it has to."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.leave: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[bool] = loop.create_future()
        loop.add_signal_handler(LEAVE_SIGNAL, self._leave)
        for number in (END_SIGNAL, signal.SIGINT):
            loop.add_signal_handler(number, self._end, False)
        loop.add_signal_handler(WIPE_SIGNAL, self._end, True)

    def _leave(self) -> None:
        if self.leave.done():
            self._end(False)
        else:
            self.leave.set_result(None)

    def _end(self, wipe: bool) -> None:
        if not self.end.done():
            self.end.set_result(wipe)


async def _told_to_end(agent: Agent, links: Links, signals: _Signals, drain_timeout_s: float, *, is_pod: bool) -> bool:
    """Until this agent is to end; whether everything that runs on it goes too. ``is_pod``: its actors end with it, so
    it waits for a replica to connect, too."""
    import structlog

    log = structlog.get_logger(__name__)
    ends: set[asyncio.Future[Any]] = {agent.shutdown, signals.end}
    await asyncio.wait({*ends, signals.leave}, return_when=asyncio.FIRST_COMPLETED)
    if not any(end.done() for end in ends):
        # Who is not registered has nothing to be suspended, and nobody would tell it to end.
        if (links.is_up and agent.is_registered) or (is_pod and agent.holds_state()):
            log.info("leaves: its actors are to be suspended", within_s=drain_timeout_s)
            agent.leave()
            await asyncio.wait(ends, timeout=drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not any(end.done() for end in ends):
            log.warning("ends; actors that are awake go on running for the next agent")
    return any(end.result() for end in ends if end.done())
