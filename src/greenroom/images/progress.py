"""How far the preparation of one image is, layer by layer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from greenroom.core.records import LayerProgress
from greenroom.images.config import Descriptor
from greenroom.images.port import OnProgress
from greenroom.images.shared import PERIOD_S, Stage

#: Progress calls are at least this far apart, so that a caller may send each on.
PROGRESS_PERIOD_S = 0.1


class Progress:
    """Gathers what the layers report and passes it on, at most every `PROGRESS_PERIOD_S` and always the last."""

    def __init__(self, layers: Sequence[Descriptor], listeners: Sequence[OnProgress | None]) -> None:
        self._listeners = listeners
        self._layers = {layer.digest: LayerProgress(digest=layer.digest, total_bytes=layer.size) for layer in layers}
        self._phase = "download"
        self._next = 0.0

    def update(self, phase: str, digest: str, done_bytes: int) -> None:
        known = self._layers[digest]
        self._layers[digest] = msgspec.structs.replace(known, done_bytes=done_bytes, phase=phase)
        changed = phase != self._phase
        self._phase = phase
        now = time.monotonic()
        if changed or now >= self._next:
            self._next = now + PROGRESS_PERIOD_S
            self._tell()

    def show(self, stage: Stage) -> None:
        """What another process does, which has the image's lock."""
        self._phase = stage.phase
        self._layers |= {layer.digest: layer for layer in stage.layers if layer.digest in self._layers}
        self._tell()

    def stage(self) -> Stage:
        return Stage(phase=self._phase, layers=tuple(self._layers.values()))

    def finish(self) -> None:
        self._phase = "unpack"
        for digest, known in self._layers.items():
            self._layers[digest] = msgspec.structs.replace(known, done_bytes=known.total_bytes, phase="unpack")
        self._tell()

    def unpacked_part(self) -> float:
        """How much of the image was unpacked, from 0.0 to 1.0, by the bytes of its layers."""
        total = sum(layer.total_bytes for layer in self._layers.values())
        done = sum(layer.done_bytes for layer in self._layers.values() if layer.phase == "unpack")
        return done / total if total else 0.0

    @asynccontextmanager
    async def watched(
        self, layer: Descriptor, arrived: Callable[[Descriptor], int]
    ) -> AsyncIterator[Callable[[int], None]]:
        """Around the fetching of a layer; yields what is to be told how many bytes are here. Until then it may be a
        wait for somebody else who fetches it for another image: what has ``arrived`` of it is looked at."""

        async def work() -> None:
            while True:
                await asyncio.sleep(PERIOD_S)
                here = await asyncio.to_thread(arrived, layer)
                if here > self._layers[layer.digest].done_bytes:
                    self.update("download", layer.digest, here)

        task = asyncio.create_task(work())

        def tell(done_bytes: int) -> None:
            task.cancel()
            self.update("download", layer.digest, done_bytes)

        try:
            yield tell
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _tell(self) -> None:
        for listener in self._listeners:
            if listener is not None:
                listener(self._phase, tuple(self._layers.values()))
