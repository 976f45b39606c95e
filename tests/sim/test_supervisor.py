"""What the server that keeps agents finds when it starts: directories and records of workers that no pool asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from greenroom.agent.held import Held
from greenroom.cli.supervisor import AgentPaths, Supervisor
from greenroom.engine.members import RETIRING
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import make_snapshot, stage


@pytest.fixture
def paths(tmp_path: Path) -> AgentPaths:
    return AgentPaths(
        workers=tmp_path / "workers", images=tmp_path / "images", snapshots=str(tmp_path / "s"), control="unix:none"
    )


async def test_a_directory_without_papers_goes_unless_it_holds_snapshots(
    make_world: Callable[..., Any], paths: AgentPaths, tmp_path: Path
) -> None:
    """Its papers were torn by a power cut, or are of a version that had none; the database was restored, or is new."""
    with_snapshot, without = paths.workers / "default-7", paths.workers / "default-8"
    for directory in (with_snapshot, without):
        held = Held(directory / "held", directory.name, ObjectSnapshotStore(tmp_path / "s"))
        await held.open()
        await held.keep(make_snapshot(), stage(directory / "staged"))
        (directory / "papers.json").write_bytes(b"{")
    for snapshot_id in held.ids():
        await held.release(snapshot_id)
    async with make_world(workers=0) as world:
        supervisor = Supervisor(world.engine, paths, log_level="info")
        await supervisor.start()
        await supervisor.close()
    assert [path.name for path in paths.workers.iterdir()] == [with_snapshot.name]
    assert [*(with_snapshot / "held" / "snapshots").rglob("*.json")]


async def test_no_agent_is_started_under_the_name_of_a_worker_that_is_not_its_own(
    make_world: Callable[..., Any], paths: AgentPaths
) -> None:
    """An agent that was started by hand, with its state directory elsewhere, retires while the server restarts. A
    second one with an empty disk would take its name, and it would be told to wipe itself."""
    async with make_world(workers=1) as world:
        await world.apply()  # it is registered
        await world.kill_agent("w0")  # so that it does not retire before anybody looks
        assert await world.engine.members.cordon("w0", RETIRING)
        supervisor = Supervisor(world.engine, paths, log_level="info")
        await supervisor.start()
        assert supervisor.names() == set()
        await supervisor.close()
