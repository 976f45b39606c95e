"""Parts of the world that fail and come back, at moments and for times drawn from the seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from greenroom.testing.simloop import Process, SimLoop
from greenroom.testing.simulation.agent import Agent
from greenroom.testing.simulation.database import STORE
from greenroom.testing.simulation.faults import Fault, Injector
from greenroom.testing.simulation.machine import Machine
from greenroom.testing.simulation.network import Network, data_path
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.snapshots import SNAPSHOTS, Bucket
from greenroom.testing.simulation.trace import Trace

#: How long a part is away, in seconds: sometimes a moment, sometimes much longer than any lease.
AWAY_S = ((0.1, 1.0), (1.0, 6.0), (8.0, 20.0), (8.0, 20.0))
#: By how much clocks jump.
JUMPS_S = (-20.0, -3.0, 3.0, 20.0)
#: The same, seldom: it takes an hour until leases of such a clock have run out.
FAR_JUMPS_S, FAR_ONE_IN = (-3600.0, 3600.0), 20


class World(Protocol):
    loop: SimLoop
    network: Network
    faults: Injector
    bucket: Bucket
    trace: Trace
    names: tuple[str, ...]
    replicas: dict[str, Replica]
    machines: dict[str, Machine]
    agents: dict[str, Agent]

    def crash_replica(self, name: str) -> None: ...
    def stop_replica(self, name: str) -> None: ...
    def double_replica(self, name: str) -> Callable[[], None]: ...
    def start_replica(self, name: str) -> None: ...
    def crash_agent(self, name: str) -> None: ...
    def start_agent(self, name: str) -> None: ...
    def crash_machine(self, name: str, *, disk: bool) -> None: ...


class Trouble:
    def __init__(self, world: World, seed: int | str) -> None:
        self._world = world
        self._random = random.Random(f"trouble {seed}")
        #: What is to be undone, by the order of doing.
        self._undo: dict[int, Callable[[], None]] = {}
        self._done = 0
        #: How far any replica's clock ever was ahead.
        self.furthest_jump_s = 0.0

    async def make(self, kinds: tuple[Fault, ...], times: int, within_s: float) -> None:
        moments = sorted(self._random.random() * within_s for _ in range(times))
        begin = self._world.loop.time()
        for moment in moments:
            await asyncio.sleep(max(0.0, begin + moment - self._world.loop.time()))
            self.act(self._random.choice(kinds))

    def heal(self) -> None:
        """Everything that is away comes back, now."""
        for undo in list(self._undo.values()):
            undo()
        self._undo.clear()

    def act(self, fault: Fault) -> None:
        """One part fails; it comes back by itself."""
        world = self._world
        replica = world.replicas[self._random.choice(world.names)]
        worker = self._random.choice(sorted(world.machines))
        away_s = self._random.uniform(*self._random.choice(AWAY_S))
        if self._one(fault, replica, worker, away_s):
            world.faults.hits[fault] += 1
            world.trace("trouble", fault.value, replica.name, worker, f"{away_s:.3f}")

    def _one(self, fault: Fault, replica: Replica, worker: str, away_s: float) -> bool:
        """Whether there was something that could fail."""
        world = self._world
        machine, agent = world.machines[worker], world.agents.get(worker)
        match fault:
            case Fault.REPLICA_CRASH if replica.alive:
                world.crash_replica(replica.name)
                self._later(away_s, lambda: world.start_replica(replica.name))
            case Fault.REPLICA_STOP if replica.alive:
                world.stop_replica(replica.name)
            case Fault.REPLICA_DOUBLE if replica.alive:
                self._pause(replica.process, away_s)
                over = world.double_replica(replica.name)
                self._later(away_s + self._random.uniform(1.0, 10.0), over)
            case Fault.AGENT_LEAVES if agent is not None:
                agent.leave()
            case Fault.REPLICA_PAUSE if replica.alive:
                self._pause(replica.process, away_s)
            case Fault.CLOCK_JUMP if replica.alive:
                far = self._random.randrange(FAR_ONE_IN) == 0
                jump_s = self._random.choice(FAR_JUMPS_S if far else JUMPS_S)
                replica.store.skew_s += jump_s
                self.furthest_jump_s = max(self.furthest_jump_s, replica.store.skew_s)
            case Fault.AGENT_CRASH if agent is not None:
                world.crash_agent(worker)
                self._later(away_s, lambda: world.start_agent(worker))
            case Fault.AGENT_PAUSE if agent is not None:
                self._pause(agent.process, away_s)
            case Fault.MACHINE_CRASH | Fault.DISK_LOST if machine.up:
                world.crash_machine(worker, disk=fault is Fault.DISK_LOST)
                self._later(away_s, lambda: world.start_agent(worker))
            case Fault.MACHINE_PAUSE if agent is not None:
                self._pause(agent.process, away_s)
                self._pause(machine.process, away_s)
            case Fault.LINK_CUT if agent is not None:
                agent.cut(replica.name)
            case Fault.PARTITION:
                self._part([replica.name], worker, away_s)
            case Fault.ISOLATION:
                self._part(world.names, worker, away_s)
            case Fault.STORE_CUT:
                self._cut(replica.name, STORE, away_s)
            case Fault.STORE_OUTAGE:
                self._down(STORE, away_s)
            case Fault.SNAPSHOTS_OUTAGE:
                self._down(SNAPSHOTS, away_s)
            case Fault.FEED_LAG if replica.alive:
                replica.store.feed.lag_until = world.loop.time() + away_s
            case Fault.FEED_CUT if replica.alive:
                replica.store.feed.cut()
            case Fault.SANDBOX_EXIT if agent is not None and machine.sandboxes:
                uid = self._random.choice(sorted(machine.sandboxes))
                world.loop.call_soon(agent.program_ends, machine.sandboxes[uid], context=agent.process.context)
            case Fault.DISK_FULL:
                machine.disk_full_until = world.loop.time() + away_s
            case Fault.CORRUPTION if among := sorted(i for i, s in world.bucket.stored.items() if not s.golden):
                world.bucket.corrupt.add(self._random.choice(among))
            case _:
                return False
        return True

    def _later(self, after_s: float, undo: Callable[[], None]) -> None:
        self._done += 1
        number = self._done
        self._undo[number] = undo

        def do() -> None:
            if self._undo.pop(number, None) is not None:
                undo()

        self._world.loop.call_later(after_s, do)

    def _part(self, replicas: Sequence[str], worker: str, away_s: float) -> None:
        """Replicas and a worker: sometimes its agent alone, and requests go on reaching what runs there."""
        whole = self._random.random() < 0.5
        for name in replicas:
            self._cut(name, worker, away_s)
            if whole:
                self._cut(name, data_path(worker), away_s)

    def _cut(self, one: str, other: str, away_s: float) -> None:
        self._world.network.cut(one, other)
        self._later(away_s, lambda: self._world.network.heal(one, other))

    def _down(self, name: str, away_s: float) -> None:
        if name not in self._world.network.down:
            self._world.network.down.add(name)
            self._later(away_s, lambda: self._world.network.down.discard(name))

    def _pause(self, process: Process, away_s: float) -> None:
        self._world.loop.pause(process, away_s)
        self._later(away_s, lambda: self._world.loop.resume(process))
