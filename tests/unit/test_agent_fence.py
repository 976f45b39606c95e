"""Which calls about an actor are carried out: by the latest owner, one at a time, each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from greenroom.agent.fence import Fence, Work
from greenroom.agent.journal import Journal
from greenroom.agent.progress import Listener
from greenroom.core import agentapi as api
from greenroom.core.errors import GreenroomError, Internal, LeaseLost, ResourceExhausted, Unavailable
from greenroom.core.records import Endpoint, Record, TemplateSpec

STARTED = api.Started(endpoint=Endpoint(path="/sock"))


class Ear:
    """Keeps the phases that it hears of."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def progress(self, progress: api.Progress) -> None:
        self.phases.append(progress.phase)


class Bench:
    """A fence, and work that ends when the test says so."""

    def __init__(self, root: Path) -> None:
        self.journal = Journal(root / "journal")
        self.holds = True
        self.floor = 0
        self.fence = Fence("w", self.journal, lambda uid: self.floor, lambda call: self.holds)
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.ends: dict[str, asyncio.Future[Record]] = {}
        self.hears: dict[str, Listener] = {}
        self._sent: list[asyncio.Task[Record]] = []

    def work(self, name: str) -> Work:
        async def run(hears: Listener) -> Record:
            self.begun.append(name)
            self.hears[name] = hears
            self.ends[name] = asyncio.get_running_loop().create_future()
            try:
                return await self.ends[name]
            except asyncio.CancelledError:
                await asyncio.sleep(0)  # cleaning up takes a while
                self.stopped.append(name)
                raise

        return run

    def send(self, call: api.ActorCall, name: str, listener: Listener | None = None) -> asyncio.Task[Record]:
        task = asyncio.ensure_future(self.fence.run(call, self.work(name), listener or Ear()))
        self._sent.append(task)
        return task

    def aside(self, uid: str, name: str) -> asyncio.Future[None]:
        async def run() -> None:
            await self.work(name)(Ear())

        return asyncio.ensure_future(self.fence.aside(uid, run))

    async def close(self) -> None:
        await self.fence.close()
        await asyncio.gather(*self._sent, return_exceptions=True)
        self.journal.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


async def turns() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def start(operation: str = "op", generation: int = 1, uid: str = "a") -> api.Start:
    identity = api.Identity(namespace="ns", name="a", uid=uid, generation=generation)
    return api.Start(
        operation_id=operation,
        actor_uid=uid,
        generation=generation,
        identity=identity,
        spec=TemplateSpec(image="x"),
        image_digest="d",
    )


def freeze(operation: str = "op", generation: int = 1) -> api.Freeze:
    return api.Freeze(operation_id=operation, actor_uid="a", generation=generation)


def discard(operation: str = "op", generation: int = 1) -> api.Discard:
    return api.Discard(operation_id=operation, actor_uid="a", generation=generation)


async def test_a_lower_generation_is_refused_and_another_actor_is_not(bench: Bench) -> None:
    bench.send(start(generation=5), "five")
    await turns()
    with pytest.raises(LeaseLost) as lost:
        await bench.send(freeze("old", 4), "four")
    assert lost.value.metadata["generation"] == "5"
    bench.send(start("other", 1, uid="b"), "other")
    await turns()
    assert bench.begun == ["five", "other"] and not bench.stopped


async def test_the_generation_of_a_resident_counts_also_when_the_journal_has_forgotten_it(bench: Bench) -> None:
    bench.floor = 7
    with pytest.raises(LeaseLost):
        await bench.send(freeze(generation=6), "six")
    assert bench.fence.generation("a") == 7


async def test_the_same_call_joins_also_under_a_later_owner(bench: Bench) -> None:
    tasks = [bench.send(start(generation=g), f"{g}") for g in (1, 1, 2)]
    await turns()
    assert bench.begun == ["1"]
    bench.ends["1"].set_result(STARTED)
    assert await asyncio.gather(*tasks) == [STARTED] * 3
    assert bench.fence.generation("a") == 2


async def test_all_who_wait_for_a_call_hear_how_far_it_is_until_they_go_away(bench: Bench) -> None:
    ears = [Ear(), Ear(), Ear()]
    first, second = bench.send(start(), "work", ears[0]), bench.send(start(), "-", ears[1])
    await turns()
    bench.hears["work"].progress(api.Progress(phase="one"))
    third = bench.send(start(generation=2), "-", ears[2])
    first.cancel()
    await turns()
    bench.hears["work"].progress(api.Progress(phase="two"))
    bench.ends["work"].set_result(STARTED)
    assert await second == await third == STARTED
    bench.hears["work"].progress(api.Progress(phase="too late"))
    assert [ear.phases for ear in ears] == [["one"], ["one", "two"], ["two"]]


async def test_another_call_stops_the_one_under_way_and_waits_for_its_cleaning_up(bench: Bench) -> None:
    first = bench.send(start(), "start")
    await turns()
    second = bench.send(discard(), "discard")
    with pytest.raises(LeaseLost, match="stopped by a later call"):
        await first
    assert bench.stopped == ["start"]
    await turns()
    assert bench.begun == ["start", "discard"]
    bench.ends["discard"].set_result(api.Done())
    await second


async def test_a_higher_generation_stops_the_one_under_way(bench: Bench) -> None:
    first = bench.send(start("one", 1), "one")
    await turns()
    second = bench.send(start("two", 2), "two")
    await turns()
    bench.ends["two"].set_result(STARTED)
    assert await second == STARTED
    with pytest.raises(LeaseLost):
        await first


