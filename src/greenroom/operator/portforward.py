"""A way to a port of a pod through the API server, for whoever stands outside the cluster.

A unix socket is listened on here; each connection to it becomes a WebSocket to ``pods/NAME/portforward``, in which the
API server, the pod's kubelet and its runtime carry the bytes on. The socket is in a directory that only its owner may
enter: no port is opened for others on this machine.

Source: k8s.io/kubelet, pkg/cri/streaming/portforward/websocket.go: subprotocol ``v4.channel.k8s.io``; each message
begins with the number of its channel; for one port 0 is data and 1 is errors; the first thing that comes on each is
the port, two bytes, little endian. There is no half-close: the end of one direction is the end of both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp

from greenroom.core.errors import FailedPrecondition, GreenroomError, Unavailable
from greenroom.operator.client import pods_path
from greenroom.operator.transport import HttpTransport

PROTOCOL = "v4.channel.k8s.io"
DATA, ERROR = 0, 1
_PORT_BYTES = 2
#: Read from a connection at once; one message to the API server holds that much.
CHUNK_BYTES = 64 << 10
#: What a pod's runtime says of a connection that failed is a line.
MAX_TROUBLE_CHARS = 1000

#: Where a connection is to go now: namespace, pod, port.
Target = tuple[str, str, int]


class Forward:
    """Forwards connections until it is closed.

    Args:
        target: asked for each connection, so that one that comes after a pod has died goes to another.

    Attributes:
        trouble: why the latest connection that failed did; None while none has.
    """

    def __init__(self, transport: HttpTransport, target: Callable[[], Awaitable[Target]]) -> None:
        self._transport, self._target = transport, target
        self.trouble: GreenroomError | None = None

    @contextlib.asynccontextmanager
    async def listening(self, socket: Path) -> AsyncIterator[None]:
        serving: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer))
            serving.add(task)
            task.add_done_callback(serving.discard)

        server = await asyncio.start_unix_server(accept, str(socket))
        try:
            yield
        finally:
            server.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._carry(reader, writer)
        except GreenroomError as error:
            self.trouble = error
        finally:
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        namespace, pod, port = await self._target()
        path = f"{pods_path(namespace)}/{pod}/portforward"
        try:
            async with self._transport.websocket(path, {"ports": str(port)}, PROTOCOL) as stream:
                await _exchange(reader, writer, stream)
        except GreenroomError as error:
            if error.metadata.get("status") in ("401", "403"):
                raise FailedPrecondition(
                    f"you may not forward ports in namespace {namespace}: {error.message}; it takes the verbs get and "
                    "create of pods/portforward",
                    reason="NO_RIGHTS",
                ) from error
            raise Unavailable(
                f"the connection through pod {namespace}/{pod} ended: {error.message}; run the command again (it takes "
                f"another pod if this one has died), and see `kubectl -n {namespace} describe pod {pod}`",
                reason="PORT_FORWARD",
            ) from error


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: aiohttp.ClientWebSocketResponse
) -> None:
    """Until whoever is connected here leaves. Raises `Unavailable` when it is the other side that ends it."""
    outward = asyncio.create_task(_send(reader, stream))
    inward = asyncio.create_task(_receive(stream, writer))
    try:
        await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        outward.cancel()
        inward.cancel()
        sent, received = await asyncio.gather(outward, inward, return_exceptions=True)
    if sent is None:
        return
    raise received if isinstance(received, Unavailable) else Unavailable("it was closed")


async def _send(reader: asyncio.StreamReader, stream: aiohttp.ClientWebSocketResponse) -> None:
    """Until whoever is connected here closes."""
    while data := await reader.read(CHUNK_BYTES):
        await stream.send_bytes(bytes([DATA]) + data)


async def _receive(stream: aiohttp.ClientWebSocketResponse, writer: asyncio.StreamWriter) -> None:
    """Until the other side closes. Raises what comes on the channel of errors."""
    ports = {DATA: b"", ERROR: b""}  # what has come of the number at each channel's start
    async for message in stream:
        if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        if channel not in ports:
            continue
        missing = _PORT_BYTES - len(ports[channel])
        ports[channel], data = ports[channel] + data[:missing], data[missing:]
        if data and channel == ERROR:
            raise Unavailable(data.decode(errors="replace").strip()[:MAX_TROUBLE_CHARS])
        if data:
            writer.write(data)
            await writer.drain()
