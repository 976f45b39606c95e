"""The ``sim`` backend: actors that are a few numbers in this process, with scripted latencies and failures.

For tests of the control plane, for simulation and for load tests: a start, restore or checkpoint costs microseconds,
so thousands of actors and wakes per second say something about the rest of the system. Its actors answer real HTTP.

One server per backend, on a unix socket, answers for all of them and tells them apart by the request header
``Greenroom-Actor: <namespace>/<name>``, which a gateway always sets. A request for an actor that is not resident here
ends its connection without an answer, as the endpoint of a sandbox that is gone does.

    /, /inc        counts one further in memory and in the simulated file; answers as ``/info``
    /info          JSON: actor, count, file_count, boot, generation
    /healthz       200
    /exit?code=N   answers, then the actor ends with that status

The script comes from the constructor or from a JSON file that ``GREENROOM_SIM_SCRIPT`` names, for example
``{"methods": {"restore": {"latency_s": 0.05, "failures": [{"call": 3, "code": "UNAVAILABLE"}]}}}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs

import httptools
import msgspec

from greenroom.core.agentapi import ActorStats, Identity, ResidentState
from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    rebuild,
)
from greenroom.core.records import Endpoint, PhaseTime, Record, SnapshotScope
from greenroom.sandbox.port import (
    BackendProbe,
    Capabilities,
    ExecSession,
    ExecSpec,
    Found,
    Running,
    SandboxClass,
)

SCRIPT_ENV = "GREENROOM_SIM_SCRIPT"
SNAPSHOT_FILE = "actor.json"
#: Requests that may wait for one frozen actor; more are answered 503. A gateway admits fewer.
MAX_HELD_REQUESTS = 1000
#: Linux, unix(7): ``sun_path`` has 108 bytes with the final zero.
MAX_SOCKET_PATH = 107
#: Of one simulated command's input that is not yet read back.
MAX_EXEC_BUFFER = 1 << 20
KILLED = 137


class ScriptedFailure(Record, frozen=True, kw_only=True):
    """``call``: which call of the method fails, counted from 1; 0 means every one. ``code`` as in
    `greenroom.core.errors`."""

    call: int = 0
    code: str = "INTERNAL"
    reason: str = ""
    message: str = "scripted failure"


class MethodScript(Record, frozen=True, kw_only=True):
    """Every call takes ``latency_s`` plus a uniformly drawn part of ``jitter_s``, before it succeeds or fails."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    failures: tuple[ScriptedFailure, ...] = ()


class SimScript(Record, frozen=True, kw_only=True):
    """``methods`` by name: open, warm, start, restore, checkpoint, freeze, thaw, exec, destroy. ``seed`` makes the
    jitter repeatable. Workers whose ``fingerprint`` differs can't restore each other's snapshots."""

    methods: dict[str, MethodScript] = {}
    seed: int = 0
    fingerprint: str = "sim-1"
    available: bool = True


class SimState(Record, frozen=True, kw_only=True, omit_defaults=False):
    """What a snapshot holds: memory (``count``, ``boot``) and file system (``file_count``)."""

    count: int = 0
    file_count: int = 0
    boot: str


class _Sandbox:
    __slots__ = ("boot", "count", "ended", "exit_code", "file_count", "frozen", "held", "owner", "sid")

    def __init__(self, owner: Identity, state: SimState) -> None:
        self.sid = os.urandom(16).hex()
        self.owner = owner
        self.count = state.count
        self.file_count = state.file_count
        self.boot = state.boot
        self.frozen = False
        self.exit_code: int | None = None
        self.ended: asyncio.Event | None = None  # made by the first who waits: most never do
        self.held: deque[Callable[[], None]] | None = None  # requests that came while frozen

    @property
    def key(self) -> str:
        return f"{self.owner.namespace}/{self.owner.name}"

    def end(self, code: int) -> None:
        if self.exit_code is None:
            self.exit_code = code
            if self.ended is not None:
                self.ended.set()
            self.release()

    def release(self) -> None:
        held, self.held = self.held, None
        for answer in held or ():
            answer()

    def info(self) -> bytes:
        return msgspec.json.encode(
            {
                "actor": self.key,
                "count": self.count,
                "file_count": self.file_count,
                "boot": self.boot,
                "generation": self.owner.generation,
            }
        )


