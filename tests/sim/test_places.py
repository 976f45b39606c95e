"""How the engine tells the gateway to reach an actor: directly, or through its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from greenroom.core.errors import FailedPrecondition, Unavailable
from greenroom.core.records import Replica
from greenroom.engine import census
from greenroom.engine.bindings import Binding
from greenroom.engine.engine import Engine
from greenroom.sandbox import dial
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.store.memory import MemoryStore
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


@pytest.mark.parametrize(
    ("link", "place", "taken"),
    [
        ("unix:/data/run/agents.sock", "here", False),
        ("unix:/data/run/agents.sock", "", False),  # it is older than places
        ("unix:/data/run/agents.sock", "a clone", True),
        ("unix:/other/run/agents.sock", "here", True),
        ("10.0.0.7:7071", "a clone", False),  # a container that was started again has another place, and its address
    ],
)
async def test_a_name_is_free_again_only_where_it_was(tmp_path: Path, link: str, place: str, taken: bool) -> None:
    store = MemoryStore()
    mine = link if link.startswith("10.") else "unix:/data/run/agents.sock"
    config = replace(QUICK, owner="r/2", replica="r", link=mine, place="here", exclusive=False)
    replicas = Engine(store, LocalHub(), ObjectSnapshotStore(tmp_path), config).replicas
    await store.put(Replica(name="r", incarnation="r/1", link=link, place=place, seen_at=store.clock()))
    if taken:
        with pytest.raises(FailedPrecondition, match="another replica of the control plane is called 'r'"):
            await replicas.check_name()
    else:
        await replicas.check_name()
    await replicas._write(store.clock(), {})
    assert (await store.get(Replica, "r")).place == "here"


def test_a_place_is_the_same_for_who_shares_it() -> None:
    assert dial.place() == dial.place() and dial.place().count("/") == 2
