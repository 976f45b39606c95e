"""People: they create actors, use them, put them to sleep, delete them, through whichever replica answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Protocol

from greenroom.core.errors import AlreadyExists, GreenroomError, Unavailable
from greenroom.core.records import Key
from greenroom.testing.simulation.oracle import Oracle
from greenroom.testing.simulation.replica import Replica

TEMPLATE = "t"
#: How long somebody waits for an answer, in seconds; some are less patient.
PATIENT_S = 40.0
#: What people do, and how often each.
ACTS = {"request": 6, "burst": 4, "suspend": 4, "pause": 2, "resume": 2, "delete": 1, "hurry": 2}
#: Requests of a burst, and the longest time between two, in seconds.
BURST, BURST_PAUSE_S = 6, 2.0


class World(Protocol):
    oracle: Oracle

    def replicas_alive(self) -> list[Replica]: ...


class User:
    """Somebody who uses one actor, ``acts`` times until ``until_s`` at the latest. What comes of what they do, well or
    ill, the oracle judges."""

    def __init__(self, world: World, key: Key, seed: str, acts: int, until_s: float) -> None:
        self._world = world
        self._key = key
        self._random = random.Random(f"user {seed}")
        self._acts = acts
        self._until_s = until_s
        self._pause_s = until_s / acts
        self.did: Counter[str] = Counter()

    async def live(self) -> None:
        await asyncio.sleep(self._random.random() * 3)
        await self._try("create")
        for _ in range(self._acts):
            await asyncio.sleep(self._random.expovariate(1 / self._pause_s))
            if asyncio.get_running_loop().time() > self._until_s:
                return
            act = self._random.choices(list(ACTS), list(ACTS.values()))[0]
            for number in range(BURST if act == "burst" else 1):
                if number:
                    await asyncio.sleep(self._random.random() * BURST_PAUSE_S)
                await self._try("request" if act == "burst" else act)

    async def _try(self, act: str) -> None:
        try:
            async with asyncio.timeout(self._random.random() if act == "hurry" else PATIENT_S):
                await self.act(act)
            self.did[act] += 1
        except (GreenroomError, TimeoutError):
            self.did[f"{act}: refused"] += 1

    async def act(self, act: str) -> None:
        alive = self._world.replicas_alive()
        if not alive:
            raise Unavailable("nobody is there")
        replica, key = self._random.choice(alive), self._key
        engine = replica.engine
        match act:
            case "create":
                await replica.ask(act, lambda: engine.create_actor(key, TEMPLATE))
            case "request" | "hurry":
                self._world.oracle.answered(await replica.ask(act, lambda: replica.request(key)))
            case "suspend":
                await replica.ask(act, lambda: engine.suspend(key))
            case "pause":
                await replica.ask(act, lambda: engine.pause(key))
            case "resume":
                await replica.ask(act, lambda: engine.resume(key))
            case "delete":
                await replica.ask(act, lambda: engine.delete(key))
                try:
                    await replica.ask("create", lambda: engine.create_actor(key, TEMPLATE))
                except AlreadyExists:
                    pass
            case _:
                raise AssertionError(act)
