"""Waiting for a slot in turn: nobody overtakes, and no turn is ever lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.core.errors import ResourceExhausted, Unavailable
from greenroom.core.records import Endpoint, Key
from greenroom.engine.bindings import Binding
from greenroom.engine.capacity import CapacityQueue
from greenroom.engine.config import EngineConfig


def binding(name: str) -> Binding:
    return Binding(
        key=Key("ns", name), uid=name, generation=1, worker="w", endpoint=Endpoint(path="/s"), idle_timeout_s=0.0
    )


class Evictions:
    """Idle actors, and those that are being suspended until the test ends it."""

    def __init__(self, *names: str) -> None:
        self.idle = [binding(name) for name in names]
        self.ends: dict[str, asyncio.Future[None]] = {}

    def candidates(self) -> list[Binding]:
        return list(self.idle)

    def begin(self, chosen: Binding) -> asyncio.Task[None]:
        self.idle.remove(chosen)
        end = self.ends[chosen.key.name] = asyncio.get_running_loop().create_future()
        return asyncio.ensure_future(_until(end))


async def _until(end: asyncio.Future[None]) -> None:
    await end


def make(idle: Evictions | None = None, **limits: int) -> CapacityQueue:
    idle = idle or Evictions()
    return CapacityQueue("p", EngineConfig(owner="me", **limits), idle.candidates, idle.begin)


async def turns() -> None:
    """Lets everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


class Waiters:
    def __init__(self, queue: CapacityQueue) -> None:
        self.queue = queue
        self.had_turn: list[int] = []
        self.probes: list[bool] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def come(self, number: int, *, again: bool = False, wait_s: float = 60.0) -> None:
        async def wait() -> None:
            probe = await self.queue.wait(again=again, until=asyncio.get_running_loop().time() + wait_s)
            self.had_turn.append(number)
            self.probes.append(probe)

        self.tasks[number] = asyncio.ensure_future(wait())
        await turns()

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_in_order_of_arrival_and_back_to_the_front() -> None:
    waiters = Waiters(queue := make())
    for number in range(3):
        await waiters.come(number)
    queue.slot_freed()
    await turns()
    assert waiters.had_turn == [0] and len(queue) == 2
    await waiters.come(10, again=True)  # somebody else was quicker
    queue.slot_freed()
    queue.slot_freed()
    await turns()
    assert waiters.had_turn == [0, 10, 1]
    await waiters.end()


async def test_a_turn_that_comes_in_the_moment_of_giving_up_is_the_next_ones() -> None:
    waiters = Waiters(queue := make())
    for number in range(3):
        await waiters.come(number)
    queue.slot_freed()
    waiters.tasks[0].cancel()  # has its turn, and has not seen it
    await turns()
    assert waiters.had_turn == [1]
    await waiters.end()
    assert len(queue) == 0


async def test_a_probe_stays_one_when_it_is_passed_on() -> None:
    waiters = Waiters(queue := make())
    for number in range(2):
        await waiters.come(number)
    queue.slot_freed(probe=True)
    waiters.tasks[0].cancel()
    await turns()
    assert (waiters.had_turn, waiters.probes) == ([1], [True])


async def test_a_turn_that_comes_with_the_time_out_is_not_lost() -> None:
    waiters = Waiters(queue := make())
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.01
    first = asyncio.ensure_future(queue.wait(again=False, until=until))
    await turns()
    await waiters.come(1)
    loop.call_at(until, queue.slot_freed)  # in the same turn of the loop as the time-out, after it
    with pytest.raises(ResourceExhausted):
        await first
    await turns()
    assert waiters.had_turn == [1]


async def test_time_out_and_full_queue_say_so() -> None:
    waiters = Waiters(queue := make(max_waiting=2))
    for number in range(2):
        await waiters.come(number)
    with pytest.raises(ResourceExhausted, match="2 wake-ups are waiting") as full:
        await queue.wait(again=False, until=asyncio.get_running_loop().time() + 60)
    assert full.value.reason == "NO_CAPACITY" and full.value.retry_after_s > 0
    await waiters.come(2, again=True)
    queue.slot_freed()
    await turns()
    assert waiters.had_turn == [2], "who has waited already is not turned away"
    with pytest.raises(ResourceExhausted, match="open requests"):
        await queue.wait(again=True, until=asyncio.get_running_loop().time() + 0.005)
    await waiters.end()
    assert len(queue) == 0


async def test_as_many_are_suspended_as_wait_and_not_more() -> None:
    evictions = Evictions("a", "b", "c", "d")
    waiters = Waiters(queue := make(evictions, evictions=2))
    await waiters.come(0)
    assert list(evictions.ends) == ["a"]
    await waiters.come(1)
    await waiters.come(2)
    assert list(evictions.ends) == ["a", "b"], "at most two at a time"
    evictions.ends["a"].set_result(None)
    await turns()
    assert list(evictions.ends) == ["a", "b", "c"]
    evictions.ends["b"].set_exception(Unavailable("no"))
    await turns()
    assert list(evictions.ends) == ["a", "b", "c"], "a failure is not tried again at once"
    queue.pump()
    assert list(evictions.ends) == ["a", "b", "c", "d"]
    await waiters.end()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["come", "again", "freed", "leave", "look"]), st.integers(0, 30)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS)
def test_no_turn_is_lost_and_nobody_overtakes(operations: list[tuple[str, int]]) -> None:
    """Against a model: the list of those who wait, and those whose turn has come and who have not run since."""

    async def run() -> None:
        waiters = Waiters(queue := make())
        waiting: list[int] = []
        due: list[int] = []
        done: list[int] = []

        async def look() -> None:
            await turns()
            done.extend(due)
            due.clear()
            assert sorted(waiters.had_turn) == sorted(done) and len(queue) == len(waiting)

        for number, (what, which) in enumerate(operations):
            match what:
                case "come" | "again":
                    await look()
                    await waiters.come(number, again=what == "again")
                    waiting.insert(0 if what == "again" else len(waiting), number)
                case "freed":
                    queue.slot_freed()
                    due += waiting[:1]
                    del waiting[:1]
                case "leave" if waiting or due:
                    gone = (due + waiting)[which % len(due + waiting)]
                    if gone in due:  # its turn is the next one's
                        due += waiting[:1]
                        del waiting[:1]
                        due.remove(gone)
                    else:
                        waiting.remove(gone)
                    waiters.tasks[gone].cancel()
                    await look()
                case _:
                    await look()
        await look()
        await waiters.end()
        assert len(queue) == 0

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 4), waiting=st.integers(1, 40), holds=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_many_waiters_and_few_slots_make_progress(slots: int, waiting: int, holds: list[int]) -> None:
    """Everybody gets a slot, in order, and never more than there are at a time."""

    async def run() -> None:
        queue = make()
        free, most, order = slots, 0, []

        async def want(number: int) -> None:
            nonlocal free, most
            again = False
            while True:
                if free and (again or not len(queue)):
                    break
                await queue.wait(again=again, until=asyncio.get_running_loop().time() + 60)
                again = True
            free -= 1
            most = max(most, slots - free)
            order.append(number)
            for _ in range(holds[number % len(holds)]):
                await asyncio.sleep(0)
            free += 1
            queue.slot_freed()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(waiting):
                group.create_task(want(number))
        assert order == list(range(waiting))
        assert most <= slots and free == slots and len(queue) == 0

    asyncio.run(run())
