"""How far a preparation is, for processes that wait for another one's.

Whoever prepares an image writes it to ``progress/<hex>`` every now and then; whoever waits for the image's lock reads
it there. So a wait for somebody else's work is seen to move, and is not taken for one in which nothing does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from greenroom.core.records import LayerProgress, Record
from greenroom.images.blobs import hex_of

#: Between two writes, and two looks: people see it move, and a stall timeout is a minute.
PERIOD_S = 0.5


class Stage(Record, frozen=True, kw_only=True):
    phase: str
    layers: tuple[LayerProgress, ...] = ()


class SharedProgress:
    """Below ``root``, which several processes share."""

    def __init__(self, root: Path) -> None:
        self._root = root / "progress"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @asynccontextmanager
    async def told(self, digest: str, stage: Callable[[], Stage]) -> AsyncIterator[None]:
        """Around a preparation: others see how far it is."""

        async def work() -> None:
            while True:
                await asyncio.sleep(PERIOD_S)
                with contextlib.suppress(OSError):  # a full disk stops the work itself, not its announcement
                    await asyncio.to_thread(self._write, digest, stage())

        try:
            async with _beside(work()):
                yield
        finally:
            self._path(digest).unlink(missing_ok=True)

    @asynccontextmanager
    async def heard(self, digest: str, on_stage: Callable[[Stage], None]) -> AsyncIterator[None]:
        """Around a wait for the digest's lock: ``on_stage`` hears how far whoever has it is."""

        async def work() -> None:
            while True:
                await asyncio.sleep(PERIOD_S)
                stage = await asyncio.to_thread(self._read, digest)
                if stage is not None:
                    on_stage(stage)

        async with _beside(work()):
            yield

    def _write(self, digest: str, stage: Stage) -> None:
        """Not synced: nobody needs it after a power cut."""
        path = self._path(digest)
        staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        staged.write_bytes(msgspec.json.encode(stage))
        staged.rename(path)

    def _read(self, digest: str) -> Stage | None:
        try:
            return msgspec.json.decode(self._path(digest).read_bytes(), type=Stage)
        except (OSError, msgspec.MsgspecError):
            return None

    def _path(self, digest: str) -> Path:
        return self._root / hex_of(digest)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
