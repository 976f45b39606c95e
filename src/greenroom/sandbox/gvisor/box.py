"""One sandbox on disk and in this process, and the factory that makes and unmakes them.

Below ``state_dir/sandboxes/<sid>/``, which is also the OCI bundle and the `runsc --root` of this sandbox alone, so that
removing the directory removes everything that runsc knows of it:

    record.json     what it is and whose: `BoxRecord`
    config.json     the OCI specification
    log             named pipe: standard output and error
    identity/       mounted at /run/greenroom and /dev/.greenroom: name, namespace, uid, generation, hostname, init
    runsc-<sid>.sock, *.state, *.lock, runsc.log     runsc's own
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from greenroom.core.agentapi import Identity
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Endpoint, Record, Resources
from greenroom.sandbox.gvisor import hostname, spec
from greenroom.sandbox.gvisor.binary import Runsc
from greenroom.sandbox.gvisor.cgroups import Cgroups, Group
from greenroom.sandbox.gvisor.control import Control, Target
from greenroom.sandbox.gvisor.failures import storage_error
from greenroom.sandbox.gvisor.network import GUEST_ADDRESS, Network, Slot
from greenroom.sandbox.port import SandboxClass
from greenroom.sandbox.reaper import Process, reap_group

if TYPE_CHECKING:
    from greenroom.sandbox.gvisor.exec import PipeSession

#: One creation takes 95 ms of CPU; more at once would only slow each other and every waking down.
CREATIONS_AT_ONCE = 2
#: Normally 0.1 s; on a machine that is starved of CPU some seconds.
CREATE_TIMEOUT_S = 60.0
#: A killed process is gone within milliseconds, unless the kernel holds it.
STRAY_TIMEOUT_S = 5.0
#: A control group is empty a moment after its last process has ended.
_CGROUP_RETRIES, _CGROUP_RETRY_S = 200, 0.01
#: How much of runsc's own log an error quotes.
_LOG_SHOWN = 600

_RECORD, _DRAFT = "record.json", "record.new"

#: Enters the control groups before it becomes runsc, so that nothing of the sandbox is ever outside them.
_ENTER = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'


class BoxState(enum.StrEnum):
    """What is recorded before it is done: the -ING ones are in doubt after a crash of the agent."""

    CREATING = "creating"
    WARM = "warm"
    STARTING = "starting"
    RUNNING = "running"
    FREEZING = "freezing"
    FROZEN = "frozen"
    THAWING = "thawing"


class BoxRecord(Record, frozen=True, kw_only=True):
    """``started``: start time of the process in clock ticks, so that a pid that is used again is not mistaken."""

    sid: str
    class_digest: str
    state: BoxState
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    port: int
    resources: Resources
    device: str = ""
    pid: int = 0
    started: int = 0
    gofer_pid: int = 0
    gofer_started: int = 0
    owner: Identity | None = None


class Box:
    """A sandbox. ``process`` is None until it is created."""

    def __init__(self, directory: Path, record: BoxRecord) -> None:
        self.directory = directory
        self.record = record
        self.target = Target(record.sid, directory)
        self.identity = directory / "identity"
        self.log = directory / "log"
        self.process: Process | None = None
        self.gofer: Process | None = None
        self.slot: Slot | None = None
        self.group = Group()
        #: Process groups of the host processes that carry the actor's code; theirs to reap is ours.
        self.stubs: set[int] = set()
        #: Freezing, thawing and saving happen one after the other.
        self.lock = asyncio.Lock()
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.sessions: set[PipeSession] = set()

    @property
    def sid(self) -> str:
        return self.record.sid

    @property
    def state(self) -> BoxState:
        return self.record.state

    def save(self, state: BoxState, **changes: object) -> None:
        """Changes the record here and on disk, in one step. Survives the agent, not the machine: nor would the
        sandbox.

        The old file is removed first: when one is renamed over another, ext4 writes its content out before, which
        takes 0.3 ms, and milliseconds on a busy disk, several times on every wake (auto_da_alloc, ext4(5)).
        """
        record = msgspec.structs.replace(self.record, state=state, **changes)
        content = msgspec.json.encode(record)
        draft, kept = self.directory / _DRAFT, self.directory / _RECORD
        try:
            draft.write_bytes(content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not kept.exists():
                raise
            _overwrite(kept, content)  # a full disk must not keep anybody from thawing an actor
        else:
            kept.unlink(missing_ok=True)
            draft.rename(kept)
        self.record = record

    def occupy(self, owner: Identity) -> None:
        """Writes down whose it is; from here on it is the actor's."""
        for name in ("name", "namespace", "uid", "generation", "hostname"):
            (self.identity / name).write_text(str(getattr(owner, name)))
        self.save(BoxState.STARTING, owner=owner)

    def endpoint(self, netns: Path) -> Endpoint:
        return Endpoint(host=GUEST_ADDRESS, port=self.record.port, netns=str(netns), device=self.record.device)

    def find_processes(self) -> bool:
        """Takes hold of the recorded processes; False when the sandbox has ended."""
        self.process = Process.find(self.record.pid, self.record.started) if self.record.pid else None
        self.gofer = Process.find(self.record.gofer_pid, self.record.gofer_started) if self.record.gofer_pid else None
        return self.process is not None

    def note_stubs(self) -> None:
        """To be called while the sandbox lives: afterwards nobody can tell whose these processes were."""
        if self.process is not None:
            self.stubs |= self.process.groups()

    def kill(self) -> None:
        """Ends every process of the sandbox. Idempotent; returns before they are gone."""
        self.note_stubs()
        for process in (self.process, self.gofer):
            if process is not None:
                process.kill()

    def holds_foreign_pipes(self) -> bool:
        """Whether a command that was started by `exec`, or a child that it left behind, still runs: the sandbox then
        holds one end of a pipe whose other end is outside. Its own pipes it holds at both ends. May take milliseconds.
        """
        ends: dict[str, int] = {}
        for fd in Path(f"/proc/{self.record.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = str(fd.readlink())
                if target.startswith("pipe:"):  # a log is a named pipe, and shown by its path
                    ends[target] = ends.get(target, 0) | fd.lstat().st_mode & (stat.S_IRUSR | stat.S_IWUSR)
        return any(mode != stat.S_IRUSR | stat.S_IWUSR for mode in ends.values())

    async def ended(self) -> int | None:
        """Waits for the end of the sandbox, reaps what it leaves behind, and returns its exit status if known."""
        status = None
        for process in (self.process, self.gofer):
            if process is not None:
                code = await process.ended()
                status = code if process is self.process else status
        for pgid in self.stubs:
            await reap_group(pgid)
        return status


def read_record(directory: Path) -> BoxRecord | None:
    """None when it is absent or unreadable: such a sandbox was never anybody's. Where there is only a draft, it is
    whole if there was a record before: see `Box.save`."""
    for name in (_RECORD, _DRAFT):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((directory / name).read_bytes(), type=BoxRecord)
    return None


class Factory:
    """Makes sandboxes that wait for an actor, and removes sandboxes without a trace."""

    def __init__(self, runsc: Runsc, control: Control, network: Network, cgroups: Cgroups, home: Path) -> None:
        self.control = control
        self._runsc = runsc
        self._network = network
        self._cgroups = cgroups
        self._home = home
        self._creating = asyncio.Semaphore(CREATIONS_AT_ONCE)

    async def create(self, cls: SandboxClass) -> Box:
        """A sandbox with its network and limits, in which nothing runs yet.

        Raises:
            FailedPrecondition: the image lacks the command, or runsc refuses (reason ``CREATE_FAILED``).
            ResourceExhausted: the disk is full (reason ``DISK_FULL``).
        """
        record = BoxRecord(
            sid=secrets.token_hex(16),  # all of one length: runsc takes the beginning of an id for the id
            class_digest=cls.digest,
            state=BoxState.CREATING,
            env=spec.environment(cls),
            cwd=cls.cwd or "/",
            uid=cls.uid,
            gid=cls.gid,
            port=cls.port,
            resources=cls.resources,
        )
        box = Box(self._home / record.sid, record)
        try:
            async with self._creating:
                await self._create(box, cls)
        except BaseException as e:
            await finish(self.dispose(box))
            if isinstance(e, OSError):
                raise storage_error(e, "creating a sandbox") from e
            raise
        return box

    async def _create(self, box: Box, cls: SandboxClass) -> None:
        box.directory.mkdir(mode=0o700)
        box.identity.mkdir()
        init = box.identity / "init"
        init.write_bytes(hostname.program(cls.uid, cls.gid))
        init.chmod(0o555)
        os.mkfifo(box.log, 0o600)
        box.slot = await self._network.make_slot(with_netns=self.control.needs_netns)
        netns = f"/proc/{os.getpid()}/fd/{box.slot.netns}" if box.slot.netns >= 0 else ""
        config = await asyncio.to_thread(spec.config, cls, box.identity, netns)  # looks for the command in the image
        (box.directory / "config.json").write_bytes(msgspec.json.encode(config))
        box.group = self._cgroups.make(box.sid, cls.resources)
        box.save(BoxState.CREATING, device=box.slot.device)
        await self._run_create(box)
        box.note_stubs()
        await self.control.connect(box.target, box.slot)
        if not self.control.needs_netns:
            box.slot.release()
        box.save(BoxState.WARM)

    async def _run_create(self, box: Box) -> None:
        # A pipe of which the sandbox holds both ends: it neither blocks nor breaks when no agent reads.
        log = os.open(box.log, os.O_RDWR | os.O_CLOEXEC)
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _ENTER, "sh", *map(str, box.group.process_files), "--"),
                *(*base_command(self._runsc), "create", f"--bundle={box.directory}", box.sid),
                cwd=box.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={},  # nothing of the agent's
            )
        finally:
            os.close(log)
        try:
            async with asyncio.timeout(CREATE_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            code = -1
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._find_processes(box)
        if code != 0 or box.process is None:
            raise FailedPrecondition(f"`runsc create` failed ({code}): {self.log_of(box)}", reason="CREATE_FAILED")

    def _find_processes(self, box: Box) -> None:
        for state in box.directory.glob("*.state"):
            content = json.loads(state.read_bytes())
            pid, gofer_pid = content["sandbox"]["pid"], content["goferPid"]
            box.process, box.gofer = Process.find(pid), Process.find(gofer_pid)
            box.save(
                BoxState.CREATING,
                pid=pid,
                started=box.process.started if box.process else 0,
                gofer_pid=gofer_pid,
                gofer_started=box.gofer.started if box.gofer else 0,
            )

    def log_of(self, box: Box) -> str:
        """What runsc said last."""
        with contextlib.suppress(OSError):
            return (box.directory / "runsc.log").read_text(errors="replace").strip()[-_LOG_SHOWN:] or "no message"
        return "no message"

    async def dispose(self, box: Box) -> None:
        """Ends the sandbox and removes all that was made for it. Idempotent."""
        box.kill()
        status = await box.ended()
        if not box.exit_code.done():
            box.exit_code.set_result(137 if status is None else status)
        for session in list(box.sessions):
            session.abort()
        for process in (box.process, box.gofer):
            if process is not None:
                process.close()
        if box.slot is not None:
            box.slot.release()
        if box.record.device:
            await self._network.drop_slot(box.record.device)
        await self._remove_group(box.sid)
        await asyncio.to_thread(shutil.rmtree, box.directory, ignore_errors=True)

    async def _remove_group(self, sid: str) -> None:
        """Also ends and reaps what is still in the group."""
        for _ in range(_CGROUP_RETRIES):
            await asyncio.gather(*(self._end_stray(sid, pid) for pid in self._cgroups.processes(sid)))
            if self._cgroups.remove(sid):
                return
            await asyncio.sleep(_CGROUP_RETRY_S)

    async def _end_stray(self, sid: str, pid: int) -> None:
        stray = Process.find(pid)
        if stray is None:
            return
        try:
            if pid in self._cgroups.processes(sid):  # still: so the handle is not of a later process with this pid
                stray.kill()
                async with asyncio.timeout(STRAY_TIMEOUT_S):
                    await stray.ended()
        except TimeoutError:
            pass  # stuck in the kernel; the group stays, and the next start finds it again
        finally:
            stray.close()

    async def sweep(self, sid: str) -> None:
        """Removes what a sandbox left behind that has no directory any more."""
        await self._remove_group(sid)


def base_command(runsc: Runsc) -> tuple[str, ...]:
    """`runsc` with the flags that every command about a sandbox must share; run it in the sandbox's directory.

    The root is relative so that the control socket's address, which holds 107 bytes, is short wherever it lies.
    """
    return (
        runsc.path,
        "--root=/proc/self/cwd",
        f"--platform={runsc.platform}",
        "--network=sandbox",
        "--ignore-cgroups",  # ours: they are entered before runsc runs
        "--overlay2=all:memory",  # writes stay in the sandbox's memory, and so are part of a snapshot
        "--net-disconnect-ok",
        "--log=/proc/self/cwd/runsc.log",
    )


def _overwrite(path: Path, content: bytes) -> None:
    """Writes a small file anew within the block that it has: one write, padded with spaces where it becomes shorter, so
    that an agent that is killed leaves the old content or the new one."""
    with path.open("r+b", buffering=0) as file:
        file.write(content.ljust(path.stat().st_size))


async def finish(work: Coroutine[object, object, None]) -> None:
    """Awaits ``work`` to its end even when the caller is cancelled, which is raised afterwards; for cleaning up."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as e:
            cancelled = e
    task.result()
    if cancelled is not None:
        raise cancelled
