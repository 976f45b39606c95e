"""How the engine tells the gateway to reach an actor: directly, or through its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from greenroom.core.errors import Unavailable
from greenroom.engine import census
from greenroom.engine.bindings import Binding
from greenroom.engine.engine import Engine
from greenroom.sandbox import dial
from greenroom.testing.local_hub import LocalHub
from greenroom.testing.world import QUICK, SimWorld


async def bound(world: SimWorld) -> Binding:
    await world.apply()
    key = await world.create("a")
    return (await world.engine.wake(key)).binding


async def again_from(world: SimWorld, place: str) -> None:
    """The agent connects once more, and says that it is there."""
    agent = world.agents["w0"]
    agent._config = replace(agent._config, place=place)
    world.hub.connect(agent)
    async with asyncio.timeout(60):
        while world.engine.members.door("w0") != (place, agent.hello().entrance):
            await asyncio.sleep(0.002)


async def test_only_who_is_elsewhere_is_reached_through_the_agent(make_world: Callable[..., Any]) -> None:
    async with make_world(workers=1) as world:
        binding = await bound(world)
        assert await world.engine.entrance(binding) is None
        world.configure(place=dial.place())
        assert await world.engine.entrance(binding) is None, "an older agent says nothing, and is on this machine"
        await again_from(world, dial.place())
        assert await world.engine.entrance(binding) is None
        await again_from(world, "elsewhere")
        with pytest.raises(Unavailable, match="--serve HOST:PORT") as shut:
            await world.engine.entrance(binding)
        assert shut.value.reason == "NO_ENTRANCE"
        await world.agents["w0"].let_in("127.0.0.1", 0, "10.0.0.7")
        await again_from(world, "elsewhere")
        entrance = await world.engine.entrance(binding)
        assert entrance is not None and entrance.host == "10.0.0.7" and len(entrance.fingerprint) == 64


@pytest.mark.parametrize("where", [dial.place(), "elsewhere"], ids=["here", "elsewhere"])
async def test_an_actor_is_reached_while_its_agent_has_no_link(make_world: Callable[..., Any], where: str) -> None:
    """It restarts, or the network is away: a request to an actor that is awake needs no word of its agent."""
    async with make_world(workers=1) as world:
        binding = await bound(world)
        world.configure(place=dial.place())
        await world.agents["w0"].let_in("127.0.0.1", 0, "10.0.0.7")
        await again_from(world, where)
        before = await world.engine.entrance(binding)
        world.hub.disconnect("w0")
        assert await world.engine.entrance(binding) == before
        world.hub.connect(world.agents["w0"])


async def test_a_replica_that_has_just_begun_waits_for_the_link_of_a_worker(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_world(workers=1) as world:
        binding = await bound(world)
        await world.agents["w0"].let_in("127.0.0.1", 0, "10.0.0.7")
        world.agents["w0"]._config = replace(world.agents["w0"]._config, place="elsewhere")
        hub = LocalHub()
        config = replace(QUICK, owner="other/1", replica="other", place=dial.place(), exclusive=False)
        other = Engine(world.store, hub, world.snapshots, config)
        await other.start()
        try:
            asked = asyncio.create_task(other.entrance(binding))
            await asyncio.sleep(0.1)
            assert not asked.done()
            hub.connect(world.agents["w0"])
            async with asyncio.timeout(60):
                found = await asked
            assert found is not None and found.host == "10.0.0.7"
            monkeypatch.setattr(census, "DOOR_WAIT_S", 0.05)
            with pytest.raises(Unavailable, match="has no link to this replica"):
                await other.entrance(Binding(binding.key, binding.uid, binding.generation, "w9", binding.endpoint, 0.0))
        finally:
            hub.disconnect("w0")
            await other.close()


def test_a_place_is_the_same_for_who_shares_it() -> None:
    assert dial.place() == dial.place() and dial.place().count("/") == 2
