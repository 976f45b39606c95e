"""One person does one thing after the other with one actor, and one chosen step of it goes wrong in one chosen way.

As SQLite's anomaly tests do: with step 1 going wrong, then with step 2, and so on, until nothing went wrong because
there was no step of that number. What is drawn at random finds what nobody thought of; this leaves no step out.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from greenroom.core.errors import GreenroomError, NotFound
from greenroom.core.records import Durability, Key, OperationState
from greenroom.testing.simloop import AT_ONCE
from greenroom.testing.simulation.faults import Chosen, Fault
from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.run import NAMESPACE, Simulation

#: What the person does. Each operation is begun from each state that it can be begun from.
SCRIPT = ("create", "request", "suspend", "request", "pause", "request", "pause", "suspend", "resume", "delete")
#: How often something that fails is tried again, and how long until then, in seconds. Longer than a lease, all in all.
TRIES, PAUSE_S = 20, 1.0

WORLD = Plan(pace=AT_ONCE, actors=1, slots=1, idle_timeout_s=0.0, without=frozenset({Fault.HANG}))


class Scripted(Simulation):
    """See the module docstring."""

    def __init__(self, chosen: Chosen, durability: Durability, *, trace: bool = False) -> None:
        super().__init__(0, replace(WORLD, durability=durability), trace=trace)
        self._chosen = chosen
        #: How many messages there were until the script was done.
        self.steps = 0

    async def _live(self) -> None:
        self.faults.choose(self._chosen)
        await self.loop.start(self.people, self._follow_script(), "person")
        self.steps = self.faults.steps

    async def _follow_script(self) -> None:
        for number, act in enumerate(SCRIPT):
            for _ in range(TRIES):
                try:
                    await self._act(act, self.replicas_alive()[number % len(self.replicas_alive())])
                    break
                except GreenroomError as error:
                    self.trace("refused", act, error.reason)
                    if act == "delete" and isinstance(error, NotFound):
                        break  # it had been done, and whoever asked was not told
                    await asyncio.sleep(PAUSE_S)
            else:
                raise self.oracle.broken(f"{act} does not succeed, however often it is tried")

    async def _act(self, act: str, replica: Replica) -> None:
        key = Key(NAMESPACE, "a0")
        match act:
            case "create":
                await replica.ask(act, partial(replica.engine.create_actor, key, "t", request_id="once"))
            case "request":
                self.oracle.answered(await replica.ask(act, partial(replica.request, key)))
            case _:
                before = self.oracle.before_suspend(key)
                operation = await replica.ask(act, partial(getattr(replica.engine, act), key))
                if operation.state is not OperationState.DONE:
                    raise GreenroomError(f"{act} is {operation.state}")
                if act == "suspend":
                    self.oracle.after_suspend(before)


def run_step(step: int, fault: Fault, durability: Durability) -> bool:
    """Whether there was a step of that number.

    Raises:
        Broken: see `greenroom.testing.simulation.run.Simulation.run`.
    """
    scripted = Scripted(Chosen(step, fault), durability)
    scripted.run()
    return scripted.steps >= step
