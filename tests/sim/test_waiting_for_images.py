"""Resumes that wait for their image: they wait as long as something moves, and hold nobody for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from greenroom.agent.images import WorkerImages
from greenroom.core import agentapi as api
from greenroom.core.errors import Unavailable
from greenroom.core.records import LayerProgress, Operation, OperationKind, OperationState
from greenroom.engine import calls
from greenroom.images.port import Image, ImageConfig, OnProgress
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import SimWorld

#: Longer than an agent is silent about a call (0.5 s) and a busy machine stands still.
DEADLINE_S = 3.0


@pytest.fixture
async def world(make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        world.configure(operation_deadline_s=DEADLINE_S, deadlines_s={})
        yield world


class Pull:
    """An image that takes as long as the test says; agents are told so instead of asking their store."""

    def __init__(self, world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves = True
        self.done = asyncio.Event()
        self.begun = asyncio.Event()

        async def hold(images: WorkerImages, call: api.Start | api.Restore, on_progress: OnProgress) -> Image:
            self.begun.set()
            done = 0
            while not self.done.is_set():
                done += self.moves
                on_progress("download", (LayerProgress(digest="sha256:1", done_bytes=done, total_bytes=1000),))
                await asyncio.sleep(0.02)
            digest = call.image_digest
            config = ImageConfig(entrypoint=("none",))
            return Image(reference="", digest=digest, rootfs=world.root, config=config, size_bytes=0)

        monkeypatch.setattr(WorkerImages, "hold", hold)
        for agent in world.agents.values():
            agent._classes._needs_image = True


async def begun(pull: Pull, resuming: asyncio.Task[Operation]) -> None:
    """The image is waited for. When that has ended instead, so does this, with what it ended with."""
    waiting = asyncio.ensure_future(pull.begun.wait())
    await asyncio.wait({waiting, resuming}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise AssertionError(f"it waits for no image: {resuming.result()}")


async def the_resume(world: SimWorld) -> Operation:
    return (await list_all(world.store, Operation, where={"kind": OperationKind.RESUME}))[-1]


async def test_no_deadline_passes_while_bytes_move(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = Pull(world, monkeypatch)
    key = await world.create("a")
    started = time.monotonic()
    resuming = asyncio.create_task(world.engine.resume(key))
    await pull.begun.wait()
    await asyncio.sleep(1.5 * DEADLINE_S)
    waiting = await the_resume(world)
    assert (waiting.state, waiting.phase) == (OperationState.RUNNING, "prepare/download")
    assert waiting.layers[0].done_bytes > 0
    pull.done.set()
    assert (await resuming).state is OperationState.DONE
    assert time.monotonic() - started > 1.5 * DEADLINE_S


async def test_a_worker_may_go_away_more_than_once_meanwhile(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it has as long to come back as the first time."""
    return_s = 2.2
    # Nothing moves while an agent is away: the deadline runs then, and is not what this is about.
    world.configure(worker_return_s=return_s, operation_deadline_s=20.0)
    key = await world.create("a")
    pull = Pull(world, monkeypatch)
    resuming = asyncio.create_task(world.engine.resume(key))
    for _ in range(2):
        await begun(pull, resuming)
        pull.begun.clear()
        await asyncio.sleep(1.2 * return_s)
        worker = (await the_resume(world)).worker
        await world.kill_agent(worker)
        await world.start_agent(worker)
        world.agents[worker]._classes._needs_image = True
    await begun(pull, resuming)
    pull.done.set()
    resumed = await resuming
    assert (resumed.state, resumed.attempts) == (OperationState.DONE, 1)


async def test_what_does_not_move_ends(make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_world() as world:
        await world.apply()
        world.configure(stall_s=0.6, attempts=1)
        pull = Pull(world, monkeypatch)
        pull.moves = False
        key = await world.create("a")
        operation = await world.engine.resume(key)
        assert operation.error is not None and operation.error.reason == "STALLED"
        pull.done.set()


async def test_requests_are_not_held_for_an_image(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "IMAGE_HOLD_S", 0.7)
    pull = Pull(world, monkeypatch)
    key = await world.create("a")
    started = time.monotonic()
    waiting = [asyncio.create_task(world.engine.wake(key)) for _ in range(3)]
    for request in waiting:
        with pytest.raises(Unavailable, match=r"waits for its image \(download, \d+ % of 0.0 MiB\)") as raised:
            await request
        assert raised.value.reason == "IMAGE_PREPARING"
        assert raised.value.retry_after_s > 0
    assert 0.5 < time.monotonic() - started < 20
    with pytest.raises(Unavailable):  # whoever comes later is told so sooner
        await world.engine.wake(key)
    pull.done.set()
    assert (await world.engine.wake(key)).binding.key == key  # it went on, and is awake by now
    assert len(await list_all(world.store, Operation, where={"kind": OperationKind.RESUME})) == 2  # and the golden one