async def test_of_many_that_wait_for_the_same_end_the_last_wins(bench: Bench) -> None:
    tasks = [bench.send(start(f"op{g}", g), f"{g}") for g in (1, 2, 3)]
    await turns()
    bench.ends["3"].set_result(STARTED)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [LeaseLost, LeaseLost, api.Started]


async def test_a_discard_is_not_stopped_by_what_comes_after_it(bench: Bench) -> None:
    ending = bench.send(discard("one", 1), "discard")
    await turns()
    wake = bench.send(start("two", 2), "wake")
    await turns()
    assert bench.begun == ["discard"] and not bench.stopped
    bench.ends["discard"].set_result(api.Done())
    await ending
    await turns()
    bench.ends["wake"].set_result(STARTED)
    assert await wake == STARTED


async def test_a_wake_that_comes_after_the_discard_of_its_operation_is_refused(bench: Bench, tmp_path: Path) -> None:
    ending = bench.send(discard(), "discard")
    await turns()
    with pytest.raises(LeaseLost, match="comes too late"):
        await bench.send(start(), "late")  # while the discard is under way
    bench.ends["discard"].set_result(api.Done())
    await ending
    with pytest.raises(LeaseLost, match="comes too late"):
        await bench.send(start(), "later")
    again = Fence("w", Journal(tmp_path / "journal"), lambda uid: 0, lambda call: True)
    with pytest.raises(LeaseLost, match="comes too late"):  # also when the agent has restarted
        await again.run(start(), bench.work("much later"), Ear())
    assert bench.begun == ["discard"]
    for name, call in {"other attempt": start("op-2"), "other owner": start(generation=2)}.items():
        wake = bench.send(call, name)
        await turns()
        bench.ends[name].set_result(STARTED)
        assert await wake == STARTED


async def test_what_was_done_is_answered_from_the_journal_while_it_holds(bench: Bench) -> None:
    first = bench.send(start(), "first")
    await turns()
    bench.ends["first"].set_result(STARTED)
    await first
    assert await bench.send(start(generation=2), "second") == STARTED
    assert bench.begun == ["first"]
    bench.holds = False
    third = bench.send(start(generation=2), "third")
    await turns()
    bench.ends["third"].set_result(STARTED)
    await third
    assert bench.begun == ["first", "third"]


async def test_a_failure_is_not_remembered(bench: Bench) -> None:
    failures: list[tuple[Exception, type[GreenroomError], str]] = [
        (Internal("no"), Internal, "INTERNAL"),
        (OSError(28, "full"), ResourceExhausted, "DISK_FULL"),
    ]
    for failure, expected, reason in failures:
        first = bench.send(start(), "first")
        await turns()
        bench.ends["first"].set_exception(failure)
        with pytest.raises(expected) as raised:
            await first
        assert raised.value.reason == reason
    assert bench.begun == ["first", "first"]


async def test_a_caller_that_goes_away_stops_nothing(bench: Bench) -> None:
    first = bench.send(start(), "first")
    await turns()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    bench.ends["first"].set_result(STARTED)
    await turns()
    assert await bench.send(start(), "second") == STARTED
    assert bench.begun == ["first"] and not bench.stopped


async def test_who_waits_when_the_agent_ends_is_told_to_ask_again(bench: Bench) -> None:
    first = bench.send(start(), "first")
    await turns()
    second = bench.send(freeze("two", 2), "second")
    await bench.fence.close()
    for task in (first, second, bench.send(start("three", 3), "third")):
        with pytest.raises(Unavailable) as gone:
            await task
        assert gone.value.reason == "WORKER_DISCONNECTED"
    assert bench.begun == ["first"] and bench.stopped == ["first"]


# --- what the agent does of its own accord ----------------------------------------------------------------------


async def test_what_is_done_aside_waits_for_calls_stops_none_and_holds_up_others(bench: Bench) -> None:
    first = bench.send(start(), "start")
    await turns()
    aside, other = bench.aside("a", "aside"), bench.aside("b", "other")
    assert bench.fence.is_busy("a") and not bench.fence.is_busy("c")
    await turns()
    assert bench.begun == ["start", "other"] and not bench.stopped
    bench.ends["other"].set_result(STARTED)
    await other
    bench.ends["start"].set_result(STARTED)
    assert await first == STARTED
    await turns()
    second = bench.send(freeze("two", 2), "freeze")
    await turns()
    assert bench.begun == ["start", "other", "aside"] and not bench.stopped
    bench.ends["aside"].set_result(STARTED)
    await aside
    await turns()
    assert bench.begun[-1] == "freeze"
    bench.ends["freeze"].set_result(api.Done())
    assert await second == api.Done()


async def test_a_failure_aside_is_its_own_and_nothing_is_begun_when_the_agent_ends(bench: Bench) -> None:
    aside = bench.aside("a", "aside")
    await turns()
    call = bench.send(freeze(), "freeze")
    bench.ends["aside"].set_exception(Internal("no"))
    with pytest.raises(Internal):
        await aside
    await turns()
    bench.ends["freeze"].set_result(api.Done())
    assert await call == api.Done()
    hanging = bench.aside("a", "hanging")
    await turns()
    await bench.fence.close()
    await hanging
    await bench.aside("a", "late")
    assert bench.stopped == ["hanging"] and "late" not in bench.begun