class SimBackend:
    """See the module docstring. ``script`` may be replaced at any time; ``calls`` counts the calls by method. A call of
    a method that has one of the ``gates`` waits until it is set, before anything of the script."""

    name = "sim"
    capabilities = Capabilities(
        scope=SnapshotScope.MEMORY, isolation="none", security_boundary=False, needs_image=False
    )

    def __init__(self, script: SimScript | None = None) -> None:
        self.script = script if script is not None else _script_from_environment()
        self.calls: Counter[str] = Counter()
        self.gates: dict[str, asyncio.Event] = {}
        self._random = random.Random(self.script.seed)
        self._sandboxes: dict[str, _Sandbox] = {}
        self._resident: dict[str, _Sandbox] = {}
        self._warm: Counter[str] = Counter()
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[asyncio.Transport] = set()
        self._endpoint = Endpoint()

    # --- life of the backend ------------------------------------------------------------------------------

    async def probe(self) -> BackendProbe:
        return BackendProbe(available=self.script.available, version="1", fingerprint=self.script.fingerprint)

    async def open(self, state_dir: Path, worker: str) -> BackendProbe:
        await self._play("open")
        path = state_dir.absolute() / "sim.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise FailedPrecondition(
                f"{path} is too long for a unix socket ({MAX_SOCKET_PATH} bytes): use a shorter state directory",
                reason="PATH_TOO_LONG",
            )
        state_dir.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), path, backlog=1024)
        self._endpoint = Endpoint(path=str(path))
        return await self.probe()

    async def reconcile(self) -> list[Found]:
        return []  # simulated sandboxes live in the agent's process: none outlives it

    async def close(self, *, keep_running: bool) -> None:
        for sandbox in list(self._sandboxes.values()):
            self._remove(sandbox)
        self._warm.clear()
        if self._server is not None:
            self._server.close()
            Path(self._endpoint.path).unlink(missing_ok=True)
            self._server = None
        for transport in list(self._connections):
            transport.abort()

    # --- life of a sandbox --------------------------------------------------------------------------------

    async def warm(self, cls: SandboxClass) -> None:
        await self._play("warm")
        self._warm[cls.digest] += 1

    def warm_counts(self) -> dict[str, int]:
        return {digest: n for digest, n in self._warm.items() if n}

    async def chill(self, class_digest: str) -> None:
        if self._warm[class_digest]:
            self._warm[class_digest] -= 1

    async def start(self, cls: SandboxClass, owner: Identity) -> Running:
        return await self._begin("start", cls, owner, None)

    async def restore(self, cls: SandboxClass, owner: Identity, source: Path, hostname: str) -> Running:
        return await self._begin("restore", cls, owner, source)

    async def _begin(self, method: str, cls: SandboxClass, owner: Identity, source: Path | None) -> Running:
        loop = asyncio.get_running_loop()
        started = loop.time()
        # A class's digest costs more than all the rest: only look when there is something to find.
        digest = cls.digest if self._warm else ""
        warm = self._warm[digest] > 0
        if warm:
            self._warm[digest] -= 1
        await self._play(method)
        sandbox = _Sandbox(owner, SimState(boot=os.urandom(8).hex()) if source is None else _read(source))
        self._sandboxes[sandbox.sid] = sandbox
        self._resident[sandbox.key] = sandbox
        phases = (PhaseTime(name=method, seconds=loop.time() - started),)
        return Running(sid=sandbox.sid, endpoint=self._endpoint, phases=phases, warm=warm)

    async def checkpoint(self, sid: str, dest: Path) -> tuple[PhaseTime, ...]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        sandbox = self._get(sid)
        await self._play("checkpoint")
        state = SimState(count=sandbox.count, file_count=sandbox.file_count, boot=sandbox.boot)
        path = dest / SNAPSHOT_FILE
        try:
            path.write_bytes(msgspec.json.encode(state))
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise ResourceExhausted(f"can't write the snapshot {path}: {error.strerror}", reason="DISK_FULL") from error
        sandbox.frozen = True
        return (PhaseTime(name="checkpoint", seconds=loop.time() - started),)

    async def freeze(self, sid: str) -> None:
        sandbox = self._get(sid)
        await self._play("freeze")
        sandbox.frozen = True

    async def thaw(self, sid: str) -> Endpoint:
        sandbox = self._get(sid)
        await self._play("thaw")
        sandbox.frozen = False
        sandbox.release()
        return self._endpoint

    async def exec(self, sid: str, spec: ExecSpec) -> ExecSession:
        sandbox = self._get(sid)
        await self._play("exec")
        return _Exec(sandbox, spec)

    async def stats(self, sid: str) -> ActorStats:
        self._get(sid)
        return ActorStats(memory_bytes=0, cpu_seconds=0.0, pids=1)

    async def wait(self, sid: str) -> int:
        sandbox = self._sandboxes.get(sid)
        if sandbox is None:
            return KILLED
        if sandbox.exit_code is None:
            if sandbox.ended is None:
                sandbox.ended = asyncio.Event()
            await sandbox.ended.wait()
        assert sandbox.exit_code is not None
        return sandbox.exit_code

    async def destroy(self, sid: str) -> None:
        await self._play("destroy")
        sandbox = self._sandboxes.get(sid)
        if sandbox is not None:
            self._remove(sandbox)

    def state(self, sid: str) -> ResidentState | None:
        """What a simulated sandbox is doing; None when it is gone. For tests."""
        sandbox = self._sandboxes.get(sid)
        if sandbox is None or sandbox.exit_code is not None:
            return None
        return ResidentState.FROZEN if sandbox.frozen else ResidentState.RUNNING

    # --- inside ----------------------------------------------------------------------------------------------

    async def _play(self, method: str) -> None:
        """Takes the time and raises the error that the script has for this call."""
        self.calls[method] += 1
        call = self.calls[method]
        if (gate := self.gates.get(method)) is not None:
            await gate.wait()
        script = self.script.methods.get(method)
        if script is None:
            return
        if script.latency_s or script.jitter_s:
            await asyncio.sleep(script.latency_s + self._random.random() * script.jitter_s)
        for failure in script.failures:
            if failure.call in (0, call):
                raise rebuild(failure.code, failure.reason, f"{failure.message} ({method}, call {call})")

    def _get(self, sid: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sid)
        if sandbox is None or sandbox.exit_code is not None:
            raise Unavailable(f"sandbox {sid} is gone: wake its actor again", reason="SANDBOX_GONE")
        return sandbox

    def _remove(self, sandbox: _Sandbox) -> None:
        self._sandboxes.pop(sandbox.sid, None)
        self._leave(sandbox, KILLED)

    def _leave(self, sandbox: _Sandbox, code: int) -> None:
        if self._resident.get(sandbox.key) is sandbox:
            del self._resident[sandbox.key]
        sandbox.end(code)


