"""Runs a simulated world through trouble and calm, and says what came of it."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from greenroom.core.errors import GreenroomError
from greenroom.core.records import Actor, Key, Template, TemplateState, Worker
from greenroom.engine.members import ASKED
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.simulation.bookkeeping import Verdicts
from greenroom.testing.simulation.clients import TEMPLATE, User
from greenroom.testing.simulation.faults import Fault
from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.rest import bound_s, problems
from greenroom.testing.simulation.world import SKEW_S, World

NAMESPACE = "default"
#: How long it may take until the template is ready, while nothing goes wrong.
SETUP_S = 60.0
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
        ends: see `Bookkeeping.ends`; and what people did.
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


class Simulation(World):
    """One world and what happens in it. See `run`.

    Attributes:
        settle_s: how long it took until it was at rest after the trouble.
    """

    settle_s = 0.0

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
            self.books.ends.update({f"user: {act}": times for act, times in user.did.items()})

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
            replica.store.skew_s = self.random.uniform(-SKEW_S, SKEW_S)
        begin = self.loop.time()
        await self._undrain()
        await self._settle(begin + self._bound_s())
        self.settle_s = self.loop.time() - begin
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
                raise self.verdicts.broken("it does not come to rest:\n" + "\n".join(found))
            await asyncio.sleep(1.0)
        self.books.audit()

    async def _use(self, actor: Actor) -> None:
        """Somebody uses it, and tries again when it was just being put to sleep."""
        for attempt in range(USES):
            replica = self.random.choice(self.replicas_alive())
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
                    raise self.verdicts.broken(f"{actor.key} can't be used: {error.reason}: {error.message}") from error

    def run(self) -> Report:
        """Raises:
        Broken: something does not hold; names the seed.
        """
        try:
            with _logs(self.verdicts):
                self.loop.run_until_complete(self.main())
        except BaseException as error:
            first = self.verdicts.found[0] if self.verdicts.found else error
            raise Broken(self.seed, self.loop.time(), first) from first
        finally:
            self.loop.close()
        if self.verdicts.found:
            raise Broken(self.seed, self.loop.time(), self.verdicts.found[0]) from self.verdicts.found[0]
        return Report(
            seed=self.seed,
            digest=self.trace.digest(),
            hits=self.faults.hits,
            ends=self.books.ends,
            virtual_s=self.loop.time(),
            settle_s=self.settle_s,
            steps=self.loop.steps,
        )


@contextmanager
def _logs(verdicts: Verdicts) -> Iterator[None]:
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
            verdicts.broken(f"a bug was logged: {event}\n{text}")
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
