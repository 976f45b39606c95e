"""``pods/NAME/portforward`` over a WebSocket, as a kubelet does it: subprotocol ``v4.channel.k8s.io``.

A pod that a `kubelet.Kubelet` runs has an address of its own. For others `Ports` says where what they would serve
really listens on this machine.

Source: k8s.io/kubelet, pkg/cri/streaming/portforward/websocket.go (see `greenroom.operator.portforward`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field

from aiohttp import WSMsgType, web

from greenroom.testing.fake_kube.errors import KubeError, bad_request

PROTOCOL = "v4.channel.k8s.io"
PATH = re.compile(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)/portforward")
_DATA, _ERROR = b"\x00", b"\x01"
_CHUNK_BYTES = 32 << 10

#: Namespace, pod and port.
Port = tuple[str, str, int]


@dataclass
class Ports:
    """``found``: host and port of each pod's port that something listens at. ``delay_s``: of what comes from there."""

    delay_s: float = 0.0
    found: dict[Port, tuple[str, int]] = field(default_factory=dict)
    _open: dict[tuple[str, str], set[web.WebSocketResponse]] = field(default_factory=dict)

    async def serve(self, request: web.Request, namespace: str, pod: str, address: str = "") -> web.WebSocketResponse:
        """``address``: of the pod. Raises `KubeError` for what is no request for a forwarded port."""
        if "Upgrade" not in request.headers.get("Connection", ""):
            raise bad_request("Upgrade request required")
        if request.headers.get("Accept", "*/*") != "*/*":  # a real one of release 1.20 compares this way
            raise KubeError(406, "NotAcceptable", "only the following media types are accepted: */*")
        if PROTOCOL not in request.headers.get("Sec-WebSocket-Protocol", ""):
            raise KubeError(403, "Forbidden", f"only {PROTOCOL} is spoken here")
        text = request.query.get("ports", "")
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise bad_request(f"invalid port {text!r}")
        port = int(text)
        stream = web.WebSocketResponse(protocols=(PROTOCOL,))
        await stream.prepare(request)
        for channel in (_DATA, _ERROR):
            await stream.send_bytes(channel + port.to_bytes(2, "little"))
        still_open = self._open.setdefault((namespace, pod), set())
        still_open.add(stream)
        try:
            place = self.found.get((namespace, pod, port)) or ((address, port) if address else None)
            await self._carry(stream, place, port)
        finally:
            still_open.discard(stream)
            await stream.close()
        return stream

    def open(self, namespace: str, pod: str) -> int:
        """Connections that are forwarded to it now."""
        return len(self._open.get((namespace, pod), ()))

    async def kill(self, namespace: str, pod: str) -> None:
        """What a pod's death does to its connections."""
        for port in [p for p in self.found if p[:2] == (namespace, pod)]:
            del self.found[port]
        for stream in list(self._open.get((namespace, pod), ())):
            await stream.close()

    async def _carry(self, stream: web.WebSocketResponse, place: tuple[str, int] | None, port: int) -> None:
        try:
            if place is None:
                raise ConnectionRefusedError
            reader, writer = await asyncio.open_connection(*place)
        except OSError:
            text = f"failed to connect to localhost:{port} inside namespace: connection refused"
            await stream.send_bytes(_ERROR + text.encode())
            return
        inward = asyncio.create_task(_answers(reader, stream, self.delay_s))
        try:
            async for message in stream:
                if message.type is WSMsgType.BINARY and message.data[:1] == _DATA:
                    writer.write(message.data[1:])
                    await writer.drain()
        finally:
            inward.cancel()
            writer.close()


async def _answers(reader: asyncio.StreamReader, stream: web.WebSocketResponse, delay_s: float) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK_BYTES):
            await asyncio.sleep(delay_s)
            await stream.send_bytes(_DATA + data)
        await stream.close()
