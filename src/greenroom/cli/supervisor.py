"""Keeps as many agent processes running on this machine as the pools in the store say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from greenroom.agent.enrolment import PAPERS, incarnation_of, was_registered
from greenroom.agent.erase import erase, noted_backend
from greenroom.agent.held import holds_any
from greenroom.cli.agent import END_SIGNAL, WIPE_SIGNAL
from greenroom.core import states
from greenroom.core.agentapi import Shutdown
from greenroom.core.errors import FailedPrecondition, GreenroomError
from greenroom.core.records import Actor, Pool, PoolSpec, Worker, WorkerState
from greenroom.engine.engine import Engine
from greenroom.engine.members import RETIRING
from greenroom.store.port import Event, Store

log = structlog.get_logger(__name__)

#: An agent that died is started again after this, doubling up to the last while it keeps dying young.
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 10.0
#: An agent that ran at least this long did not die of its start.
HEALTHY_S = 10.0
#: How often a worker that is too much is told so again, while it can't end (the disk is full, for example).
RETIRE_PAUSE_S = 10.0
#: How long an agent that is to end is waited for, should it be about to connect.
YOUNG_S = 10.0
#: Of a file beside the directory of a worker that retires.
NOTE_SUFFIX = ".retires"
#: How long an agent may take to end after it was asked to: its sandboxes and its network are removed meanwhile.
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class AgentPaths:
    """``workers``: parent of the workers' state directories; ``control``: address that agents connect to; ``prefix``:
    what the names of this server's workers begin with, where several servers share the store."""

    workers: Path
    images: Path
    snapshots: str
    control: str
    prefix: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    images_high: int = 0
    images_low: int = 0
    peers: tuple[str, int] | None = None


