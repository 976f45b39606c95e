"""What a wake-up costs on top of what gVisor itself needs for it, in alternating rounds of one run.

*wake* is a request through the gateway to a sleeping actor, from connecting to the last byte of its answer. The *floor*
is the same work without Greenroom: calls on the control socket of a sandbox that was made beforehand restore the very
same snapshot files, then one HTTP request goes straight to the actor; no store, no agent, no gateway. Both run the same
runsc with the same flags on the same root file system, in control groups with the same limits; before each measurement
a warm sandbox is ready, nothing of ours is under way, and the machine is given some seconds to have a quiet moment.
Rounds alternate (wake, floor; floor, wake), so that drift hits both.

Goal, for a Python actor of 15 MB with a warm sandbox: half of the wakes take at most 1.3 times the floor's median, and
95 % of them at most twice the floor's 95th percentile.

Further cases, each with a floor of its own: no warm sandbox (the floor then creates one too), a frozen actor (the
floor resumes one), and actors with 64 and 256 MB of random memory.

    python bench/wake.py [--rounds 30] [--case-rounds 10] [--only sleeping,cold,frozen,64mb,256mb]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.agent.classes import sandbox_class
from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.agentapi import Identity
from greenroom.core.gc import blobs
from greenroom.core.records import (
    Actor,
    Endpoint,
    Operation,
    OperationState,
    Probe,
    Snapshot,
    Template,
    TemplateSpec,
    TemplateState,
)
from greenroom.images.store import DiskImageStore
from greenroom.sandbox import dial, reaper
from greenroom.sandbox.gvisor import binary
from greenroom.sandbox.gvisor.box import Box, BoxState, Factory, read_record
from greenroom.sandbox.gvisor.cgroups import Cgroups
from greenroom.sandbox.gvisor.control import SNAPSHOT_FILES, SocketControl
from greenroom.sandbox.gvisor.network import Network
from greenroom.sandbox.port import SandboxClass
from greenroom.testing import counter_app
from greenroom.testing.live import LiveServer
from greenroom.testing.python_image import build_python_image

GOAL_P50, GOAL_P95 = 1.3, 2.0
HOME = WORK / "wake"
WARM = 1
#: A measurement begins in a moment in which our own processes used less than this share of a core ...
OWN_SHARE = 0.05
#: ... and others less than this share of the machine; they are waited for so long, then it begins all the same.
OTHERS_SHARE, OTHERS_WAIT_S = 0.25, 3.0
WINDOW_S = 0.05
#: A pool is full again in half a second; this bounds a broken one.
SETTLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Took:
    """In ms, from before connecting (or restoring) on. ``cpu_ms``: of the server and its agent alone."""

    first_ms: float
    last_ms: float
    phases: tuple[tuple[str, float], ...] = ()
    cpu_ms: float = 0.0


@dataclass
class Case:
    """What was measured of one kind of wake. ``noisy``: measurements that began on a busy machine."""

    name: str
    wakes: list[Took] = field(default_factory=list)
    floors: list[Took] = field(default_factory=list)
    #: (wall, CPU of server and agent) of putting the actor to sleep again.
    suspends: list[tuple[float, float]] = field(default_factory=list)
    suspend_phases: list[dict[str, float]] = field(default_factory=list)
    noisy: int = 0
    image_bytes: int = 0


# --- measuring --------------------------------------------------------------------------------------------


async def get(connect: Callable[[], Awaitable[socket.socket]], head: str) -> tuple[float, float, bytes, bytes]:
    """One GET: when its answer's first and last byte came, its head and its body."""
    loop = asyncio.get_running_loop()
    with await connect() as sock:
        await loop.sock_sendall(sock, head.encode())
        data, first = b"", 0.0
        while True:
            chunk = await loop.sock_recv(sock, 1 << 16)
            if not chunk:
                raise SystemExit(f"the connection was closed after {data!r}")
            first = first or time.perf_counter()
            data += chunk
            top, end, body = data.partition(b"\r\n\r\n")
            if end and len(body) >= int(header(top, "content-length")):
                if not top.startswith(b"HTTP/1.1 200 "):
                    raise SystemExit(f"it answered {data!r}")
                return first, time.perf_counter(), top, body


def header(head: bytes, name: str) -> str:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    raise SystemExit(f"no {name} in {head!r}")


async def connected(endpoint: Endpoint) -> socket.socket:
    """Without the detour through a thread that resolves names, which asyncio makes even for an address."""
    sock = dial.make_socket(endpoint)
    with contextlib.suppress(BlockingIOError):
        sock.connect(dial.address(endpoint))
    await reaper.writable(sock.fileno())
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))
    return sock


