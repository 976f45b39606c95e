"""``greenroom agent``: one worker's process. ``greenroom up`` starts them; in a cluster a pod does."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from pathlib import Path
from typing import Any

import click

_PR_SET_PDEATHSIG = 1
#: Ends an agent together with everything that runs on it; SIGTERM leaves actors running, for the next agent.
WIPE_SIGNAL = signal.SIGUSR1


@click.command(hidden=True)
@click.option("--worker", required=True, help="Name of the worker, unique among all that the control plane knows.")
@click.option("--pool", required=True)
@click.option("--backend", required=True, help="A sandbox backend by its entry point's name.")
@click.option("--slots", type=click.IntRange(1, 10_000), required=True, help="Actors awake at a time.")
@click.option("--warm", type=click.IntRange(0, 1000), default=None, help="Sandboxes kept ready.")
@click.option("--state-dir", type=click.Path(path_type=Path), required=True, help="The worker's own directory.")
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Image store; agents may share one.")
@click.option("--snapshots", required=True, help="Snapshot store: a directory or a URL.")
@click.option("--control", required=True, help="Where the control plane takes agents, e.g. unix:/path/agents.sock.")
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
    snapshots: str,
    control: str,
) -> int:
    import structlog

    from greenroom.agent.agent import DEFAULT_WARM, Agent, AgentConfig
    from greenroom.agent.link import AgentLink
    from greenroom.core.errors import GreenroomError
    from greenroom.images.store import DiskImageStore
    from greenroom.sandbox import registry
    from greenroom.sandbox.reaper import become_subreaper
    from greenroom.snapshots.store import ObjectSnapshotStore

    log = structlog.get_logger(__name__)
    become_subreaper()  # sandboxes are orphans of the commands that made them
    config = AgentConfig(
        worker=worker, pool=pool, capacity=slots, state_dir=state_dir, warm=DEFAULT_WARM if warm is None else warm
    )
    worker_agent = Agent(config, registry.load(backend), DiskImageStore(images), ObjectSnapshotStore(snapshots))
    # Before anything is made: a signal that comes while it opens is obeyed when it is open, and has cleaned up after
    # an earlier agent.
    told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    for number, wipe in ((signal.SIGTERM, False), (signal.SIGINT, False), (WIPE_SIGNAL, True)):
        asyncio.get_running_loop().add_signal_handler(number, _tell, told, wipe)
    try:
        await worker_agent.open()
    except GreenroomError as error:
        log.error("the worker can't start", error=error.message, reason=error.reason)
        return error.exit_code
    link = asyncio.create_task(AgentLink(worker_agent, control).run())
    ends: set[asyncio.Future[Any]] = {worker_agent.shutdown, told, link}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    broken = link.done()
    if broken:
        log.error("the link to the control plane failed", exc_info=link.exception())
    await asyncio.sleep(0)  # the answer to Shutdown goes out before the link does
    link.cancel()
    await asyncio.gather(link, return_exceptions=True)
    await worker_agent.close(wipe=any(end.result() for end in (worker_agent.shutdown, told) if end.done()))
    return 1 if broken else 0


def _tell(told: asyncio.Future[bool], wipe: bool) -> None:
    if not told.done():
        told.set_result(wipe)
