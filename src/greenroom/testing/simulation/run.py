"""Puts a simulated world together, runs it through trouble and calm, and says what came of it."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from greenroom.core.errors import GreenroomError
from greenroom.core.records import Actor, Key, Probe, Template, TemplateSpec, TemplateState, Worker
from greenroom.engine.bindings import BindingTable
from greenroom.engine.census import ASKED
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.simloop import Process, SimLoop
from greenroom.testing.simulation.agent import Agent
from greenroom.testing.simulation.clients import TEMPLATE, User
from greenroom.testing.simulation.database import Database
from greenroom.testing.simulation.faults import Fault, Injector
from greenroom.testing.simulation.links import SimHub
from greenroom.testing.simulation.machine import Machine, Sandbox
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.oracle import Oracle
from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.rest import bound_s, problems
from greenroom.testing.simulation.snapshots import Bucket
from greenroom.testing.simulation.trace import Trace
from greenroom.testing.simulation.trouble import Trouble

NAMESPACE = "default"
#: How long it may take until the template is ready, while nothing goes wrong.
SETUP_S = 60.0
#: A replica that could not start is started again this much later.
RESTART_S = 1.0
#: Clocks of replicas differ by up to this much.
SKEW_S = 0.5
#: Actors that two people use.
MORE_USERS = 2
#: How often somebody tries to use an actor in the end.
USES = 5


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one seed.

    Attributes:
        digest: of all that happened; two runs of a seed have the same.
        hits: faults that were done, by kind.
        ends: see `Oracle.ends`.
        virtual_s: how long it took in there.
        settle_s: how much of that until it was at rest after the trouble.
    """

    seed: int
    digest: str
    hits: Counter[Fault]
    ends: Counter[str]
    virtual_s: float
    settle_s: float
    steps: int


class Broken(AssertionError):
    """What does not hold, with the seed that shows it."""

    def __init__(self, seed: int, at_s: float, what: BaseException) -> None:
        super().__init__(f"seed {seed}, at {at_s:.3f} s: {what}\n  alone: make sim SEEDS=1 FROM={seed}")
        self.seed = seed


