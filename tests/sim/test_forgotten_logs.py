"""Logs of actors that were deleted, wherever these had run, are removed; those of others stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from greenroom.core import agentapi as api
from greenroom.core.errors import Unavailable
from greenroom.core.records import Key
from greenroom.testing.world import SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


def write_log(world: SimWorld, worker: str, uid: str) -> None:
    """Simulated sandboxes write none."""
    directory = world.root / worker / "logs" / uid
    directory.mkdir()
    (directory / f"{1:012d}").write_text("a line\n")


async def until_only(world: SimWorld, worker: str, uids: set[str]) -> None:
    async with asyncio.timeout(60):
        while {path.name for path in (world.root / worker / "logs").iterdir()} != uids:
            await asyncio.sleep(0.002)


async def two_with_logs_everywhere(world: SimWorld) -> tuple[Key, str, str]:
    """One to be deleted, and the uids of both."""
    gone, stays = await world.create("gone"), await world.create("stays")
    uids = (await world.actor(gone)).uid, (await world.actor(stays)).uid
    for worker in world.names:
        for uid in uids:
            write_log(world, worker, uid)
    return gone, *uids


async def test_of_one_that_slept_on_every_worker(world: SimWorld) -> None:
    gone, _, stays = await two_with_logs_everywhere(world)
    await world.engine.delete(gone)
    for worker in world.names:
        await until_only(world, worker, {stays})


async def test_also_by_a_worker_that_was_away_and_a_control_plane_that_died(world: SimWorld) -> None:
    gone, _, stays = await two_with_logs_everywhere(world)
    await world.kill_agent("w1")
    await world.engine.delete(gone)
    await world.crash_control()
    await world.start_agent("w1")
    for worker in world.names:
        await until_only(world, worker, {stays})


async def test_a_message_that_is_lost_is_made_up_for(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    call = world.hub.call

    async def lossy(worker: str, what: api.AgentCall, on_progress: Any = None) -> Any:
        if isinstance(what, api.Sync) and what.destroy and worker not in lost:
            lost.append(worker)
            raise Unavailable(f"worker {worker} is not connected", reason="WORKER_DISCONNECTED")
        return await call(worker, what, on_progress)

    monkeypatch.setattr(world.hub, "call", lossy)
    gone, _, stays = await two_with_logs_everywhere(world)
    await world.engine.delete(gone)
    for worker in world.names:
        await until_only(world, worker, {stays})
    assert sorted(lost) == world.names
