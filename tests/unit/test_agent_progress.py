"""Calls that take long say how far they are: at least once a second while something moves, at most ten times."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from agent_kit import PATIENCE_S, SPEC, Bench, Said, short_directory, until
from msgspec.structs import replace

from greenroom.agent.progress import PROGRESS_INTERVAL_S, QUIET_S, Reports
from greenroom.core.errors import DeadlineExceeded
from greenroom.core.records import Probe
from greenroom.sandbox.sim import MethodScript, SimScript
from greenroom.testing.simloop import SimLoop


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """What is told when is exact where nothing else takes time."""
    loop = SimLoop(0)
    loop.run_until_complete(main())
    loop.close()


def intervals(said: Said) -> list[float]:
    return [after - before for (before, _), (after, _) in itertools.pairwise(said.progresses)]


def test_however_fast_it_moves_it_is_told_ten_times_a_second_and_the_latest() -> None:
    async def main() -> None:
        said = Said()
        with Reports(said) as reports:
            for count in range(1, 1000):  # a second
                reports.bytes("x", count, 0)
                await asyncio.sleep(0.001)
        assert [at for at, _ in said.progresses] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
        assert [p.done_bytes for _, p in said.progresses] == pytest.approx([500, 600, 700, 800, 900], abs=2)
        await asyncio.sleep(1)
        assert len(said.progresses) == 5, "nothing is told after the call"

    in_virtual_time(main)


def test_a_phase_that_is_told_once_arrives() -> None:
    async def main() -> None:
        said = Said()
        with Reports(said) as reports:
            reports.phase("one")
            reports.phase("two")
            await asyncio.sleep(QUIET_S + 0.05)
            reports.phase("three")
            await asyncio.sleep(0.15)
        assert said.phases == ["two", "three"]
        assert intervals(said) == pytest.approx([PROGRESS_INTERVAL_S])

    in_virtual_time(main)


def test_while_files_grow_it_is_told_once_a_second(tmp_path: Path) -> None:
    async def main() -> None:
        said = Said()
        with Reports(said) as reports, (tmp_path / "pages").open("wb", buffering=0) as file:
            async with reports.growing(tmp_path, "checkpoint"):
                for _ in range(100):  # ten seconds
                    file.write(b"x")
                    await asyncio.sleep(0.1)
        assert len(said.progresses) >= 10 and max(intervals(said)) <= 1.0
        assert said.progresses[-1][1].done_bytes >= 90

    in_virtual_time(main)


async def test_a_fast_call_tells_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reports.__init__, "__defaults__", (PATIENCE_S,))  # fast by this, on any machine
    await bench.boot()
    await bench.restore(await bench.suspend())
    assert bench.said.progresses == []


async def test_a_boot_and_a_wait_for_readiness(bench: Bench) -> None:
    bench.backend.script = SimScript(methods={"start": MethodScript(latency_s=QUIET_S + 0.2)})
    spec = replace(SPEC, readyz=Probe(path="/never", timeout_s=0.4))
    bench.said.begin()
    with pytest.raises(DeadlineExceeded):
        await bench.boot(spec=spec)
    assert bench.said.phases[-2:] == ["boot", "ready"]  # a slow machine may say what comes before
    bench.said.check_rate()


async def test_a_checkpoint_says_what_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.boot()
    checkpoint = bench.backend.checkpoint

    async def slowly(sid: str, dest: Path) -> object:
        with (dest / "pages").open("wb") as file:
            for _ in range(24):
                file.write(bytes(1 << 20))
                file.flush()
                await asyncio.sleep(0.1)
        return await checkpoint(sid, dest)

    monkeypatch.setattr(bench.backend, "checkpoint", slowly)
    bench.said.begin()
    await bench.checkpoint(bench.manifest())
    bench.said.check_rate()
    sizes = [p.done_bytes for _, p in bench.said.progresses]
    assert bench.said.phases == ["checkpoint"] and len(sizes) >= 4 and sizes == sorted(sizes) and sizes[-1] > 15 << 20


async def test_a_restore_that_hangs_is_silent_after_it_has_said_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.boot()
    held = await bench.suspend()
    bench.backend.script = SimScript(methods={"restore": MethodScript(latency_s=3600.0)})
    verify, verified = bench.snapshots.verify, asyncio.Event()

    async def verify_and_say(*args: Any) -> None:
        await verify(*args)
        verified.set()

    monkeypatch.setattr(bench.snapshots, "verify", verify_and_say)
    bench.said.begin()
    restore = asyncio.create_task(bench.restore(held))
    await verified.wait()  # this goes on beside it, and tells how far it is
    await until(lambda: bench.said.phases[-1:] == ["load"])
    await asyncio.sleep(2 * PROGRESS_INTERVAL_S)
    told = len(bench.said.progresses)
    await asyncio.sleep(QUIET_S)
    assert len(bench.said.progresses) == told
    bench.said.check_rate()
    restore.cancel()
    await asyncio.gather(restore, return_exceptions=True)