def cpu_ms(pids: list[int]) -> float:
    """CPU time of all threads of the processes, to the nanosecond. Source: Linux, sched-stats.rst."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e6


def machine_ms() -> float:
    """CPU time that the whole machine has spent on anything but idling."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) * 1e3 / os.sysconf("SC_CLK_TCK")


async def quiet(pids: list[int]) -> bool:
    """Waits until nothing of ours is under way, and a while for the others; whether they were quiet too."""
    until = time.monotonic() + OTHERS_WAIT_S
    while True:
        own, others, at = cpu_ms(pids), machine_ms(), time.monotonic()
        await asyncio.sleep(WINDOW_S)
        window = (time.monotonic() - at) * 1e3
        if cpu_ms(pids) - own > OWN_SHARE * window:
            if time.monotonic() > until + SETTLE_TIMEOUT_S:
                raise SystemExit("the server and its agent do not come to rest")
            continue
        noisy = machine_ms() - others > OTHERS_SHARE * window * (os.cpu_count() or 1)
        if not noisy or time.monotonic() > until:
            return not noisy


# --- the two sides ----------------------------------------------------------------------------------------


class Product:
    """A server with one worker; `wake` and `suspend` need an actor that exists."""

    def __init__(self) -> None:
        self.server = LiveServer(HOME / "data", workers=1, slots=4, options=("--log-level=warning",))
        self.warm = WARM

    def start(self, warm: int) -> None:
        self.warm = warm
        self.server.options = ("--log-level=warning", f"--warm={warm}")
        self.server.start()

    def prepare(self) -> Template:
        image = build_python_image(HOME / "layout", app=Path(counter_app.__file__), env={"COUNT_FILE": "/count"})
        template = self.server.apply(
            "counter", TemplateSpec(image=image, readyz=Probe(path="/healthz"), idle_timeout_s=0)
        )
        if template.state is not TemplateState.READY:
            raise SystemExit(f"the template is {template.state}: {template.message}")
        return template

    def create(self, name: str) -> None:
        self.server.client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name=name, template="counter"))

    def actor(self, name: str) -> Actor:
        return convert.from_message(
            Actor, self.server.client.actors.GetActor(pb.GetActorRequest(namespace="default", name=name))
        )

    def ask(self, method: str, name: str) -> Operation:
        call = getattr(self.server.client.actors, method)
        operation = convert.from_message(Operation, call(pb.ActorRequest(namespace="default", name=name)))
        if operation.state is not OperationState.DONE:
            raise SystemExit(f"{method} {name}: {operation}")
        return operation

    def files(self, name: str) -> Path:
        """The files that the sleeping actor wakes from, linked: the next suspend may replace them."""
        request = pb.GetSnapshotRequest(id=self.actor(name).snapshot)
        snapshot = convert.from_message(Snapshot, self.server.client.snapshots.GetSnapshot(request))
        where = {f.name: blobs.blob_key(snapshot.actor_uid, f) for f in snapshot.files}
        kept = HOME / "image"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for file in SNAPSHOT_FILES:
            os.link(HOME / "data" / "snapshots" / where[file], kept / file)
        return kept

    async def settled(self, others: int = 0) -> bool:
        """Waits until the pool is full, no sandbox is left but its own and ``others``, and the processes are idle."""
        until = time.monotonic() + SETTLE_TIMEOUT_S
        sandboxes = HOME / "data" / "workers" / "default-0" / "sandboxes" / "sandboxes"
        while True:
            states = Counter(r.state if (r := read_record(d)) else "" for d in sandboxes.iterdir())
            if states[BoxState.WARM] == self.warm and states.total() == self.warm + others:
                break
            if time.monotonic() > until:
                raise SystemExit(f"the worker does not come to rest: {states}")
            await asyncio.sleep(0.01)
        return await quiet(self.server.pids())

    async def wake(self, name: str) -> Took:
        host, port = self.server.gateway
        head = f"GET /inc HTTP/1.1\r\nHost: bench\r\nGreenroom-Actor: default/{name}\r\n\r\n"

        pids = self.server.pids()
        cpu, started = cpu_ms(pids), time.perf_counter()
        first, last, top, body = await get(lambda: connected(Endpoint(host=host, port=port)), head)
        cpu = cpu_ms(pids) - cpu
        items = [i.strip().partition(";dur=") for i in header(top, "server-timing").split(",")]
        phases = tuple((phase, float(ms)) for phase, _, ms in items)
        assert json.loads(body)["actor"] == name, body
        return Took((first - started) * 1e3, (last - started) * 1e3, phases, cpu)

    async def suspend(self, name: str, case: Case) -> None:
        pids = self.server.pids()
        cpu, started = cpu_ms(pids), time.perf_counter()
        operation = await asyncio.to_thread(self.ask, "SuspendActor", name)
        case.suspends.append(((time.perf_counter() - started) * 1e3, cpu_ms(pids) - cpu))
        case.suspend_phases.append(summed((p.name, p.seconds * 1e3) for p in operation.phases))


