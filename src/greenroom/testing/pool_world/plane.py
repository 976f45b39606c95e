"""Greenroom's control plane in the simulated cluster: rosters by its own rule, demand as the script says, and answers
that come late, not at all, or after the call has taken effect."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from greenroom.core.demand import Demand, WorkerDemand
from greenroom.core.errors import NotFound, Unavailable
from greenroom.core.records import Key, PoolSpec, Template, TemplateSpec
from greenroom.core.rosters import Roster, replaced
from greenroom.operator.plane import Change
from greenroom.testing.fake_kube.objects import Object
from greenroom.testing.pool_world.transport import LATENCY_S

#: A call is given up after this long.
TIMEOUT_S = 15.0
#: Slots of one worker, as `PoolSpec` has them by default.
SLOTS = PoolSpec().slots


@dataclass
class SimPlane:
    """One for all operators of a world.

    Args:
        pods: those that run now, by name.
        clock: the server's.

    Attributes:
        trouble: how often (0 to 1) a call is answered by nobody; half of those take effect.
        actors: how many are awake, or wait: on the workers on the roster that run, the first ones first.
    """

    chance: random.Random
    pods: Callable[[], Mapping[str, Object]]
    clock: Callable[[], float]
    trouble: float = 0.0
    actors: int = 0
    pools: dict[str, PoolSpec] = field(default_factory=dict)
    rosters: dict[str, Roster] = field(default_factory=dict)
    #: Since when nobody is awake on a worker.
    _idle_since: dict[str, float] = field(default_factory=dict)

    async def _pass(self) -> bool:
        """Whether the call is answered; before that it takes effect, or not."""
        await asyncio.sleep(self.chance.uniform(*LATENCY_S))
        if self.chance.random() >= self.trouble:
            return True
        if self.chance.random() < 0.5:
            await asyncio.sleep(TIMEOUT_S)
            raise Unavailable("nobody answered, and it never arrived")
        return False

    async def _answer(self, answered: bool) -> None:
        await asyncio.sleep(self.chance.uniform(*LATENCY_S))
        if not answered:
            await asyncio.sleep(TIMEOUT_S)
            raise Unavailable("nobody answered")

    async def apply_pool(self, name: str, spec: PoolSpec) -> None:
        answered = await self._pass()
        self.pools[name] = spec
        await self._answer(answered)

    async def delete_pool(self, name: str) -> None:
        answered = await self._pass()
        self.pools.pop(name, None)
        await self._answer(answered)

    async def admit(self, roster: Roster) -> None:
        answered = await self._pass()
        self.rosters[roster.pool] = replaced(self.rosters.get(roster.pool), roster)
        await self._answer(answered)

    async def demand(self, pool: str) -> Demand:
        answered = await self._pass()
        if pool not in self.pools:
            raise NotFound(f"there is no pool {pool}")
        demand = self.loads(pool)
        await self._answer(answered)
        return demand

    def names_on(self, pool: str) -> list[str]:
        """Workers on the roster that run, in the order in which they get actors."""
        roster, running = self.rosters.get(pool), self.pods()
        return [w.name for w in roster.workers if w.name in running] if roster is not None else []

    def loads(self, pool: str) -> Demand:
        names = self.names_on(pool)
        left, loads, now = self.actors, [], self.clock()
        for name in names:
            awake = min(left, SLOTS)
            left -= awake
            if awake:
                self._idle_since.pop(name, None)
                idle_s = 0.0
            else:
                idle_s = now - self._idle_since.setdefault(name, now)
            loads.append(WorkerDemand(name=name, awake=awake, ready=True, idle_s=idle_s))
        return Demand(pool=pool, slots=SLOTS * len(names), awake=self.actors - left, waiting=left, workers=tuple(loads))

    async def apply_template(self, key: Key, spec: TemplateSpec) -> Template:
        raise Unavailable("there are no templates here")

    async def delete_template(self, key: Key) -> None:
        raise Unavailable("there are no templates here")

    async def templates(self) -> AsyncIterator[Change]:
        yield Change()
        await asyncio.get_running_loop().create_future()
