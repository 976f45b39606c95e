"""A whole Greenroom on one machine, put together: store, engine, agents, API and gateway.

Everything it keeps is below one data directory:
    control.db      the control plane's records
    snapshots/      sleeping actors
    images/         layers and unpacked root file systems
    workers/NAME/   what one worker needs while it runs
    run/            api.sock (for the command line and the SDK), agents.sock (for the agents)
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import structlog

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2_grpc
from greenroom.api.link import AgentHub
from greenroom.api.server import ApiServer
from greenroom.api.service import ServerInfo
from greenroom.cli.supervisor import AgentPaths, Supervisor, awake_actors
from greenroom.core.errors import NotFound
from greenroom.core.records import Actor, Pool, PoolSpec
from greenroom.engine.config import EngineConfig
from greenroom.engine.engine import Engine
from greenroom.gateway.gateway import Gateway
from greenroom.sandbox import registry
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.store.sqlite import SqliteStore

log = structlog.get_logger(__name__)

#: Agents ping as often as this at most (their keepalive is 15 s).
_MIN_PING_MS = 10_000


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """``pool`` is applied at start if there is no pool "default" yet, or if it was asked for explicitly
    (``resize``). ``listen``: the gateway's (host, port), port 0 for any. ``api``: further API addresses."""

    data_dir: Path
    pool: PoolSpec = field(default_factory=PoolSpec)
    resize: bool = False
    listen: tuple[str, int] = ("127.0.0.1", 8080)
    domain: str = "localhost"
    api: tuple[str, ...] = ()
    log_level: str = "info"
    warm: int | None = None
    operation_deadline_s: float = 300.0
    capacity_wait_s: float = 60.0


class Server:
    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self.run_dir = options.data_dir / "run"

    async def start(self) -> None:
        """Raises `GreenroomError` when something is in use or missing; then nothing is left running."""
        options = self._options
        options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        registry.load(options.pool.backend)  # an unknown backend is said before anything is started
        self.store = await SqliteStore.open(options.data_dir)
        try:
            await self._start_parts()
        except BaseException:
            await self.close(suspend=False)
            raise

    async def _start_parts(self) -> None:
        options = self._options
        self.run_dir.mkdir(mode=0o700, exist_ok=True)
        self.gateway: Gateway | None = None
        self.api: ApiServer | None = None
        self.supervisor: Supervisor | None = None
        self.hub = AgentHub()
        config = EngineConfig(
            owner=f"server-{uuid.uuid4().hex[:12]}",
            operation_deadline_s=options.operation_deadline_s,
            capacity_wait_s=options.capacity_wait_s,
        )
        snapshots = str(options.data_dir / "snapshots")
        self.engine = Engine(self.store, self.hub, ObjectSnapshotStore(snapshots), config)
        self._link = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS)])
        link_pb2_grpc.add_AgentLinkServicer_to_server(self.hub, self._link)
        control = f"unix:{self.run_dir / 'agents.sock'}"
        self._link.add_insecure_port(control)
        self.gateway = Gateway(self.engine, domain=options.domain)
        await self.gateway.start(*options.listen)
        self.api = ApiServer(self.engine, info=self._info())
        await self.api.start([f"unix:{self.run_dir / 'api.sock'}", *options.api])
        await self._link.start()
        await self.engine.start()
        await self._apply_pool()
        paths = AgentPaths(
            workers=options.data_dir / "workers",
            images=options.data_dir / "images",
            snapshots=snapshots,
            control=control,
        )
        self.supervisor = Supervisor(self.engine, paths, log_level=options.log_level, warm=options.warm)
        await self.supervisor.start()

    async def _apply_pool(self) -> None:
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

    async def close(self, *, suspend: bool = True) -> list[str]:
        """Ends everything in order: no new requests, actors suspended, agents ended, store closed.

        Returns:
            Actors that could not be suspended (a full disk). The sandboxes on their workers are left running, for the
            next server to take over: to end them would lose what they have in memory.
        """
        awake: list[Actor] = []
        if self.gateway:
            await self.gateway.close(grace_s=1.0)
        if suspend and self.supervisor:
            awake = await self._suspend_all()
        if self.supervisor:
            await self.supervisor.close(spare={actor.worker for actor in awake})
        if self.api:
            await self.api.close(grace_s=1.0)
        await self.engine.close()
        await self._link.stop(grace=1.0)
        await self.store.close()
        return [str(actor.key) for actor in awake]

    async def _suspend_all(self) -> list[Actor]:
        """Suspends every actor and returns those that are awake all the same."""
        for operation in await self.engine.suspend_all():
            if operation.error is not None:
                log.error("could not suspend", actor=str(operation.key), error=operation.error.message)
        return await awake_actors(self.store)
