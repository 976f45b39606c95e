"""The virtual-time event loop: what it promises to programs, and that the same seed takes the same course."""

from __future__ import annotations

import asyncio
import time

import pytest

from greenroom.testing.simloop import Deadlock, Pace, Process, Runaway, SimLoop


def test_an_hour_passes_at_once() -> None:
    loop = SimLoop(0)
    began = time.monotonic()

    async def main() -> float:
        await asyncio.sleep(3600)
        return loop.time()

    assert loop.run_until_complete(main()) == 3600.0
    assert time.monotonic() - began < 5
    loop.close()


def test_timeouts_and_cancellation() -> None:
    loop = SimLoop(0)

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await loop.create_future()
        task = asyncio.create_task(asyncio.sleep(10))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return loop.time()

    assert loop.run_until_complete(main()) == 4.0
    loop.close()


def test_callbacks_of_a_process_run_in_the_order_in_which_they_were_registered() -> None:
    for seed in range(20):
        loop, order = SimLoop(seed), []

        async def main(loop: SimLoop = loop, order: list[int] = order) -> None:
            for number in range(10):
                loop.call_soon(order.append, number)
            await asyncio.sleep(0)

        loop.run_until_complete(main())
        assert order == list(range(10))
        loop.close()


def orders(seed: int) -> str:
    """Two processes, whose steps nothing puts in an order."""
    loop, order = SimLoop(seed), []
    processes = [loop.process(name) for name in "ab"]

    async def run(process: Process) -> None:
        for _ in range(10):
            order.append(process.name)
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(loop.start(process, run(process)) for process in processes))

    loop.run_until_complete(main())
    loop.close()
    return "".join(order)


def test_the_order_of_processes_is_drawn() -> None:
    assert len({orders(seed) for seed in range(20)}) > 10
    assert [orders(seed) for seed in range(20)] == [orders(seed) for seed in range(20)]


def test_the_order_of_timers_of_one_instant_is_drawn() -> None:
    def fired(seed: int) -> tuple[int, ...]:
        loop, order = SimLoop(seed), []

        async def main() -> None:
            for number in range(5):
                loop.call_at(1.0, order.append, number)
            await asyncio.sleep(2)

        loop.run_until_complete(main())
        loop.close()
        return tuple(order)

    assert len({fired(seed) for seed in range(20)}) > 10


def test_a_dead_process_does_nothing_any_more() -> None:
    loop, said = SimLoop(0), []
    process = loop.process("victim")

    async def work() -> None:
        try:
            while True:
                said.append(loop.time())
                await asyncio.sleep(1)
        finally:
            said.append(-1.0)

    async def main() -> None:
        loop.start(process, work())
        await asyncio.sleep(2.5)
        loop.kill(process)
        await asyncio.sleep(10)

    loop.run_until_complete(main())
    assert said == [0.0, 1.0, 2.0], "not even a finally"
    loop.close()


def test_a_paused_process_goes_on_as_if_nothing_had_happened() -> None:
    loop, said = SimLoop(0), []
    process = loop.process("sleeper")

    async def work() -> None:
        while True:
            await asyncio.sleep(1)
            said.append(loop.time())

    async def main() -> None:
        loop.start(process, work())
        await asyncio.sleep(1.5)
        loop.pause(process, 10)
        await asyncio.sleep(11.5)

    loop.run_until_complete(main())
    assert said == [1.0, 11.5, 12.5]
    loop.close()


def test_other_things_happen_while_a_process_is_busy() -> None:
    """A chain of callbacks takes time, so a message may come between two of its links."""

    def interrupted(seed: int) -> bool:
        loop, order = SimLoop(seed, pace=Pace(often=0.5, short_s=0.01)), []

        async def chain() -> None:
            for link in range(20):
                order.append(link)
                await asyncio.sleep(0)

        async def main() -> None:
            loop.call_later(0.02, order.append, -1)
            await asyncio.create_task(chain())
            await asyncio.sleep(1)

        loop.run_until_complete(main())
        loop.close()
        return 0 < order.index(-1) < 20

    assert sum(interrupted(seed) for seed in range(20)) > 10


def test_who_waits_for_ever_is_named() -> None:
    loop = SimLoop(0)

    async def forgotten() -> None:
        await loop.create_future()

    async def main() -> None:
        await asyncio.create_task(forgotten(), name="who-was-it")

    with pytest.raises(Deadlock, match="main/who-was-it"):
        loop.run_until_complete(main())
    loop.close()


def test_what_goes_round_and_round_is_ended() -> None:
    loop = SimLoop(0, limit=1000)

    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Runaway):
        loop.run_until_complete(main())
    loop.close()


def test_what_a_callback_raises_ends_the_run() -> None:
    loop = SimLoop(0)

    def fail() -> None:
        raise AssertionError("here")

    async def main() -> None:
        loop.call_later(1, fail)
        await asyncio.sleep(10)

    with pytest.raises(AssertionError, match="here"):
        loop.run_until_complete(main())
    assert loop.time() == 1.0
    loop.close()


def test_there_are_no_threads() -> None:
    loop = SimLoop(0)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(time.time)

    loop.run_until_complete(main())
    loop.close()


def test_sets_of_tasks_are_in_order() -> None:
    loop = SimLoop(0)

    async def main() -> list[str]:
        tasks = {asyncio.create_task(asyncio.sleep(0), name=str(n)) for n in range(50)}
        names = [task.get_name() for task in tasks]
        await asyncio.wait(tasks)
        return names

    first = loop.run_until_complete(main())
    loop.close()
    loop = SimLoop(0)
    assert loop.run_until_complete(main()) == first
    loop.close()
