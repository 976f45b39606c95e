"""What lies between a client and the API server, and does what networks, proxies and busy servers do.

In front of one `Api`: requests that never arrive, whose answer is lost, that take effect long after their sender has
given up, or twice; refusals; and replicas of the server that are behind, each somewhere else.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from greenroom.testing.fake_kube.api import Api, Request, Response
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Object
from greenroom.testing.fake_kube.resources import Resource
from greenroom.testing.fake_kube.views import View

#: A server ends a request after this long (``--request-timeout``), so nothing takes effect later than that.
LATEST_S = 60.0


class Dropped(Exception):
    """No answer is sent."""


@dataclass(frozen=True)
class Odds:
    """How often a request meets which fate (0 to 1, together at most 1). Reads are only lost, refused or failed."""

    lost: float = 0.0  # it never arrives
    reply_lost: float = 0.0  # it takes effect, and nobody is told
    late: float = 0.0  # its sender is told that nobody answers, and then it takes effect
    twice: float = 0.0  # it takes effect now and again later (never a POST: RFC 9110, 9.2.2)
    refused: float = 0.0  # 429
    failed: float = 0.0  # 500, without effect
    latest_s: float = LATEST_S


CALM = Odds()
#: Of what writes, and of what only reads.
_FATES = (("lost", "reply_lost", "late", "twice", "refused", "failed"), ("lost", "refused", "failed"))


@dataclass
class Adversary:
    """`handle` is what a client is connected to.

    Args:
        spawn: begins a task that lives as long as the server.
        spare: paths that are let through whatever the odds are.
    """

    api: Api
    chance: random.Random
    spawn: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.ensure_future
    odds: Odds = CALM
    spare: tuple[str, ...] = ()
    hits: Counter[str] = field(default_factory=Counter)
    #: What was sent with an unknown outcome, by method and last part of the path.
    unknown: Counter[str] = field(default_factory=Counter)

    async def handle(self, request: Request) -> Response:
        if any(part in request.path for part in self.spare):
            return await self.api.handle(request)
        fate = self._fate(request.method)
        if fate:
            self.hits[fate] += 1
            if fate in ("lost", "reply_lost", "late"):
                self.unknown[f"{request.method} {request.path.rpartition('/')[2]}"] += 1
        match fate:
            case "lost":
                raise Dropped
            case "reply_lost":
                await self.api.handle(request)
                raise Dropped
            case "late":
                self.spawn(self._later(request))
                raise Dropped
            case "twice":
                self.spawn(self._later(request))
            case "refused":
                return _error(KubeError(429, "TooManyRequests", "too many requests, please try again", retry_after_s=1))
            case "failed":
                return _error(KubeError(500, "InternalError", "etcdserver: request timed out"))
        return await self.api.handle(request)

    def _fate(self, method: str) -> str:
        draw = self.chance.random()
        for name in _FATES[method == "GET"]:
            if name == "twice" and method == "POST":
                continue
            draw -= getattr(self.odds, name)
            if draw < 0:
                return name
        return ""

    async def _later(self, request: Request) -> None:
        sent_at = self.api.objects.clock() if request.sent_at is None else request.sent_at
        await asyncio.sleep(self.chance.uniform(0.0, self.odds.latest_s))
        await self.api.handle(replace(request, sent_at=sent_at))


def _error(error: KubeError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    return Response(error.code, msgspec.json.encode(error.status()), headers=headers)


@dataclass
class Replicas:
    """Several replicas' caches of one server, each behind by a time of its own. Run `follow` as a task.

    Attributes:
        lag_s: how long a change takes to get to a cache, at most.
        frozen: nothing gets to any cache while this is set.
    """

    api: Api
    chance: random.Random
    count: int = 3
    lag_s: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        self.views = [View(self.api.objects, live=False) for _ in range(self.count)]
        self.api.view_of = lambda _: self.chance.choice(self.views)
        self._news = asyncio.Event()
        self.api.objects.on_change.append(lambda _: self._news.set())

    async def follow(self) -> None:
        """Until it is cancelled."""
        while True:
            behind = [view for view in self.views if view.behind]
            if not behind:
                self._news.clear()
                await self._news.wait()
            await asyncio.sleep(max(0.01, self.lag_s * self.chance.random() / 2))
            if behind and not self.frozen:
                view = self.chance.choice(behind)
                view.advance(self.chance.randint(1, view.behind) if self.lag_s else None)

    def compact(self) -> None:
        """Forgets all history, and ends all watches so that somebody notices."""
        for view in self.views:
            view.compact()
            view.drop_watches(
                KubeError(410, "Expired", "too old resource version") if self.chance.random() < 0.5 else None
            )


@dataclass
class Quota:
    """Refuses pods beyond a number, as a ResourceQuota does; put it into `Objects.admit`. None: no limit."""

    pods: Callable[[], int]
    most: int | None = None

    def __call__(self, resource: Resource, obj: Object) -> None:
        if resource.plural == "pods" and self.most is not None and self.pods() >= self.most:
            name = obj["metadata"]["name"]
            message = f'pods "{name}" is forbidden: exceeded quota: pods, requested: pods=1, limited: pods={self.most}'
            raise KubeError(403, "Forbidden", message)
