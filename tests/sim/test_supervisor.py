"""What the server that keeps agents finds when it starts: directories and records of workers that no pool asks for."""

from __future__ import annotations

import asyncio
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
        async with asyncio.timeout(30):
            while without.exists():
                await asyncio.sleep(0.05)
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


async def test_a_retirement_that_an_earlier_server_did_not_write_down(
    make_world: Callable[..., Any], paths: AgentPaths
) -> None:
    """It was killed between the worker's answer, that its disk is erased, and the end of the record. One that went
    without a word is not taken for it."""
    async with make_world(workers=2) as world:
        await world.apply()
        incarnation = (await world.engine.members.find("w0")).incarnation
        for name in ("w0", "w1"):
            await world.kill_agent(name)
            assert await world.engine.members.cordon(name, RETIRING)
        paths.workers.mkdir()
        (paths.workers / ".w0.retires").write_text(incarnation)
        (paths.workers / ".w1.retires").write_text(incarnation)
        supervisor = Supervisor(world.engine, paths, log_level="info")
        await supervisor.start()
        assert [await world.engine.members.find(name) is None for name in ("w0", "w1")] == [True, False]
        assert not [*paths.workers.iterdir()]
        await supervisor.close()


async def test_a_worker_whose_disk_is_there_has_not_retired(
    make_world: Callable[..., Any], paths: AgentPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told to retire while somebody looks what became of it. (Its record would go, and it would come back as one
    that the database knows nothing of.)"""
    async with make_world(workers=1) as world:
        await world.apply()
        members = world.engine.members
        (paths.workers / "w0").mkdir(parents=True)
        (paths.workers / ".w0.retires").write_text((await members.find("w0")).incarnation)
        await world.kill_agent("w0")
        supervisor, find = Supervisor(world.engine, paths, log_level="info"), members.find

        async def find_and_be_late(name: str) -> object:
            found = await find(name)
            monkeypatch.undo()
            assert await members.cordon("w0", RETIRING)
            return found

        monkeypatch.setattr(members, "find", find_and_be_late)
        await supervisor._conclude("w0")
        assert await members.find("w0") is not None
