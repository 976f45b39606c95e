"""What a worker says it has, and what it does when it is told that some of it is nobody's."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agent_kit import SPEC, Bench, short_directory, until
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import Conflict, LeaseLost, Unavailable
from greenroom.core.gc.records import Entry, Kind, Local, log_handle
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


async def sync(bench: Bench, *destroy: str, closed: int = 0, known: str = "", epoch: int = 1) -> api.Synced:
    answer: api.Synced = await bench.call(api.Sync(epoch=epoch, closed_seq=closed, destroy=destroy, known=known))
    return answer


def listed(said: api.Synced | api.Disk) -> dict[str, Entry]:
    entries = said.entries if isinstance(said, api.Disk) else said.report.inventory
    assert entries is not None
    return {entry.handle: entry for entry in entries}


async def on_disk(bench: Bench) -> dict[str, Entry]:
    return listed(await bench.call(api.ListDisk()))


async def wake(bench: Bench, uid: str = "a", seq: int = 1, handle: str = "", generation: int = 1) -> str:
    handle = handle or f"op-{uid}-{generation}"
    identity = replace(bench.identity(generation, uid), sandbox=handle, create_seq=seq)
    ids = bench.ids(handle, generation, uid)
    await bench.call(api.Start(**ids, identity=identity, spec=SPEC, image_digest=""))
    return handle


async def test_it_lists_sandboxes_what_it_holds_and_logs(bench: Bench) -> None:
    handle = await wake(bench, seq=7)
    said = await sync(bench, closed=5)
    assert listed(said)[handle] == Entry(
        handle=handle, create_seq=7, state=Local.LIVE, parent=log_handle("a"), owner="ns/a", generation=1
    )
    assert said.report.closed_seq == 5 and [r.sandbox for r in said.residents] == [handle]
    saved = await bench.suspend()
    (bench.root / "w" / "logs" / "b").mkdir()
    before, said = said, await sync(bench)
    disk = await on_disk(bench)
    assert disk[saved.id].kind is Kind.SNAPSHOT and disk[log_handle("b")].kind is Kind.LOG
    assert handle not in listed(said) and said.report.closed_seq == 5, "it never goes back"
    assert said.disk != before.disk, "it is worth a look"


async def test_a_disk_is_listed_in_pages(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_DISK_PAGE", 3)
    for n in range(7):
        (bench.root / "w" / "logs" / f"u{n}").mkdir()
    found: list[str] = []
    more = True
    while more:
        page: api.Disk = await bench.call(api.ListDisk(after=found[-1] if found else ""))
        assert len(page.entries) <= 3
        found += [entry.handle for entry in page.entries]
        more = page.more
    assert found == [log_handle(f"u{n}") for n in range(7)]


async def test_what_is_known_is_not_said_again(bench: Bench) -> None:
    await wake(bench)
    first = await sync(bench)
    again = await sync(bench, known=first.digest)
    assert again.same and not again.report.inventory and not again.residents
    await wake(bench, "b")
    assert not (await sync(bench, known=first.digest)).same


async def test_another_epoch_is_refused_and_nothing_is_destroyed(bench: Bench) -> None:
    handle = await wake(bench)
    for epoch in (0, 2):
        with pytest.raises(Conflict, match="register it again") as refused:
            await sync(bench, handle, epoch=epoch, closed=9)
        assert refused.value.reason == "WRONG_EPOCH"
    said = await sync(bench)
    assert handle in listed(said) and said.report.closed_seq == 0


async def test_a_late_call_for_a_disk_that_was_retired_is_refused_on_the_next_one_of_its_name(bench: Bench) -> None:
    """Both are in epoch 1: the name's record was removed in between."""
    handle = await wake(bench)
    for late in (
        api.Sync(epoch=1, incarnation="the disk before", closed_seq=500, destroy=(handle,)),
        api.Shutdown(wipe=True, erase=True, epoch=1, incarnation="the disk before", closed_seq=500),
    ):
        with pytest.raises(Conflict, match="the disk before") as refused:
            await bench.call(late)
        assert refused.value.reason == "WRONG_EPOCH"
    mine = bench.agent._enrolment.papers.incarnation
    for said in ("", mine):
        assert (await bench.call(api.Sync(epoch=1, incarnation=said, closed_seq=0))).report.closed_seq == 0
    assert bench.state() and not bench.agent.shutdown.done()


