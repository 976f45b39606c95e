"""The `process` backend keeps the port's rules, as root and as nobody, and what is particular to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import msgspec
import pytest

import greenroom
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, ResourceExhausted
from greenroom.sandbox.port import Backend, ExecSpec
from greenroom.sandbox.process import ProcessBackend, backend
from greenroom.sandbox.process.files import ARCHIVE
from greenroom.testing.backend_conformance import (
    BackendConformance,
    BackendTools,
    counter_class,
    counter_rootfs,
    digests,
    identity,
)

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this to the machine")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _first_line(fifo: Path) -> bytes:
    with open(fifo, "rb") as log:
        return log.readline()


class Tools(BackendTools):
    async def make_backend(self) -> Backend:
        return ProcessBackend()

    async def python(self, backend: Backend, sid: str, script: str) -> str:
        """Runs a script in the sandbox and returns what it printed."""
        session = await backend.exec(sid, ExecSpec(argv=("python3", "-c", script)))
        status, out, err = await self.run(session)
        assert status == 0, err.decode()
        return out.decode().strip()


class TestProcessBackend(Tools, BackendConformance):
    lacks = frozenset({"warm"})


class TestFiles(Tools):
    """What a snapshot of files keeps."""

    async def test_removed_and_replaced_files_stay_so(self, tmp_path: Path) -> None:
        cls, owner = counter_class(counter_rootfs()), identity()
        change = (
            "import os, shutil; os.remove('/etc/hosts'); shutil.rmtree('/var/tmp'); os.mkdir('/var/tmp');"
            "open('/root/x', 'w').write('mine'); os.chmod('/root/x', 0); os.link('/root/x', '/root/y')"
        )
        look = (
            "import os; print(os.path.exists('/etc/hosts'), os.listdir('/var/tmp'), os.stat('/root/x').st_nlink,"
            "oct(os.stat('/root/y').st_mode & 0o777))"
        )
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.python(backend, running.sid, change)
            await backend.checkpoint(running.sid, tmp_path)
            await backend.destroy(running.sid)
            running = await backend.restore(cls, owner, tmp_path, owner.hostname)
            assert await self.python(backend, running.sid, look) == "False [] 2 0o0"

    async def test_links_that_lead_out_lead_nowhere(self, tmp_path: Path) -> None:
        """A hostile actor may leave anything where the next sandbox makes its mount points."""
        outside, tree, source = (tmp_path / name for name in ("outside", "tree", "source"))
        for directory in (outside, tree, source):
            directory.mkdir(mode=0o777)
        for name in ("run", "etc", "dev", "proc", "tmp"):
            (tree / name).symlink_to(outside)
        with tarfile.open(source / ARCHIVE, "w") as archive:
            archive.add(tree, ".")
        async with self.opened() as (backend, _, _):
            with contextlib.suppress(GreenroomError):  # it may start or not, but only over its own files
                await backend.restore(counter_class(counter_rootfs()), identity(), source, "x")
        assert list(outside.iterdir()) == []

    async def test_a_user_and_its_files(self, tmp_path: Path) -> None:
        cls = msgspec.structs.replace(counter_class(counter_rootfs()), uid=1234, gid=1235)
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, identity())
            said = await self.python(backend, running.sid, "import os; print(os.getuid(), os.getgid())")
            assert said == "1234 1235"
            await self.python(backend, running.sid, "open('/data/mine', 'w')")
            await backend.checkpoint(running.sid, tmp_path)
            again = await backend.restore(cls, identity(), tmp_path, "x")
            owner = await self.python(
                backend, again.sid, "import os; s = os.stat('/data/mine'); print(s.st_uid, s.st_gid)"
            )
            assert owner == "1234 1235"


class TestStopping(Tools):
    async def test_a_program_that_ignores_the_signal_is_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backend, "STOP_GRACE_S", 0.2)
        script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('listens', flush=True); time.sleep(999)"
        cls = msgspec.structs.replace(counter_class(counter_rootfs()), argv=("python3", "-c", script))
        async with self.opened() as (process, _, _):
            running = await process.start(cls, identity())
            assert running.log_fifo is not None
            assert b"listens" in await asyncio.to_thread(_first_line, running.log_fifo)
            phases = await process.checkpoint(running.sid, tmp_path)
            assert phases[0].seconds >= 0.2
            assert digests(tmp_path)

    async def test_a_sleeper_survives_its_agent(self, tmp_path: Path) -> None:
        """Between checkpoint and publish the files in the sandbox are all there is of the actor."""
        cls, owner = counter_class(counter_rootfs()), identity()
        place = Path(tempfile.mkdtemp(prefix="gr-"))
        first = await self.make_backend()
        await first.open(place, "w")
        await first.reconcile()
        running = await first.start(cls, owner)
        await self.ask(running.endpoint, owner, "/")
        await first.checkpoint(running.sid, tmp_path)
        await first.close(keep_running=True)
        (place / "sandboxes" / ("f" * 32)).mkdir()  # half made: not even a record
        second = await self.make_backend()
        await second.open(place, "w")
        (found,) = await second.reconcile()
        assert (found.sid, found.state) == (running.sid, ResidentState.FROZEN)
        assert (await self.ask(await second.thaw(found.sid), owner, "/")).file == 2
        await second.close(keep_running=False)
        assert [p.name for p in (place / "sandboxes").iterdir()] == []
        shutil.rmtree(place)

    async def test_one_agent_per_directory(self) -> None:
        async with self.opened() as (_, state_dir, _):
            with pytest.raises(FailedPrecondition, match="another agent"):
                await (await self.make_backend()).open(state_dir, "other")

    @needs_root
    async def test_full_disk_leaves_it_running(self, tmp_path: Path) -> None:
        cls, owner = counter_class(counter_rootfs()), identity()
        await asyncio.to_thread(_run, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path))
        try:
            async with self.opened() as (backend, _, _):
                running = await backend.start(cls, owner)
                await self.ask(running.endpoint, owner, "/")
                await self.python(backend, running.sid, "open('/data/big', 'wb').write(b'x' * 1_000_000)")
                with pytest.raises(ResourceExhausted, match="full") as caught:
                    await backend.checkpoint(running.sid, tmp_path)
                assert caught.value.reason == "DISK_FULL"
                assert list(tmp_path.iterdir()) == []
                assert (await self.ask(running.endpoint, owner, "/")).file == 2
        finally:
            await asyncio.to_thread(_run, "umount", str(tmp_path))

    async def test_cancelled_checkpoint_leaves_it_running(self, tmp_path: Path) -> None:
        cls, owner = counter_class(counter_rootfs()), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            for times, delay in enumerate((0.0, 0.002, 0.005, 0.008), start=1):
                await self.ask(running.endpoint, owner, "/")
                dest = tmp_path / str(times)
                dest.mkdir()
                task = asyncio.create_task(backend.checkpoint(running.sid, dest))
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.wait([task])
                if task.cancelled():
                    assert digests(dest) == {}
                else:
                    assert digests(dest)
                    await backend.thaw(running.sid)
                assert (await self.ask(running.endpoint, owner)).file == times


class TestHostIsOutOfReach(Tools):
    """No security boundary, but the actor's root must not change the machine by accident."""

    @pytest.mark.parametrize(
        "attempt",
        [
            "os.open('/proc/sys/kernel/core_pattern', os.O_WRONLY)",
            "os.chmod('/dev/null', 0)",
            "os.open('/etc/resolv.conf', os.O_WRONLY)",
            "open('/run/greenroom/name', 'w')",
            "os.mknod('/root/disk', 0o60600, os.makedev(254, 0))",
            "os.sethostname('x') if hasattr(os, 'sethostname') else socket.sethostname('x')",
        ],
    )
    @pytest.mark.parametrize("mode", ["user", pytest.param("plain", marks=needs_root)])
    async def test_refused(self, attempt: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "_modes", lambda: [mode])
        script = f"import os, socket\ntry:\n    {attempt}\n    print('done')\nexcept OSError as e:\n    print(e.errno)"
        async with self.opened() as (process, _, _):
            running = await process.start(counter_class(counter_rootfs()), identity())
            said = await self.python(process, running.sid, script)
            assert said in {str(number) for number in (errno.EROFS, errno.EPERM, errno.EACCES)}

    @needs_root
    async def test_root_without_user_namespaces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "_modes", lambda: ["plain"])
        cls, owner = msgspec.structs.replace(counter_class(counter_rootfs()), uid=NOBODY, gid=NOBODY), identity()
        async with self.opened() as (process, _, _):
            running = await process.start(cls, owner)
            await self.ask(running.endpoint, owner, "/")
            assert await self.python(process, running.sid, "import os; print(os.getuid())") == str(NOBODY)
            await process.checkpoint(running.sid, tmp_path)
            again = await process.restore(cls, owner, tmp_path, owner.hostname)
            assert (await self.ask(again.endpoint, owner, "/")).file == 2

    async def test_sees_only_itself(self) -> None:
        look = "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdecimal())[:2], os.listdir('/tmp'))"
        async with self.opened() as (backend, _, _):
            running = await backend.start(counter_class(counter_rootfs()), identity())
            assert await self.python(backend, running.sid, look) == "[1, 2] []"