class Simulation:
    """One world. See `run`."""

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
        self.oracle = Oracle(self.database.memory, self, self.loop.stop, self.loop.time, return_s)
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
        )
        self.people = self.loop.process("people")
        self._processes = 0
        self._random = random.Random(f"world {seed}")
        self.trouble = Trouble(self, seed)
        self._settle_s = 0.0

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
            return self.bucket.stored[snapshot_id][1]
        return next((m.held[snapshot_id][1] for m in self.machines.values() if snapshot_id in m.held), None)

    def is_damaged(self, snapshot_id: str) -> bool:
        return snapshot_id in self.bucket.corrupt

    def knows_it_is_alone(self, worker: str) -> bool | None:
        agent = self.agents.get(worker)
        return None if agent is None else agent.knows_it_is_alone()

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
        skew_s = self._random.uniform(-SKEW_S, SKEW_S)
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
                self.oracle.broken(f"{replica.name} could not start: {task.exception()!r}")
            self.crash_replica(replica.name, RESTART_S)

    def crash_replica(self, name: str, restart_s: float | None = None) -> None:
        """It dies. It is started again by whoever has killed it, or else a while later."""
        replica = self.replicas[name]
        if replica.dead:
            return
        replica.die()
        after_s = self._random.uniform(0.1, 8.0) if restart_s is None else restart_s
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
            self.oracle.broken(f"{replica.name} could not stop: {task.exception()!r}")
        left = replica.left_behind()
        self.crash_replica(replica.name)
        if left:
            self.oracle.broken(f"{replica.name} was closed, and these go on: {left}")

    def start_agent(self, name: str) -> None:
        if name in self.agents:
            return
        machine = self.machines[name]
        if not machine.up:
            machine.boot()
        self._processes += 1
        agent = Agent(machine, self.network, self.bucket, self, self._processes, str(self.seed), self.trace)
        agent.end = lambda wipe: self._agent_ends(agent, wipe)
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
            after_s = self._random.uniform(0.1, 8.0)
            self.loop.call_later(after_s, self.start_agent, agent.worker, context=self.loop.main.context)

    def _kill_agent(self, agent: Agent) -> None:
        """At a step. Sometimes the whole machine dies."""
        if self.agents.get(agent.worker) is agent:
            if self._random.random() < 0.5:
                self.crash_agent(agent.worker)
            else:
                self.crash_machine(agent.worker, disk=False)
            after_s = self._random.uniform(0.1, 8.0)
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

    # --- a run --------------------------------------------------------------------------------------------

    async def main(self) -> None:
        for name in self.names:
            self.start_replica(name)
        for name in self.machines:
            self.start_agent(name)
        await self._apply()
        await self._live()
        await self._calm()

    async def _live(self) -> None:
        """People use actors while things go wrong."""
        plan = self.plan
        self.faults.trouble = True
        users = [
            User(self, Key(NAMESPACE, f"a{n % plan.actors}"), f"{self.seed} {n}", plan.acts, plan.trouble_s)
            for n in range(plan.actors + MORE_USERS)
        ]
        lives = [self.loop.start(self.people, user.live(), f"user-{n}") for n, user in enumerate(users)]
        await self.trouble.make(plan.kinds, plan.parts, plan.trouble_s)
        await asyncio.sleep(max(0.0, plan.trouble_s - self.loop.time()))
        await asyncio.wait(lives)
        for life, user in zip(lives, users, strict=True):
            life.result()
            self.oracle.ends.update({f"user: {act}": times for act, times in user.did.items()})

    async def _apply(self) -> None:
        replica = self.replicas[self.names[0]]
        await replica.ask("apply", lambda: replica.engine.apply_template(Key(NAMESPACE, TEMPLATE), self.spec))
        while (await self.database.memory.get(Template, f"{NAMESPACE}/{TEMPLATE}")).state is not TemplateState.READY:
            assert self.loop.time() < SETUP_S, "the template does not become ready, and nothing goes wrong"
            await asyncio.sleep(0.5)

    async def _calm(self) -> None:
        """Nothing goes wrong any more. Everything comes to rest by itself, and every actor can be used."""
        self.trace("calm")
        self.faults.trouble = False
        self.trouble.heal()
        for replica in self.replicas_alive():
            replica.store.skew_s = self._random.uniform(-SKEW_S, SKEW_S)
        begin = self.loop.time()
        await self._undrain()
        await self._settle(begin + self._bound_s())
        self._settle_s = self.loop.time() - begin
        for actor in await list_all(self.database.memory, Actor):
            await self._use(actor)
        await self._settle(self.loop.time() + self._bound_s())

    async def _undrain(self) -> None:
        """Whoever had drained a worker and could not undo it does it now."""
        for worker in await list_all(self.database.memory, Worker):
            while (await self.database.memory.get(Worker, worker.name)).cordon == ASKED:
                for replica in self.replicas_alive():
                    with suppress(GreenroomError):
                        await replica.ask("undrain", partial(replica.engine.drain_worker, worker.name, undo=True))
                await asyncio.sleep(1.0)

    def _bound_s(self) -> float:
        return bound_s(self.plan.clocks, self.trouble.furthest_jump_s)

    async def _settle(self, until: float) -> None:
        while found := await problems(self.database.memory, list(self.replicas.values()), self.machines, self.bucket):
            if self.loop.time() > until:
                raise self.oracle.broken("it does not come to rest:\n" + "\n".join(found))
            await asyncio.sleep(1.0)
        self.oracle.audit()

    async def _use(self, actor: Actor) -> None:
        """Somebody uses it, and tries again when it was just being put to sleep."""
        for attempt in range(USES):
            replica = self._random.choice(self.replicas_alive())
            try:
                self.oracle.answered(await replica.ask("request", partial(replica.request, actor.key)))
                return
            except GreenroomError as error:
                self.trace("refused", actor.key, error.reason, error.message)
                if error.reason in ("SNAPSHOT_CORRUPT", "NO_CAPACITY"):
                    return  # nothing good is left of it; every other actor is in use
                if error.reason == "ACTOR_CRASHED":
                    await replica.ask("resume", partial(replica.engine.resume, actor.key))
                elif error.reason != "UNAVAILABLE" or attempt == USES - 1:
                    raise self.oracle.broken(f"{actor.key} can't be used: {error.reason}: {error.message}") from error

    def run(self) -> Report:
        """Raises:
        Broken: something does not hold; names the seed.
        """
        try:
            with _logs(self.oracle):
                self.loop.run_until_complete(self.main())
        except BaseException as error:
            first = self.oracle.found[0] if self.oracle.found else error
            raise Broken(self.seed, self.loop.time(), first) from first
        finally:
            self.loop.close()
        if self.oracle.found:
            raise Broken(self.seed, self.loop.time(), self.oracle.found[0]) from self.oracle.found[0]
        return Report(
            seed=self.seed,
            digest=self.trace.digest(),
            hits=self.faults.hits,
            ends=self.oracle.ends,
            virtual_s=self.loop.time(),
            settle_s=self._settle_s,
            steps=self.loop.steps,
        )


@contextmanager
def _logs(oracle: Oracle) -> Iterator[None]:
    """Nothing is logged; but an exception that the engine only logs, and that nobody raised on purpose, is a bug."""

    def listen(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        error = event.get("exc_info")
        if error and not isinstance(error, GreenroomError):
            import traceback

            text = (
                "".join(traceback.format_exception(error))
                if isinstance(error, BaseException)
                else traceback.format_exc()
            )
            oracle.broken(f"a bug was logged: {event}\n{text}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], wrapper_class=structlog.make_filtering_bound_logger(30))
    try:
        yield
    finally:
        structlog.configure(**before)


def run(seed: int, plan: Plan | None = None) -> Report:
    """Runs one seed, in a world of its own drawing unless ``plan`` says which. Raises `Broken`."""
    return Simulation(seed, plan or Plan.draw(seed)).run()


def run_all(seeds: Iterable[int], plan: Callable[[int], Plan] = Plan.draw) -> Iterator[Report | Broken]:
    """Runs one seed after the other."""
    # A world is full of circles, and a collection in the midst of it finds nothing that is garbage already. So there is
    # one after each, which does not look at what was there before.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for seed in seeds:
            try:
                yield run(seed, plan(seed))
            except Broken as broken:
                yield broken.with_traceback(None)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
