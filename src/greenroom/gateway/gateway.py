"""The wake-on-request gateway: from a host name to an actor that runs, however asleep it was.

    ClientConnection --owns--> Exchange --borrows--> UpstreamConnection (of the Pool of one Binding)
                                   |
                                   +-- Waker: the engine, which wakes the actor and says where it runs

All of it belongs to one event loop and no request needs a task unless it has to wait. What an actor does wrong ends at
its own connection; what a client does wrong ends at its own, too.
"""

from __future__ import annotations

import asyncio
import errno
import time
from typing import Final

import structlog

from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.core.names import check_label
from greenroom.core.records import Key
from greenroom.engine.bindings import Binding
from greenroom.engine.port import Waker
from greenroom.gateway.client import ClientConnection
from greenroom.gateway.heads import RequestHead
from greenroom.gateway.limits import Limits
from greenroom.gateway.route import Route, by_header, by_host, is_nobodys, owner_of
from greenroom.gateway.upstream import Pool

log = structlog.get_logger(__name__)

#: How often deadlines are looked at, in seconds: they are rough.
_SWEEP_S: Final = 0.5
#: Routes that are remembered; they are forgotten all together, since finding one anew costs microseconds.
_MAX_ROUTES: Final = 4096
#: Connections that wait to be accepted; the kernel caps it at net.core.somaxconn.
_BACKLOG: Final = 4096


class Gateway:
    """
    Args:
        waker: the engine.
        domain: what host names of actors end in: ``<actor>.<namespace>.<domain>``.
        trust_forwarded: all clients are proxies of ours, whose X-Forwarded fields are believed.
        access_log: one debug line of structlog per request.

    Attributes:
        requests: answered or given up so far.
        held: waiting for their actors now.
    """

    def __init__(
        self,
        waker: Waker,
        *,
        domain: str = "localhost",
        limits: Limits | None = None,
        trust_forwarded: bool = False,
        access_log: bool = False,
    ) -> None:
        for label in domain.split("."):
            check_label("domain", label)
        self.waker = waker
        self.domain = domain
        self.limits = limits or Limits()
        self.trust_forwarded = trust_forwarded
        self.access_log = access_log
        self.closing = False
        self.clients: set[ClientConnection] = set()
        self.requests = 0
        self.held = 0
        self.held_body_bytes = 0
        self._held_by_key: dict[Key, int] = {}
        self._pools: dict[Binding, Pool] = {}
        self._routes: dict[bytes, Route] = {}
        #: Of hosts beside the header: whose name it is, and whether nobody can have it lead where he likes.
        self._hosts: dict[bytes, tuple[Key | None, bool]] = {}
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._no_clients = asyncio.Event()
        self._no_clients.set()

    # --- life ---------------------------------------------------------------------------------------------

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens; ``port`` 0 takes any free one. May be called for several addresses.

        Raises:
            FailedPrecondition: reason ``PORT_IN_USE``, or ``CAN_NOT_LISTEN`` for any other cause.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: ClientConnection(self), host, port, backlog=_BACKLOG)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise FailedPrecondition(
                    f"can't listen on port {port} of {host}: {e.strerror}; choose another address",
                    reason="CAN_NOT_LISTEN",
                ) from e
            raise FailedPrecondition(
                f"port {port} of {host} is in use by another program: stop that, or let the gateway listen on another "
                "port (`greenroom up --listen HOST:PORT`; port 0 takes any that is free)",
                reason="PORT_IN_USE",
                metadata={"host": host, "port": str(port)},
            ) from e
        self._servers.append(server)
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [s.getsockname()[:2] for server in self._servers for s in server.sockets]

    async def close(self, grace_s: float = 5.0) -> None:
        """Takes no more connections, gives open requests ``grace_s`` seconds, then ends them."""
        self.closing = True
        for server in self._servers:
            server.close()
        for client in list(self.clients):
            client.shut_down()
        try:
            async with asyncio.timeout(grace_s):
                await self._no_clients.wait()
        except TimeoutError:
            for client in list(self.clients):
                client.transport.abort()
            await self._no_clients.wait()
        for pool in list(self._pools.values()):
            pool.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.perf_counter()
            for client in [c for c in self.clients if c.deadline < now]:
                try:
                    client.expire()
                except Exception:
                    log.exception("gateway.expire_failed")  # a bug; but no other connection may live for ever by it
                    client.transport.abort()
            for pool in list(self._pools.values()):
                pool.close_idle(now - self.limits.upstream_idle_s)

    # --- what its parts share -----------------------------------------------------------------------------

    def arrived(self, client: ClientConnection) -> bool:
        """False when it is one too many, and is to be closed."""
        self.clients.add(client)
        self._no_clients.clear()
        return len(self.clients) <= self.limits.clients and not self.closing

    def left(self, client: ClientConnection) -> None:
        self.clients.discard(client)
        if not self.clients:
            self._no_clients.set()

    def route(self, request: RequestHead, on_loopback: bool) -> Route:
        """Raises `NotFound` with what to do. ``on_loopback``: the client is of this machine, as is its browser."""
        if request.actor:
            meant = by_header(request.actor.decode("latin-1"), request.port.decode("latin-1"))
            self._check_host(request.host, meant.key, on_loopback)
            return meant
        route = self._routes.get(request.host)
        if route is None:
            route = by_host(request.host.decode("latin-1"), self.domain)
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            self._routes[request.host] = route
        return route

    def _check_host(self, host: bytes, key: Key, on_loopback: bool) -> None:
        """A page that an actor serves may send any header to where it came from. So under an actor's name no other is
        reached; nor, on the loopback, under a name that somebody has lead there (DNS rebinding)."""
        known = self._hosts.get(host)
        if known is None:
            if len(self._hosts) >= _MAX_ROUTES:
                self._hosts.clear()
            text = host.decode("latin-1")
            known = self._hosts[host] = owner_of(text, self.domain), is_nobodys(text, self.domain)
        owner, nobodys = known
        if (owner is not None and owner != key) or (on_loopback and not nobodys):
            raise NotFound(
                f"host {host.decode('latin-1')!r} does not lead to actor {key}, whatever the header Greenroom-Actor "
                "says; with that call the gateway by its address, or as localhost",
                reason="NO_ROUTE",
            )

    def pool(self, binding: Binding) -> Pool:
        """The connections of ``binding``, which is not revoked; they end with it."""
        pool = self._pools.get(binding)
        if pool is None:
            pool = self._pools[binding] = Pool(binding, self.limits, self._pools.pop, self.waker.entrance)
        return pool

    def hold(self, key: Key) -> None:
        """One more request waits for ``key``; `unhold` ends that.

        Raises:
            ResourceExhausted: too many do.
        """
        waiting = self._held_by_key.get(key, 0)
        if waiting >= self.limits.held_per_actor or self.held >= self.limits.held_total:
            whom = f"actor {key}" if waiting >= self.limits.held_per_actor else "sleeping actors"
            raise ResourceExhausted(f"too many requests wait for {whom}; try again later", reason="TOO_MANY_HELD")
        self._held_by_key[key] = waiting + 1
        self.held += 1

    def unhold(self, key: Key) -> None:
        self.held -= 1
        self._held_by_key[key] -= 1
        if not self._held_by_key[key]:
            del self._held_by_key[key]
