"""A whole Greenroom on one machine, put together: store, engine, agents, API and gateway.

Everything it keeps is below one data directory:
    greenroom.db    the control plane's records
    snapshots/      sleeping actors
    images/         layers and unpacked root file systems
    workers/NAME/   what one worker needs while it runs
    run/            api.sock (for the command line and the SDK), agents.sock (for the agents)

Agents and callers on other machines come over TCP, with TLS and tokens (`greenroom.api.access`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import structlog

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2_grpc
from greenroom.api.link import AgentHub
from greenroom.api.metrics import MetricsServer
from greenroom.api.server import MAX_SOCKET_PATH_BYTES, ApiServer, listen_tcp, stop
from greenroom.api.service import ServerInfo
from greenroom.cli.supervisor import AgentPaths, Supervisor, awake_actors
from greenroom.cli.tcp import Listeners, joined
from greenroom.core.errors import FailedPrecondition, GreenroomError, InvalidArgument, NotFound, Unavailable
from greenroom.core.gc.blobs import SCRUB_AGE_S
from greenroom.core.records import Actor, OperationKind, Pool, PoolSpec
from greenroom.engine.config import DEADLINES_S, PREPARE_DEADLINE_S, EngineConfig
from greenroom.engine.engine import Engine
from greenroom.engine.members import LEAVING
from greenroom.gateway.gateway import Gateway
from greenroom.gateway.limits import Limits
from greenroom.sandbox import dial, registry
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.store.hold import Hold
from greenroom.store.port import Store
from greenroom.store.sqlite import SqliteStore

log = structlog.get_logger(__name__)

#: Between attempts to start the workers of a server whose store did not answer.
STORE_RETRY_S = 1.0

#: Agents ping as often as this at most (their keepalive is 15 s).
_MIN_PING_MS = 10_000


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """``pool`` is applied at start if there is no pool "default" yet, or if it was asked for explicitly
    (``resize``). ``listen``: the gateway's (host, port), port 0 for any. ``api``: further API addresses.

    ``store``: "" for SQLite in the data directory, which one server holds; a ``postgresql://`` URL for a database that
    any number of replicas share, each with a ``name`` of its own. ``snapshots``: where sleeping actors are kept, which
    replicas and workers share ("": below the data directory); ``images`` likewise. ``images_high``,
    ``images_low``: marks of evicting images, in bytes (0: none). ``peers``: where workers serve layers to each other.
    ``metrics``: where Prometheus gets figures.
    ``no_workers``: keeps no agents. ``listeners``: what is listened on for agents over TCP, and what TCP asks for.
    ``rosters``: takes only workers that are on a roster, and leaves all pools to whoever sends these."""

    data_dir: Path
    pool: PoolSpec = field(default_factory=PoolSpec)
    resize: bool = False
    listen: tuple[str, int] = ("127.0.0.1", 8080)
    domain: str = "localhost"
    api: tuple[str, ...] = ()
    log_level: str = "info"
    warm: int | None = None
    store: str = field(default="", repr=False)  # there may be a password in it
    snapshots: str = ""
    images: Path | None = None
    images_high: int = 0
    images_low: int = 0
    peers: tuple[str, int] | None = None
    metrics: tuple[str, int] | None = None
    name: str = "server"
    no_workers: bool = False
    listeners: Listeners = field(default_factory=Listeners)
    rosters: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    lease_ttl_s: float = 30.0
    stall_s: float = 60.0
    worker_return_s: float = 15.0
    worker_gone_s: float = 86400.0
    reconcile_s: float = 30.0
    scrub_s: float = 6 * 3600.0
    scrub_age_s: float = SCRUB_AGE_S
    deadlines_s: dict[OperationKind, float] = field(default_factory=dict)
    operation_deadline_s: float = 300.0
    capacity_wait_s: float = 60.0
    max_files: int = 1024


class Server:
    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self.run_dir = options.data_dir / "run"
        self.store: Store | None = None
        self.engine: Engine | None = None
        self.gateway: Gateway | None = None
        self.api: ApiServer | None = None
        self.supervisor: Supervisor | None = None
        self.metrics: MetricsServer | None = None
        #: Where agents on other machines connect; "": nowhere.
        self.agents_address = ""
        self._links: list[grpc.aio.Server] = []
        self._hold: Hold | None = None
        self._later: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises `GreenroomError` when something is in use or missing; then nothing is left running."""
        options = self._options
        registry.load(options.pool.backend)  # an unknown backend is said before anything is started
        agents_socket = self.run_dir / "agents.sock"
        if len(os.fsencode(agents_socket)) > MAX_SOCKET_PATH_BYTES:
            raise InvalidArgument(
                f"data directory {options.data_dir} has too long a path: the sockets below it could not be named "
                f"({MAX_SOCKET_PATH_BYTES} bytes at most)",
                reason="PATH_TOO_LONG",
            )
        try:
            self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if options.store:  # SQLite's holds it by itself. Before the sockets: gRPC takes those of a live server away
                self._hold = Hold(options.data_dir)
        except OSError as error:
            raise FailedPrecondition(
                f"data directory {options.data_dir} can't be used: {error.strerror}; choose another with --data or "
                "GREENROOM_HOME",
                reason="DATA_DIR_UNUSABLE",
            ) from error
        try:
            self.store = await open_store(options)
            await self._start_parts(self.store, f"unix:{agents_socket}")
        except BaseException:
            await self.close(suspend=False)
            raise

    async def _start_parts(self, store: Store, control: str) -> None:
        options = self._options
        hub = AgentHub()
        agents = self._take_agents(hub, control)
        config = EngineConfig(
            owner=f"{options.name}/{uuid.uuid4().hex[:12]}",
            replica=options.name,
            link=agents or control,
            rosters=options.rosters,
            place=dial.place(),
            exclusive=not options.store,
            lease_ttl_s=options.lease_ttl_s,
            stall_s=options.stall_s,
            worker_return_s=options.worker_return_s,
            worker_gone_s=options.worker_gone_s,
            reconcile_s=options.reconcile_s,
            scrub_s=options.scrub_s,
            scrub_age_s=options.scrub_age_s,
            deadlines_s=DEADLINES_S | options.deadlines_s,
            prepare_deadline_s=options.deadlines_s.get(OperationKind.PREPARE, PREPARE_DEADLINE_S),
            operation_deadline_s=options.operation_deadline_s,
            capacity_wait_s=options.capacity_wait_s,
        )
        snapshots = options.snapshots or str(options.data_dir / "snapshots")
        self.engine = Engine(store, hub, ObjectSnapshotStore(snapshots), config)
        with contextlib.suppress(Unavailable):  # the engine asks again; but one that may not begin answers nobody
            await self.engine.replicas.check_name()
        await self.engine.belongings.check()
        limits = Limits(clients=min(Limits().clients, options.max_files // 2))  # each needs another one to its actor
        self.gateway = Gateway(self.engine, domain=options.domain, limits=limits)
        await self.gateway.start(*options.listen)
        self.api = ApiServer(self.engine, info=self._info(), guard=options.listeners.api_guard)
        await self.api.start([f"unix:{self.run_dir / 'api.sock'}", *options.api])
        if options.metrics:
            self.metrics = MetricsServer(self.engine)
            await self.metrics.start(*options.metrics)
        for link in self._links:
            await link.start()
        await self.engine.start()
        if not options.no_workers:
            paths = AgentPaths(
                workers=options.data_dir / "workers",
                images=options.images or options.data_dir / "images",
                snapshots=snapshots,
                control=control,
                prefix="" if config.exclusive else f"{options.name}-",
                labels=options.labels,
                images_high=options.images_high,
                images_low=options.images_low,
                peers=options.peers,
            )
            self.supervisor = Supervisor(self.engine, paths, log_level=options.log_level, warm=options.warm)
        try:
            await self._keep_workers()
        except Unavailable as error:  # an embedded store is never away at the start
            log.warning("no workers yet: the store does not answer", error=error.message)
            self._later = asyncio.create_task(self._keep_workers_later(), name="keep-workers-later")

    def _take_agents(self, hub: AgentHub, control: str) -> str:
        """Binds the socket and the TCP address for agents; returns what those elsewhere are told that the latter is, or
        "" without one."""
        listeners = self._options.listeners
        guard = listeners.agent_guard
        self._links.append(_link_server(hub, []))
        self._links[0].add_insecure_port(control)
        if not listeners.agents:
            return ""
        self._links.append(_link_server(hub, guard.interceptors() if guard else []))
        self.agents_address = listen_tcp(self._links[1], listeners.agents, guard, "--agents", "--agent-token-file")
        log.info("takes agents", address=self.agents_address)
        return joined((listeners.agents_host, int(self.agents_address.rpartition(":")[2])))

    async def _keep_workers(self) -> None:
        await self._apply_pool()
        if self.supervisor:
            await self.supervisor.start()

    async def _keep_workers_later(self) -> None:
        while True:
            await asyncio.sleep(STORE_RETRY_S)
            try:
                return await self._keep_workers()
            except Unavailable:
                continue

    async def _apply_pool(self) -> None:
        if self._options.rosters:
            return  # pools are the operator's
        assert self.store is not None and self.engine is not None
        try:
            await self.store.get(Pool, "default")
            if not self._options.resize:
                return
        except NotFound:
            pass
        await self.engine.apply_pool("default", self._options.pool)

    def _info(self) -> ServerInfo:
        assert self.gateway is not None
        host, port = self.gateway.addresses[0]
        return ServerInfo(
            backends=tuple(registry.names()),
            gateway_url=f"http://{host}:{port}",
            domain=self._options.domain,
        )

    @property
    def gateway_address(self) -> tuple[str, int]:
        assert self.gateway is not None
        return self.gateway.addresses[0]

    async def close(self, *, suspend: bool = True, hurry: asyncio.Event | None = None) -> list[str]:
        """Ends everything in order: no new requests, actors suspended, agents ended, store closed. A step that fails is
        logged, and the others follow.

        Args:
            suspend: suspends what is running; without, it goes on running for the next server to take over.
            hurry: when set, what is not suspended yet is left running.

        Returns:
            Actors that could not be suspended (a full disk, or ``hurry``). The sandboxes on their workers are left
            running: to end them would lose what they have in memory.
        """
        awake: list[Actor] = []
        if self._later:
            self._later.cancel()
        if self.gateway:
            await _step(self.gateway.close(grace_s=1.0))
        if self.supervisor and self.engine and self.store:
            mine = self.supervisor.names()
            if suspend:
                await _step(self._empty(self.engine, mine, hurry or asyncio.Event()))
            try:
                awake = [actor for actor in await awake_actors(self.store) if actor.worker in mine]
                spare = {actor.worker for actor in awake}
            except GreenroomError as error:
                log.error("can't tell what is awake, leaves it running", error=error.message)
                spare = mine
            await _step(self.supervisor.close(spare=spare))
        if self.api:
            await _step(self.api.close(grace_s=1.0))
        if self.metrics:
            await _step(self.metrics.close())
        if self.engine:
            await _step(self.engine.replicas.leave())
            await _step(self.engine.close())
        for link in self._links:
            await _step(stop(link, grace_s=1.0))
        if self.store:
            await _step(self.store.close())
        if self._hold:
            self._hold.release()
        return [str(actor.key) for actor in awake]

    async def _empty(self, engine: Engine, workers: set[str], hurry: asyncio.Event) -> None:
        """Suspends what runs on these workers, and uploads what is only there, until it is done or in a hurry."""
        emptying = asyncio.create_task(_empty_workers(engine, sorted(workers)))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({emptying, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not emptying.done():
            emptying.cancel()
            return
        await emptying


async def _empty_workers(engine: Engine, workers: list[str]) -> None:
    if not engine.config.exclusive:  # other replicas would wake actors there again
        for worker in workers:
            await _of_one(worker, engine.members.cordon(worker, LEAVING))
    for operation in await engine.suspend_all(workers):
        if operation.error is not None:
            log.error("could not suspend", actor=str(operation.key), error=operation.error.message)
    for worker in workers:
        await _of_one(worker, engine.uploads.flush(worker))


async def _of_one(worker: str, step: Awaitable[object]) -> None:
    """What fails on one worker, which may be gone, keeps none of the others from being emptied."""
    try:
        await step
    except GreenroomError as error:
        log.warning("worker not emptied as the server ends", worker=worker, reason=error.reason, error=error.message)


def _link_server(hub: AgentHub, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
            ("grpc.so_reuseport", 0),  # otherwise a second server on the same port would silently share it
        ],
        interceptors=interceptors,
    )
    link_pb2_grpc.add_AgentLinkServicer_to_server(hub, server)
    return server


async def open_store(options: ServerOptions) -> Store:
    if not options.store:
        return await SqliteStore.open(options.data_dir)
    from greenroom.store.postgres import PostgresStore  # psycopg is only loaded where it is used

    return await PostgresStore.open(options.store, replica=options.name)


async def _step(work: Awaitable[object]) -> None:
    try:
        await work
    except Exception:
        log.exception("ending goes on after a failure")
