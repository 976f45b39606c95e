"""``GET /metrics``: figures of the control plane for Prometheus, as text.

What has to be read from the store is read when somebody asks, and not more often than every
`greenroom.engine.garbage.FIGURES_AGE_S`.
Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from greenroom.core.demand import Demand
from greenroom.core.errors import FailedPrecondition, GreenroomError
from greenroom.engine.garbage import Figures
from greenroom.engine.port import ControlPlane

log = structlog.get_logger(__name__)

#: How long the store and the workers may take for the figures; a scraper waits ten seconds by default.
READ_TIMEOUT_S = 8.0


class MetricsServer:
    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._garbage: Mapping[str, Figures] = {}
        self._workers: Mapping[str, int] = {}
        self._demands: Sequence[Demand] = ()
        #: Whether the store and the workers told the figures just now.
        self._is_read = False
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Returns the address that it listens on. Raises `FailedPrecondition` (reason ``PORT_IN_USE``)."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise FailedPrecondition(
                f"can't serve metrics on {host}:{port}: {error.strerror or error}; choose another --metrics address",
                reason="PORT_IN_USE",
            ) from error
        address = self._runner.addresses[0]
        log.info("metrics are served", address=f"http://{address[0]}:{address[1]}/metrics")
        return address[0], address[1]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                self._garbage, self._workers = await self._control.garbage.figures()
                self._demands = await self._control.demands()
            self._is_read = True
        except (GreenroomError, TimeoutError) as error:  # what is counted in this process is worth telling all the same
            self._is_read = False
            log.info("figures not read", error=str(error))
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def collect(self) -> Iterator[Metric]:
        """For `CollectorRegistry`."""
        removals = self._control.removals
        up = GaugeMetricFamily("greenroom_figures_read", "Whether store and workers told the gauges below just now.")
        up.add_metric([], float(self._is_read))
        yield up
        if self._is_read:
            yield from self._gauges()
        wakes = self._control.wakes_here()
        yield _counter("greenroom_pool_wakes", "Wake-ups through this replica that ended well.", "pool", wakes)
        yield _counter("greenroom_garbage_destroyed", "What was destroyed, by kind.", "kind", removals.destroyed)
        yield _counter(
            "greenroom_garbage_destroyed_bytes", "Bytes of what was destroyed.", "kind", removals.destroyed_bytes
        )
        yield _counter("greenroom_garbage_failures", "What could not be destroyed at a try.", "kind", removals.failed)
        yield _counter("greenroom_worker_syncs", "Comparisons of a worker with the records.", "result", removals.syncs)

    def _gauges(self) -> Iterator[Metric]:
        objects = GaugeMetricFamily("greenroom_garbage_objects", "What is to be destroyed.", labels=["kind"])
        size = GaugeMetricFamily("greenroom_garbage_bytes", "Bytes of what is to be destroyed.", labels=["kind"])
        oldest = GaugeMetricFamily(
            "greenroom_garbage_oldest_seconds", "Age of the oldest of what is to be destroyed.", labels=["kind"]
        )
        for kind, figures in sorted(self._garbage.items()):
            objects.add_metric([kind], figures.objects)
            size.add_metric([kind], figures.size_bytes)
            oldest.add_metric([kind], figures.oldest_s)
        workers = GaugeMetricFamily("greenroom_workers", "Workers, by state.", labels=["state"])
        for state, number in self._workers.items():
            if state != "distrusted":
                workers.add_metric([state], number)
        distrusted = GaugeMetricFamily(
            "greenroom_workers_distrusted", "Workers on which nothing is destroyed until somebody has looked."
        )
        distrusted.add_metric([], self._workers.get("distrusted", 0))
        yield from (objects, size, oldest, workers, distrusted)
        yield from self._pools()

    def _pools(self) -> Iterator[Metric]:
        """Of all replicas together: each tells the same."""
        slots = GaugeMetricFamily("greenroom_pool_slots", "Slots of workers that take actors.", labels=["pool"])
        awake = GaugeMetricFamily("greenroom_pool_awake", "Slots that are taken.", labels=["pool"])
        waiting = GaugeMetricFamily("greenroom_pool_waiting", "Wake-ups that wait for a slot.", labels=["pool"])
        for demand in self._demands:
            slots.add_metric([demand.pool], demand.slots)
            awake.add_metric([demand.pool], demand.awake)
            waiting.add_metric([demand.pool], demand.waiting)
        yield from (slots, awake, waiting)


def _counter(name: str, help: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, help, labels=[label])
    for value, number in sorted(values.items()):
        family.add_metric([value], number)
    return family