class Floor:
    """gVisor alone: sandboxes of the class that the product's agent would make, in a state directory of their own."""

    def __init__(self, factory: Factory, network: Network, cgroups: Cgroups, cls: SandboxClass) -> None:
        self.factory, self.network, self.cgroups, self.cls = factory, network, cgroups, cls
        self.rounds = 0

    @classmethod
    async def open(cls, template: Template) -> Floor:
        home = HOME / "floor"
        (home / "sandboxes").mkdir(parents=True)
        reaper.become_subreaper()
        network = Network("gr-bench-wake", home / "slot-counter")
        await network.open()
        cgroups = Cgroups.detect("bench-wake")
        factory = Factory(await binary.find(), SocketControl(), network, cgroups, home / "sandboxes")
        image = await DiskImageStore(HOME / "data" / "images").get(template.image_digest)
        return cls(factory, network, cgroups, sandbox_class(image, template.spec))

    async def create(self, name: str) -> Box:
        """A warm sandbox, with all written down that the product writes down on the way."""
        box = await self.factory.create(self.cls)
        self.rounds += 1
        box.occupy(Identity(namespace="default", name=name, uid="0", generation=self.rounds))
        return box

    async def restore(self, box: Box, source: Path) -> None:
        await self.factory.control.restore(box.target, source)
        self.cgroups.limit_cpu(box.group, self.cls.resources)  # the actor's answer is under the same quota

    async def answer(self, box: Box, started: float, first_phase: str = "restore") -> Took:
        """One request to the actor; ``started``: when the floor's work began, which this ends."""
        assert box.record.owner is not None
        endpoint = box.endpoint(self.network.path)
        head = f"GET /inc HTTP/1.1\r\nHost: bench\r\nGreenroom-Actor: default/{box.record.owner.name}\r\n\r\n"
        before = time.perf_counter()
        first, last, _, _ = await get(lambda: connected(endpoint), head)
        phases = ((first_phase, (before - started) * 1e3), ("answer", (first - before) * 1e3))
        return Took((first - started) * 1e3, (last - started) * 1e3, phases)

    async def close(self) -> None:
        await self.network.close(remove=True)
        self.cgroups.remove_worker()


# --- the cases --------------------------------------------------------------------------------------------


async def sleeping(product: Product, floor: Floor, case: Case, name: str, rounds: int) -> None:
    """Wakes from a snapshot; with no warm sandbox (``product.warm`` 0) the floor creates one in the measured time."""

    async def wake() -> None:
        case.noisy += not await product.settled()
        case.wakes.append(await product.wake(name))

    async def restore(source: Path) -> None:
        box = await floor.create(name) if product.warm else None
        case.noisy += not await quiet([*product.server.pids(), os.getpid()])
        started = time.perf_counter()
        if box is None:
            box = await floor.create(name)
        await floor.restore(box, source)
        case.floors.append(await floor.answer(box, started, "restore" if product.warm else "create-and-restore"))
        await floor.factory.dispose(box)

    for number in range(rounds):
        source = product.files(name)
        case.image_bytes = sum((source / f).stat().st_size for f in SNAPSHOT_FILES)
        if number % 2:
            await restore(source)
        await wake()
        await product.settled(others=1)  # the pool is filled again before the actor is put to sleep
        await product.suspend(name, case)
        if number % 2 == 0:
            await product.settled()
            await restore(source)


async def frozen(product: Product, floor: Floor, case: Case, name: str, rounds: int) -> None:
    box = await floor.create(name)
    await floor.restore(box, product.files(name))
    await floor.answer(box, 0.0)
    await product.wake(name)

    async def wake() -> None:
        await asyncio.to_thread(product.ask, "PauseActor", name)
        case.noisy += not await product.settled(others=1)
        case.wakes.append(await product.wake(name))

    async def resume() -> None:
        await floor.factory.control.pause(box.target)
        case.noisy += not await quiet([*product.server.pids(), os.getpid()])
        started = time.perf_counter()
        await floor.factory.control.resume(box.target)
        case.floors.append(await floor.answer(box, started, "thaw"))

    for number in range(rounds):
        for side in (wake, resume) if number % 2 == 0 else (resume, wake):
            await side()
    await floor.factory.dispose(box)
    await asyncio.to_thread(product.ask, "SuspendActor", name)


async def touch(product: Product, name: str, megabytes: int) -> None:
    """Fills memory of a new actor and puts it to sleep with that."""
    product.create(name)
    await asyncio.to_thread(product.server.request, f"default/{name}", f"/touch?mb={megabytes}")
    await asyncio.to_thread(product.ask, "SuspendActor", name)


