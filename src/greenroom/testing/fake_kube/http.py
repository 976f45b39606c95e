"""The fake API server on a socket of 127.0.0.1, and a kubeconfig for it."""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec
import yaml
from aiohttp import web

from greenroom.testing.fake_kube.adversary import Dropped
from greenroom.testing.fake_kube.api import Api, Handler, Request
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import MAX_OBJECT_BYTES
from greenroom.testing.fake_kube.portforward import PATH, Ports


class FakeKube:
    """An async context manager. ``url`` is where it listens.

    Args:
        api: what it serves; a new, empty one by default.
        handler: what answers instead of the API itself (an adversary in front of it).
        token: clients must send it (``Authorization: Bearer``); "" takes everybody.
        tls: makes it serve https.
        ports: what pods serve, for ``portforward``.
    """

    def __init__(
        self,
        api: Api | None = None,
        *,
        handler: Handler | None = None,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        ports: Ports | None = None,
    ) -> None:
        self.api = api or Api()
        self._handler = handler or self.api.handle
        self._token = token
        self._tls = tls
        self.ports = ports or Ports()
        self.url = ""
        self.requests = 0

    async def __aenter__(self) -> FakeKube:
        app = web.Application(client_max_size=2 * MAX_OBJECT_BYTES)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.api.view.drop_watches()
        await self._runner.cleanup()

    def kubeconfig(self, path: Path, namespace: str = "default", certificate: Path | None = None) -> Path:
        """Writes one whose only context is this server. ``certificate``: of the authority that vouches for it."""
        return self.write_kubeconfig(path, self.url, self._token or "none", namespace, certificate)

    @staticmethod
    def write_kubeconfig(
        path: Path, url: str, token: str, namespace: str = "default", certificate: Path | None = None
    ) -> Path:
        cluster = {"server": url}
        if certificate is not None:
            cluster["certificate-authority"] = str(certificate)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "fake", "user": {"token": token}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": namespace}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if self._token and request.headers.get("Authorization") != f"Bearer {self._token}":
            return web.json_response({"kind": "Status", "code": 401, "reason": "Unauthorized"}, status=401)
        wanted = Request(
            method=request.method,
            path=request.path,
            query=dict(request.query),
            headers={name.lower(): value for name, value in request.headers.items()},
            body=await request.read(),
            client=request.headers.get("User-Agent", "unknown"),
        )
        try:
            forwarded = PATH.fullmatch(request.path)
            if forwarded is not None and request.method == "GET":
                # The pod has to be there, and whoever asks to have the right to it: its handler knows.
                answer = await self._handler(wanted)
                if answer.status == 200:
                    status = msgspec.json.decode(answer.body).get("status") or {}
                    namespace, pod = forwarded.groups()
                    return await self.ports.serve(request, namespace, pod, status.get("podIP", ""))
            else:
                answer = await self._handler(wanted)
        except KubeError as error:
            return web.json_response(error.status(), status=error.code)
        except Dropped:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=499)
        headers = {"Content-Type": "application/json", **answer.headers}
        if answer.stream is None:
            return web.Response(status=answer.status, body=answer.body, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        async for piece in answer.stream:
            await response.write(piece)
        return response
