"""The other processes of the control plane that share the store: who they are, and what they use.

Each replica keeps a record of its own, renewed every third of a lease's life. Agents are told where all of them are,
and keep a link to each, so that an operation can be driven by any.

A record also says what is asked of its replica (`greenroom.engine.demand`), and which actors were in use through it
since it last said so. What the others make of the latter: such an actor is not idle. That is a hint, at most `REPORT_S`
late: an actor may be suspended in the very second in which another replica's first request for a long time reaches it,
and is then woken again for that request.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog
from msgspec.structs import replace

from greenroom.core.agentapi import Welcome
from greenroom.core.errors import Conflict, FailedPrecondition, GreenroomError, NotFound
from greenroom.core.records import Replica
from greenroom.engine import clock

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: How often a replica says what is in use through it, when anything is.
REPORT_S = 1.0
#: Lives of a lease after which the record of a replica that has gone is removed.
KEPT_LIVES = 10
#: Heartbeats of an agent in the time after which it counts as lost.
HEARTBEATS_PER_RETURN = 8
#: Share of that time after which an agent that nobody answers freezes what runs on it (see `greenroom.engine.census`).
ALONE_SHARE = 0.5


class Replicas:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._peers: dict[str, Replica] = {}
        self._mine: Replica | None = None
        self._reported_at = 0.0
        self.announce()

    def announce(self) -> None:
        """Tells the agents (by `WorkerHub.welcome`) where the control plane is and how often to say that they live."""
        config = self._engine.config
        values = [config.worker_return_s, *(r.worker_return_s for r in self._peers.values() if r.worker_return_s)]
        #: Of all replicas' ``worker_return_s``: see `greenroom.engine.census`.
        self.shortest_return_s, self.longest_return_s = min(values), max(values)
        links = {r.link for r in self._peers.values() if r.link} | ({config.link} if config.link else set())
        self._engine.hub.welcome = Welcome(
            replica=config.replica,
            links=tuple(sorted(links)),
            heartbeat_s=self.shortest_return_s / HEARTBEATS_PER_RETURN,
            alone_s=self.shortest_return_s * ALONE_SHARE,
            snapshot_mark=self._engine.belongings.mark,
        )

    async def check_name(self) -> None:
        """Raises:
        FailedPrecondition: another process that seems to live has this replica's name (reason
            ``REPLICA_NAME_TAKEN``). One that took agents where this one does has died before this one began.
        """
        config = self._engine.config
        if config.exclusive:
            return
        try:
            other = await self._store.get(Replica, config.replica)
        except NotFound:
            return
        if not self._is_here(other) and other.seen_at + config.lease_ttl_s > self._engine.now():
            where = other.link if other.link != config.link else f"{other.link}, on another machine or in a container"
            raise FailedPrecondition(
                f"another replica of the control plane is called {config.replica!r} (it takes agents at {where}); "
                f"give this one another name with --name, or wait {config.lease_ttl_s:g} s if that one has ended",
                reason="REPLICA_NAME_TAKEN",
            )

    def _is_here(self, other: Replica) -> bool:
        """Whether it takes agents where this one does. A path is another one on each machine, and in each root."""
        config = self._engine.config
        same_place = other.place in ("", config.place) or not config.link.startswith("unix:")
        return other.link == config.link and same_place

    async def loop(self) -> None:
        if self._engine.config.exclusive:
            return  # there can be no others
        while True:
            try:
                await self._report()
            except GreenroomError as error:
                log.warning("replica not reported, tries again", error=error.message)
            await asyncio.sleep(REPORT_S)

    async def _report(self) -> None:
        config, now = self._engine.config, self._engine.now()
        uses = self._uses(now)
        pools = self._engine.pools_asked
        asked = {"waiting": pools.waiting_here(), "wakes_per_s": pools.paces_here()}
        due = self._mine is None or now - self._mine.seen_at >= config.lease_ttl_s / 3
        if due:
            await self._look(now)
        news = self._mine is not None and asked != {name: getattr(self._mine, name) for name in asked}
        if due or uses or news:
            self._mine = await self._write(now, {"uses": uses, **asked})

    def _uses(self, now: float) -> dict[str, float]:
        """Actors that have been in use here since the last time this was asked."""
        at, since = clock.monotonic(), self._reported_at
        self._reported_at = at
        return {
            b.uid: now - (0.0 if b.in_flight else at - b.used_here)
            for b in self._engine.bindings.all()
            if b.in_flight or b.used_here >= since
        }

    async def _look(self, now: float) -> None:
        """Who else is there."""
        config = self._engine.config
        alive: dict[str, Replica] = {}
        for replica in await self._store.list(Replica):
            if replica.name == config.replica:
                continue
            if replica.seen_at + config.lease_ttl_s > now:
                alive[replica.name] = replica
            elif replica.seen_at + KEPT_LIVES * config.lease_ttl_s < now:
                await self._forget(replica)
        if set(alive) != set(self._peers):
            log.info("replicas of the control plane", others=sorted(alive))
        self._peers = alive
        self.announce()

    async def _forget(self, replica: Replica) -> None:
        try:
            await self._store.remove(replica)
        except Conflict:
            pass  # it is back

    async def _write(self, now: float, said: dict[str, Any]) -> Replica:
        config = self._engine.config
        current = self._mine
        if current is None:
            try:
                current = await self._store.get(Replica, config.replica)
            except NotFound:
                current = Replica(name=config.replica, incarnation="", started_at=now)
        about = {
            "incarnation": config.owner,
            "link": config.link,
            "place": config.place,
            "worker_return_s": config.worker_return_s,
        }
        mine = replace(current, **about, seen_at=now, **said)
        try:
            return await self._store.put(mine)
        except Conflict:
            self._mine = None  # an earlier process of this name still writes, or a reply was lost: read it anew
            raise

    def seen(self, replica: Replica) -> None:
        """Another replica's record, as it is now."""
        if replica.name == self._engine.config.replica:
            return
        known = self._peers.get(replica.name)
        self._peers[replica.name] = replica
        if known is None or known.worker_return_s != replica.worker_return_s:
            self.announce()
        if replica.uses:
            now, at = self._engine.now(), clock.monotonic()
            for uid, used_at in replica.uses.items():
                self._engine.bindings.used_elsewhere(uid, at - max(0.0, now - used_at), at + 2 * REPORT_S)

    def others(self) -> list[Replica]:
        """Those that seem to live, as they were last heard."""
        return list(self._peers.values())

    async def leave(self) -> None:
        """This replica ends: its record goes."""
        if self._mine is not None:
            await self._forget(await self._store.get(Replica, self._mine.name))
