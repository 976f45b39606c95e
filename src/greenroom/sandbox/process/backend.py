"""The backend: which sandboxes there are, what state each is in, and the order in which things happen to them.

**This is not a security boundary.** It keeps honest programs apart, on a laptop, in CI, wherever there is no root. What
an actor sees is its image's files, its own processes and a host name; but it shares the kernel and the host's network,
and can connect to whatever the host can. Not limited: memory, CPU, disk; the number of processes only without root.

A sandbox is a directory ``sandboxes/<sid>`` below the state directory:

    record.json   who lives there, which process, in which state; written before anything of the actor runs
    upper, work   the actor's own files: the upper layer of an overlayfs over the image
    root          where that is mounted, in the sandbox's mount namespace only
    log.fifo      stdout and stderr; the sandbox's init holds both ends
    exit          how the actor ended, written by the init

Snapshots hold files only. Freezing for one means to stop the program (its stop signal, then SIGKILL), thawing to start
it again over the same files; `freeze` alone stops and continues processes with their memory (SIGSTOP).

The actor must listen on the port in ``PORT``: all share the host's network. A port belongs to one actor for as long as
the agent lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import platform
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import structlog

from greenroom.core.agentapi import ActorStats, Identity, ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, Unavailable
from greenroom.core.records import Endpoint, PhaseTime, SnapshotScope
from greenroom.sandbox.port import (
    BackendProbe,
    Capabilities,
    Check,
    ExecSession,
    ExecSpec,
    Found,
    Running,
    SandboxClass,
    phase_times,
)
from greenroom.sandbox.process import files, launch, namespaces
from greenroom.sandbox.process.ports import HOST, Ports
from greenroom.sandbox.process.record import Phase, SandboxRecord, boot_id, read_record, write_record
from greenroom.sandbox.reaper import Process

#: How long a program may take to end after its stop signal, when its files are to be saved.
STOP_GRACE_S = 5.0
KILLED = 137
WARNING = "not a security boundary: actors share this machine's kernel and network; use it for trusted code only"

log = structlog.get_logger(__name__)


class _Sandbox:
    """One sandbox and what happens to it. ``lock`` orders checkpoint, freeze, thaw and the final clean-up."""

    def __init__(self, directory: Path, record: SandboxRecord) -> None:
        self.directory = directory
        self.record = record
        self.process: Process | None = None
        self.lock = asyncio.Lock()
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.destroyed = False
        self.watcher: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(host=HOST, port=self.record.port)

    @property
    def fifo(self) -> Path:
        return self.directory / "log.fifo"

    @property
    def env(self) -> dict[str, str]:
        # HOST by convention, as PORT: so that not the whole network can reach an actor.
        return {"HOST": HOST, **dict(self.record.cls.env), "PORT": str(self.record.port)}

    def update(self, phase: Phase, process: Process | None) -> None:
        self.process = process
        self.record = self.record.moved(phase, process)
        write_record(self.directory, self.record)

    def watch(self, process: Process) -> None:
        self.process = process
        self.watcher = asyncio.create_task(self._watch(process))

    async def _watch(self, process: Process) -> None:
        """Notes the end of the actor, unless it was stopped on purpose."""
        await process.ended()
        if self.process is process and self.record.phase in (Phase.RUNNING, Phase.FROZEN):
            self.end(_exit_code(self.directory))

    def end(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)


class ProcessBackend:
    """See the module docstring."""

    name = "process"
    capabilities = Capabilities(scope=SnapshotScope.DATA, isolation="namespace", security_boundary=False)

    def __init__(self) -> None:
        self._state_dir = Path()
        self._mode = "user"
        self._ports = Ports("")
        self._sandboxes: dict[str, _Sandbox] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._lock_fd = -1

    # --- life of the backend ------------------------------------------------------------------------------

    async def probe(self) -> BackendProbe:
        checks = [await files.check_tar(), await _check_namespaces(_modes(), None)]
        return _result(checks)

    async def open(self, state_dir: Path, worker: str) -> BackendProbe:
        state_dir = state_dir.absolute()
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock(state_dir)
        try:
            for name in ("sandboxes", "trash", "check"):
                (state_dir / name).mkdir(mode=0o700, exist_ok=True)
            checks = [await files.check_tar()]
            for mode in _modes():
                checks[1:] = [await _check_namespaces([mode], state_dir / "check")]
                self._mode = mode
                if checks[1].ok:
                    break
            probe = _result(checks)
            if not probe.available:
                raise FailedPrecondition(
                    f"the process backend can't run here: {probe.reason}. {checks[-1].hint}".strip(),
                    reason="BACKEND_UNAVAILABLE",
                )
        except BaseException:
            self._release_lock()
            raise
        self._state_dir = state_dir
        self._ports = Ports(f"{worker} of {state_dir}")
        self._dispose(state_dir / "check")
        log.warning("process_backend_opened", worker=worker, warning=WARNING)
        return probe

    def _take_lock(self, state_dir: Path) -> None:
        fd = os.open(state_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise FailedPrecondition(
                f"another agent uses {state_dir}: give each its own state directory", reason="STATE_DIR_IN_USE"
            ) from None
        self._lock_fd = fd

    def _release_lock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def reconcile(self) -> list[Found]:
        for left in (self._state_dir / "trash").iterdir():
            self._in_background(files.remove(left))
        found = []
        for directory in sorted((self._state_dir / "sandboxes").iterdir()):
            record = read_record(directory)
            sandbox = await self._adopt(directory, record) if record is not None else None
            if sandbox is None:
                self._dispose(directory)
                continue
            self._sandboxes[sandbox.record.sid] = sandbox
            found.append(
                Found(
                    sid=sandbox.record.sid,
                    owner=sandbox.record.owner,
                    state=ResidentState.RUNNING if sandbox.record.phase is Phase.RUNNING else ResidentState.FROZEN,
                    endpoint=sandbox.endpoint,
                    log_fifo=sandbox.fifo,
                )
            )
        return found

    async def _adopt(self, directory: Path, record: SandboxRecord) -> _Sandbox | None:
        """Takes over what an earlier agent left; None when there is nothing to go on with."""
        process = Process.find(record.pid, record.started) if record.pid and record.boot == boot_id() else None
        sandbox = _Sandbox(directory, record)
        if record.phase in (Phase.RUNNING, Phase.FROZEN) and process is not None:
            sandbox.watch(process)
        elif record.phase in (Phase.STOPPING, Phase.STARTING) and record.complete:
            # Its files are all there is of the actor since its last snapshot: stopped is what it was to become, or was.
            sandbox.process = process
            await self._stop(sandbox)
        elif record.phase is not Phase.STOPPED:
            if process is not None:
                process.kill()
                await process.ended()
                process.close()
            return None
        self._ports.keep(record.port, record.owner.uid)
        return sandbox

    async def close(self, *, keep_running: bool) -> None:
        for sid, sandbox in list(self._sandboxes.items()):
            if not keep_running:
                await self.destroy(sid)
            elif sandbox.watcher is not None:
                sandbox.watcher.cancel()
                if sandbox.process is not None:
                    sandbox.process.close()
        self._sandboxes.clear()
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        self._release_lock()

    # --- life of a sandbox --------------------------------------------------------------------------------

    async def start(self, cls: SandboxClass, owner: Identity) -> Running:
        return await self._begin(cls, owner, None)

    async def restore(self, cls: SandboxClass, owner: Identity, source: Path, hostname: str) -> Running:
        return await self._begin(cls, owner, source)

    async def _begin(self, cls: SandboxClass, owner: Identity, source: Path | None) -> Running:
        clock = asyncio.get_running_loop().time
        began, marks = clock(), []
        sid = os.urandom(16).hex()
        port = self._ports.take(owner.uid)
        record = SandboxRecord(sid=sid, owner=owner, cls=cls, port=port, boot=boot_id())
        sandbox = _Sandbox(self._state_dir / "sandboxes" / sid, record)
        try:
            _make_directory(sandbox.directory)
            if source is not None:
                await files.unpack(source, sandbox.directory / "upper")
                marks.append(("unpack", clock()))
            await self._launch(sandbox)
            marks.append(("start", clock()))
        except BaseException:
            self._ports.give_back(port)
            cleaning = self._dispose(sandbox.directory)
            if cleaning is not None:
                await asyncio.shield(cleaning)
            raise
        self._sandboxes[sid] = sandbox
        return Running(
            sid=sid, endpoint=sandbox.endpoint, log_fifo=sandbox.fifo, phases=phase_times(marks, began), warm=False
        )

    async def _launch(self, sandbox: _Sandbox) -> None:
        (sandbox.directory / "exit").unlink(missing_ok=True)
        process = await launch.launch(
            self._mode,
            sandbox.directory,
            sandbox.record.cls,
            sandbox.record.owner,
            sandbox.env,
            lambda init: sandbox.update(Phase.STARTING, init),
        )
        sandbox.update(Phase.RUNNING, process)
        sandbox.watch(process)

    async def _stop(self, sandbox: _Sandbox) -> None:
        """Ends the program in its own time, or else at once. Its files stay. Idempotent."""
        process = sandbox.process
        if process is not None:
            frozen = sandbox.record.phase is Phase.FROZEN
            sandbox.update(Phase.STOPPING, process)
            if frozen:
                await asyncio.to_thread(namespaces.go_on, process.pid)
            process.send(signal.SIGTERM)  # to its init, which passes the actor's own stop signal on
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    await process.ended()
            except TimeoutError:
                log.warning("actor_ignored_stop", actor=sandbox.record.owner.name, grace_s=STOP_GRACE_S)
                process.kill()
                await process.ended()
            process.close()
        sandbox.update(Phase.STOPPED, None)

    async def checkpoint(self, sid: str, dest: Path) -> tuple[PhaseTime, ...]:
        clock = asyncio.get_running_loop().time
        began, marks = clock(), []
        sandbox = self._get(sid)
        async with self._change(sandbox):
            files.check_writable(dest)  # before anything is stopped
            try:
                await self._stop(sandbox)
                marks.append(("stop", clock()))
                await files.pack(sandbox.directory / "upper", dest)
                marks.append(("pack", clock()))
            except BaseException:
                (dest / files.ARCHIVE).unlink(missing_ok=True)
                await asyncio.shield(self._in_background(self._go_on(sandbox)))
                raise
        return phase_times(marks, began)

    async def _go_on(self, sandbox: _Sandbox) -> None:
        """After a failed checkpoint: whatever was reached, the actor runs again, unless it was destroyed meanwhile."""
        if sandbox.record.phase is Phase.RUNNING or sandbox.destroyed:
            return
        try:
            await self._stop(sandbox)
            await self._launch(sandbox)
        except BaseException:
            sandbox.end(KILLED)
            raise

    async def freeze(self, sid: str) -> None:
        sandbox = self._get(sid)
        async with self._change(sandbox):
            if sandbox.record.phase is Phase.RUNNING:
                assert sandbox.process is not None
                await asyncio.to_thread(namespaces.stop, sandbox.process.pid)
                sandbox.update(Phase.FROZEN, sandbox.process)

    async def thaw(self, sid: str) -> Endpoint:
        sandbox = self._get(sid)
        async with self._change(sandbox):
            if sandbox.record.phase is Phase.FROZEN:
                assert sandbox.process is not None
                await asyncio.to_thread(namespaces.go_on, sandbox.process.pid)
                sandbox.update(Phase.RUNNING, sandbox.process)
            elif sandbox.record.phase is Phase.STOPPED:
                await self._launch(sandbox)
        return sandbox.endpoint

    async def exec(self, sid: str, spec: ExecSpec) -> ExecSession:
        sandbox = self._get(sid)
        if sandbox.record.phase is not Phase.RUNNING or sandbox.process is None:
            raise FailedPrecondition(f"the sandbox of {sandbox.record.owner.name} is frozen: thaw it", reason="FROZEN")
        return await launch.Exec.begin(self._mode, sandbox.process, sandbox.record.cls, sandbox.env, spec)

    async def stats(self, sid: str) -> ActorStats:
        process = self._get(sid).process
        return await asyncio.to_thread(namespaces.measure, process.pid) if process is not None else ActorStats()

    async def wait(self, sid: str) -> int:
        sandbox = self._sandboxes.get(sid)
        return KILLED if sandbox is None else await asyncio.shield(sandbox.exited)

    async def destroy(self, sid: str) -> None:
        sandbox = self._sandboxes.pop(sid, None)
        if sandbox is None:
            return
        sandbox.destroyed = True
        sandbox.end(KILLED)
        if sandbox.process is not None:
            sandbox.process.kill()  # the init of the pid namespace: everything in it ends with it
        self._in_background(self._bury(sandbox))

    # --- inside -------------------------------------------------------------------------------------------------

    async def _bury(self, sandbox: _Sandbox) -> None:
        async with sandbox.lock:  # a start that was under way is over now, and may have made a process
            if sandbox.process is not None:
                sandbox.process.kill()
                await sandbox.process.ended()
                sandbox.process.close()
        self._ports.give_back(sandbox.record.port)
        self._dispose(sandbox.directory)

    def _get(self, sid: str) -> _Sandbox:
        sandbox = self._sandboxes.get(sid)
        if sandbox is None or sandbox.exited.done():
            raise Unavailable(f"sandbox {sid} is gone: wake its actor again", reason="SANDBOX_GONE")
        return sandbox

    @contextlib.asynccontextmanager
    async def _change(self, sandbox: _Sandbox) -> AsyncIterator[None]:
        """One change of state at a time; refused, before and after, when the sandbox has gone."""
        async with sandbox.lock:
            self._get(sandbox.record.sid)
            yield
            self._get(sandbox.record.sid)

    def _dispose(self, directory: Path) -> asyncio.Task[None] | None:
        """Out of the way at once, removed in the background."""
        away = self._state_dir / "trash" / f"{directory.name}-{os.urandom(4).hex()}"
        try:
            directory.rename(away)
        except FileNotFoundError:
            return None
        return self._in_background(files.remove(away))

    def _in_background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _logged(work: Coroutine[None, None, None]) -> None:
    try:
        await work
    except (GreenroomError, OSError) as error:
        log.error("process_backend_clean_up_failed", error=str(error))


def _make_directory(directory: Path) -> None:
    for path, mode in ((directory, 0o700), *((directory / name, 0o755) for name in ("upper", "work", "root"))):
        path.mkdir()
        path.chmod(mode)  # whatever the umask: the upper directory's mode is the actor's view of "/"
    os.mkfifo(directory / "log.fifo", 0o600)


def _exit_code(directory: Path) -> int:
    """What the init wrote; nothing, when it was killed."""
    try:
        return int((directory / "exit").read_text() or KILLED)
    except FileNotFoundError:
        return KILLED


def _modes() -> list[str]:
    """User namespaces even for root: the rights of the actor's root then end at the sandbox."""
    return ["user", "plain"] if os.geteuid() == 0 else ["user"]