@needs_root
@pytest.mark.timeout(360)
def test_all_of_it_as_nobody(tmp_path: Path) -> None:
    """The same suite, run by a user without any right: with an interpreter that this user can reach."""
    packages = Path(importlib.util.find_spec("pytest").origin).parents[1]  # type: ignore[union-attr, arg-type]
    sources = Path(greenroom.__file__).parents[1]
    for path in (packages, sources, Path(__file__)):
        if any(not parent.stat().st_mode & 0o005 for parent in (path, *path.parents)):
            pytest.skip(f"{path} can't be read by other users")
    place = Path(tempfile.mkdtemp(prefix="gr-nobody-"))
    try:
        place.chmod(0o755)
        home = place / "home"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        (place / "lib").mkdir()
        for library in (counter_rootfs() / "usr" / "lib").rglob("libpython*"):
            shutil.copy2(library, place / "lib")
        command = [
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all"),
            *(str(counter_rootfs() / "usr/bin/python3"), "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-c", str(Path(__file__).parents[2] / "pyproject.toml"), f"--basetemp={home}/pytest"),
            f"{__file__}::TestProcessBackend",
            *(f"{__file__}::TestFiles", f"{__file__}::TestHostIsOutOfReach"),
        ]
        done = subprocess.run(
            command,
            cwd=home,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "LD_LIBRARY_PATH": str(place / "lib"),
                "PYTHONPATH": f"{sources}:{packages}",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert " passed" in done.stdout
        print(done.stdout.splitlines()[-1], file=sys.stderr)
    finally:
        shutil.rmtree(place)
