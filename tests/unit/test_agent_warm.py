"""The warm pool: what it makes and when."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from greenroom.agent.warm import QUIET_S, WarmPool, plan
from greenroom.sandbox.port import SandboxClass


class Warmer:
    """Makes sandboxes in no time and remembers when."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.at: list[float] = []
        self.changed = asyncio.Event()

    async def warm(self, cls: SandboxClass) -> None:
        self.made[cls.digest] = self.made.get(cls.digest, 0) + 1
        self.at.append(time.monotonic())
        self.changed.set()

    def warm_counts(self) -> dict[str, int]:
        return dict(self.made)

    async def chill(self, class_digest: str) -> None:
        self.made[class_digest] -= 1

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60):
            while sum(self.made.values()) < count:
                self.changed.clear()
                await self.changed.wait()


def sandbox_class(name: str) -> SandboxClass:
    return SandboxClass(rootfs=Path("/none"), image_digest=name, argv=("x",), env=())


def test_the_latest_class_gets_what_is_left_over() -> None:
    assert plan(["a"], {}, 4) == (["a"] * 4, [])
    assert plan(["a", "b"], {"b": 4}, 4) == (["a"] * 3, ["b"] * 3)
    assert plan(["a", "b", "c"], {"a": 1, "b": 1}, 2) == ([], [])
    assert plan([], {"a": 1}, 2) == ([], ["a"])


async def test_nothing_is_made_during_a_wake_and_for_a_moment_after_it() -> None:
    warmer = Warmer()
    pool = WarmPool(warmer, 1)
    pool.start()
    try:
        with pool:
            pool.want(sandbox_class("a"))
            await asyncio.sleep(0.02)
            assert not warmer.made
            ended = time.monotonic()
        await warmer.until(1)
        assert warmer.at[0] - ended >= QUIET_S * 0.99
    finally:
        await pool.close()


async def test_a_wake_in_the_quiet_moment_begins_it_anew() -> None:
    warmer = Warmer()
    pool = WarmPool(warmer, 2)
    pool.start()
    try:
        pool.want(sandbox_class("a"))
        ended = []
        for _ in range(3):
            with pool:
                await asyncio.sleep(0)
                ended.append(time.monotonic())
            await asyncio.sleep(QUIET_S / 2)
        await warmer.until(2)
        for at in warmer.at:  # one that stood still for all of the moment may have made it before the next wake
            assert at - max(end for end in ended if end < at) >= QUIET_S * 0.99
    finally:
        await pool.close()
