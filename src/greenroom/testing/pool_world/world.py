"""Server, nodes, operators, people and trouble, in virtual time. One seed and one script, one course.

First trouble, then calm; then everything must come to rest as it is wanted, and stay there without a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from greenroom.core.ledger.naming import pod_name
from greenroom.operator.crds import definitions
from greenroom.operator.objects import POOL_LABEL, POOL_UID_LABEL
from greenroom.operator.operator import Operator
from greenroom.testing import defects
from greenroom.testing.fake_kube.adversary import CALM, Adversary, Odds, Quota, Replicas
from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Caller, Entry, Name, Object, Objects
from greenroom.testing.fake_kube.resources import CRD, Resource
from greenroom.testing.pool_world.losers import ALGORITHMS, Loser
from greenroom.testing.pool_world.oracle import OPERATOR, PODS, POOLS, Oracle, desired, overshoot, owner
from greenroom.testing.pool_world.plane import SLOTS, SimPlane
from greenroom.testing.pool_world.transport import SimTransport
from greenroom.testing.simloop import Pace, Process, SimLoop

#: Seconds since the epoch when a simulation begins.
EPOCH = 1_750_000_000.0
PERSON = Caller("person", "person")
POOL: Name = ("default", "pool")
#: From the end of the trouble until everything is at rest: late requests (60 s), two fences one after the other, what
#: is tried again after the longest pauses, and a lease.
SETTLE_S = 900.0
#: For how long nothing may be written then.
IDLE_S = 600.0
#: Of the autoscaler, so that it shrinks pools within the time that they have to come to rest.
COOL_DOWN_S = 20.0
STEPS = 3_000_000
DEFAULT_PACE = Pace()
STORM = Odds(refused=0.5, failed=0.4)


class Act(NamedTuple):
    """What happens at a time (seconds from the start): the name of a method of `World`, and a number for it."""

    at: float
    what: str
    number: int = 0


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        algorithm: ``ledger`` or one of `losers.ALGORITHMS`.
        lag_s: how far the caches of the server's replicas are behind, at most.
        lose_call: which request of the first operator it dies with (counted from 1; negative: after the answer).
        more_pools: beside the one that things happen to, of one worker each.
        plane: whether there is a control plane; ``plane_trouble``: how often (0 to 1) it does not answer.
    """

    seed: int = 0
    script: tuple[Act, ...] = ()
    odds: Odds = CALM
    lag_s: float = 0.0
    replicas: int = 3
    operators: int = 1
    algorithm: str = "ledger"
    trouble_s: float = 300.0
    lose_call: int = 0
    more_pools: int = 0
    plane: bool = False
    plane_trouble: float = 0.0
    pace: Pace = DEFAULT_PACE


@dataclass
class Report:
    """``creations``, ``deletions``: of pods, by operators. ``settle_s``: from the end of the trouble to rest.
    ``calls``: of the first operator, during the trouble."""

    creations: int
    deletions: int
    strays: int
    settle_s: float
    calls: int
    overshoot: tuple[int, int]
    ledger: Object
    pods: int
    writes: int


class Unsettled(AssertionError):
    """It did not come to rest as it is wanted."""


def run(plan: Plan) -> Report:
    """Runs it.

    Raises:
        Wrong: a law of the `oracle` is broken.
        Unsettled: the end is not as it should be.
    """
    loop = SimLoop(plan.seed, pace=plan.pace, limit=STEPS)
    try:
        with quiet(), defects.raised():
            return loop.run_until_complete(World(plan, loop).run())
    finally:
        loop.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


