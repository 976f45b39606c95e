"""The parts of a simulated world, and how they live, die and come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

from greenroom.core.errors import GreenroomError
from greenroom.core.records import Probe, TemplateSpec
from greenroom.engine.bindings import BindingTable
from greenroom.testing.simloop import Process, SimLoop
from greenroom.testing.simulation.agent import Agent
from greenroom.testing.simulation.bookkeeping import Bookkeeping, Verdicts
from greenroom.testing.simulation.database import Database
from greenroom.testing.simulation.faults import Injector
from greenroom.testing.simulation.links import SimHub
from greenroom.testing.simulation.machine import Machine, Sandbox
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.oracle import Oracle
from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.snapshots import Bucket
from greenroom.testing.simulation.trace import Trace
from greenroom.testing.simulation.trouble import Trouble

#: A replica that could not start is started again this much later.
RESTART_S = 1.0
#: Who dies at a step is back after a time between these, in seconds.
BACK_S = (0.1, 8.0)
#: Clocks of replicas differ by up to this much.
SKEW_S = 0.5


class World:
    """See the module docstring. Nothing happens in it by itself: see `greenroom.testing.simulation.run`."""

    def __init__(self, seed: int, plan: Plan, *, trace: bool = False) -> None:
        self.seed, self.plan = seed, plan
        self.loop = SimLoop(seed, pace=plan.pace)
        self.trace = Trace(self.loop.time, keep=trace)
        self.faults = Injector(seed, rate=plan.step_rate, without=plan.without)
        self.network = Network(self.loop, seed, self.faults)
        self.network.crash = self._crash
        self.database = Database(self.network, self.trace)
        self.bucket = Bucket(self.network, self.trace)
        return_s = plan.clocks.worker_return_s if plan.replicas > 1 else None
        self.verdicts = Verdicts(self.loop.stop)
        self.books = Bookkeeping(self.database.memory, self.verdicts, self.loop.time)
        self.oracle = Oracle(self.books, self, return_s)
        self.database.on_write = self.oracle.wrote
        self.names = tuple(f"r{n}" for n in range(plan.replicas))
        self.replicas: dict[str, Replica] = {}
        #: Processes of replicas whose name another one has by now.
        self._doubles: list[Replica] = []
        self.sandboxes: dict[str, Sandbox] = {}
        self.machines = {
            name: Machine(self.loop, name, plan.slots, self.oracle, self.sandboxes)
            for name in (f"w{n}" for n in range(plan.machines))
        }
        self.agents: dict[str, Agent] = {}
        self.spec = TemplateSpec(
            image="sim:t",
            readyz=Probe(path="/healthz", timeout_s=5.0),
            idle_timeout_s=plan.idle_timeout_s,
            on_crash=plan.on_crash,
            durability=plan.durability,
            retention=plan.retention,
        )
        self.people = self.loop.process("people")
        self._processes = 0
        self.random = random.Random(f"world {seed}")
        self.trouble = Trouble(self, seed)

    # --- what others look at ------------------------------------------------------------------------------

    def hub(self, replica: str) -> SimHub | None:
        there = self.replicas.get(replica)
        return there.hub if there is not None and there.alive else None

    def replicas_alive(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.alive]

    def tables(self) -> list[BindingTable]:
        """Those by which requests are routed at this moment."""
        now = self.loop.time()
        replicas = [*self.replicas.values(), *self._doubles]
        return [r.engine.bindings for r in replicas if r.alive and r.process.held_until <= now]

    def stored_count(self, snapshot_id: str) -> int | None:
        if snapshot_id in self.bucket.stored:
            return self.bucket.count(self.bucket.stored[snapshot_id])
        return next((m.held[snapshot_id][1] for m in self.machines.values() if snapshot_id in m.held), None)

    def is_damaged(self, snapshot_id: str) -> bool:
        return snapshot_id in self.bucket.corrupt

    def knows_it_is_alone(self, worker: str) -> bool | None:
        agent = self.agents.get(worker)
        return None if agent is None else agent.calls.knows_it_is_alone()

    def sandbox_at(self, path: str) -> Sandbox | None:
        return self.sandboxes.get(path)

    # --- parts that live and die --------------------------------------------------------------------------

    def start_replica(self, name: str) -> None:
        if name in self.replicas and not self.replicas[name].dead:
            return
        self._processes += 1
        bits = random.Random(f"ids {self.seed} {self._processes}").getrandbits
        owner = f"{name}/{self._processes}"
        config = replace(
            self.plan.clocks, owner=owner, replica=name, link=name, exclusive=self.plan.replicas == 1, randbits=bits
        )
        skew_s = self.random.uniform(-SKEW_S, SKEW_S)
        replica = Replica(
            name, self.network, self.database, self.bucket, config, skew_s, self.sandboxes, self.oracle, self.trace
        )
        replica.hub.kill_agent = lambda agent: self._kill_agent(agent)
        self.replicas[name] = replica
        self.trace(name, "starts")
        task = self.loop.start(replica.process, replica.start(), f"start-{name}")
        task.add_done_callback(lambda done: self._started(replica, done), context=self.loop.main.context)

    def _started(self, replica: Replica, task: asyncio.Task[None]) -> None:
        """A process that could not start has ended, and whoever looks after it starts another one."""
        if task.exception() is not None and self.replicas.get(replica.name) is replica:
            self.trace(replica.name, "could not start", task.exception())
            if not isinstance(task.exception(), GreenroomError):
                self.verdicts.broken(f"{replica.name} could not start: {task.exception()!r}")
            self.crash_replica(replica.name, RESTART_S)

    def crash_replica(self, name: str, restart_s: float | None = None) -> None:
        """It dies. It is started again by whoever has killed it, or else a while later."""
        replica = self.replicas[name]
        if replica.dead:
            return
        replica.die()
        after_s = self.random.uniform(*BACK_S) if restart_s is None else restart_s
        self.loop.call_later(after_s, self.start_replica, name, context=self.loop.main.context)

    def _crash(self, process: Process) -> None:
        """A process of a replica dies at one of its steps."""
        replica = self.replicas[process.name]
        if replica.process is process:
            self.crash_replica(replica.name)
        for double in self._doubles:
            if double.process is process and not double.dead:
                double.die()

    def double_replica(self, name: str) -> Callable[[], None]:
        """Another process of its name is started, while it is still there. Returns what ends the older one."""
        double = self.replicas.pop(name)
        self._doubles.append(double)
        self.start_replica(name)
        return lambda: None if double.dead else double.die()

    def stop_replica(self, name: str) -> None:
        """It ends as it should, and is started again a while later."""
        replica = self.replicas[name]
        self.trace(name, "stops")
        stopping = self.loop.start(replica.process, replica.stop(), f"stop-{name}")
        stopping.add_done_callback(lambda done: self._stopped(replica, done), context=self.loop.main.context)

    def _stopped(self, replica: Replica, task: asyncio.Task[None]) -> None:
        if task.exception() is not None:
            self.verdicts.broken(f"{replica.name} could not stop: {task.exception()!r}")
        left = replica.left_behind()
        self.crash_replica(replica.name)
        if left:
            self.verdicts.broken(f"{replica.name} was closed, and these go on: {left}")

    def start_agent(self, name: str) -> None:
        if name in self.agents:
            return
        machine = self.machines[name]
        if not machine.up:
            machine.boot()
        self._processes += 1
        agent = Agent(machine, self.network, self.bucket, self, self._processes, str(self.seed), self.trace)
        agent.calls.end = lambda wipe: self._agent_ends(agent, wipe)
        self.agents[name] = agent
        self.trace(name, "starts with", len(machine.sandboxes))
        agent.start()

    def crash_agent(self, name: str) -> None:
        """Its sandboxes live on."""
        agent = self.agents.pop(name)
        self.trace(name, "agent dies")
        self.loop.kill(agent.process)
        agent.hang_up()

    def _agent_ends(self, agent: Agent, wipe: bool) -> None:
        """As it was told to; a while later there is a new one."""
        if self.agents.get(agent.worker) is agent:
            self.crash_agent(agent.worker)
            for sandbox in list(agent.machine.sandboxes.values()) if wipe else ():
                sandbox.ended_by_call = True
                agent.machine.remove(sandbox)
            after_s = self.random.uniform(*BACK_S)
            self.loop.call_later(after_s, self.start_agent, agent.worker, context=self.loop.main.context)

    def _kill_agent(self, agent: Agent) -> None:
        """At a step. Sometimes the whole machine dies."""
        if self.agents.get(agent.worker) is agent:
            if self.random.random() < 0.5:
                self.crash_agent(agent.worker)
            else:
                self.crash_machine(agent.worker, disk=False)
            after_s = self.random.uniform(*BACK_S)
            self.loop.call_later(after_s, self.start_agent, agent.worker, context=self.loop.main.context)

    def crash_machine(self, name: str, *, disk: bool) -> None:
        """With all that runs there, and (``disk``) all that is stored there; its connections just go silent."""
        agent = self.agents.pop(name, None)
        self.trace(name, "machine dies", disk)
        if agent is not None:
            self.loop.kill(agent.process)
        self.machines[name].crash()
        if disk:
            self.machines[name].format()
