"""Streams between a caller and a worker: commands in an actor, and logs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from greenroom.core import agentapi as api
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Actor
from greenroom.engine.bindings import Binding
from greenroom.engine.workers import CallStream, WorkerHub

#: Log bytes of one actor that are put in order in memory; what the workers keep of it is bounded likewise.
MAX_LOG_BYTES = 32 << 20


class RemoteExec:
    """See `greenroom.engine.port.ExecStream`. Holds the binding, so that the actor does not count as idle."""

    def __init__(self, stream: CallStream, binding: Binding) -> None:
        self._stream = stream
        self._binding = binding
        self._held = True

    async def write(self, data: bytes) -> None:
        await self._stream.send(data)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        try:
            async for chunk in self._stream.chunks():
                yield chunk
        finally:
            self._release()

    async def wait(self) -> int:
        try:
            result = await self._stream.result()
        finally:
            self._release()
        assert isinstance(result, api.Exited)
        return result.code

    async def kill(self) -> None:
        self._stream.cancel()
        self._release()

    def _release(self) -> None:
        if self._held:
            self._held = False
            self._binding.release()


async def merged_logs(hub: WorkerHub, actor: Actor, tail_lines: int, follow: bool) -> AsyncIterator[bytes]:
    """What all connected workers keep of an actor, in the order of its incarnations; ``follow``: then what comes."""
    kept = await asyncio.gather(*(_kept(hub, worker, actor.uid) for worker in hub.connected()))
    segments = sorted((segment for worker in kept for segment in worker.items()), key=lambda segment: segment[0])
    data = b"".join(part for _, part in segments)
    if tail_lines >= 0:
        data = b"".join(data.splitlines(keepends=True)[-tail_lines:] if tail_lines else [])
    if data:
        yield data
    if follow and actor.worker:
        stream = hub.open(actor.worker, api.Logs(actor_uid=actor.uid, tail_lines=0, follow=True))
        try:
            async for _, chunk in stream.chunks():
                yield chunk
        finally:
            stream.cancel()


async def _kept(hub: WorkerHub, worker: str, actor_uid: str) -> dict[int, bytes]:
    """Bytes by generation that one worker keeps; nothing when it goes away meanwhile."""
    kept: dict[int, bytes] = {}
    try:
        stream = hub.open(worker, api.Logs(actor_uid=actor_uid))
        async for generation, chunk in stream.chunks():
            kept[generation] = kept.get(generation, b"") + chunk
            if sum(map(len, kept.values())) > MAX_LOG_BYTES:
                stream.cancel()
                break
    except GreenroomError:
        pass  # a worker that is gone keeps nothing that could be shown
    return kept
