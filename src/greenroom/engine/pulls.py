"""Templates' images on workers: pulled once for a preparation, and made ready on every worker of the pool."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import structlog

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Unavailable,
)
from greenroom.core.records import (
    LayerProgress,
    Operation,
    Template,
    TemplateState,
)
from greenroom.engine import clock
from greenroom.engine.operations import quietly
from greenroom.engine.phases import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: How long a preparation waits for the first worker of its pool.
WORKER_WAIT_S = 60.0
#: Between two writes of how far a pull is.
PROGRESS_INTERVAL_S = 0.25
#: The same for the template, which people watch rather than programs.
TEMPLATE_PROGRESS_INTERVAL_S = 1.0
#: Tries to make a template's image ready on a worker that has joined, and the pause before the second; it doubles. What
#: does not succeed then is done by the first actor that wakes there.
WARM_ATTEMPTS = 5
WARM_PAUSE_S = 5.0


class Pulls:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        #: Preparations that wait for the first worker of a pool.
        self.waiting: Counter[str] = Counter()

    async def worker_of(self, pool: str) -> str:
        """A connected worker of the pool, waiting for the first one, which an autoscaler may make because of that."""
        self.waiting[pool] += 1
        try:
            async with asyncio.timeout(WORKER_WAIT_S):
                while True:
                    arrival = self._engine.census.arrival
                    for name, hello in self._engine.hub.connected().items():
                        if hello.pool == pool:
                            return name
                    await arrival.wait()
        except TimeoutError:
            raise FailedPrecondition(
                f"pool {pool!r} has no connected worker; apply a WorkerPool of that name, or start the server with one",
                reason="NO_WORKER",
            ) from None
        finally:
            self.waiting[pool] -= 1

    async def pull(self, template: Template, op: Operation, phases: Phases) -> str:
        """The image's digest, pulled by some worker; by another one when that goes away."""
        while True:
            worker = await self.worker_of(template.spec.pool)
            phases.end("worker")
            try:
                return await self.pull_on(worker, template, op)
            except Unavailable as error:
                if error.reason != "WORKER_DISCONNECTED":
                    raise
            await asyncio.sleep(self._engine.config.retry_s)

    async def pull_on(self, worker: str, template: Template, op: Operation) -> str:
        """Whatever it takes, as long as something moves. How far it is stands in the operation and in the template."""
        layers: tuple[LayerProgress, ...] = ()
        image, phase, shown_at = template.spec.image, op.phase, 0.0

        def report(progress: api.Progress) -> None:
            nonlocal layers, phase
            layers, phase = progress.layers, progress.phase

        peers = self._engine.images.peers(worker)
        prepare = api.Prepare(image=image, peers=peers, id=f"{op.id}-{op.generation}")
        call = asyncio.ensure_future(self._engine.hub.call(worker, prepare, report))
        moved = clock.monotonic()
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=PROGRESS_INTERVAL_S)
                if layers != op.layers or phase != op.phase:
                    changed = phase != op.phase
                    op = await self._engine.preparations.note(op, phase=phase, layers=layers)
                    moved = clock.monotonic()
                    if changed or moved - shown_at >= TEMPLATE_PROGRESS_INTERVAL_S:
                        template = await self._engine.preparations.change(
                            template, op, phase=op.phase, layers=op.layers
                        )
                        shown_at = moved
                elif clock.monotonic() - moved > self._engine.config.stall_s:
                    raise DeadlineExceeded(
                        f"pulling {image} on worker {worker}: nothing has moved for {self._engine.config.stall_s:g} s; "
                        "what was fetched is kept, so apply the template again when the registry answers",
                        reason="STALLED",
                    )
        finally:
            if not call.done() and not self._ops.closed:  # nobody waits for it any more; the worker must not go on
                self._engine.spawn(quietly(self._engine.hub.call(worker, api.StopPrepare(id=prepare.id))), "stop")
            call.cancel()
        prepared = await call
        assert isinstance(prepared, api.Prepared)
        return prepared.image_digest

    async def prewarm(self, hello: api.Hello) -> None:
        """A worker has joined: images and sandboxes of its pool's templates are made ready there, one after the other:
        the link is the same for all."""
        after = ""
        while page := await self._store.list(Template, where={"state": TemplateState.READY}, after=after):
            for template in page:
                if template.spec.pool == hello.pool:
                    await quietly(self.warm(hello.worker, template))
            after = page[-1].pk

    def warm_all(self, template: Template) -> None:
        for name, hello in self._engine.hub.connected().items():
            if hello.pool == template.spec.pool:
                self._engine.spawn(quietly(self.warm(name, template)), f"warm-{name}")

    async def warm(self, worker: str, template: Template) -> None:
        pause_s = WARM_PAUSE_S
        for attempt in range(1, WARM_ATTEMPTS + 1):
            try:
                peers = self._engine.images.peers(worker, template.image_digest)
                call = api.Warm(spec=template.spec, image_digest=template.image_digest, peers=peers)
                await self._engine.hub.call(worker, call)
                return
            except Unavailable as error:  # the registry; one that is away itself is prepared anew when it is back
                if error.reason == "WORKER_DISCONNECTED" or attempt == WARM_ATTEMPTS:
                    raise
            await asyncio.sleep(pause_s)
            pause_s *= 2
