"""What an agent destroys: some of each kind at a time, children first, and what hangs or fails holds up nobody else."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from agent_kit import until

from greenroom.agent import sweeper as module
from greenroom.agent.sweeper import Sweeper
from greenroom.core.errors import Unavailable
from greenroom.core.gc.records import Entry, Kind, Local
from greenroom.core.gc.worker import PLACES

#: None of what ends by itself takes this long.
LIMITS_S = dict.fromkeys(Kind, 30.0)


def entry(handle: str, kind: Kind = Kind.SANDBOX, parent: str = "") -> Entry:
    return Entry(handle=handle, create_seq=1, state=Local.LIVE, kind=kind, parent=parent)


class Disk:
    """What there is; some of it hangs, some fails so often."""

    def __init__(self, *entries: Entry) -> None:
        self.there = {e.handle: e for e in entries}
        self.hangs: set[str] = set()
        self.fails: Counter[str] = Counter()
        self.order: list[str] = []
        self.busy: Counter[Kind] = Counter()
        self.most: Counter[Kind] = Counter()

    def present(self) -> list[Entry]:
        return [*self.there.values()]

    async def destroy(self, entry: Entry) -> None:
        self.busy[entry.kind] += 1
        self.most[entry.kind] = max(self.most[entry.kind], self.busy[entry.kind])
        try:
            await asyncio.sleep(0.001)
            if entry.handle in self.hangs:
                await asyncio.Event().wait()
            if self.fails[entry.handle] > 0:
                self.fails[entry.handle] -= 1
                raise Unavailable("it does not go")
            self.there.pop(entry.handle, None)
            self.order.append(entry.handle)
        finally:
            self.busy[entry.kind] -= 1


@pytest.fixture(autouse=True)
def _quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.01)


async def test_no_more_at_a_time_than_there_are_places() -> None:
    many = [entry(f"{kind}-{n}", kind) for kind in Kind for n in range(20)]
    disk = Disk(*many)
    sweeper = Sweeper(disk.present, disk.destroy, LIMITS_S)
    sweeper.order(many)
    sweeper.order(many)  # again is not twice
    await until(lambda: not len(sweeper))
    assert not disk.there and len(disk.order) == len(many)
    assert dict(disk.most) == PLACES
    assert sweeper.swept.destroyed == dict.fromkeys(Kind, 20)


async def test_t28_what_hangs_costs_its_place_only() -> None:
    many = [entry(f"s{n}") for n in range(20)]
    disk = Disk(*many)
    disk.hangs = {"s0", "s1", "s2"}
    sweeper = Sweeper(disk.present, disk.destroy, {Kind.SANDBOX: 30.0})
    sweeper.order(many)
    await until(lambda: len(disk.order) == 17)
    assert {*disk.there} == disk.hangs and all(handle in sweeper for handle in disk.hangs)
    await sweeper.close()
    assert not disk.busy[Kind.SANDBOX]


async def test_what_takes_too_long_is_stopped_and_tried_again() -> None:
    disk = Disk(entry("s"))
    disk.hangs = {"s"}
    sweeper = Sweeper(disk.present, disk.destroy, {Kind.SANDBOX: 0.02})
    sweeper.order(disk.present())
    await until(lambda: sweeper.swept.failures >= 2)
    disk.hangs.clear()
    await until(lambda: not len(sweeper))
    assert not disk.there


async def test_what_fails_is_tried_again_and_does_not_hold_up_the_others() -> None:
    many = [entry(f"s{n}") for n in range(10)]
    disk = Disk(*many)
    disk.fails = Counter({"s0": 3})
    sweeper = Sweeper(disk.present, disk.destroy, LIMITS_S)
    sweeper.order(many)
    await until(lambda: not len(sweeper))
    assert disk.order[-1] == "s0" and sweeper.swept.failures == 3
    assert sweeper.swept.destroyed == {Kind.SANDBOX: 10}


async def test_an_error_that_nobody_thought_of_does_not_end_it() -> None:
    tries = 0

    async def destroy(entry: Entry) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ZeroDivisionError

    sweeper = Sweeper(list, destroy, LIMITS_S)
    sweeper.order([entry("s")])
    await until(lambda: not len(sweeper))
    assert tries == 2


async def test_t33_what_lives_in_something_goes_before_it() -> None:
    disk = Disk(entry("log-a", Kind.LOG), entry("s", parent="log-a"))
    sweeper = Sweeper(disk.present, disk.destroy, LIMITS_S)
    sweeper.order([disk.there["log-a"]])
    await asyncio.sleep(0.05)
    assert {*disk.there} == {"log-a", "s"}, "somebody lives in it"
    sweeper.order([disk.there["s"]])
    await until(lambda: not len(sweeper))
    assert disk.order == ["s", "log-a"]