@dataclass
class World:
    plan: Plan
    loop: SimLoop
    calls: int = 0
    processes: dict[int, Process] = field(default_factory=dict)
    #: What the server, or the oracle on its log, raised first. It ends the run.
    broken: Exception | None = None

    def __post_init__(self) -> None:
        self.chance = random.Random(f"world {self.plan.seed}")
        self.server = self.loop.process("server")
        self.objects = Objects(clock=self.clock)
        self.api = Api(self.objects)
        for definition in definitions():
            self.objects.create(CRD, "", definition)
        pods, pools = (
            self.objects.registry.get("", "v1", "pods"),
            self.objects.registry.of_kind("greenroom.dev/v1alpha1", "WorkerPool"),
        )
        assert pods is not None and pools is not None
        self.pods_resource: Resource = pods
        self.pools_resource: Resource = pools
        self.replicas = Replicas(self.api, self._random("replicas"), self.plan.replicas, self.plan.lag_s)
        self.cluster = Cluster(self.objects)
        self.quota = Quota(lambda: len(self.objects.state.get(PODS, {})))
        self.objects.admit.append(self.quota)
        self.adversary = Adversary(self.api, self._random("adversary"), self.spawn, self.plan.odds, spare=("/leases",))
        self._stormy_until = 0.0
        self._blind_s = 0
        self.objects.on_change.append(self._see)
        self.plane = SimPlane(self._random("plane"), self._running, self.clock, self.plan.plane_trouble)
        self.oracle = Oracle()
        if self.plan.algorithm == "ledger":
            self.objects.on_change.append(self.oracle.see)

    def clock(self) -> float:
        return EPOCH + self.loop.time()

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.plan.seed}")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.start(self.server, self._guard(work))

    async def _guard(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except Exception as error:
            self.broken = self.broken or error
            if not self._alarm.done():
                self._alarm.set_result(None)

    async def _pass(self, seconds: float) -> None:
        """Lets time pass."""
        await asyncio.wait([self._alarm], timeout=max(0.0, seconds))
        if self.broken is not None:
            raise self.broken

    # --- operators ---

    def start(self, number: int) -> None:
        process = self.loop.process(f"{OPERATOR}-{number}")
        self.processes[number] = process
        identity = f"{OPERATOR}-{number}-{self.chance.randrange(1 << 30)}"
        chance = self._random(identity)
        transport = SimTransport(self._heard(number), identity, chance, self.spawn, self.clock)
        if self.plan.algorithm == "ledger":
            plane = self.plane if self.plan.plane else None
            work = Operator(
                transport, "default", identity, chance=chance, wall=self.clock, plane=plane, cool_down_s=COOL_DOWN_S
            ).run()
        else:
            work = Loser(transport, identity, ALGORITHMS[self.plan.algorithm], chance).run()
        self.loop.start(process, work)

    def _heard(self, number: int) -> Callable[..., Any]:
        """What carries its requests, which may be the end of it."""

        async def handle(request: Any) -> Any:
            if number or "/leases" in request.path:
                return await self.adversary.handle(request)
            self.calls += 1
            here = self.calls
            if here == self.plan.lose_call:
                self.crash(0)
            answer = await self.adversary.handle(request)
            if here == -self.plan.lose_call:
                self.crash(0)
            return answer

        return handle

    # --- what may happen ---

    def crash(self, number: int) -> None:
        """An operator dies, and is started again a little later."""
        number %= self.plan.operators
        self.loop.kill(self.processes[number])

        async def again() -> None:
            await asyncio.sleep(self.chance.uniform(0.1, 5.0))
            self.start(number)

        self.spawn(again())

    def pause(self, number: int) -> None:
        """An operator stands still for ten times as long as its lease."""
        self.loop.pause(self.processes[number % self.plan.operators], 150.0)

    def freeze(self, seconds: int) -> None:
        """Nothing gets into any cache of the server for a while (0: until the calm)."""
        self.replicas.frozen = True
        if seconds:

            async def thaw() -> None:
                await asyncio.sleep(seconds)
                self.replicas.frozen = False

            self.spawn(thaw())

    def blind(self, seconds: int) -> None:
        """As `freeze`, from the moment at which an operator has created its next pod."""
        self._blind_s = seconds

    def _see(self, entry: Entry) -> None:
        if self._blind_s and entry.key == PODS and entry.kind == "ADDED" and entry.client.startswith(OPERATOR):
            self.freeze(self._blind_s)
            self._blind_s = 0

    def compact(self, _: int) -> None:
        self.replicas.compact()

    def scale(self, replicas: int) -> None:
        self._change_spec(replicas=replicas)

    def demand(self, actors: int) -> None:
        """From now on the pool is the autoscaler's, and so many actors are awake or want to be."""
        self.plane.actors = actors
        if (pool := self._pool()) is not None and pool["spec"].get("replicas") is not None:
            self._change_spec(replicas=None)

    def mute(self, _: int) -> None:
        """The control plane answers nobody any more, until the calm."""
        self.plane.trouble = 1.0

    def suspend(self, wanted: int) -> None:
        self._change_spec(suspend=bool(wanted))

    def victim(self, index: int) -> None:
        if (pod := self._pod(index)) is not None and (pool := self._pool()) is not None:
            self._change_spec(victims=sorted({*pool["spec"].get("victims", ()), pod["metadata"]["uid"]}))

    def fail(self, index: int) -> None:
        if (pod := self._pod(index)) is not None:
            self.cluster.fail(_name(pod))

    def evict(self, index: int) -> None:
        """Somebody else deletes a pod."""
        if (pod := self._pod(index)) is not None:
            self.objects.delete(self.pods_resource, *_name(pod), PERSON)

    def lose(self, index: int) -> None:
        """The node of a pod does not answer any more, and somebody deletes the pod, which never ends."""
        if (pod := self._pod(index)) is not None:
            self.cluster.lost.add(_name(pod))
            self.evict(index)

    def unlabel(self, index: int) -> None:
        self._change_pod(index, labels={})

    def relabel(self, index: int) -> None:
        """By its labels it is of a pool that there is not; with an even index the uid that says otherwise goes, too."""
        if (pod := self._pod(index)) is not None:
            uid = (pod["metadata"].get("labels") or {}).get(POOL_UID_LABEL) if index % 2 else None
            self._change_pod(index, labels={POOL_LABEL: "another", **({POOL_UID_LABEL: uid} if uid else {})})

    def disown(self, index: int) -> None:
        self._change_pod(index, ownerReferences=[])

    def foreign(self, ahead: int) -> None:
        """Somebody makes a pod with the name that one of the next workers would have."""
        if (pool := self._pool()) is None or "ledger" not in pool.get("status", {}):
            return
        ledger = pool["status"]["ledger"]
        name = pod_name(POOL[1], pool["metadata"]["uid"], ledger["epoch"], ledger["nextOrdinal"] + ahead)
        with contextlib.suppress(KubeError):
            pod = {"metadata": {"name": name}, "spec": {"containers": []}}
            self.objects.create(self.pods_resource, POOL[0], pod, PERSON)

    def wipe(self, _: int) -> None:
        """The pool's status is lost."""
        self._change_status({})

    def edit(self, _: int) -> None:
        """Somebody edits the ledger."""
        if (pool := self._pool()) is not None and "ledger" in pool.get("status", {}):
            ledger = {**pool["status"]["ledger"], "nextOrdinal": 0, "slots": {}}
            self._change_status({**pool["status"], "ledger": ledger})

    def recreate(self, _: int) -> None:
        """The pool is deleted, without waiting for its workers, and made again."""
        pool = self._pool()
        if pool is not None:
            self.objects.delete(self.pools_resource, *POOL, PERSON)
            held = self._pool()
            if held is not None:
                metadata = {**held["metadata"], "finalizers": []}
                self.objects.update(self.pools_resource, *POOL, {**held, "metadata": metadata}, PERSON)
        self.make_pool(2)

    def limit(self, pods: int) -> None:
        self.quota.most = pods

    def storm(self, seconds: int) -> None:
        """The server answers 429 and 5xx for a while."""
        until = self.loop.time() + seconds
        self._stormy_until = max(self._stormy_until, until)
        self.adversary.odds = STORM

        async def over() -> None:
            await asyncio.sleep(seconds)
            if self._stormy_until <= until and self.adversary.odds is STORM:
                self.adversary.odds = self.plan.odds

        self.spawn(over())

    # --- inside ---

    def make_pool(self, replicas: int, name: str = POOL[1]) -> None:
        pool = {"metadata": {"name": name}, "spec": {"replicas": replicas, "grace": "10s"}}
        with contextlib.suppress(KubeError):
            self.objects.create(self.pools_resource, POOL[0], pool, PERSON)

    def _pool(self) -> Object | None:
        return self.objects.find(self.pools_resource, *POOL)

    def _pod(self, index: int) -> Object | None:
        found = sorted(
            (pod["metadata"]["name"], pod)
            for pod in self.objects.state.get(PODS, {}).values()
            if owner(pod) and "deletionTimestamp" not in pod["metadata"]
        )
        return found[index % len(found)][1] if found else None

    def _change_spec(self, **values: Any) -> None:
        """None takes a field away."""
        if (pool := self._pool()) is not None:
            spec = {name: value for name, value in {**pool["spec"], **values}.items() if value is not None}
            self.objects.update(self.pools_resource, *POOL, {**pool, "spec": spec}, PERSON)

    def _change_status(self, status: Object) -> None:
        if (pool := self._pool()) is not None:
            self.objects.update(self.pools_resource, *POOL, {**pool, "status": status}, PERSON, subresource="status")

    def _change_pod(self, index: int, **metadata: Any) -> None:
        if (pod := self._pod(index)) is not None:
            changed = {**pod, "metadata": {**pod["metadata"], **metadata}}
            self.objects.update(self.pods_resource, *_name(pod), changed, PERSON)

    # --- the course ---

    async def run(self) -> Report:
        self._alarm: asyncio.Future[None] = self.loop.create_future()
        self.spawn(self.replicas.follow())
        self.spawn(self._nodes())
        self.make_pool(3)
        for number in range(self.plan.more_pools):
            self.make_pool(1, f"another-{number}")
        for number in range(self.plan.operators):
            self.start(number)
        for act in sorted(self.plan.script):
            await self._pass(act.at - self.loop.time())
            getattr(self, act.what)(act.number)
        await self._pass(self.plan.trouble_s - self.loop.time())
        calls = self.calls
        self._calm()
        if self.plan.algorithm != "ledger":
            return self._report(0.0, 0, calls)
        settle_s = await self._settle()
        before = self._writes()
        await self._pass(IDLE_S)
        written = self._writes()[len(before) :]
        if written:
            raise Unsettled(f"{len(written)} writes in {IDLE_S:g} s of rest, the first: {written[0]}")
        return self._report(settle_s, len(before), calls)

    async def _nodes(self) -> None:
        chance = self._random("nodes")
        while True:
            await asyncio.sleep(chance.uniform(0.05, 2.0))
            self.cluster.step()

    def _calm(self) -> None:
        self.adversary.odds = CALM
        self.replicas.frozen, self.replicas.lag_s = False, 0.0
        self.quota.most = None
        self.plane.trouble = 0.0
        for process in self.processes.values():
            self.loop.resume(process)

    async def _settle(self) -> float:
        began = self.loop.time()
        quiet, last = 0, -1
        while self.loop.time() < began + SETTLE_S:
            await self._pass(5.0)
            writes = len(self._writes())
            quiet = quiet + 1 if writes == last and not self._wrong() else 0
            last = writes
            if quiet >= 30:
                return self.loop.time() - began
        raise Unsettled(self._wrong() or "writes go on and on")

    def _wrong(self) -> str:
        """How it is not as it is wanted; "" when it is."""
        pool = self._pool()
        if pool is None:
            return "there is no pool"
        ledger = pool.get("status", {}).get("ledger") or {"slots": {}}
        live = {slot.get("podUID") for slot in ledger["slots"].values() if slot["state"] == "L"}
        others = {p["metadata"]["uid"] for name, p in self.objects.state[POOLS].items() if name != POOL}
        mine = [
            p
            for p in self.objects.state.get(PODS, {}).values()
            if owner(p) and owner(p) not in others and _name(p) not in self.cluster.lost
        ]
        alive = {p["metadata"]["uid"] for p in mine if "deletionTimestamp" not in p["metadata"]}
        wanted = desired(pool)
        if (wrong := self._wrong_in_plane(pool, ledger)) or len(mine) != len(alive):
            if wrong:
                return wrong
            return f"{len(mine) - len(alive)} pods are still ending"
        if alive != live or len(live) != wanted:
            return f"{wanted} are wanted, {len(alive)} pods are there, {len(live)} of them in the ledger: {ledger}"
        ready = pool.get("status", {}).get("readyReplicas", 0)
        return "" if ready == wanted else f"{ready} of {wanted} are shown as ready"

    def _wrong_in_plane(self, pool: Object, ledger: Object) -> str:
        """How the control plane's view differs from the ledger, and the pool's size from the demand."""
        if not self.plan.plane:
            return ""
        roster = self.plane.rosters.get(POOL[1])
        known = {(w.epoch, w.ordinal): w.pod_uid for w in roster.workers} if roster is not None else {}
        active = {
            tuple(map(int, slot_id.split("-"))): slot.get("podUID", "")
            for slot_id, slot in ledger["slots"].items()
            if slot["state"] != "D"
        }
        if roster is None or known != active or roster.pool_uid != pool["metadata"]["uid"]:
            return f"the roster is {roster}, and the ledger {ledger}"
        spec = pool["spec"]
        if spec.get("replicas") is None and not spec.get("suspend"):
            wanted = math.ceil(self.plane.actors / SLOTS)
            if len(active) != wanted:
                return f"{self.plane.actors} actors need {wanted} workers, and there are {len(active)}"
        return ""

    def _running(self) -> dict[str, Object]:
        return {
            name: pod
            for (_, name), pod in self.objects.state.get(PODS, {}).items()
            if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        }

    def _writes(self) -> Sequence[str]:
        return [
            f"{e.verb} {e.key[1]} {e.name[1]} at {e.at - EPOCH:.1f}"
            for e in self.objects.log
            if e.client.startswith(OPERATOR) and e.key[1] != "leases"
        ]

    def _report(self, settle_s: float, writes: int, calls: int) -> Report:
        pool = self._pool() or {}
        return Report(
            creations=self.oracle.creations,
            deletions=self.oracle.deletions,
            strays=len(self.oracle.strays),
            settle_s=settle_s,
            calls=calls,
            overshoot=overshoot(self.objects.log),
            ledger=pool.get("status", {}).get("ledger", {}),
            pods=len(self.objects.state.get(PODS, {})),
            writes=writes,
        )


def _name(pod: Object) -> Name:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]
