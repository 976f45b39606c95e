"""The client's side of `Exec`, for both kinds of client: sends the command, then input, and yields what comes back.

Input is sent only after the command has started and no longer than it runs, so that a write that fails never takes the
place of the answer (https://github.com/grpc/grpc/issues/36066).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient, Client

#: Bytes of input in one frame.
CHUNK_BYTES = 64 << 10


def execute(client: Client, start: Any, stdin: Iterable[bytes], timeout_s: float | None = None) -> Iterator[Any]:
    """Yields frames of stdout and stderr, and last the one with ``exit_code``. ``stdin`` is read in another thread.

    Closing the iterator kills the command.
    """
    started, ended = threading.Event(), threading.Event()

    def requests() -> Iterator[Any]:
        yield pb.ExecRequest(start=start)
        started.wait()
        for data in stdin:
            for chunk in chunks(data):
                if ended.is_set():
                    return
                yield pb.ExecRequest(stdin=chunk)
        if not ended.is_set():
            yield pb.ExecRequest(stdin_closed=True)
            ended.wait()  # the request stream stays open, so that cancelling is what ends it

    with client.actors.Exec(requests(), timeout=timeout_s) as stream:
        try:
            for frame in stream:
                if frame.started:
                    started.set()
                    continue
                if frame.WhichOneof("frame") == "exit_code":
                    ended.set()
                yield frame
                if ended.is_set():
                    return
        finally:
            ended.set()
            started.set()


async def execute_aio(client: AioClient, start: Any, stdin: AsyncIterable[bytes]) -> AsyncGenerator[Any, None]:
    """As `execute`."""
    started, ended = asyncio.Event(), asyncio.Event()

    async def requests() -> AsyncIterator[Any]:
        yield pb.ExecRequest(start=start)
        await started.wait()
        async for data in stdin:
            for chunk in chunks(data):
                if ended.is_set():
                    return
                yield pb.ExecRequest(stdin=chunk)
        if not ended.is_set():
            yield pb.ExecRequest(stdin_closed=True)
            await ended.wait()

    async with client.actors.Exec(requests()) as stream:
        try:
            async for frame in stream:
                if frame.started:
                    started.set()
                    continue
                if frame.WhichOneof("frame") == "exit_code":
                    ended.set()
                yield frame
                if ended.is_set():
                    return
        finally:
            ended.set()
            started.set()


def chunks(data: bytes) -> Iterator[bytes]:
    for offset in range(0, len(data), CHUNK_BYTES):
        yield data[offset : offset + CHUNK_BYTES]
