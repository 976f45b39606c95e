"""Calls that take long say how far they are: at least once a second while something moves, at most ten times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_kit import SPEC, Bench, Said, short_directory
from msgspec.structs import replace

from greenroom.agent.progress import QUIET_S, Reports
from greenroom.core import agentapi as api
from greenroom.core.errors import DeadlineExceeded
from greenroom.core.records import Probe
from greenroom.sandbox.sim import MethodScript, SimScript


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


async def test_however_fast_it_moves_it_is_told_ten_times_a_second_and_the_latest() -> None:
    said = Said()
    with Reports(said) as reports:
        began = asyncio.get_running_loop().time()
        count = 0
        while asyncio.get_running_loop().time() < began + QUIET_S + 0.55:
            count += 1
            reports.bytes("x", count, 0)
            await asyncio.sleep(0.001)
    said.check_rate()
    assert 3 <= len(said.progresses) <= 7
    assert said.progresses[0][0] - began >= QUIET_S * 0.95
    last = said.progresses[-1][1].done_bytes
    assert 0.5 * count < last <= count
    await asyncio.sleep(0.15)
    assert len(said.progresses) <= 7, "nothing is told after the call"


async def test_a_phase_that_is_told_once_arrives() -> None:
    said = Said()
    with Reports(said) as reports:
        reports.phase("one")
        reports.phase("two")
        await asyncio.sleep(QUIET_S + 0.05)
        reports.phase("three")
        await asyncio.sleep(0.15)
    assert said.phases == ["two", "three"]
    said.check_rate()


async def test_a_fast_call_tells_nothing(bench: Bench) -> None:
    await bench.boot()
    await bench.restore(await bench.suspend())
    assert bench.said.progresses == []


async def test_a_boot_and_a_wait_for_readiness(bench: Bench) -> None:
    bench.backend.script = SimScript(methods={"start": MethodScript(latency_s=QUIET_S + 0.2)})
    spec = replace(SPEC, readyz=Probe(path="/never", timeout_s=0.4))
    with pytest.raises(DeadlineExceeded):
        await bench.boot(spec=spec)
    assert bench.said.phases == ["boot", "ready"]
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
    await bench.checkpoint(bench.manifest())
    bench.said.check_rate()
    sizes = [p.done_bytes for _, p in bench.said.progresses]
    assert bench.said.phases == ["checkpoint"] and len(sizes) >= 4 and sizes == sorted(sizes) and sizes[-1] > 15 << 20


async def test_a_restore_that_hangs_is_silent_after_it_has_said_so(bench: Bench) -> None:
    await bench.boot()
    held = await bench.suspend()
    bench.backend.script = SimScript(methods={"restore": MethodScript(latency_s=QUIET_S + 0.7)})
    await bench.restore(held)
    assert [p for _, p in bench.said.progresses] == [
        api.Progress(phase="load", done_bytes=held.size_bytes, total_bytes=held.size_bytes)
    ] or bench.said.phases == ["load"]
    assert len(bench.said.progresses) == 1
