"""``kill -9`` while actors come and go, scaled down; in full it is `bench/gc_kill.py`. And pools that get smaller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import Kit, until

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.records import PoolSpec
from greenroom.testing.kills.rounds import Rounds
from greenroom.testing.leaks import leaks
from greenroom.testing.leftovers import leftovers

pytestmark = pytest.mark.xdist_group("sandboxes")

ROUNDS = 3


@pytest.mark.timeout(600)  # a round waits up to three minutes for the end of what is left
@pytest.mark.parametrize("backend", ["process", pytest.param("gvisor", marks=[pytest.mark.gvisor, pytest.mark.root])])
def test_nothing_leaks_and_nothing_alive_is_touched(data_dir: Path, counter_image: str, backend: str) -> None:
    rounds = Rounds(data_dir, backend, counter_image, seed=5)

    async def run() -> None:
        for _ in range(ROUNDS):
            await rounds.round()

    try:
        rounds.start()
        asyncio.run(run())
    finally:
        rounds.stop()
    assert rounds.findings == []
    assert leftovers(data_dir / "d") == []


@pytest.mark.timeout(120)
def test_a_pool_that_gets_smaller_leaves_nothing(serve: Callable[..., Kit], data_dir: Path) -> None:
    kit = serve(backend="process", workers=2)
    assert kit.apply().state == "Ready"
    kit.create("a", "b", "c")
    counts = {name: kit.get(name)["file"] for name in "abc"}

    def resize(replicas: int) -> None:
        spec = PoolSpec(replicas=replicas, slots=4, backend="process")
        kit.client.pools.ApplyPool(pb.ApplyPoolRequest(name="default", spec=convert.to_message(spec)))

    resize(1)
    assert until(lambda: leaks(data_dir), lambda found: not found) == []
    assert [path.name for path in (data_dir / "workers").iterdir()] == ["default-0"]
    assert {name: kit.get(name)["file"] for name in "abc"} == {name: count + 1 for name, count in counts.items()}
    # One that is taken back while it starts: it is given no actor that would go with it.
    resize(2)
    resize(1)
    assert until(lambda: leaks(data_dir), lambda found: not found) == []
    kit.live.kill()
    kit.live.workers = 2
    kit.live.start()
    assert until(lambda: leaks(data_dir), lambda found: not found) == []
    assert {name: kit.get(name)["file"] for name in "abc"} == {name: count + 2 for name, count in counts.items()}
