"""A worker with more on its disk than one message holds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from agent_kit import Bench, short_directory, until
from link_kit import Replica

from greenroom.agent.links import Links
from greenroom.core import agentapi as api
from greenroom.core.agentapi import SandboxExited
from greenroom.testing.world import SimWorld

#: Of sleeping actors that have once written a line on this worker: each keeps a directory there (512 MiB of logs, which
#: is the only bound, are room for some hundred thousand).
LOGS = 50_000


async def test_a_worker_with_the_logs_of_many_actors_can_be_asked_what_it_has() -> None:
    with short_directory() as root:
        async with Bench(root) as bench:
            replica = Replica(bench.root, "r0")
            await replica.start()
            links = Links(bench.agent, [replica.address])
            links.start()
            try:
                await until(lambda: replica.connected)
                bench.agent._logs.uids = lambda: [f"{n:032x}" for n in range(LOGS)]  # type: ignore[method-assign]
                said: Any = await replica.hub.call("w", api.Sync(epoch=1, closed_seq=0))
                assert said.report.inventory == () and said.disk
                found = 0
                page: Any = api.Disk(more=True)
                while page.more:
                    after = page.entries[-1].handle if page.entries else ""
                    page = await replica.hub.call("w", api.ListDisk(after=after))
                    found += len(page.entries)
                assert found == LOGS and not replica.gone, "the link broke"
            finally:
                await links.close()
                await replica.kill()


async def test_more_logs_than_an_inventory_holds_do_not_make_awake_actors_unreachable(tmp_path: Path) -> None:
    """Every comparison fails with INVENTORY_TOO_LARGE; and without one nobody is bound again after a restart."""
    with short_directory() as root:
        async with SimWorld(root, workers=1) as world:
            await world.apply()
            key = await world.create("a")
            await world.request(key)
            agent = world.agents["w0"]
            real = agent._logs.uids
            names = [f"{n:032x}" for n in range(100_001)]
            agent._logs.uids = lambda: names  # type: ignore[method-assign]
            try:
                await world.crash_control()
                reached = asyncio.ensure_future(world.request(key))
                await asyncio.wait({reached}, timeout=120)
                done = reached.done() and reached.exception() is None
                reached.cancel()
                await asyncio.gather(reached, return_exceptions=True)
            finally:
                agent._logs.uids = real  # type: ignore[method-assign]
            assert done, "the actor runs, and nobody reaches it"


_ = (SandboxExited, pytest)