async def test_t23_a_create_whose_number_is_closed_comes_too_late(bench: Bench) -> None:
    await sync(bench, closed=4)
    with pytest.raises(Unavailable, match="nobody waits for it any more"):
        await wake(bench, seq=4)
    await wake(bench, seq=5)
    await bench.restart()
    with pytest.raises(Unavailable, match="comes too late"):
        await wake(bench, "b", seq=4)  # it is written down


async def being_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Task[str], asyncio.Event]:
    """A wake, and what it waits for."""
    start, go_on = bench.backend.start, asyncio.Event()

    async def held_up(*args: Any) -> Any:
        await go_on.wait()
        return await start(*args)

    monkeypatch.setattr(bench.backend, "start", held_up)
    waking = asyncio.create_task(wake(bench))
    await until(lambda: bench.agent._wakes)
    return waking, go_on


async def test_t20_what_is_just_being_made_is_listed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    waking, go_on = await being_made(bench, monkeypatch)
    assert listed(await sync(bench))["op-a-1"].state is Local.INIT
    go_on.set()
    await waking
    assert listed(await sync(bench))["op-a-1"].state is Local.LIVE


async def test_what_is_just_being_made_ends_when_nobody_waits_for_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    waking, go_on = await being_made(bench, monkeypatch)
    await sync(bench, "op-a-1")
    go_on.set()
    with pytest.raises(LeaseLost, match="nobody waits for sandbox op-a-1"):
        await waking
    assert not bench.backend._sandboxes
    await until(lambda: not len(bench.agent._inventory._sweeper))


async def test_it_destroys_what_it_is_told_to(bench: Bench) -> None:
    gone, stays = await wake(bench), await wake(bench, "b")
    saved = await bench.suspend()
    handle = await wake(bench, generation=3)
    await sync(bench, gone, handle, saved.id, log_handle("a"), "never-here")
    await until(lambda: not len(bench.agent._inventory._sweeper))
    assert {*listed(await sync(bench))} == {stays} and not (await on_disk(bench)).keys() - {log_handle("b")}
    assert bench.state("b") is api.ResidentState.RUNNING and bench.state("a") is None


async def test_an_old_order_does_not_meet_what_came_after_it(bench: Bench) -> None:
    """Handles are never used twice, so an order for the sandbox before is none for this one."""
    before = await wake(bench)
    await bench.suspend()
    await wake(bench, generation=3)
    await sync(bench, before)
    await until(lambda: not len(bench.agent._inventory._sweeper))
    assert bench.state() is api.ResidentState.RUNNING


async def test_a_log_stays_as_long_as_somebody_writes_to_it(bench: Bench) -> None:
    handle = await wake(bench)
    (bench.root / "w" / "logs" / "a").mkdir(exist_ok=True)
    await sync(bench, log_handle("a"))
    assert (await on_disk(bench))[log_handle("a")].state is Local.DYING
    assert (bench.root / "w" / "logs" / "a").is_dir() and bench.state() is api.ResidentState.RUNNING
    await sync(bench, handle)
    await until(lambda: not (bench.root / "w" / "logs" / "a").exists())


async def test_t27_what_can_not_be_listed_is_not_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await wake(bench)

    def broken() -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(bench.agent._logs, "uids", broken)
    said = await sync(bench)
    assert len(listed(said)) == 1 and not await on_disk(bench), "nothing is said of logs, and nobody misses them"


async def test_what_ended_and_could_not_be_removed_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else knows of it: the actor is not there any more, and no record speaks of the sandbox."""
    monkeypatch.setattr("greenroom.agent.sweeper.FIRST_RETRY_S", 0.01)
    failures = tuple(ScriptedFailure(call=n, code="UNAVAILABLE") for n in (1, 2))
    script = SimScript(methods={"destroy": MethodScript(failures=failures)})
    with short_directory() as root:
        async with Bench(root, script=script) as bench:
            await wake(bench)
            [box] = bench.backend._sandboxes.values()
            box.end(7)
            await until(lambda: not bench.backend._sandboxes)
            await until(lambda: not len(bench.agent._inventory._sweeper))
            assert not listed(await sync(bench))


async def test_t34_a_full_disk_does_not_keep_anything_from_being_destroyed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await wake(bench)
    saved = await bench.suspend()
    handle = await wake(bench, generation=3)

    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench.agent._enrolment, "_write", full)
    said = await sync(bench, handle, saved.id, closed=9)
    assert said.report.closed_seq == 0, "what can't be written down is not closed"
    await until(lambda: not len(bench.agent._inventory._sweeper))
    assert not listed(await sync(bench)) and not (await on_disk(bench)).keys() - {log_handle("a")}
