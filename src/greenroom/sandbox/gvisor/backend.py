"""The gVisor backend: sandboxes with a kernel of their own in user space, whose whole memory can be put to sleep.

The parts: `box` makes and unmakes sandboxes, `control` (or `cli`) tells them what to do, `network` and `cgroups` are
what a sandbox stands on. Here is the life of an actor in one: which sandbox it gets, what is written down before which
step, and what is undone when a step fails.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import Coroutine
from pathlib import Path

import msgspec
import structlog

from greenroom.core.agentapi import ActorStats, Identity, ResidentState
from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import Endpoint, PhaseTime, SnapshotScope
from greenroom.sandbox import reaper
from greenroom.sandbox.gvisor import binary, spec
from greenroom.sandbox.gvisor.box import Box, BoxState, Factory, base_command, finish, read_record
from greenroom.sandbox.gvisor.cgroups import CONTROLLERS, Cgroups
from greenroom.sandbox.gvisor.cli import CliControl
from greenroom.sandbox.gvisor.control import SNAPSHOT_FILES, Command, Control, SocketControl
from greenroom.sandbox.gvisor.exec import KILLED, open_session
from greenroom.sandbox.gvisor.failures import disk_is_full, sandbox_errors, why_not_running
from greenroom.sandbox.gvisor.machine import probe_machine
from greenroom.sandbox.gvisor.naming import set_hostname
from greenroom.sandbox.gvisor.network import Network
from greenroom.sandbox.gvisor.selftest import self_test
from greenroom.sandbox.gvisor.stacks import is_changing, is_frozen
from greenroom.sandbox.gvisor.urpc import UrpcClosed, UrpcError
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

#: Exit codes are remembered for those who ask after `destroy`; for so many sandboxes.
MAX_REMEMBERED = 4096
#: After a crash of the agent in the middle of freezing or thawing it is asked how far that got, which takes some
#: milliseconds; a worker that does not come back soon is taken for lost.
PROBE_TIMEOUT_S = 10.0
PROBE_RETRY_S = 0.05
#: How the actor ended is known with the end of its sandbox, or a moment later.
EXIT_TIMEOUT_S = 30.0

#: A killed command's files are closed a moment after its end is known; never, when it left children behind.
DESCRIPTORS_RETRIES, DESCRIPTORS_RETRY_S = 50, 0.01

log = structlog.get_logger(__name__)

_FROZEN = frozenset({BoxState.FROZEN, BoxState.FREEZING})


def scope_name(state_dir: Path) -> str:
    """What the network namespace and the cgroups of the worker with this state directory are called."""
    return "gr-" + hashlib.sha256(os.fsencode(state_dir.resolve())).hexdigest()[:8]


class GvisorBackend:
    """See `greenroom.sandbox.port.Backend` and `Warmer`."""

    name = "gvisor"
    capabilities = Capabilities(scope=SnapshotScope.MEMORY, isolation="kernel", security_boundary=True)

    def __init__(self) -> None:
        self._boxes: dict[str, Box] = {}
        self._warm: dict[str, deque[Box]] = {}
        self._exits: OrderedDict[str, int] = OrderedDict()
        #: Work that `close` waits for.
        self._background: set[asyncio.Task[None]] = set()
        #: One task for each actor, that waits for its end.
        self._watchers: set[asyncio.Task[None]] = set()
        self._state_dir = Path()
        self._factory: Factory
        self._network: Network
        self._cgroups: Cgroups

    # --- opening and closing ------------------------------------------------------------------------------

    async def probe(self) -> BackendProbe:
        return await probe_machine()

    async def open(self, state_dir: Path, worker: str) -> BackendProbe:
        probe = await self.probe()
        if not probe.available:
            raise FailedPrecondition(f"gVisor can't run here: {probe.reason}", reason="BACKEND_UNAVAILABLE")
        runsc = await binary.find()
        controls = controls_to_try(os.environ.get("GREENROOM_GVISOR_CONTROL", ""), runsc)
        self._state_dir = state_dir.resolve()
        (self._state_dir / "sandboxes").mkdir(parents=True, exist_ok=True)
        name = scope_name(state_dir)
        reaper.become_subreaper()
        self._network = Network(name, self._state_dir / "slot-counter")
        self._cgroups = Cgroups.detect(name)
        limits, refused = await asyncio.to_thread(self._cgroups.open)
        for controller, why in refused.items():
            lost = "actors run without this limit" if controller in CONTROLLERS else "CPU time is not counted"
            log.warning(lost, controller=controller, reason=why, worker=worker)
        checks = tuple(limits if check.name == limits.name else check for check in probe.checks)
        await self._network.open()
        failures: list[str] = []
        for way, control in controls.items():
            self._factory = Factory(runsc, control, self._network, self._cgroups, self._state_dir / "sandboxes")
            started = time.monotonic()
            try:
                await self_test(self._factory, self._state_dir / "self-test")
            except FailedPrecondition as e:
                failures.append(f"by {way}: {e.message}")
                continue
            except ResourceExhausted as e:
                if not self._has_actors():
                    failures.append(f"by {way}: {e.message}")
                    continue
                # They run, so it works; without an agent they would soon count as lost.
                log.error("gVisor is not tested: the disk is full, and actors are here", worker=worker, error=e.message)
                skipped = Check(name="self-test", ok=True, detail=f"by {way}, not done: {e.message}")
                return msgspec.structs.replace(probe, checks=(*checks, skipped))
            detail = "; ".join([f"by {way}, {time.monotonic() - started:.2f} s", *failures])
            ready = Check(name="self-test", ok=True, detail=detail)
            return msgspec.structs.replace(probe, checks=(*checks, ready))
        await self._network.close(remove=not any((self._state_dir / "sandboxes").iterdir()))
        self._cgroups.remove_worker()
        self._cgroups.close()
        raise FailedPrecondition("; ".join(failures), reason="SELF_TEST_FAILED")

    def _has_actors(self) -> bool:
        records = map(read_record, (self._state_dir / "sandboxes").iterdir())
        return any(record is not None and record.owner is not None for record in records)

    async def reconcile(self) -> list[Found]:
        found, boxes = [], []
        for directory in sorted((self._state_dir / "sandboxes").iterdir()):
            if (box := self._load(directory)) is not None:
                boxes.append(box)
            else:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        states = await asyncio.gather(*map(self._adopt, boxes))
        for box, state in zip(boxes, states, strict=True):
            if state is None:
                await self._factory.dispose(box)
            else:
                self._keep(box)
                assert box.record.owner is not None
                found.append(
                    Found(
                        sid=box.sid,
                        owner=box.record.owner,
                        state=state,
                        endpoint=box.endpoint(self._network.path),
                        log_fifo=box.log,
                    )
                )
        await self._sweep()
        return found

    def _load(self, directory: Path) -> Box | None:
        record = read_record(directory)
        if record is None:
            return None
        box = Box(directory, record)
        box.find_processes()
        box.group = self._cgroups.find(record.sid)
        return box

    async def _adopt(self, box: Box) -> ResidentState | None:
        """In which state the sandbox goes on; None when it was nobody's, was half made, or has ended."""
        if box.process is None or box.record.owner is None:
            return None
        match box.state:
            case BoxState.RUNNING:
                return ResidentState.RUNNING
            case BoxState.FROZEN:
                return ResidentState.FROZEN
            case BoxState.FREEZING | BoxState.THAWING:
                frozen = await self._is_frozen(box)
                box.save(BoxState.FROZEN if frozen else BoxState.RUNNING)
                return ResidentState.FROZEN if frozen else ResidentState.RUNNING
        return None

    async def _is_frozen(self, box: Box) -> bool:
        """To thaw what is not frozen would crash it; to freeze what is, it would have to be thawed twice."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                stacks = await self._factory.control.stacks(box.target)
                while is_changing(stacks):
                    await asyncio.sleep(PROBE_RETRY_S)
                    stacks = await self._factory.control.stacks(box.target)
        except UrpcClosed:
            return False  # it has just ended, as `_watch` finds
        except (TimeoutError, UrpcError, OSError) as error:
            log.error("a sandbox does not say whether it is frozen; it counts as frozen", sid=box.sid, error=str(error))
            return True
        return is_frozen(stacks)

    async def _sweep(self) -> None:
        """Removes what sandboxes left behind that have no directory any more."""
        for device in await self._network.devices() - {b.record.device for b in self._boxes.values()}:
            await self._network.drop_slot(device)
        for sid in self._cgroups.leftovers() - self._boxes.keys():
            await self._factory.sweep(sid)

    async def close(self, *, keep_running: bool) -> None:
        doomed = [box for pool in self._warm.values() for box in pool]
        self._warm.clear()
        if not keep_running:
            doomed += self._boxes.values()
            self._boxes.clear()
        await asyncio.gather(*(self._dispose(box) for box in doomed))
        while self._background:
            await asyncio.wait(self._background)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for box in self._boxes.values():
            for session in list(box.sessions):
                session.abort()
            for process in (box.process, box.gofer):
                if process is not None:
                    process.close()
        await self._network.close(remove=not self._boxes)
        self._cgroups.remove_worker()
        self._cgroups.close()
        self._boxes.clear()

    # --- warm sandboxes -----------------------------------------------------------------------------------

    async def warm(self, cls: SandboxClass) -> None:
        box = await self._factory.create(cls)
        self._warm.setdefault(cls.digest, deque()).append(box)

    def warm_counts(self) -> dict[str, int]:
        return {digest: len(pool) for digest, pool in self._warm.items() if pool}

    async def chill(self, class_digest: str) -> None:
        if box := self._pop_warm(class_digest):
            await finish(self._dispose(box))

    def _pop_warm(self, digest: str) -> Box | None:
        pool = self._warm.get(digest)
        box = pool.popleft() if pool else None
        if not pool:
            self._warm.pop(digest, None)
        return box

    async def _take(self, cls: SandboxClass) -> tuple[Box, bool]:
        """A sandbox for one actor, and whether it was waiting."""
        while (box := self._pop_warm(cls.digest)) is not None:
            if box.process is not None and box.process.alive():
                return box, True
            self._in_background(self._dispose(box))  # killed by somebody else, such as the kernel short of memory
        return await self._factory.create(cls), False

    # --- an actor moves in --------------------------------------------------------------------------------

    async def start(self, cls: SandboxClass, owner: Identity) -> Running:
        return await self._move_in(cls, owner, None, owner.hostname)

    async def restore(self, cls: SandboxClass, owner: Identity, source: Path, hostname: str) -> Running:
        missing = [name for name in SNAPSHOT_FILES if not (source / name).is_file()]
        if missing:
            raise DataLoss(f"snapshot {source} lacks {', '.join(missing)}", reason="SNAPSHOT_UNREADABLE")
        return await self._move_in(cls, owner, source, hostname)

    async def _move_in(self, cls: SandboxClass, owner: Identity, source: Path | None, believed: str) -> Running:
        started = time.monotonic()
        marks: list[tuple[str, float]] = []
        box, warm = await self._take(cls)
        if not warm:
            marks.append(("create", time.monotonic()))
        try:
            box.occupy(owner)
            if source is None:
                await self._factory.control.start(box.target)
                marks.append(("start", time.monotonic()))
            else:
                await self._factory.control.restore(box.target, source)
                marks.append(("restore", time.monotonic()))
            if believed != owner.hostname:
                await set_hostname(self._factory.control, box.target, owner.hostname)
                marks.append(("hostname", time.monotonic()))
            self._cgroups.limit_cpu(box.group, cls.resources)
            box.save(BoxState.RUNNING)
        except BaseException as e:
            self._in_background(self._dispose(box))
            if not isinstance(e, Exception):
                raise
            memory = cls.resources.memory_bytes if self._cgroups.out_of_memory(box.group) else 0
            raise why_not_running(e, source, self._factory.log_of(box), memory) from e
        if box.slot is not None:
            box.slot.release()
        self._keep(box)
        return Running(
            sid=box.sid,
            endpoint=box.endpoint(self._network.path),
            log_fifo=box.log,
            phases=phase_times(marks, started),
            warm=warm,
        )

    def _keep(self, box: Box) -> None:
        self._boxes[box.sid] = box
        self._track(self._watchers, self._watch(box))

    async def _watch(self, box: Box) -> None:
        """Finds out how the actor ended, from its sandbox or from the sandbox's own end."""
        assert box.process is not None
        box.note_stubs()
        asked = asyncio.ensure_future(self._factory.control.wait(box.target))
        ended = asyncio.ensure_future(box.process.ended())
        try:
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and not asked.exception():
                code: int | None = asked.result()
            else:
                code = await ended
                if code is None:  # another process's child; the answer may still be on its way
                    await asyncio.wait({asked}, timeout=EXIT_TIMEOUT_S)
                    code = asked.result() if asked.done() and not asked.exception() else KILLED
            if not box.exit_code.done():
                box.exit_code.set_result(KILLED if code is None else code)
            await box.ended()
        finally:
            for task in (asked, ended):
                task.cancel()

    # --- freezing and saving ------------------------------------------------------------------------------

    async def freeze(self, sid: str) -> None:
        box = self._find_alive(sid)
        async with box.lock:
            if box.state is not BoxState.FROZEN:
                with sandbox_errors(sid, "freezing"):
                    await finish(self._pause(box))

    async def thaw(self, sid: str) -> Endpoint:
        box = self._find_alive(sid)
        async with box.lock:
            if box.state in _FROZEN:
                with sandbox_errors(sid, "thawing"):
                    await finish(self._resume(box))
        return box.endpoint(self._network.path)

    async def _pause(self, box: Box) -> None:
        box.save(BoxState.FREEZING)
        await self._factory.control.pause(box.target)
        box.save(BoxState.FROZEN)

    async def _resume(self, box: Box) -> None:
        box.save(BoxState.THAWING)
        await self._factory.control.resume(box.target)
        box.save(BoxState.RUNNING)

    async def checkpoint(self, sid: str, dest: Path) -> tuple[PhaseTime, ...]:
        box = self._find_alive(sid)
        if not dest.is_dir() or any(dest.iterdir()):
            raise InvalidArgument(f"{dest} is no empty directory")
        async with box.lock:
            started = time.monotonic()
            marks: list[tuple[str, float]] = []
            with sandbox_errors(sid, "checkpoint"):
                try:
                    await finish(self._end_commands(box))
                    if box.state is not BoxState.FROZEN:
                        await finish(self._pause(box))
                    await self._network.settle(box.record.device)
                    if await asyncio.to_thread(box.holds_foreign_pipes):
                        raise FailedPrecondition(
                            "a command that was started in the sandbox left a process behind that still has its "
                            "standard streams open; end it first",
                            reason="EXEC_ACTIVE",
                        )
                    marks.append(("freeze", time.monotonic()))
                    # To its end, whatever happens: gVisor can't be told to stop, and must not be thawed meanwhile.
                    await finish(self._factory.control.checkpoint(box.target, dest))
                    marks.append(("checkpoint", time.monotonic()))
                except BaseException as error:
                    full = isinstance(error, UrpcError) and disk_is_full(dest)  # asked before there is room again
                    await finish(self._undo_checkpoint(box, dest))
                    if full:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dest)) from error
                    raise
            return phase_times(marks, started)

    async def _end_commands(self, box: Box) -> None:
        """Ends what `exec` started. gVisor would save such a process without complaint, but could never restore it:
        the other ends of its standard streams are not in the image."""
        running = [session for session in box.sessions if session.running]
        if not running:
            return
        if box.state is BoxState.FROZEN:
            await self._resume(box)
        for session in running:
            await session.kill()
            await session.wait()
        for _ in range(DESCRIPTORS_RETRIES):
            if not await asyncio.to_thread(box.holds_foreign_pipes):
                return
            await asyncio.sleep(DESCRIPTORS_RETRY_S)

    async def _undo_checkpoint(self, box: Box, dest: Path) -> None:
        for path in dest.iterdir():
            path.unlink()
        if box.state is BoxState.FROZEN and box.process is not None and box.process.alive():
            await self._resume(box)

    # --- the rest of its life -----------------------------------------------------------------------------

    async def exec(self, sid: str, spec: ExecSpec) -> ExecSession:
        box = self._find_alive(sid)
        if not spec.argv:
            raise InvalidArgument("no command given")
        command = Command(
            program="",  # looked up in the sandbox as it is now, along the PATH in env
            argv=spec.argv,
            env={**box.record.env, **dict(spec.env)},
            cwd=spec.cwd or box.record.cwd,
            uid=box.record.uid,
            gid=box.record.gid,
            capabilities=exec_capabilities(box.record.uid),
        )
        async with box.lock:  # not while it is being saved: see `_end_commands`
            if box.state in _FROZEN:
                raise FailedPrecondition(f"sandbox {sid} is frozen; thaw it first", reason="SANDBOX_FROZEN")
            with sandbox_errors(sid, f"running {spec.argv[0]!r}", command=spec.argv[0]):
                session = await open_session(
                    lambda stdio: self._factory.control.execute(box.target, command, stdio), spec.timeout_s
                )
            box.sessions.add(session)
        session.when_done(lambda: box.sessions.discard(session))
        return session

    async def stats(self, sid: str) -> ActorStats:
        box = self._find_alive(sid)
        with sandbox_errors(sid, "measuring"):
            memory, pids = await self._factory.control.usage(box.target)
        return ActorStats(memory_bytes=memory, cpu_seconds=self._cgroups.cpu_seconds(box.group) or 0.0, pids=pids)

    async def wait(self, sid: str) -> int:
        if sid in self._exits:
            return self._exits[sid]
        return await asyncio.shield(self._find(sid).exit_code)

    async def destroy(self, sid: str) -> None:
        if box := self._boxes.pop(sid, None):
            box.kill()
            self._exits[sid] = box.exit_code.result() if box.exit_code.done() else KILLED
            while len(self._exits) > MAX_REMEMBERED:
                self._exits.popitem(last=False)
            self._in_background(self._dispose(box))

    # --- helpers ------------------------------------------------------------------------------------------

    def _find(self, sid: str) -> Box:
        try:
            return self._boxes[sid]
        except KeyError:
            raise Unavailable(f"sandbox {sid} is gone", reason="SANDBOX_GONE") from None

    def _find_alive(self, sid: str) -> Box:
        box = self._find(sid)
        if box.exit_code.done():  # gVisor itself goes on for a moment
            raise Unavailable(
                f"the actor in sandbox {sid} has ended with status {box.exit_code.result()}", reason="SANDBOX_GONE"
            )
        return box

    async def _dispose(self, box: Box) -> None:
        box.kill()
        await self._factory.dispose(box)

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        self._track(self._background, work)

    def _track(self, tasks: set[asyncio.Task[None]], work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def controls_to_try(chosen: str, runsc: binary.Runsc) -> dict[str, Control]:
    """The ways of speaking to a sandbox, the better first; ``chosen`` leaves one."""
    controls: dict[str, Control] = {"socket": SocketControl(), "cli": CliControl(base_command(runsc))}
    if not chosen:
        return controls
    if chosen not in controls:
        raise FailedPrecondition(f"GREENROOM_GVISOR_CONTROL={chosen} is neither 'socket' nor 'cli'")
    return {chosen: controls[chosen]}


def exec_capabilities(uid: int) -> tuple[str, ...]:
    """What a further command may do: as the actor's own, and hence nothing unless it is root."""
    return spec.CAPABILITIES if uid == 0 else ()