def _script_from_environment() -> SimScript:
    path = os.environ.get(SCRIPT_ENV)
    if not path:
        return SimScript()
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=SimScript)
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidArgument(f"the script {path} ({SCRIPT_ENV}) can't be read: {error}") from error


def _read(source: Path) -> SimState:
    try:
        with open(source / SNAPSHOT_FILE, "rb") as file:
            return msgspec.json.decode(file.read(), type=SimState)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataLoss(f"the snapshot in {source} can't be read: {error}", reason="SNAPSHOT_CORRUPT") from error


# --- the actors' HTTP server ------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """Keep-alive HTTP/1.1 for all actors of one backend; answers in the order of the requests."""

    def __init__(self, backend: SimBackend) -> None:
        self._backend = backend
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._actor = ""
        self._pending: deque[tuple[str, bytes, bool]] = deque()
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not derive from it
        self._backend._connections.add(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._backend._connections.discard(self._transport)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._send(b"400 Bad Request", b'{"error":"not HTTP/1.1"}', keep_alive=False)

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._url = b""
        self._actor = ""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"greenroom-actor":
            self._actor = value.decode("latin-1")

    def on_message_complete(self) -> None:
        self._pending.append((self._actor, self._url, self._parser.should_keep_alive()))
        if not self._waiting:
            self._answer_pending()

    # Answering.

    def _answer_pending(self) -> None:
        self._waiting = False
        while self._pending:
            actor, url, keep_alive = self._pending[0]
            sandbox = self._backend._resident.get(actor)
            if sandbox is not None and sandbox.frozen and sandbox.exit_code is None:
                if sandbox.held is None:
                    sandbox.held = deque()
                if len(sandbox.held) < MAX_HELD_REQUESTS:
                    sandbox.held.append(self._answer_pending)
                    self._waiting = True
                    return
                self._pending.popleft()
                self._send(b"503 Service Unavailable", b'{"error":"too many requests wait"}', keep_alive)
                continue
            self._pending.popleft()
            self._answer(sandbox, url, keep_alive)

    def _answer(self, sandbox: _Sandbox | None, url: bytes, keep_alive: bool) -> None:
        if sandbox is None:
            if self._transport is not None:
                self._transport.close()
            return
        path, _, query = url.partition(b"?")
        match path:
            case b"/" | b"/inc":
                sandbox.count += 1
                sandbox.file_count += 1
                self._send(b"200 OK", sandbox.info(), keep_alive)
            case b"/info":
                self._send(b"200 OK", sandbox.info(), keep_alive)
            case b"/healthz":
                self._send(b"200 OK", b'{"ok":true}', keep_alive)
            case b"/exit":
                code = parse_qs(query.decode("latin-1")).get("code", ["0"])[0]
                self._send(b"200 OK", b'{"exiting":true}', keep_alive)
                self._backend._leave(sandbox, int(code) & 0xFF if code.isdecimal() else 1)
            case _:
                self._send(b"404 Not Found", b'{"error":"no such page"}', keep_alive)

    def _send(self, status: bytes, body: bytes, keep_alive: bool) -> None:
        if self._transport is None:
            return
        self._transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b"
            % (status, len(body), b"" if keep_alive else b"Connection: close\r\n", body)
        )
        if not keep_alive:
            self._transport.close()


