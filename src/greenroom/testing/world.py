"""A whole Greenroom in one process, whose parts can be killed one by one: engine, agents with the ``sim`` backend, a
store in memory, snapshots in a directory. No wire and no sandbox, so an actor's life takes milliseconds.

    async with SimWorld(directory) as world:
        await world.apply("t")
        key = await world.create("a")
        await world.request(key)          # wakes it
        await world.crash_control()       # as kill -9 would
        await world.settle()              # until nothing is under way and everything agrees; raises with what does not

`SimWorld.steps` lets step N of what the engine does fail: see `greenroom.testing.steps`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from greenroom.agent.agent import Agent, AgentConfig
from greenroom.core import states
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import DeadlineExceeded, Unavailable
from greenroom.core.gc.blobs import SCRUB_AGE_S
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Operation,
    OperationState,
    Probe,
    Record,
    Snapshot,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.core.rosters import Berth
from greenroom.engine.config import EngineConfig
from greenroom.engine.engine import Engine
from greenroom.images.store import DiskImageStore
from greenroom.sandbox.sim import SimBackend, SimScript
from greenroom.snapshots.objects import Objects
from greenroom.snapshots.port import StoredObject
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.store.memory import MemoryStore
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import audit, list_all
from greenroom.testing.local_hub import LocalHub
from greenroom.testing.steps import Gate, SteppedHub, SteppedStore, Steps

NAMESPACE = "default"
#: Clocks short enough that nothing has to be waited for, and long enough for two slow cores.
QUICK = EngineConfig(
    owner="",
    lease_ttl_s=5.0,
    operation_deadline_s=20.0,
    prepare_deadline_s=20.0,
    worker_return_s=20.0,  # no test waits for it but with its own; who stands still for half of it is alone
    drain_grace_s=0.5,
    capacity_wait_s=10.0,
    idle_scan_s=0.02,
    janitor_s=0.02,
    retry_s=0.002,
    reconcile_s=0.05,
    mark_s=0.2,
    scrub_s=0.1,
)
#: How long `SimWorld.settle` waits. Everything takes milliseconds; this bounds a world that never settles, and is
#: longer than a busy machine stands still.
SETTLE_S = 60.0
_POLL_S = 0.002


class OldSnapshots(ObjectSnapshotStore):
    """All its objects look old, so that the scrub looks at every one of them: no promise depends on their age."""

    async def objects(self) -> AsyncIterator[tuple[str, Sequence[StoredObject]]]:
        async for uid, objects in super().objects():
            yield uid, [StoredObject(o.key, o.age_s + 2 * SCRUB_AGE_S) for o in objects]


class Said(Record, frozen=True, kw_only=True):
    """What a simulated actor answers: see `greenroom.sandbox.sim`."""

    actor: str
    count: int
    file_count: int
    boot: str
    generation: int


class SimWorld:
    """See the module docstring. ``root`` must be short: a socket's path is limited to 107 bytes. ``store``: another one
    than in memory; the world closes it. ``objects``: where snapshots are, instead of a directory."""

    def __init__(
        self,
        root: Path,
        *,
        workers: int = 2,
        slots: int = 8,
        config: EngineConfig = QUICK,
        script: SimScript | None = None,
        store: Store | None = None,
        objects: Objects | None = None,
    ) -> None:
        self.root = root
        self.names = [f"w{n}" for n in range(workers)]
        self.slots = slots
        self.config = config
        self.script = script or SimScript()
        self.store = store or MemoryStore()
        self.snapshots = OldSnapshots(root / "snapshots", objects=objects)
        self.hub = LocalHub()
        self.steps = Steps()
        self.steps.kill_agents = self._replace_agents
        self.agents: dict[str, Agent] = {}
        self.backends: dict[str, SimBackend] = {}
        self._gates: list[Gate] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SimWorld:
        self._beating = asyncio.create_task(self._beat())
        await self.start_control()
        for name in self.names:
            await self.start_agent(name)
        await self.settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._tasks)
        self._beating.cancel()
        await self.stop_control()
        for name in list(self.agents):
            await self.kill_agent(name)
        await self.store.close()

    async def _beat(self) -> None:
        """All agents say that they live, as often as they are asked to."""
        while True:
            await asyncio.sleep(self.hub.welcome.heartbeat_s)
            self.hub.heartbeat()

    # --- parts that live and die --------------------------------------------------------------------------

    async def start_control(self, *, connect: bool = True) -> None:
        """A new control plane on the same store; the agents that live connect to it (``connect``)."""
        gate = Gate(self.steps)
        self._gates.append(gate)
        self.steps.control_dies.clear()
        store, hub = SteppedStore(self.store, gate), SteppedHub(self.hub, gate)
        config = replace(self.config, owner=f"control-{uuid.uuid4().hex[:8]}")
        self.engine = Engine(store, hub, self.snapshots, config)
        await self.engine.start()
        for agent in self.agents.values() if connect else ():
            self.hub.connect(agent)

    def configure(self, **fields: Any) -> None:
        """Other clocks and limits from now on; operations that are under way keep theirs."""
        self.config = replace(self.config, **fields)
        self.engine.config = replace(self.engine.config, **fields)

    async def stop_control(self) -> None:
        """Closes it as a server that ends does. Afterwards nothing of it may do anything."""
        await self.engine.close()
        self._gates[-1].closed()
        self._cut_all()

    async def crash_control(self, *, restart: bool = True) -> None:
        """As ``kill -9``: from this moment nothing of it reaches store or agents."""
        self._gates[-1].shut()
        self._cut_all()
        for binding in self.engine.bindings.all():
            self.engine.bindings.revoke(binding.key)  # the connections of its gateway die with it
        await self.engine.close()
        self._gates[-1].closed()
        if restart:
            await self.start_control()

    def _cut_all(self) -> None:
        self.hub.listener = None
        for name in self.agents:
            self.hub.disconnect(name)

    async def start_agent(self, name: str, berth: Berth | None = None) -> None:
        """A new agent process of that worker; it connects. ``berth``: which slot of a ledger it has."""
        config = AgentConfig(
            worker=name,
            pool="default",
            capacity=self.slots,
            state_dir=self.root / name,
            warm=0,
            berth=berth or Berth(),
        )
        self.backends[name] = SimBackend(self.script)
        agent = Agent(config, self.backends[name], DiskImageStore(self.root / "images"), self.snapshots)
        await agent.open()
        self.agents[name] = agent
        self.hub.connect(agent)

    async def kill_agent(self, name: str) -> None:
        """It dies, and its sandboxes with it: they live in its process."""
        agent = self.agents.pop(name)
        self.hub.disconnect(name)
        await agent.close(wipe=True)

    async def _replace_agents(self, worker: str) -> None:
        for name in [worker] if worker else list(self.agents):
            if name in self.agents:
                await self.kill_agent(name)
                self._later(self.start_agent(name))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what people do -----------------------------------------------------------------------------------

    async def apply(self, name: str = "t", **fields: Any) -> Template:
        """Applies a template and waits until it is READY or FAILED."""
        spec = TemplateSpec(image=f"sim:{name}", **{"readyz": Probe(path="/healthz", timeout_s=5.0)} | fields)
        await self.engine.apply_template(Key(NAMESPACE, name), spec)
        return await self.template(name)

    async def template(self, name: str = "t") -> Template:
        """The template as soon as it is READY or FAILED."""
        until = time.monotonic() + SETTLE_S
        while True:
            template = await self.store.get(Template, f"{NAMESPACE}/{name}")
            if template.state in (TemplateState.READY, TemplateState.FAILED):
                return template
            if time.monotonic() > until:
                raise DeadlineExceeded(f"template {name} is still {template.state}")
            await asyncio.sleep(_POLL_S)

    async def create(self, name: str, template: str = "t") -> Key:
        key = Key(NAMESPACE, name)
        await self.engine.create_actor(key, template)
        return key

    async def actor(self, key: Key) -> Actor:
        return await self.store.get(Actor, str(key))

    async def request(self, key: Key, path: str = "/inc") -> Said:
        """One request through the engine's table, as the gateway makes it; wakes the actor.

        Raises:
            Unavailable: the connection was closed before the answer.
        """
        binding = (await self.engine.wake(key)).binding
        binding.acquire()
        try:
            reader, writer = await asyncio.open_unix_connection(binding.endpoint.path)
            binding.on_revoke(writer.transport.abort)
            try:
                if binding.revoked:  # while it connected
                    raise Unavailable(f"actor {key} was suspended before it was asked")
                writer.write(f"GET {path} HTTP/1.1\r\nGreenroom-Actor: {key}\r\nConnection: close\r\n\r\n".encode())
                answer = await reader.read()
            finally:
                binding.forget(writer.transport.abort)
                writer.close()
        except OSError as error:
            raise Unavailable(f"no connection to actor {key}: {error}") from error
        finally:
            binding.release()
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise Unavailable(f"actor {key} answered {answer!r}")
        return msgspec.json.decode(body, type=Said)

    def end_program(self, key: Key, code: int = 3) -> None:
        """The actor's program ends by itself; without a request, which would be one more that can fail."""
        for backend in self.backends.values():
            if (sandbox := backend._resident.get(str(key))) is not None:
                backend._leave(sandbox, code)

    # --- what must hold -----------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Returns when nothing is under way and store, engine and agents agree about everything.

        Raises:
            AssertionError: they don't within `SETTLE_S`; says what is wrong. What must hold at every moment (see
                `greenroom.testing.contracts.store.audit`) is checked all the time.
        """
        until = time.monotonic() + SETTLE_S
        while problems := await self.problems():
            if self.steps.control_dies.is_set():
                await self.crash_control()
            assert time.monotonic() < until, "the world does not settle:\n" + "\n".join(problems)
            await asyncio.sleep(_POLL_S)
        assert not self.hub.bugs, self.hub.bugs
        zombies = [name for gate in self._gates for name in gate.zombies]
        assert not zombies, f"a closed control plane went on: {zombies}"

    async def problems(self) -> list[str]:
        """What keeps this world from being at rest."""
        try:
            await audit(self.store)
        except AssertionError as error:
            if isinstance(self.store, MemoryStore):
                raise
            return [f"{error}"]  # of lists that were read one after the other; it must go away
        found = [f"still starting: {task}" for task in self._tasks]
        if self.steps.acting or self.steps.control_dies.is_set():
            found.append(f"still going wrong: {self.steps.hit}")
        actors = await list_all(self.store, Actor)
        found += [f"under way: {o}" for o in await list_all(self.store, Operation) if o.state is OperationState.RUNNING]
        found += [f"in between: {a}" for a in actors if a.state in states.BUSY]
        found += [f"driven: {operation}" for operation in self.engine.ops.running]
        found += self._sandbox_problems(actors) + self._binding_problems(actors) + self._leftovers()
        found += await self._snapshot_problems(actors)
        unknown = self.hub.connected().keys() - self.engine.members.enrolled()
        found += [f"not registered yet: {worker}" for worker in unknown]
        for worker in await list_all(self.store, Worker):
            if (worker.state is WorkerState.ACTIVE) != (worker.name in self.agents):
                found.append(f"an agent that is {'there' if worker.name in self.agents else 'not there'}: {worker}")
        return found

    def _sandbox_problems(self, actors: list[Actor]) -> list[str]:
        """Each awake actor has one sandbox, on its worker and in its state; nobody else has any."""
        wanted = Counter(
            (a.uid, a.worker, ResidentState.FROZEN if a.state is ActorState.PAUSED else ResidentState.RUNNING)
            for a in actors
            if a.worker
        )
        found: Counter[tuple[str, str, ResidentState]] = Counter()
        for worker, agent in self.agents.items():
            backend = self.backends[worker]
            known = {r.actor_uid: r.state for r in agent.hello().residents}
            for sandbox in backend._sandboxes.values():
                found[sandbox.owner.uid, worker, known.get(sandbox.owner.uid, ResidentState.STARTING)] += 1
                if backend.state(sandbox.sid) is not known.get(sandbox.owner.uid):
                    return [f"agent {worker} thinks that {sandbox.key} is {known.get(sandbox.owner.uid)}"]
        return [f"sandbox missing: {x}" for x in wanted - found] + [f"sandbox too much: {x}" for x in found - wanted]

    def _binding_problems(self, actors: list[Actor]) -> list[str]:
        bound = {(b.key, b.uid, b.generation, b.worker, b.endpoint) for b in self.engine.bindings.all()}
        running = {(a.key, a.uid, a.generation, a.worker, a.endpoint) for a in actors if a.state is ActorState.RUNNING}
        draining = {(b.key, "draining") for b in self.engine.bindings.all() if self.engine.bindings.get(b.key) is None}
        return [f"bound or running, but not both: {x}" for x in bound ^ running] + [f"{x}" for x in draining]

    def _leftovers(self) -> list[str]:
        """But what an agent keeps for those who come for it."""
        return [
            f"left in {part}: {path}"
            for name, agent in self.agents.items()
            for part in ("staging", "cache")
            for path in (self.root / name / part).iterdir()
            if path.name not in agent._inventory._fetched.kept()
        ]

    async def _snapshot_problems(self, actors: list[Actor]) -> list[str]:
        """Snapshots on disk are those with a record, and each record is wanted by somebody."""
        records = {s.id: s for s in await list_all(self.store, Snapshot)}
        stored = {snapshot_id for _, snapshot_id in await self.snapshots.list()}
        wanted = {i for a in actors for i in (a.snapshot, a.previous_snapshot) if i}
        wanted |= {t.golden_snapshot for t in await list_all(self.store, Template) if t.golden_snapshot}
        return [f"on disk or in the store, but not both: {i}" for i in stored ^ set(records)] + [
            f"wanted by nobody: {records[i]}" for i in set(records) - wanted
        ]