async def _check_namespaces(modes: list[str], directory: Path | None) -> Check:
    refused = ""
    for mode in modes:
        try:
            await launch.check(mode, directory)
        except (GreenroomError, OSError) as error:
            refused = refused or str(error)
        else:
            return Check(name="namespaces", ok=True, detail=f"{mode} namespaces, overlayfs and /proc work")
    return Check(name="namespaces", ok=False, detail=refused, hint=_hint())


#: Settings that forbid user namespaces, and the value that does.
_SWITCHES = (
    ("kernel.unprivileged_userns_clone", "0"),
    ("user.max_user_namespaces", "0"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1"),
)


def _hint() -> str:
    for name, forbidding in _SWITCHES:
        path = Path("/proc/sys") / name.replace(".", "/")
        if path.exists() and path.read_text().strip() == forbidding:
            return f"user namespaces are switched off: look at sysctl {name} (it is {forbidding}), or run as root"
    names = ", ".join(name for name, _ in _SWITCHES)
    return (
        f"look at the sysctls {names}; the state directory must be on a file system that overlayfs can write to "
        "(ext4, xfs, btrfs, tmpfs), not on an overlayfs itself"
    )


def _result(checks: list[Check]) -> BackendProbe:
    return BackendProbe(
        available=all(check.ok for check in checks),
        version=f"linux {platform.release()}",
        fingerprint=f"process-1-{platform.machine()}",
        checks=(*checks, Check(name="isolation", ok=True, detail=WARNING)),
    )
