"""People: they create actors, use them, put them to sleep, delete them, through whichever replica answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Protocol

from greenroom.core.errors import AlreadyExists, FailedPrecondition, GreenroomError, Unavailable
from greenroom.core.records import Actor, Key, Operation, OperationState, TemplateSpec, Worker, WorkerState
from greenroom.engine.engine import Engine
from greenroom.testing.simulation.machine import Machine
from greenroom.testing.simulation.oracle import Oracle
from greenroom.testing.simulation.replica import Replica

TEMPLATE = "t"
#: What people apply and delete while things go wrong; no actor is made from these.
OTHER_TEMPLATES = ("u0", "u1")
#: How long a worker stays drained, at most, in seconds.
DRAINED_S = 10.0
#: How long somebody waits for an answer, in seconds; some are less patient.
PATIENT_S = 40.0
#: What people do, and how often each.
ACTS = {
    "request": 6,
    "burst": 4,
    "suspend": 4,
    "pause": 2,
    "resume": 2,
    "delete": 1,
    "hurry": 2,
    "cancel": 1,
    "drain": 0.3,
    "forget": 1,
    "apply": 0.3,
    "unapply": 0.2,
}
#: Requests of a burst, and the longest time between two, in seconds.
BURST, BURST_PAUSE_S = 6, 2.0
#: How often somebody says that a worker will not come back, and the longest time between, in seconds.
FORGETS, FORGET_PAUSE_S = 12, 2.0


class World(Protocol):
    oracle: Oracle
    machines: dict[str, Machine]
    spec: TemplateSpec

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
                before = self._world.oracle.before_suspend(key)
                operation = await replica.ask(act, lambda: engine.suspend(key))
                if operation.state is OperationState.DONE:
                    self._world.oracle.after_suspend(before)
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
            case "cancel":
                await replica.ask(act, lambda: _cancel(engine, key))
            case "drain":
                worker = self._random.choice(sorted(self._world.machines))
                await replica.ask(act, lambda: engine.drain_worker(worker))
                await asyncio.sleep(self._random.random() * DRAINED_S)
                await replica.ask(act, lambda: engine.drain_worker(worker, undo=True))
            case "forget":
                await self._forget(replica)
            case "apply":
                template = Key(key.namespace, self._random.choice(OTHER_TEMPLATES))
                await replica.ask(act, lambda: engine.apply_template(template, self._world.spec))
            case "unapply":
                template = Key(key.namespace, self._random.choice(OTHER_TEMPLATES))
                await replica.ask(act, lambda: engine.delete_template(template))
            case _:
                raise AssertionError(act)

    async def _forget(self, replica: Replica) -> None:
        """Says of a worker that is away that it will not come back, again and again until that is believed, or it is
        heard."""
        engine, away = replica.engine, {"state": str(WorkerState.STALLED)}
        for _ in range(FORGETS):
            found = sorted(w.name for w in await replica.ask("list", lambda: engine.store.list(Worker, where=away)))
            if not found:
                return
            try:
                await replica.ask("forget", lambda: engine.forget_worker(found[0], accept_loss=True))  # noqa: B023
                self.did["forgotten"] += 1
            except FailedPrecondition:
                await asyncio.sleep(self._random.random() * FORGET_PAUSE_S)


async def _cancel(engine: Engine, key: Key) -> Operation | None:
    """Whatever is being done to an actor."""
    operation = (await engine.store.get(Actor, str(key))).operation
    return await engine.cancel_operation(operation) if operation else None
