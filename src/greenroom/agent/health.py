"""``GET /livez`` and ``/readyz``, for whoever keeps the agent's process (a kubelet). They say one word, and nothing of
what runs here."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web


class HealthServer:
    """``unready``: why the worker takes no actors; "" when it does."""

    def __init__(self, unready: Callable[[], str]) -> None:
        self._unready = unready
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Returns the address that it listens on. Raises `OSError`: it can't be had."""
        app = web.Application()
        app.router.add_get("/livez", self._live)
        app.router.add_get("/readyz", self._ready)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        address = self._runner.addresses[0]
        return address[0], address[1]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # who answers lives

    async def _ready(self, request: web.Request) -> web.Response:
        why = self._unready()
        return web.Response(text=f"{why or 'ok'}\n", status=503 if why else 200)
