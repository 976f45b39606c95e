"""What the operator says of itself over HTTP: whether it lives (``/livez``), whether it is of use (``/readyz``), and
figures for Prometheus (``/metrics``). Nothing here is secret, and nothing can be done with it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from greenroom.core.errors import FailedPrecondition
from greenroom.operator.operator import Operator

#: An operator that has not heard the API server for this long is not ready: it neither acts nor could take over.
SILENT_S = 45.0


class OperatorWeb:
    """An async context manager.

    Args:
        health, metrics: where to listen; None: nowhere. May be the same.
    """

    def __init__(self, operator: Operator, health: tuple[str, int] | None, metrics: tuple[str, int] | None) -> None:
        self._operator = operator
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._paths: dict[tuple[str, int], list[web.RouteDef]] = {}
        if health is not None:
            self._paths[health] = [web.get("/livez", self._lives), web.get("/readyz", self._ready)]
        if metrics is not None:
            self._paths.setdefault(metrics, []).append(web.get("/metrics", self._metrics))
        self._runners: list[web.AppRunner] = []
        #: Where it listens, in the order of ``health`` and ``metrics``.
        self.addresses: list[tuple[str, int]] = []

    async def __aenter__(self) -> OperatorWeb:
        try:
            for (host, port), routes in self._paths.items():
                app = web.Application()
                app.add_routes(routes)
                runner = web.AppRunner(app, access_log=None)
                self._runners.append(runner)
                await runner.setup()
                await web.TCPSite(runner, host, port).start()
                self.addresses.append(runner.addresses[0][:2])
        except OSError as error:
            await self.__aexit__()
            raise FailedPrecondition(
                f"can't listen on {host}:{port}: {error.strerror or error}; choose another address for --health or "
                "--metrics",
                reason="PORT_IN_USE",
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _lives(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, request: web.Request) -> web.Response:
        silent_s = asyncio.get_running_loop().time() - self._operator.heard_at
        if silent_s > SILENT_S:
            return web.Response(status=503, text="the API server does not answer\n")
        return web.Response(text="leads\n" if self._operator.term is not None else "stands by\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def collect(self) -> Iterator[Metric]:
        """For `CollectorRegistry`."""
        term = self._operator.term
        leads = GaugeMetricFamily("greenroom_operator_leads", "Whether this operator acts.")
        leads.add_metric([], float(term is not None))
        yield leads
        if term is None:
            return
        cached = GaugeMetricFamily("greenroom_operator_cached", "Objects in the cache, by kind.", labels=["kind"])
        lists = CounterMetricFamily("greenroom_operator_lists", "How often everything was listed.", labels=["kind"])
        quiet = GaugeMetricFamily(
            "greenroom_operator_cache_silent_seconds", "For how long nothing was heard of a kind.", labels=["kind"]
        )
        now = asyncio.get_running_loop().time()
        for kind, cache in term.caches().items():
            cached.add_metric([kind], len(cache.found))
            lists.add_metric([kind], cache.lists)
            quiet.add_metric([kind], max(0.0, now - cache.heard_at) if cache.synced.is_set() else 0.0)
        waiting = GaugeMetricFamily("greenroom_operator_queue", "Pools that are to be looked at.")
        waiting.add_metric([], len(term.queue))
        troubled = GaugeMetricFamily(
            "greenroom_operator_pools_unregistered", "Pools whose workers the control plane does not know of."
        )
        rosters = term.companions.rosters
        troubled.add_metric([], len(rosters.trouble) if rosters is not None else 0)
        looks = CounterMetricFamily("greenroom_operator_looks", "Looks at pools, by result.", labels=["result"])
        for result, number in sorted(Counter(self._operator.looks).items()):
            looks.add_metric([result], number)
        yield from (cached, lists, quiet, waiting, troubled, looks)
