"""When something fails: a full disk, a damaged snapshot, a killed process, a cancelled call. With real sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gvisor_support import (
    READY_TIMEOUT_S,
    get,
    identity,
    make_rootfs,
    mount_tmpfs,
    opened,
    python_class,
    run,
    skip_unless_possible,
    unmount,
    until,
    worker_name,
)

from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from greenroom.sandbox.gvisor import GvisorBackend
from greenroom.sandbox.gvisor import backend as gvisor_backend
from greenroom.sandbox.gvisor.box import BoxState, read_record
from greenroom.sandbox.port import ExecSpec, SandboxClass

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    skip_unless_possible()
    yield make_rootfs(tmp_path_factory.mktemp("gvisor") / "rootfs")


@pytest.fixture
def counter(rootfs: Path) -> SandboxClass:
    return python_class(rootfs)


@pytest.fixture
async def backend(rootfs: Path, tmp_path: Path) -> AsyncIterator[GvisorBackend]:
    async with opened(tmp_path / "state") as backend:
        yield backend


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for a mebibyte."""
    disk = tmp_path / "tiny"
    disk.mkdir()
    mount_tmpfs(disk, "1m")
    yield disk
    unmount(disk)


@pytest.mark.parametrize("way", ["socket", "cli"])
async def test_full_disk_leaves_the_actor_running(
    way: str, rootfs: Path, tmp_path: Path, tiny_disk: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREENROOM_GVISOR_CONTROL", way)
    counter = python_class(rootfs)
    async with opened(tmp_path / "state") as backend:
        running = await backend.start(counter, identity("unlucky"))
        await get(running.endpoint, "/inc")
        for frozen in (False, True):
            if frozen:
                await backend.freeze(running.sid)
            with pytest.raises(ResourceExhausted) as caught:
                await backend.checkpoint(running.sid, tiny_disk)
            assert caught.value.reason == "DISK_FULL"
            assert list(tiny_disk.iterdir()) == []
            assert (await get(running.endpoint, "/info"))["ram"] == 1
        await backend.checkpoint(running.sid, image)
        await backend.destroy(running.sid)
        woken = await backend.restore(counter, identity("unlucky"), image, "unlucky")
        assert (await get(woken.endpoint, "/inc"))["ram"] == 2


async def test_an_agent_that_comes_on_a_full_disk_takes_over_what_runs(rootfs: Path, tmp_path: Path) -> None:
    """And does not, where nothing runs: then it may be gVisor that does not work."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_tmpfs(disk, "16m")
    old = GvisorBackend()
    try:
        await old.open(disk / "state", "test")
        await old.reconcile()
        running = await old.start(python_class(rootfs), identity("patient"))
        await get(running.endpoint, "/inc")
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
        new = GvisorBackend()
        probe = await new.open(disk / "state", "test")
        assert [c.detail for c in probe.checks if c.name == "self-test" and "not done" in c.detail]
        (found,) = await new.reconcile()
        await new.freeze(found.sid)
        await new.thaw(found.sid)
        assert (await get(running.endpoint, "/inc"))["ram"] == 2
        await new.close(keep_running=False)
        with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
        with pytest.raises(FailedPrecondition, match="no room"):
            await GvisorBackend().open(disk / "state", "test")
    except BaseException:
        await old.close(keep_running=False)
        raise
    finally:
        unmount(disk)


async def test_cancelled_checkpoint_leaves_the_actor_running(
    backend: GvisorBackend, counter: SandboxClass, image: Path
) -> None:
    running = await backend.start(counter, identity("hasty"))
    await get(running.endpoint, "/inc")
    for delay_s in (0.0, 0.0005, 0.003, 0.01, 0.02):
        task = asyncio.create_task(backend.checkpoint(running.sid, image))
        await asyncio.sleep(delay_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(image.iterdir()) == []
        assert (await get(running.endpoint))["ram"] == 1


@pytest.mark.parametrize("frozen", [False, True])
async def test_checkpoint_ends_commands_so_that_its_image_can_be_restored(
    backend: GvisorBackend, counter: SandboxClass, image: Path, frozen: bool
) -> None:
    running = await backend.start(counter, identity("watched"))
    await get(running.endpoint, "/inc")
    session = await backend.exec(running.sid, ExecSpec(argv=("python3", "-c", "input()")))
    if frozen:
        await backend.freeze(running.sid)
        with pytest.raises(FailedPrecondition, match="frozen"):
            await backend.exec(running.sid, ExecSpec(argv=("python3",)))
    await backend.checkpoint(running.sid, image)
    assert await session.wait() == 137
    woken = await backend.restore(counter, identity("watched"), image, "watched")
    assert (await get(woken.endpoint, "/inc"))["ram"] == 2


async def test_command_that_left_a_child_behind_forbids_a_checkpoint(
    backend: GvisorBackend, counter: SandboxClass, image: Path
) -> None:
    running = await backend.start(counter, identity("parent"))
    await get(running.endpoint, "/inc")
    fork = "import os\nif os.fork() == 0: input()"
    session = await backend.exec(running.sid, ExecSpec(argv=("python3", "-c", fork)))
    assert await session.wait() == 0
    with pytest.raises(FailedPrecondition) as caught:
        await backend.checkpoint(running.sid, image)
    assert caught.value.reason == "EXEC_ACTIVE"
    assert list(image.iterdir()) == []
    assert (await get(running.endpoint, "/inc"))["ram"] == 2
    assert (await run(session, b"end\n"))[0] == 0
    await backend.checkpoint(running.sid, image)
    woken = await backend.restore(counter, identity("parent"), image, "parent")
    assert (await get(woken.endpoint, "/inc"))["ram"] == 3


async def test_only_an_empty_directory_is_written_to(
    backend: GvisorBackend, counter: SandboxClass, image: Path
) -> None:
    running = await backend.start(counter, identity("tidy"))
    (image / "precious").write_text("mine")
    for place in (image, image / "absent"):
        with pytest.raises(InvalidArgument):
            await backend.checkpoint(running.sid, place)
    assert (image / "precious").read_text() == "mine"
    assert (await get(running.endpoint))["ram"] == 0


async def test_damaged_snapshots_are_refused_and_leave_nothing(
    backend: GvisorBackend, counter: SandboxClass, image: Path, tmp_path: Path
) -> None:
    running = await backend.start(counter, identity("fragile"))
    await get(running.endpoint)
    await backend.checkpoint(running.sid, image)
    await backend.destroy(running.sid)
    for name in ("checkpoint.img", "pages_meta.img", "pages.img"):
        whole = (image / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b""):
            (image / name).write_bytes(damaged)
            with pytest.raises(DataLoss):
                await backend.restore(counter, identity("fragile"), image, "fragile")
        (image / name).unlink()
        with pytest.raises(DataLoss):
            await backend.restore(counter, identity("fragile"), image, "fragile")
        (image / name).write_bytes(whole)
    woken = await backend.restore(counter, identity("fragile"), image, "fragile")
    await get(woken.endpoint)
    await backend.destroy(woken.sid)
    await until(lambda: not any((tmp_path / "state/sandboxes").iterdir()))


async def test_killed_sandbox_is_noticed_everywhere(backend: GvisorBackend, counter: SandboxClass, image: Path) -> None:
    running = await backend.start(counter, identity("victim"))
    await get(running.endpoint)
    session = await backend.exec(running.sid, ExecSpec(argv=("python3", "-c", "input()")))
    waiting = asyncio.create_task(backend.wait(running.sid))
    os.kill(pid_of(backend, running.sid), signal.SIGKILL)
    async with asyncio.timeout(READY_TIMEOUT_S):
        assert await waiting == 137
        assert await session.wait() == 137
    for call in (backend.freeze(running.sid), backend.stats(running.sid), backend.checkpoint(running.sid, image)):
        with pytest.raises(GreenroomError) as caught:
            await call
        assert caught.value.reason == "SANDBOX_GONE"
    assert list(image.iterdir()) == []


async def test_killed_warm_sandbox_is_not_used(backend: GvisorBackend, counter: SandboxClass) -> None:
    await backend.warm(counter)
    (box,) = backend._warm[counter.digest]
    os.kill(box.record.pid, signal.SIGKILL)
    assert box.process is not None
    await box.process.ended()
    running = await backend.start(counter, identity("careful"))
    assert not running.warm
    await get(running.endpoint)


@pytest.mark.parametrize("recorded", [BoxState.FREEZING, BoxState.THAWING])
@pytest.mark.parametrize("frozen", [False, True])
async def test_agent_that_died_while_freezing_or_thawing(
    rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: BoxState, frozen: bool
) -> None:
    """Whichever happened before the death, the sandbox is found as it is and goes on; also on a machine that stands
    still for long, and with a program of the actor's own where ours was."""
    old = GvisorBackend()
    await old.open(tmp_path, "test")
    await old.reconcile()
    running = await old.start(python_class(rootfs), identity("torn"))
    await get(running.endpoint, "/inc")
    if frozen:
        await old.freeze(running.sid)
    old._boxes[running.sid].save(recorded)

    async def late(*_: object) -> None:
        raise TimeoutError("the machine stood still")

    monkeypatch.setattr(gvisor_backend, "set_hostname", late)
    new = GvisorBackend()
    await new.open(tmp_path, "test")
    (found,) = await new.reconcile()
    assert found.state is (ResidentState.FROZEN if frozen else ResidentState.RUNNING)
    await new.thaw(running.sid)
    assert (await get(running.endpoint, "/inc"))["ram"] == 2
    await new.freeze(running.sid)
    await new.thaw(running.sid)
    assert (await get(running.endpoint, "/inc"))["ram"] == 3
    await new.close(keep_running=False)


#: Puts a program of its own wherever it can where the one is that gives sandboxes their names.
_IMPOSTOR = """
import contextlib, os, signal, sys
for path in ("/run", "/dev", "/dev/.greenroom"):
    with contextlib.suppress(OSError):
        (os.unlink if os.path.islink(path) else lambda p: os.rename(p, "/away"))(path)
    for place in (path, path + "/greenroom", path + "/.greenroom"):
        with contextlib.suppress(OSError):
            os.makedirs(place, exist_ok=True)
            with open(place + "/init", "w") as file:
                file.write(f"#!{sys.executable}\\nopen('/taken-over', 'w')\\n")
            os.chmod(place + "/init", 0o777)
print("ready", flush=True)
while True: signal.pause()
"""


@pytest.mark.parametrize("linked", [False, True])
async def test_an_actor_can_not_replace_the_program_that_names_it(
    tmp_path: Path, image: Path, rootfs: Path, linked: bool
) -> None:
    """It runs with more rights than the actor has, whenever one is woken from another's snapshot."""
    if linked:
        rootfs = make_rootfs(tmp_path / "linked")
        with contextlib.suppress(FileNotFoundError):
            (rootfs / "run").rmdir()
        (rootfs / "opt" / "x").mkdir(parents=True)
        (rootfs / "run").symlink_to("/opt/x")
    cls = python_class(rootfs, "-c", _IMPOSTOR)
    async with opened(tmp_path / "state") as backend:
        golden = await backend.start(cls, identity("golden"))
        assert golden.log_fifo is not None
        async with asyncio.timeout(READY_TIMEOUT_S):
            assert await asyncio.to_thread(read_line, golden.log_fifo) == "ready\n"
        await backend.checkpoint(golden.sid, image)
        woken = await backend.restore(cls, identity("woken"), image, "golden")
        look = "import os; print(os.uname().nodename, os.path.exists('/taken-over'))"
        session = await backend.exec(woken.sid, ExecSpec(argv=("python3", "-c", look)))
        assert await run(session) == (0, b"woken False\n", b"")


async def test_an_image_in_which_that_program_could_be_replaced_is_refused(tmp_path: Path) -> None:
    rootfs = make_rootfs(tmp_path / "linked")
    with contextlib.suppress(FileNotFoundError):
        (rootfs / "dev").rmdir()
    (rootfs / "opt").mkdir()
    (rootfs / "dev").symlink_to("/opt")
    async with opened(tmp_path / "state") as backend:
        with pytest.raises(FailedPrecondition, match="/dev is a link") as caught:
            await backend.start(python_class(rootfs), identity("odd"))
        assert caught.value.reason == "IMAGE_INVALID"


def read_line(fifo: Path) -> str:
    with fifo.open() as log:
        return log.readline()


async def test_half_made_sandboxes_are_removed(rootfs: Path, tmp_path: Path) -> None:
    old = GvisorBackend()
    await old.open(tmp_path, "test")
    await old.reconcile()
    running = await old.start(python_class(rootfs), identity("half"))
    old._boxes[running.sid].save(BoxState.STARTING)
    (tmp_path / "sandboxes" / "no-record").mkdir()
    torn = tmp_path / "sandboxes" / ("f" * 32)
    torn.mkdir()
    (torn / "record.json").write_text("{")
    reused = tmp_path / "sandboxes" / ("e" * 32)
    reused.mkdir()
    record = read_record(tmp_path / "sandboxes" / running.sid)
    assert record is not None
    other = msgspec.structs.replace(record, sid="e" * 32, pid=os.getpid(), started=1, device="", gofer_pid=0)
    (reused / "record.json").write_bytes(msgspec.json.encode(other))

    new = GvisorBackend()
    await new.open(tmp_path, "test")
    assert await new.reconcile() == []
    assert list((tmp_path / "sandboxes").iterdir()) == []
    await new.close(keep_running=False)


async def test_unusable_runsc_is_named_by_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runsc that says the right version but can do nothing fails the self-test, in both ways of speaking to it."""
    impostor = tmp_path / "runsc"
    impostor.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "runsc version 20990101.0" && exit\nexit 3\n')
    impostor.chmod(0o755)
    monkeypatch.setenv("GREENROOM_RUNSC", str(impostor))
    if os.geteuid() != 0:
        pytest.skip("gVisor sandboxes need root")
    backend = GvisorBackend()
    assert (await backend.probe()).available
    with pytest.raises(FailedPrecondition) as caught:
        await backend.open(tmp_path / "state", "test")
    assert caught.value.reason == "SELF_TEST_FAILED"
    assert "step 'create'" in caught.value.message
    assert not backend._network.path.exists()


def pid_of(backend: GvisorBackend, sid: str) -> int:
    return backend._boxes[sid].record.pid


@pytest.mark.parametrize("file", ["memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us"])
async def test_an_actor_does_not_start_without_a_limit_that_held(
    backend: GvisorBackend, counter: SandboxClass, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    if not list(Path("/sys/fs/cgroup").glob(f"*/greenroom/{worker_name(backend)}/{file}")):
        pytest.skip(f"no version 1 hierarchy that has {file}")
    write = Path.write_text

    def write_text(path: Path, text: str, *args: Any) -> int:
        if path.name == file:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return write(path, text, *args)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(Internal, match=f"{file.split('.')[0]} limit could not be set") as caught:
        await backend.start(counter, identity("unlimited"))
    assert caught.value.reason == "LIMIT_NOT_SET"
    monkeypatch.undo()
    running = await backend.start(counter, identity("limited"))
    await get(running.endpoint)
