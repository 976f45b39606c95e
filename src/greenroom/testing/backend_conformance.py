"""The rules of `greenroom.sandbox.port`, as tests. A class that passes them is a backend.

In a package of your own (needs ``pytest`` and ``pytest-asyncio``)::

    class TestMyBackend(BackendConformance):
        async def make_backend(self) -> Backend:
            return MyBackend()

        async def make_class(self, tmp_path: Path) -> SandboxClass:
            return counter_class(counter_rootfs())

`make_class` returns a class that runs an HTTP server which counts: by default `greenroom.testing.counter_app` in a root
file system of this machine's own Python. An own program must answer these with a JSON object:

    GET /             one further in memory and in a file; then as /info
    GET /info         ``ram`` and ``file`` (the counts), ``actor`` (its name), ``generation``, ``boot`` (drawn when the
                      program starts)
    GET /exit?code=N  ends the program with that status

Where a program answers otherwise, override `read`; where commands are called otherwise, `command`.

What a backend can't do it declares in ``lacks``, out of ``command`` (the class's argv is run at all), ``exec``,
``freeze``, ``logs`` and ``warm``. The tests of what is lacking are then not collected; that it is lacking is tested.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import pytest

from greenroom.core.agentapi import Identity, ResidentState
from greenroom.core.errors import DataLoss, FailedPrecondition, GreenroomError, Unavailable, Unimplemented
from greenroom.core.records import Endpoint, SnapshotScope
from greenroom.sandbox.dial import address, make_socket
from greenroom.sandbox.port import Backend, ExecSession, ExecSpec, Running, SandboxClass, Warmer
from greenroom.testing import counter_app
from greenroom.testing.python_rootfs import build_python_rootfs

#: How long anything may take that takes milliseconds on an idle machine; a machine that tests is not idle.
PATIENCE_S = 30.0
#: How long a thing must stay away to count as "does not happen".
QUIET_S = 0.3


@functools.cache
def counter_rootfs() -> Path:
    """A root file system with Python and the counter in it; made once per process, removed at its end."""
    base = Path(tempfile.mkdtemp(prefix="greenroom-rootfs-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    base.chmod(0o755)
    build_python_rootfs(base / "rootfs", {"/app/counter_app.py": Path(counter_app.__file__)})
    return base / "rootfs"


def counter_class(rootfs: Path) -> SandboxClass:
    return SandboxClass(
        rootfs=rootfs,
        image_digest="sha256:" + "0" * 64,
        argv=("python3", "/app/counter_app.py"),
        env=(("PATH", "/usr/bin:/bin"), ("PORT", "8080")),
    )


def identity(name: str = "counter", generation: int = 1) -> Identity:
    return Identity(namespace="conformance", name=name, uid=f"uid-{name}", generation=generation)


class Reading(NamedTuple):
    """What an actor says of itself."""

    ram: int
    file: int
    actor: str
    generation: int
    boot: str


class Opened(NamedTuple):
    """A backend that was opened and has reconciled."""

    backend: Backend
    state_dir: Path
    worker: str


class BackendTools:
    """What an adapter says of itself, and what tests of a backend are written with."""

    #: Whether sandboxes go on when the agent's process dies.
    survives_agent = True

    # --- what an adapter says ---------------------------------------------------------------------------------

    async def make_backend(self) -> Backend:
        """A new one, not opened."""
        raise NotImplementedError("override make_backend")

    async def make_class(self, tmp_path: Path) -> SandboxClass:
        """What the tests run; see the module docstring."""
        return counter_class(counter_rootfs())

    def read(self, body: bytes) -> Reading:
        said = json.loads(body)
        return Reading(said["ram"], said["file"], said["actor"], said["generation"], said["boot"])

    def command(self, what: str, *args: str) -> tuple[str, ...]:
        """A command line that does ``what``: ``cat`` copies stdin to stdout, ``exit`` ends with status args[0],
        ``sleep`` takes args[0] seconds, ``complain`` writes args[0] to stderr, ``linger`` says "begun" and waits for
        a child that takes args[0] seconds (an empty tuple: can't be done here)."""
        script = {
            "cat": "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)",
            "exit": "import sys; sys.exit(int(sys.argv[1]))",
            "sleep": "import sys, time; time.sleep(float(sys.argv[1]))",
            "complain": "import sys; sys.stderr.write(sys.argv[1])",
            "linger": "import os, sys, time\n"
            "if os.fork() == 0: time.sleep(float(sys.argv[1]))\n"
            "else: print('begun', flush=True); os.wait()",
        }[what]
        return ("python3", "-c", script, *args)

    async def http_get(self, endpoint: Endpoint, path: str, owner: Identity) -> tuple[int, bytes]:
        """One request on a new connection, as the gateway makes it: (status, body). Raises OSError when nobody
        answers."""
        loop = asyncio.get_running_loop()
        with make_socket(endpoint) as sock:
            await loop.sock_connect(sock, address(endpoint))
            head = f"GET {path} HTTP/1.1\r\nHost: test\r\nGreenroom-Actor: {owner.namespace}/{owner.name}\r\n"
            await loop.sock_sendall(sock, f"{head}Connection: close\r\n\r\n".encode())
            answer = b""
            while part := await loop.sock_recv(sock, 1 << 16):
                answer += part
        if not answer:
            raise ConnectionResetError("closed without an answer")
        header, _, body = answer.partition(b"\r\n\r\n")
        return int(header.split(b" ", 2)[1]), body

    # --- tools of the tests -----------------------------------------------------------------------------------

    async def ask(self, endpoint: Endpoint, owner: Identity, path: str = "/info") -> Reading:
        """As the agent's readiness probe: asks until the program listens."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    status, body = await self.http_get(endpoint, path, owner)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                assert status == 200, body
                return self.read(body)

    async def end_program(self, endpoint: Endpoint, owner: Identity, code: int) -> None:
        await self.ask(endpoint, owner)  # it listens
        # Whether the answer still comes through is nobody's business.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                await self.http_get(endpoint, f"/exit?code={code}", owner)

    @contextlib.asynccontextmanager
    async def opened(self, state_dir: Path | None = None, worker: str = "") -> AsyncIterator[Opened]:
        """A backend in a directory of its own; afterwards everything must be gone, whatever the test did."""
        # Not below pytest's directory: a unix socket's path has at most 107 bytes.
        place = state_dir or Path(tempfile.mkdtemp(prefix="gr-"))
        worker = worker or f"conf-{os.urandom(4).hex()}"
        backend = await self.make_backend()
        await backend.open(place, worker)
        try:
            await backend.reconcile()
            yield Opened(backend, place, worker)
        finally:
            async with asyncio.timeout(PATIENCE_S):
                await backend.close(keep_running=False)
            await until_nothing(lambda: traces(place, worker))
            shutil.rmtree(place)

    async def exec(self, backend: Backend, sid: str, argv: tuple[str, ...]) -> ExecSession:
        return await backend.exec(sid, ExecSpec(argv=argv))

    async def run(self, session: ExecSession, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """(status, stdout, stderr) of a command."""
        async with asyncio.timeout(PATIENCE_S):
            if stdin:
                await session.write(stdin)
            await session.write(b"")
            out = {1: b"", 2: b""}
            async for number, chunk in session.output():
                out[number] += chunk
            return await session.wait(), out[1], out[2]


#: Tests of what a backend may lack.
_NEEDS = {
    "test_no_such_command": "command",
    "test_freeze_and_thaw": "freeze",
    "test_checkpoint_and_destroy_of_a_frozen_one": "freeze",
    "test_exec": "exec",
    "test_exec_of_no_such_command": "exec",
    "test_exec_is_killed": "exec",
    "test_exec_is_let_go": "exec",
    "test_logs_come_through_the_fifo": "logs",
    "test_warm_sandboxes_are_counted_and_used": "warm",
}


@pytest.mark.asyncio
class BackendConformance(BackendTools):
    """See the module docstring."""

    #: What this backend can't do, of ``command``, ``exec``, ``freeze``, ``logs``, ``warm``.
    lacks: ClassVar[frozenset[str]] = frozenset()

    # --- the backend ------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, power in _NEEDS.items():
            if power in cls.lacks:
                setattr(cls, name, None)  # pytest does not collect it

    async def test_it_lacks_what_it_says(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            if "command" in self.lacks:
                assert not backend.capabilities.needs_image
            if "exec" in self.lacks:
                with pytest.raises(Unimplemented):
                    await backend.exec(running.sid, ExecSpec(argv=("true",)))
            if "freeze" in self.lacks:
                with pytest.raises(Unimplemented):
                    await backend.freeze(running.sid)
            assert ("logs" in self.lacks) == (running.log_fifo is None)
            assert ("warm" in self.lacks) == (not isinstance(backend, Warmer))

    async def test_probe_never_raises_and_changes_nothing(self, tmp_path: Path) -> None:
        backend = await self.make_backend()
        before = sorted(tmp_path.rglob("*"))
        first, second = await backend.probe(), await backend.probe()
        assert first.available, first.reason
        assert first.version and first.fingerprint
        assert first.fingerprint == second.fingerprint
        assert sorted(tmp_path.rglob("*")) == before

    async def test_open_makes_its_directory_and_close_is_enough(self, tmp_path: Path) -> None:
        place = Path(tempfile.mkdtemp(prefix="gr-"))
        async with self.opened(place / "state") as opened:
            assert (place / "state").is_dir()
            assert (await opened.backend.probe()).available
        shutil.rmtree(place)

    async def test_close_ends_everything(self, tmp_path: Path) -> None:
        cls = await self.make_class(tmp_path)
        async with self.opened() as (backend, _, _):
            for name in ("one", "two"):
                running = await backend.start(cls, identity(name))
                await self.ask(running.endpoint, identity(name))

    # --- start ------------------------------------------------------------------------------------------------

    async def test_start_answers_and_knows_who_it_is(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity(generation=7)
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            assert len(running.sid) == 32 and int(running.sid, 16) >= 0
            said = await self.ask(running.endpoint, owner, "/")
            assert (said.ram, said.file, said.actor, said.generation) == (1, 1, owner.name, 7)
            assert all(phase.seconds >= 0 for phase in running.phases)
            stats = await backend.stats(running.sid)
            assert stats.memory_bytes >= 0 and stats.cpu_seconds >= 0

    async def test_actors_are_apart(self, tmp_path: Path) -> None:
        cls = await self.make_class(tmp_path)
        owners = [identity(f"actor-{i}") for i in range(4)]
        async with self.opened() as (backend, _, _):
            started = await asyncio.gather(*(backend.start(cls, owner) for owner in owners))
            assert len({running.sid for running in started}) == len(owners)
            for times, (running, owner) in enumerate(zip(started, owners, strict=True)):
                for _ in range(times):
                    await self.ask(running.endpoint, owner, "/")
            for times, (running, owner) in enumerate(zip(started, owners, strict=True)):
                said = await self.ask(running.endpoint, owner)
                assert (said.ram, said.file, said.actor) == (times, times, owner.name)

    async def test_no_such_command(self, tmp_path: Path) -> None:
        cls = msgspec.structs.replace(await self.make_class(tmp_path), argv=("/no/such/program",))
        async with self.opened() as (backend, state_dir, _):
            with pytest.raises(FailedPrecondition, match="/no/such/program") as caught:
                await backend.start(cls, identity())
            assert caught.value.reason == "COMMAND_NOT_FOUND"
            await until_nothing(lambda: processes(state_dir))

    async def test_cancelled_start_leaves_nothing(self, tmp_path: Path) -> None:
        cls = await self.make_class(tmp_path)
        for delay in (0.0, 0.005, 0.02):
            async with self.opened() as (backend, state_dir, _):
                task = asyncio.create_task(backend.start(cls, identity()))
                await asyncio.sleep(delay)
                if task.cancel():
                    with contextlib.suppress(asyncio.CancelledError):
                        running = await task
                        await backend.destroy(running.sid)  # it had just come through
                await until_nothing(lambda state_dir=state_dir: processes(state_dir))  # type: ignore[misc]

    # --- checkpoint and restore -------------------------------------------------------------------------------

    async def test_sleep_and_wake_elsewhere(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            for _ in range(3):
                before = await self.ask(running.endpoint, owner, "/")
            await backend.checkpoint(running.sid, snapshot)
            await backend.destroy(running.sid)
            memory = backend.capabilities.scope is SnapshotScope.MEMORY
        content = digests(snapshot)
        assert content
        later = identity(generation=2)
        async with self.opened() as (backend, _, _):
            running = await backend.restore(cls, later, snapshot, owner.hostname)
            said = await self.ask(running.endpoint, later, "/")
        assert said.file == 4
        assert said.ram == (4 if memory else 1)
        assert (said.boot == before.boot) == memory
        assert (said.actor, said.generation) == (later.name, 2)
        assert digests(snapshot) == content, "a snapshot is only read"

    async def test_many_wake_from_one_snapshot(self, tmp_path: Path) -> None:
        cls, first = await self.make_class(tmp_path), identity("golden")
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, first)
            await self.ask(running.endpoint, first, "/")
            await backend.checkpoint(running.sid, snapshot)
            owners = [identity(f"copy-{i}") for i in range(2)]
            copies = await asyncio.gather(*(backend.restore(cls, o, snapshot, first.hostname) for o in owners))
            for copy, owner in zip(copies, owners, strict=True):
                said = await self.ask(copy.endpoint, owner, "/")
                assert (said.file, said.actor) == (2, owner.name)

    async def test_thaw_after_checkpoint(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.ask(running.endpoint, owner, "/")
            waiter = asyncio.create_task(backend.wait(running.sid))
            await backend.checkpoint(running.sid, tmp_path / "a")
            endpoint = await backend.thaw(running.sid)
            said = await self.ask(endpoint, owner, "/")
            assert said.file == 2
            assert said.ram == (2 if backend.capabilities.scope is SnapshotScope.MEMORY else 1)
            assert not waiter.done(), "an actor that sleeps has not ended"
            await backend.thaw(running.sid)
            await backend.checkpoint(running.sid, tmp_path / "b")
            await backend.destroy(running.sid)
            async with asyncio.timeout(PATIENCE_S):
                await waiter

    async def test_failed_checkpoint_leaves_it_running(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            before = await self.ask(running.endpoint, owner, "/")
            with pytest.raises(GreenroomError):
                await backend.checkpoint(running.sid, tmp_path / "there" / "is" / "none")
            said = await self.ask(running.endpoint, owner, "/")
            assert (said.ram, said.file, said.boot) == (2, 2, before.boot)
            dest = tmp_path / "dest"
            dest.mkdir()
            await backend.checkpoint(running.sid, dest)
            assert digests(dest)

    async def test_unreadable_snapshot(self, tmp_path: Path) -> None:
        cls = await self.make_class(tmp_path)
        (tmp_path / "empty").mkdir()
        async with self.opened() as (backend, state_dir, _):
            with pytest.raises(DataLoss):
                await backend.restore(cls, identity(), tmp_path / "empty", "counter")
            await until_nothing(lambda: processes(state_dir))

    # --- end --------------------------------------------------------------------------------------------------

    async def test_destroy_is_idempotent(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            await backend.destroy("0" * 32)
            running = await backend.start(cls, owner)
            await backend.destroy(running.sid)
            await backend.destroy(running.sid)
            for call in (backend.freeze, backend.thaw, backend.stats):
                with pytest.raises((Unavailable, Unimplemented)):
                    await call(running.sid)
            with pytest.raises(Unavailable):
                await backend.checkpoint(running.sid, tmp_path)
            with pytest.raises((Unavailable, Unimplemented)):
                await backend.exec(running.sid, ExecSpec(argv=self.command("exit", "0")))

    async def test_wait_sees_the_end_of_the_program(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            waiters = [asyncio.create_task(backend.wait(running.sid)) for _ in range(5)]
            impatient = asyncio.create_task(backend.wait(running.sid))
            await self.end_program(running.endpoint, owner, 7)
            impatient.cancel()
            async with asyncio.timeout(PATIENCE_S):
                assert await asyncio.gather(*waiters) == [7] * 5
                assert await backend.wait(running.sid) == 7
            with pytest.raises(Unavailable):
                await backend.checkpoint(running.sid, tmp_path)
            await backend.destroy(running.sid)

    async def test_wait_sees_destroy(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            waiters = [asyncio.create_task(backend.wait(running.sid)) for _ in range(3)]
            await asyncio.sleep(0)
            await backend.destroy(running.sid)
            async with asyncio.timeout(PATIENCE_S):
                assert len(set(await asyncio.gather(*waiters))) == 1

    async def test_stale_endpoint_reaches_nobody_else(self, tmp_path: Path) -> None:
        cls, old, new = await self.make_class(tmp_path), identity("old"), identity("new")
        async with self.opened() as (backend, _, _):
            first = await backend.start(cls, old)
            await self.ask(first.endpoint, old)
            await backend.destroy(first.sid)
            second = await backend.start(cls, new)
            await self.ask(second.endpoint, new)
            with contextlib.suppress(OSError, GreenroomError, TimeoutError):
                async with asyncio.timeout(QUIET_S * 3):
                    _, body = await self.http_get(first.endpoint, "/info", old)
                    pytest.fail(f"somebody answered: {body!r}")

    # --- freeze -----------------------------------------------------------------------------------------------

    async def test_freeze_and_thaw(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.ask(running.endpoint, owner, "/")
            await backend.freeze(running.sid)
            await backend.freeze(running.sid)
            request = asyncio.create_task(self.http_get(running.endpoint, "/", owner))
            await asyncio.wait([request], timeout=QUIET_S)
            assert not request.done(), "a frozen actor does not answer"
            endpoint = await backend.thaw(running.sid)
            await backend.thaw(running.sid)
            async with asyncio.timeout(PATIENCE_S):
                _, body = await request
            assert self.read(body).ram == 2
            assert (await self.ask(endpoint, owner, "/")).ram == 3

    async def test_checkpoint_and_destroy_of_a_frozen_one(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        dest = tmp_path / "dest"
        dest.mkdir()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.ask(running.endpoint, owner, "/")
            await backend.freeze(running.sid)
            await backend.checkpoint(running.sid, dest)
            await backend.destroy(running.sid)
            again = await backend.restore(cls, owner, dest, owner.hostname)
            assert (await self.ask(again.endpoint, owner, "/")).file == 2
            await backend.freeze(again.sid)

    # --- exec and logs ----------------------------------------------------------------------------------------

    async def test_exec(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.ask(running.endpoint, owner)
            sent = os.urandom(300_000)  # more than any pipe holds
            session = await self.exec(backend, running.sid, self.command("cat"))
            writer = asyncio.create_task(self._feed(session, sent))
            received = b"".join([chunk async for number, chunk in session.output() if number == 1])
            await writer
            assert received == sent
            assert await session.wait() == 0
            session = await backend.exec(running.sid, ExecSpec(argv=self.command("exit", "9")))
            assert await self.run(session) == (9, b"", b"")
            if complain := self.command("complain", "ouch"):
                session = await backend.exec(running.sid, ExecSpec(argv=complain))
                assert await self.run(session) == (0, b"", b"ouch")

    async def _feed(self, session: ExecSession, data: bytes) -> None:
        for offset in range(0, len(data), 10_000):
            await session.write(data[offset : offset + 10_000])
        await session.write(b"")

    async def test_exec_of_no_such_command(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            with pytest.raises(FailedPrecondition, match="no-such-command") as caught:
                await self.exec(backend, running.sid, ("no-such-command",))
            assert caught.value.reason == "COMMAND_NOT_FOUND"
            await self.ask(running.endpoint, owner)

    async def test_exec_is_killed(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        sleep = self.command("sleep", "1000")
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            session = await self.exec(backend, running.sid, sleep)
            await session.kill()
            await session.kill()
            assert (await self.run(session))[0] == 137
            session = await backend.exec(running.sid, ExecSpec(argv=sleep, timeout_s=0.2))
            assert (await self.run(session))[0] == 137
            if linger := self.command("linger", "1000"):
                session = await backend.exec(running.sid, ExecSpec(argv=linger, timeout_s=2.0))
                assert await self.run(session) == (137, b"begun\n", b"")
            session = await backend.exec(running.sid, ExecSpec(argv=sleep))
            await backend.destroy(running.sid)
            async with asyncio.timeout(PATIENCE_S):
                assert await session.wait() == 137

    async def test_exec_is_let_go(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            await self.ask(running.endpoint, owner)
            had = set(held())
            session = await self.exec(backend, running.sid, self.command("cat"))
            writer = asyncio.create_task(self._feed(session, bytes(8 << 20)))  # more than waits anywhere
            await asyncio.wait([writer], timeout=QUIET_S * 3)
            assert not writer.done(), "nobody reads"
            writer.cancel()
            await asyncio.wait([writer])
            await session.kill()
            session.abort()
            session.abort()
            async with asyncio.timeout(PATIENCE_S):
                assert await session.wait() == 137
            await until_nothing(lambda: [what for what in held() if what not in had])
            await self.ask(running.endpoint, owner)

    async def test_logs_come_through_the_fifo(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            running = await backend.start(cls, owner)
            assert running.log_fifo is not None
            await self.ask(running.endpoint, owner)
            fd = os.open(running.log_fifo, os.O_RDONLY | os.O_NONBLOCK)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    text = b""
                    while b"\n" not in text:
                        with contextlib.suppress(BlockingIOError):
                            text += os.read(fd, 4096)
                        await asyncio.sleep(0.01)
            finally:
                os.close(fd)
            assert b"listens" in text
            assert (await self.ask(running.endpoint, owner, "/")).ram == 1, "goes on without a reader"

    # --- warm sandboxes ---------------------------------------------------------------------------------------

    async def test_warm_sandboxes_are_counted_and_used(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity()
        async with self.opened() as (backend, _, _):
            assert isinstance(backend, Warmer)
            assert backend.warm_counts().get(cls.digest, 0) == 0
            await backend.warm(cls)
            await backend.warm(cls)
            assert backend.warm_counts()[cls.digest] == 2
            running = await backend.start(cls, owner)
            assert running.warm
            assert backend.warm_counts()[cls.digest] == 1
            assert (await self.ask(running.endpoint, owner, "/")).actor == owner.name
            await backend.chill(cls.digest)
            await backend.chill(cls.digest)
            assert backend.warm_counts().get(cls.digest, 0) == 0
            other = await backend.start(cls, identity("other"))
            assert not other.warm
            await backend.warm(cls)  # and close ends that one too

    # --- a new agent ------------------------------------------------------------------------------------------

    async def test_a_new_agent_finds_what_was_left_running(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity(generation=3)
        place = Path(tempfile.mkdtemp(prefix="gr-"))
        worker = f"conf-{os.urandom(4).hex()}"
        first = await self.make_backend()
        await first.open(place, worker)
        await first.reconcile()
        running = await first.start(cls, owner)
        before = await self.ask(running.endpoint, owner, "/")
        await first.close(keep_running=True)
        await self._finds(place, worker, running, owner, before)

    async def test_a_new_agent_finds_what_a_killed_one_left(self, tmp_path: Path) -> None:
        cls, owner = await self.make_class(tmp_path), identity(generation=3)
        place = Path(tempfile.mkdtemp(prefix="gr-"))
        worker = f"conf-{os.urandom(4).hex()}"
        running = await asyncio.to_thread(in_a_killed_process, lambda: self._abandon(place, worker, cls, owner))
        before = await self.ask(running.endpoint, owner, "/") if self.survives_agent else None
        await self._finds(place, worker, running, owner, before)

    async def _abandon(self, place: Path, worker: str, cls: SandboxClass, owner: Identity) -> Running:
        backend = await self.make_backend()
        await backend.open(place, worker)
        await backend.reconcile()
        return await backend.start(cls, owner)

    async def _finds(self, place: Path, worker: str, running: Running, owner: Identity, before: Reading | None) -> None:
        backend = await self.make_backend()
        await backend.open(place, worker)
        try:
            found = await backend.reconcile()
            if not self.survives_agent:
                assert found == []
                return
            assert before is not None
            assert [(one.sid, one.owner) for one in found] == [(running.sid, owner)]
            assert found[0].state is ResidentState.RUNNING
            after = await self.ask(found[0].endpoint, owner, "/")
            assert (after.ram, after.boot) == (before.ram + 1, before.boot)
            waiter = asyncio.create_task(backend.wait(running.sid))
            assert await self.run(await backend.exec(running.sid, ExecSpec(argv=self.command("exit", "4")))) == (
                4,
                b"",
                b"",
            )
            await self.end_program(found[0].endpoint, owner, 6)
            async with asyncio.timeout(PATIENCE_S):
                assert await waiter == 6
        finally:
            await backend.close(keep_running=False)
            await until_nothing(lambda: traces(place, worker))
            shutil.rmtree(place)


# --- the state of the machine -----------------------------------------------------------------------------------


def processes(state_dir: Path) -> list[str]:
    """Processes that name ``state_dir`` in their command line or environment, or have mounts from it."""
    needle, found = os.fsencode(state_dir), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        for name in ("cmdline", "environ", "mountinfo"):
            with contextlib.suppress(OSError):  # ended, or somebody else's
                if needle in (entry / name).read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {entry.name} ({name}): {command}")
                    break
    return found


def traces(state_dir: Path, worker: str) -> list[str]:
    """What is left on the machine of a backend: processes, mounts, network namespaces, cgroups, interfaces."""
    found = processes(state_dir)
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(state_dir) in line]
    for directory in (Path("/run/netns"), Path("/run/greenroom/netns"), Path("/sys/class/net")):
        if os.access(directory, os.R_OK):  # not there, or not for who is not root
            found += [str(entry) for entry in directory.iterdir() if worker in entry.name]
    cgroups = Path("/sys/fs/cgroup")
    found += [str(path) for depth in ("*", "*/*", "*/*/*") for path in cgroups.glob(depth) if worker in path.name]
    return found


async def until_nothing(look: Callable[[], list[str]]) -> None:
    """Waits until ``look`` finds nothing; a killed process may take a moment to be gone."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while left := look():
        assert asyncio.get_running_loop().time() < deadline, f"left behind: {left}"
        await asyncio.sleep(0.02)


def held() -> list[str]:
    """Pipes, sockets and tasks of this process."""
    tasks = [f"{task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks()]
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links.append(str(descriptor.readlink()))
    return tasks + [link for link in links if link.startswith(("pipe:", "socket:"))]


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_a_killed_process(work: Callable[[], Coroutine[None, None, Running]]) -> Running:
    """Runs a coroutine in a copy of this process, which then dies by SIGKILL, as an agent may."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            running = asyncio.new_event_loop().run_until_complete(work())
            os.write(writer, msgspec.json.encode(running, enc_hook=str))
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    try:
        return msgspec.json.decode(answer, type=Running, dec_hook=lambda kind, value: kind(value))
    except msgspec.MsgspecError:
        raise AssertionError(f"the first agent failed: {answer.decode(errors='replace')}") from None
