"""The rounds: load, a kill, everything up again, rest, and the two questions."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from msgspec.structs import replace

from greenroom.api.client import AioClient
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Actor, ActorState, Probe, TemplateSpec, TemplateState
from greenroom.store.sqlite_file import DATABASE_FILE
from greenroom.testing.kills.load import ANSWER_S, DURABILITIES, Load, actors_of
from greenroom.testing.leaks import Wanted, differences, read
from greenroom.testing.leaks.places import Sandbox, entries, look
from greenroom.testing.live import LiveAgent, LiveServer

#: What is killed, and how often each.
VICTIMS = {"agent": 3, "control plane": 3, "all": 2, "none": 1}
#: After the load has begun; and between the kill and the start of what does not start by itself.
KILL_AFTER_S = (0.1, 2.0)
DOWN_S = (0.0, 0.5)
WORKERS, SLOTS, WARM = 2, 4, 1
#: Everything that is killed is started again: on a machine that is busy that may take long.
WORKER_RETURN_S = 60
#: What an upload that was killed has left in the snapshot store is to be found within a round.
SCRUB = ("--scrub-every=1", "--scrub-age=3")
#: Logs of a deleted actor on workers where it ran before go when these are compared.
COMPARE = ("--compare-every=3",)
#: Until all is at rest. The longest known: a sandbox that gVisor can't save for two minutes (see
#: `greenroom.sandbox.gvisor.network.Network.settle`), so that its worker does not retire before.
SETTLE_S = 180.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """``what``: a line of `leaks`, or what became of an actor. ``kind``: the same without names."""

    round: int
    victim: str
    what: str

    @property
    def kind(self) -> str:
        text = re.sub(r"/\S*/(?=\S)", "", self.what)  # paths
        text = re.sub(r"\b[0-9a-f]{8,}\b", "ID", text)
        text = re.sub(r"\bdefault/[\w-]+", "default/NAME", text)
        return re.sub(r"\d+", "N", text)


@dataclass(frozen=True, slots=True)
class Incarnation:
    """A running actor, before the kill."""

    wakes: int
    pid: int
    started: int
    boot: str
    ram: int


@dataclass(slots=True)
class Rounds:
    """One server that keeps two workers and fewer, and one worker that is kept by nobody and outlives it.

    `start`, any number of `round`, `stop`.
    """

    home: Path
    backend: str
    image: str
    seed: int = 1
    actors: int = 8
    findings: list[Finding] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    #: What took longest to come to rest in the last round: since when the rest was awaited, and what.
    last: list[tuple[float, str]] = field(default_factory=list)
    server: LiveServer = field(init=False)
    agent: LiveAgent = field(init=False)
    load: Load = field(init=False)
    chance: random.Random = field(init=False)
    _round: int = 0

    def start(self) -> None:
        """Raises `FailedPrecondition` when the templates can't be made."""
        data = self.home / "d"
        options = (f"--warm={WARM}", "--capacity-wait=15", f"--worker-return={WORKER_RETURN_S}", *SCRUB, *COMPARE)
        self.server = LiveServer(data, backend=self.backend, workers=WORKERS, slots=SLOTS, options=options)
        self.server.start()
        self.agent = LiveAgent(
            "alone",
            self.home / "alone",
            images=data / "images",
            snapshots=data / "snapshots",
            control=(self.server.control,),
            backend=self.backend,
            slots=SLOTS,
            options=(f"--warm={WARM}",),
        )
        self.agent.start()
        spec = TemplateSpec(image=self.image, readyz=Probe(path="/healthz"), idle_timeout_s=0.0)
        for name, durability in DURABILITIES.items():
            template = self.server.apply(name, replace(spec, durability=durability))
            if template.state is not TemplateState.READY:
                raise FailedPrecondition(f"template {name} is {template.state}: {template.message}")
        self.chance = random.Random(self.seed)
        self.load = Load(self.server, self.chance, spec, self.actors, WORKERS)

    def stop(self) -> None:
        if self.server.process is not None and self.server.process.poll() is None:
            self.server.stop()
        self.agent.stop()

    # --- one round ----------------------------------------------------------------------------------------

    async def round(self) -> list[Finding]:
        """What was found in it."""
        began, self._round = time.monotonic(), self._round + 1
        before = await self._incarnations()
        for known in self.load.known.values():
            known.disturbed = False
        stop = asyncio.Event()
        load = asyncio.create_task(self.load.run(stop))
        victim = self.chance.choices([*VICTIMS], [*VICTIMS.values()])[0]
        await asyncio.sleep(self.chance.uniform(*KILL_AFTER_S))  # the moment of the kill, not a condition
        await asyncio.to_thread(self._kill, victim)
        stop.set()
        await asyncio.sleep(self.chance.uniform(*DOWN_S))
        await asyncio.to_thread(self._start_again)
        await load
        self.kills[victim] += 1
        found = [Finding(self._round, victim, what) for what in await self._settle()]
        found += [Finding(self._round, victim, what) for what in await self._examine(before)]
        self.findings += found
        self.seconds.append(time.monotonic() - began)
        return found

    def _kill(self, victim: str) -> None:
        if victim == "agent":
            name = self.chance.choice([self.agent.name, *(f"default-{n}" for n in range(WORKERS))])
            if name == self.agent.name or not self.server.kill_agent(name):
                self.agent.kill()
        elif victim == "control plane":
            assert self.server.process is not None
            os.kill(self.server.process.pid, signal.SIGKILL)  # the agents that it keeps end with it, the other does not
            self.server.process.wait()
            self.server.client.close()
        elif victim == "all":
            self.agent.kill()
            self.server.kill()

    def _start_again(self) -> None:
        if self.server.process is None or self.server.process.poll() is not None:
            # A server is told how many workers at its start: as many as there were, or others.
            pools = read(self.server.data_dir / DATABASE_FILE).pools
            as_before = pools[0].spec.replicas
            self.server.workers = self.chance.choice([as_before, self.chance.randint(0, WORKERS)])
            self.server.start()
        if self.agent.process is None or self.agent.process.poll() is not None:
            self.agent.start()

    # --- does anything leak ---------------------------------------------------------------------------------

    def _leaks(self) -> list[str]:
        data = self.server.data_dir
        rows = read(data / DATABASE_FILE)
        return differences(
            rows,
            look(data, self._state_dirs(), data / "images", data / "snapshots"),
            Wanted(
                workers={self.agent.name, *(f"default-{n}" for p in rows.pools for n in range(p.spec.replicas))},
                warm=len(DURABILITIES) + WARM,
            ),
        )

    def _state_dirs(self) -> dict[str, Path]:
        home = self.server.data_dir / "workers"
        names = {f"default-{n}" for n in range(WORKERS)} | {path.name for path in entries(home)}
        return {name: home / name for name in sorted(names)} | {self.agent.name: self.agent.state_dir}

    async def _settle(self) -> list[str]:
        """What is left when all is at rest, and was not left before."""
        began, old = time.monotonic(), {f.what for f in self.findings}
        self.last = []
        while True:
            left = [line for line in await asyncio.to_thread(self._leaks) if line not in old]
            if not left:
                return []
            self.last = [(round(time.monotonic() - began, 1), line) for line in left]
            if time.monotonic() - began > SETTLE_S:
                return left
            await asyncio.sleep(_POLL_S)

    # --- was anything alive touched ---------------------------------------------------------------------------

    async def _incarnations(self) -> dict[str, Incarnation]:
        """Of the actors that run."""
        found: dict[str, Incarnation] = {}
        async with AioClient(self.server.address) as client, aiohttp.ClientSession() as session:
            actors = await actors_of(client)
            boxes = await asyncio.to_thread(self._sandboxes)
            for name, actor in actors.items():
                box = boxes.get(actor.uid)
                if actor.state is ActorState.RUNNING and box is not None:
                    said = await self.load.ask(session, name, "/info")
                    if said is not None:
                        found[name] = Incarnation(actor.wakes, box.pid, box.started, said["boot"], said["ram"])
        return found

    def _sandboxes(self) -> dict[str, Sandbox]:
        """By actor (uid)."""
        data = self.server.data_dir
        machine = look(data, self._state_dirs(), data / "images", data / "snapshots")
        return {box.uid: box for place in machine.places.values() for box in place.sandboxes if box.uid}

    async def _examine(self, before: dict[str, Incarnation]) -> list[str]:
        found: list[str] = []
        async with AioClient(self.server.address) as client, aiohttp.ClientSession() as session:
            actors = await actors_of(client)
            boxes = await asyncio.to_thread(self._sandboxes)
            for name, known in [*self.load.known.items()]:
                actor = actors.pop(name, None)
                if actor is None:
                    if known.created and not known.deleted:
                        found.append(f"forgotten: actor default/{name}, which nobody deleted")
                    del self.load.known[name]
                    continue
                if known.gone:
                    found.append(f"risen: actor default/{name}, whose deletion was answered")
                known.deleted, known.created = False, True
                if actor.state is ActorState.CRASHED:
                    if not known.crashed:
                        found.append(f"crashed: actor default/{name}: {actor.reason}: {actor.message.splitlines()[0]}")
                    known.crashed = True
                    continue
                found += self._same(before.get(name), actor, boxes.get(actor.uid), known.disturbed)
                found += await self._counts(client, session, actor, before.get(name) if not known.disturbed else None)
        found += [f"unknown: actor default/{name}, which nobody made" for name in actors]
        return found

    def _same(self, was: Incarnation | None, actor: Actor, box: Sandbox | None, disturbed: bool) -> list[str]:
        """An actor that ran and that nobody touched runs on, in the same process. (One whose worker ends was suspended
        for that, and says so by its wakes or its state.)"""
        if was is None or disturbed or actor.wakes != was.wakes or actor.state is not ActorState.RUNNING:
            return []
        if box is None or (box.pid, box.started) != (was.pid, was.started):
            return [f"touched: actor {actor.key} ran as process {was.pid} and is {box and box.pid} now"]
        return []

    async def _counts(
        self, client: AioClient, session: aiohttp.ClientSession, actor: Actor, was: Incarnation | None
    ) -> list[str]:
        """What it remembers is at least what clients were told. Wakes it; another one may have to sleep for that."""
        until = time.monotonic() + ANSWER_S
        while (said := await self.load.ask(session, actor.name, "/info")) is None:
            if time.monotonic() > until:
                return [f"unusable: actor {actor.key}, which was {actor.state}"]
            await asyncio.sleep(_POLL_S)
        if said["actor"] not in ("", actor.name):
            return [f"mistaken: actor {said['actor']} answered for actor {actor.key}"]
        counted = self.load.known[actor.name].counted
        if said["file"] < counted:
            return [f"reset: actor {actor.key} counts {said['file']}, and had answered {counted}"]
        now = (await actors_of(client))[actor.name]
        ran_on = was is not None and now.wakes == was.wakes
        if ran_on and was is not None and (said["boot"] != was.boot or said["ram"] < was.ram):
            return [f"reset: actor {actor.key} ran on, and has lost its memory"]
        return []


def summary(rounds: Rounds) -> dict[str, Any]:
    """Figures for a report: findings by kind, each with its first example."""
    kinds = Counter(finding.kind for finding in rounds.findings)
    first = {f.kind: f for f in reversed(rounds.findings)}
    return {
        "rounds": len(rounds.seconds),
        "killed": dict(rounds.kills),
        "seconds_per_round": round(sum(rounds.seconds) / max(1, len(rounds.seconds)), 2),
        "answers": dict(sorted(rounds.load.counts.items())),
        "findings": [
            {
                "kind": kind,
                "times": n,
                "round": first[kind].round,
                "killed": first[kind].victim,
                "first": first[kind].what,
            }
            for kind, n in kinds.most_common()
        ],
    }