class Supervisor:
    def __init__(self, engine: Engine, paths: AgentPaths, *, log_level: str, warm: int | None = None) -> None:
        self._engine = engine
        self._paths = paths
        self._log_level = log_level
        self._warm = warm
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._retiring: dict[str, asyncio.Task[None]] = {}
        #: Workers whose directory is being removed.
        self._clearing: set[str] = set()
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._pools: dict[str, Pool] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False

    def names(self) -> set[str]:
        """The workers that this server keeps."""
        return set(self._keepers) | set(self._retiring)

    async def start(self) -> None:
        events = self._engine.store.watch()
        for note in self._paths.workers.glob(f".*{NOTE_SUFFIX}"):
            await self._conclude(note.name[1:].removesuffix(NOTE_SUFFIX))
        await self._reconcile()
        await self._retire_leftovers()
        self._watcher = asyncio.create_task(self._watch(events), name="pool-watcher")

    async def _watch(self, events: AsyncIterator[Event]) -> None:
        """Follows the pools; after a failure (the store, or too many events at once) it looks anew at all of them."""
        while True:
            try:
                async for event in events:
                    if isinstance(event.record, Pool):
                        await self._reconcile()
            except GreenroomError as error:
                log.warning("looks at all pools again", error=error.message)
            await asyncio.sleep(LAST_PAUSE_S)
            events = self._engine.store.watch()
            with contextlib.suppress(GreenroomError):
                await self._reconcile()

    async def _reconcile(self) -> None:
        """Starts what is missing and ends what is too much, by name: worker N of a pool is ``<pool>-<N>``, after the
        server's prefix."""
        wanted: dict[str, Pool] = {}
        for pool in await self._engine.store.list(Pool):
            wanted |= {f"{self._paths.prefix}{pool.name}-{n}": pool for n in range(pool.spec.replicas)}
        for name, pool in wanted.items():
            if name in self._retiring or name in self._clearing:
                continue
            if name in self._keepers and self._pools[name].spec.slots != pool.spec.slots:
                # Actors go on running meanwhile: the agent that comes with the new number takes them over.
                await self._end(name, self._keepers.pop(name), wipe=False)
            if name not in self._keepers:
                self._keepers[name] = self._keeper(name, pool)
        for name in [n for n in self._keepers if n not in wanted]:
            self._retiring[name] = self._keepers.pop(name)
            self._engine.spawn(self._retire(name), f"retire-{name}")

    async def _retire_leftovers(self) -> None:
        """Workers of an earlier server that no pool asks for any more (``up`` with fewer of them): they are started
        once more, so that nothing that runs there is left behind."""
        workers = await self._engine.store.list(Worker)
        for worker in workers:
            if not (self._paths.workers / worker.name).is_dir():
                continue  # another server's, or an agent's that was started by hand
            if worker.name in self._keepers:
                continue
            spec = PoolSpec(backend=worker.backend, slots=worker.capacity)
            pool = Pool(name=worker.pool, uid="", spec=spec, created_at=worker.registered_at)
            self._retiring[worker.name] = self._keeper(worker.name, pool)
            self._engine.spawn(self._retire(worker.name), f"retire-{worker.name}")
        left = {path.name for path in self._paths.workers.glob("*") if path.is_dir()} - {w.name for w in workers}
        for name in sorted(left - self._keepers.keys()):
            self._engine.spawn(self._clear(name), f"clear-{name}")

    def _keeper(self, name: str, pool: Pool) -> asyncio.Task[None]:
        self._pools[name] = pool
        return self._keep_on(name)

    def _keep_on(self, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._keep(name, self._pools[name]), name=f"keep-{name}")

    async def _keep(self, name: str, pool: Pool) -> None:
        """Runs one agent, again and again."""
        pause = FIRST_PAUSE_S
        while True:
            await self._conclude(name)
            started = time.monotonic()
            try:
                process = await self._spawn(name, pool)
            except OSError as error:  # no more processes or files for now
                log.error("agent can't be started", worker=name, error=str(error))
                await asyncio.sleep(LAST_PAUSE_S)
                continue
            self._processes[name] = process
            status = await process.wait()
            if name in self._retiring and not (self._paths.workers / name / PAPERS).exists():
                return  # it has retired
            pause = FIRST_PAUSE_S if time.monotonic() - started > HEALTHY_S else min(pause * 2, LAST_PAUSE_S)
            log.warning("agent ended, starts again", worker=name, status=status, in_s=pause)
            await asyncio.sleep(pause)

    async def _spawn(self, name: str, pool: Pool, *more: str) -> asyncio.subprocess.Process:
        arguments = {
            "worker": name,
            "pool": pool.name,
            "backend": pool.spec.backend,
            "slots": str(pool.spec.slots),
            "state-dir": str(self._paths.workers / name),
            "images": str(self._paths.images),
            "snapshots": self._paths.snapshots,
            "control": self._paths.control,
            "parent": str(os.getpid()),
            "log-level": self._log_level,
        }
        if self._warm is not None:
            arguments["warm"] = str(self._warm)
        if self._paths.images_high:
            arguments |= {"images-high": str(self._paths.images_high), "images-low": str(self._paths.images_low)}
        if self._paths.peers:
            arguments["peers"] = "{}:{}".format(*self._paths.peers)
        command = [f"--{key}={value}" for key, value in arguments.items()]
        command += [f"--label={key}={value}" for key, value in self._paths.labels.items()]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "greenroom",
            "agent",
            *command,
            *more,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which ends its agents in order
        )

    async def _retire(self, name: str) -> None:
        """A worker that is too much: it is retired (`greenroom.engine.decommission`), and not started again then. One
        that dies meanwhile is, so that nothing that runs there is left behind."""
        while not self._closed and (keeper := self._retiring.get(name)) is not None:
            try:
                if await self._is_over(name):
                    await self._end(name, keeper, wipe=True)
                    if self._closed or await self._is_over(name):
                        break
                    self._retiring[name] = keeper = self._keep_on(name)  # it has registered in the last moment
                if incarnation := incarnation_of(self._paths.workers / name / PAPERS):
                    self._note(name).write_text(incarnation)
                await self._engine.decommission.retire(name)
                if keeper.done():  # its disk is erased, and then its record goes; or it was killed as it began
                    await asyncio.wait({self._engine.decommission.begin(name)})
                    await self._conclude(name)
                    if not await self._is_over(name):
                        self._retiring[name] = keeper = self._keep_on(name)
                    continue
            except (GreenroomError, OSError) as error:
                log.error("worker can't end yet", worker=name, error=str(error))
            await asyncio.wait({keeper}, timeout=RETIRE_PAUSE_S)  # it ends when its disk is erased
        if self._retiring.pop(name, None) is not None:  # or the server ends, and all its agents with it
            await self._clear(name)

    def _note(self, name: str) -> Path:
        """Whose directory it was, of a worker that retires; outlives it."""
        return self._paths.workers / f".{name}{NOTE_SUFFIX}"

    async def _conclude(self, name: str) -> None:
        """A worker that was to retire may have erased its disk when nobody was there to write that down."""
        note = self._note(name)
        if not note.exists():
            return
        try:
            if not (self._paths.workers / name).exists():
                await self._engine.decommission.erased(name, note.read_text())
            elif (worker := await self._engine.members.find(name)) is not None and worker.cordon == RETIRING:
                return
            note.unlink()
        except (GreenroomError, OSError) as error:
            log.warning("worker may count as lost before it counts as retired", worker=name, error=str(error))

    async def _is_over(self, name: str) -> bool:
        """Whether nothing is expected of a worker: it never registered, has retired, or was given up."""
        worker = await self._engine.members.find(name)
        return worker is None or worker.state is WorkerState.GONE

    async def _clear(self, name: str) -> None:
        self._clearing.add(name)
        try:
            await self._remove(name, self._paths.workers / name)
            await self._conclude(name)
        finally:
            self._clearing.discard(name)
        if not self._closed:
            await self._reconcile()  # it may be wanted again by now

    async def _remove(self, name: str, directory: Path) -> None:
        """What a worker that nobody knows any more leaves here. Not one that was told of something, and none that holds
        snapshots, whatever became of its papers: what a restored database knows nothing of is not discarded."""
        try:
            if await self._engine.members.find(name) is not None:
                return  # its tombstone
            if was_registered(directory / PAPERS):
                log.error("a worker that the database does not know has left its disk", path=str(directory))
                return
            if await asyncio.to_thread(holds_any, directory / "held"):
                log.error(
                    "a worker that the database does not know has left snapshots, perhaps the only copies",
                    path=str(directory),
                    todo="if the database was restored to an earlier time, restore a later one; if nothing is missed, "
                    "remove the directory",
                )
                return
            if directory.exists() and (backend := noted_backend(directory)):
                await self._end_what_is_left(name, backend)
            await asyncio.to_thread(erase, directory)
        except (GreenroomError, OSError) as error:
            log.error("what a worker has left is not removed", path=str(directory), error=str(error))

    async def _end_what_is_left(self, name: str, backend: str) -> None:
        """An agent that was killed leaves more than files: sandboxes, a network, uses of images. One that begins after
        it ends them, without a word to anybody.

        Raises:
            FailedPrecondition: it could not; its log says why.
        """
        pool = Pool(name="", uid="", spec=PoolSpec(backend=backend, slots=1), created_at=0.0)
        process = await self._spawn(name, pool, "--erase")
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                status = await process.wait()
        except TimeoutError:
            status = -1
        finally:
            if process.returncode is None:
                process.kill()
        if status != 0:
            raise FailedPrecondition(f"what an agent of worker {name} left running could not be ended; see its log")

    async def _end(self, name: str, keeper: asyncio.Task[None], *, wipe: bool) -> None:
        # One that is just being started takes over first what an agent before it left; ended before it handles signals,
        # it would leave that behind.
        if not keeper.done():
            await self._engine.census.wait_for_worker(name, asyncio.get_running_loop().time() + YOUNG_S)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        process = self._processes.pop(name, None)
        if process is None or process.returncode is not None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                try:
                    await self._engine.hub.call(name, Shutdown(wipe=wipe))
                except GreenroomError:  # it is not connected (yet)
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(WIPE_SIGNAL if wipe else END_SIGNAL)
                await process.wait()
        except TimeoutError:
            log.error("agent does not end, is killed", worker=name)
            process.kill()
            await process.wait()

    async def close(self, *, spare: Collection[str] = ()) -> None:
        """Ends all agents; what still runs on them is destroyed, so suspend everything first. On the workers of
        ``spare`` it goes on running instead, for the next agent to take over."""
        self._closed = True
        if self._watcher:
            self._watcher.cancel()
        keepers = self._keepers | self._retiring
        self._keepers, self._retiring = {}, {}
        await asyncio.gather(*(self._end(name, keeper, wipe=name not in spare) for name, keeper in keepers.items()))


async def awake_actors(store: Store, worker: str = "") -> list[Actor]:
    """Actors that hold a slot (of ``worker``): they run, are paused, or are on the way from one to the other."""
    awake: list[Actor] = []
    for state in sorted(states.BOUND):
        where = {"state": str(state), **({"worker": worker} if worker else {})}
        after = ""
        while page := await store.list(Actor, where=where, after=after):
            awake += page
            after = page[-1].pk
    return awake