async def measure(cases: dict[str, int]) -> list[Case]:
    product, done = Product(), []
    product.start(warm=WARM)
    floor: Floor | None = None
    try:
        floor = await Floor.open(product.prepare())
        product.create("a")
        await product.wake("a")
        await asyncio.to_thread(product.ask, "SuspendActor", "a")
        for name, rounds in cases.items():
            if (warm := 0 if name == "cold" else WARM) != product.warm:
                await asyncio.to_thread(product.server.stop)
                product.start(warm)
                await product.wake("a")
                await asyncio.to_thread(product.ask, "SuspendActor", "a")
            case, actor = Case(name), "a"
            if name.endswith("mb"):
                actor = f"a{name}"
                await touch(product, actor, int(name.removesuffix("mb")))
            await (frozen if name == "frozen" else sleeping)(product, floor, case, actor, rounds)
            done.append(case)
            say(json.dumps({name: figures(case)}, indent=1))
    finally:
        if floor is not None:
            for box in floor_leftovers(floor):
                await floor.factory.dispose(box)
            await floor.close()
        await asyncio.to_thread(product.server.stop)
    return done


def floor_leftovers(floor: Floor) -> list[Box]:
    """What a run that failed half-way has left."""
    left = []
    for directory in (HOME / "floor" / "sandboxes").iterdir():
        if (record := read_record(directory)) is not None:
            left.append(Box(directory, record))
            left[-1].find_processes()
    return left


# --- figures ----------------------------------------------------------------------------------------------


def summed(phases: Any) -> dict[str, float]:
    """Phases by name; one that comes twice is added up."""
    out: dict[str, float] = defaultdict(float)
    for name, ms in phases:
        out[name] += ms
    return dict(out)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for phases in rounds for name in phases)
    return {name: round(median(phases.get(name, 0.0) for phases in rounds), 2) for name in names}


def figures(case: Case) -> dict[str, Any]:
    wakes, floors = [t.last_ms for t in case.wakes], [t.last_ms for t in case.floors]
    middle = sorted(case.wakes, key=lambda t: t.last_ms)[len(wakes) // 2]
    out: dict[str, Any] = {"rounds": len(wakes), "starts_on_a_busy_machine": case.noisy}
    for side, tooks in (("wake", case.wakes), ("floor", case.floors)):
        for point in ("first", "last"):
            values = [getattr(t, f"{point}_ms") for t in tooks]
            out[f"{side}_{point}_byte_p50_ms"] = round(percentile(values, 0.5), 2)
            out[f"{side}_{point}_byte_p95_ms"] = round(percentile(values, 0.95), 2)
    out |= {
        "p50_ratio": round(percentile(wakes, 0.5) / percentile(floors, 0.5), 3),
        "p95_ratio": round(percentile(wakes, 0.95) / percentile(floors, 0.95), 3),
        "pool_misses": sum(any(name == "create" for name, _ in t.phases) for t in case.wakes),
        "phases_median_ms": medians([summed(t.phases) for t in case.wakes]),
        "floor_phases_median_ms": medians([summed(t.phases) for t in case.floors]),
        "median_wake_phases_ms": dict(middle.phases),
        "server_and_agent_cpu_per_wake_ms": round(median(t.cpu_ms for t in case.wakes), 2),
    }
    if case.image_bytes:
        out["image_mb"] = round(case.image_bytes / 1e6, 1)
    if case.suspends:
        walls, cpus = zip(*case.suspends, strict=True)
        out |= {
            "suspend_p50_ms": round(percentile(list(walls), 0.5), 2),
            "suspend_p95_ms": round(percentile(list(walls), 0.95), 2),
            "suspend_phases_median_ms": medians(case.suspend_phases),
            "server_and_agent_cpu_per_suspend_ms": round(median(cpus), 2),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of a sleeping actor with a warm sandbox")
    parser.add_argument("--case-rounds", type=int, default=10, help="of every other case")
    parser.add_argument("--only", default="sleeping,frozen,64mb,256mb,cold", help="cases, separated by commas")
    options = parser.parse_args()
    cases = {name: options.rounds if name == "sleeping" else options.case_rounds for name in options.only.split(",")}
    if unknown := cases.keys() - {"sleeping", "frozen", "64mb", "256mb", "cold"}:
        parser.error(f"no case {', '.join(sorted(unknown))}")
    before = conditions()
    shutil.rmtree(HOME, ignore_errors=True)
    done = uvloop.run(measure(cases))
    shutil.rmtree(HOME)
    by_name = {case.name: figures(case) for case in done}
    ok = True
    if base := by_name.get("sleeping"):
        ok = base["p50_ratio"] <= GOAL_P50 and base["p95_ratio"] <= GOAL_P95 and base["pool_misses"] == 0
    report("wake", {"goal_p50_ratio": GOAL_P50, "goal_p95_ratio": GOAL_P95, **by_name}, before=before, ok=ok)


if __name__ == "__main__":
    main()