# --- simulated commands -----------------------------------------------------------------------------------------


class _Exec:
    """``echo WORDS``, ``cat``, ``sleep S`` and ``exit CODE``; there is no other program in a simulated sandbox."""

    def __init__(self, sandbox: _Sandbox, spec: ExecSpec) -> None:
        if not spec.argv or spec.argv[0] not in ("echo", "cat", "sleep", "exit"):
            raise FailedPrecondition(
                f"no command {' '.join(spec.argv)!r} in a simulated sandbox: there are echo, cat, sleep and exit",
                reason="COMMAND_NOT_FOUND",
            )
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._buffered = 0
        self._over = False
        self._drained = asyncio.Event()
        self._killed = asyncio.Event()
        if sandbox.ended is None:
            sandbox.ended = asyncio.Event()
        self._sandbox_ended = sandbox.ended
        self._input_closed = asyncio.Event()
        self._task = asyncio.create_task(self._run(spec))

    async def _run(self, spec: ExecSpec) -> int:
        watchers = [asyncio.create_task(event.wait()) for event in (self._killed, self._sandbox_ended)]
        work = asyncio.create_task(self._command(*spec.argv))
        try:
            timeout = spec.timeout_s or None
            await asyncio.wait([work, *watchers], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else KILLED
        finally:
            for task in (work, *watchers):
                task.cancel()
            self._over = True
            self._drained.set()
            self._chunks.put_nowait(b"")

    async def _command(self, name: str, *args: str) -> int:
        match name:
            case "echo":
                self._chunks.put_nowait(" ".join(args).encode() + b"\n")
                return 0
            case "cat":
                await self._input_closed.wait()
                return 0
            case "sleep":
                await asyncio.sleep(float(args[0]))
                return 0
            case "exit":
                return int(args[0]) & 0xFF
            case _:
                raise Internal(f"simulated command {name} is not written")

    async def write(self, data: bytes) -> None:
        if not data:
            self._input_closed.set()
            return
        while self._buffered > MAX_EXEC_BUFFER and not self._over:
            self._drained.clear()
            await self._drained.wait()
        self._buffered += len(data)
        self._chunks.put_nowait(data)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        while chunk := await self._chunks.get():
            self._buffered -= len(chunk)
            self._drained.set()
            yield 1, chunk

    async def wait(self) -> int:
        return await asyncio.shield(self._task)

    async def kill(self) -> None:
        self._killed.set()

    def abort(self) -> None:
        self._killed.set()  # there are no pipes
