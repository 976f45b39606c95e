"""The agent's links: one to every replica of the control plane.

Some addresses are given and stay for ever. Others are learned: each replica names all of them whenever it is heard. One
that was learned is dropped when no replica that is connected names it any more and it is down; so as long as nobody can
be reached, every address that was ever good is tried.

Two addresses may lead to one replica (a service's name, and one of what is behind it). A replica takes one link of each
worker, the latest; so a link whose replica is connected through another one waits until that one is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace

import structlog

from greenroom.agent.agent import Agent
from greenroom.agent.link import AgentLink
from greenroom.api.access import Access

log = structlog.get_logger(__name__)

#: Addresses that are learned at most. A control plane has a handful of replicas; one that names more is broken.
MAX_LEARNED = 64


class Links:
    """`start`, then `close`. ``given``: gRPC addresses. ``access``: for those on TCP."""

    def __init__(self, agent: Agent, given: Collection[str], access: Access | None = None) -> None:
        self._agent = agent
        self._given = frozenset(given)
        self._access = access or Access()
        #: Replicas share a certificate, which is for the name that was given and not for the addresses that each has.
        hosts = [target.rpartition(":")[0] for target in sorted(self._given) if not target.startswith("unix:")]
        self._learned_access = self._access
        if hosts and not self._access.server_name:
            self._learned_access = replace(self._access, server_name=hosts[0].strip("[]"))
        self._links: dict[str, AgentLink] = {}
        self._dropping: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        for target in sorted(self._given):
            self._add(target)

    @property
    def targets(self) -> Collection[str]:
        return self._links.keys()

    @property
    def is_up(self) -> bool:
        """Whether any replica is connected."""
        return any(link.is_up for link in self._links.values())

    async def close(self) -> None:
        """What waits to be sent is sent first."""
        links, self._links = [*self._links.values()], {}
        await asyncio.gather(*(link.close() for link in links), *self._dropping)

    def _add(self, target: str) -> None:
        access = self._access if target in self._given else self._learned_access
        link = AgentLink(self._agent, target, self._welcomed, self._elsewhere, access)
        self._links[target] = link
        link.start()

    def _welcomed(self, link: AgentLink) -> None:
        """Learns from what a replica says, and forgets what none says any more."""
        if self._links.get(link.target) is not link:
            return  # it is being closed
        named = {target for other in self._links.values() if other.is_up for target in other.welcome.links}
        for target in sorted(filter(self._can_reach, named - self._links.keys())):
            if len(self._links) >= len(self._given) + MAX_LEARNED:
                log.error("too many replicas are named", target=target)
                break
            log.info("learned of a replica", target=target)
            self._add(target)
        for target in self._links.keys() - named - self._given:
            if not self._links[target].is_up:
                log.info("forgets a replica", target=target)
                task = asyncio.create_task(self._links.pop(target).close())
                self._dropping.add(task)
                task.add_done_callback(self._dropping.discard)

    def _can_reach(self, target: str) -> bool:
        """Sockets are for agents on the replica's machine, TCP for those that know whom they meet there."""
        if target.startswith("unix:"):
            return any(given.startswith("unix:") for given in self._given)
        return self._access.ca is not None or any(not given.startswith("unix:") for given in self._given)

    def _elsewhere(self, link: AgentLink) -> AgentLink | None:
        replica = link.welcome.replica
        return next(
            (
                other
                for other in self._links.values()
                if other is not link and other.is_up and _leads_to(other, replica)
            ),
            None,
        )


def _leads_to(link: AgentLink, replica: str) -> bool:
    return bool(replica) and link.welcome.replica == replica
