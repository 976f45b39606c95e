"""`Transport` in a simulation: the server goes on with a request whatever becomes of who sent it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from greenroom.core.errors import Unavailable
from greenroom.operator.transport import Reply, refusal
from greenroom.testing.fake_kube.adversary import Dropped
from greenroom.testing.fake_kube.api import Handler, Request, Response

#: Each way, in seconds.
LATENCY_S = (0.001, 0.03)


@dataclass
class SimTransport:
    """``spawn``: begins a task in the server's process. ``clock``: the server's."""

    handler: Handler
    client: str
    chance: random.Random
    spawn: Callable[[Coroutine[Any, Any, Any]], Any]
    clock: Callable[[], float]

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout_s: float,
    ) -> Reply:
        raw = b"" if body is None else msgspec.json.encode(body)
        answer = await self._ask(method, path, query or {}, raw, content_type, timeout_s)
        if answer.status >= 300:
            raise refusal(answer.status, answer.body, float(answer.headers.get("Retry-After", "0")))
        return Reply(answer.status, answer.body)

    @contextlib.asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterable[bytes]]:
        answer = await self._ask("GET", path, query, b"", "", 10.0)
        if answer.status >= 300:
            raise refusal(answer.status, answer.body)
        assert answer.stream is not None
        yield answer.stream

    async def _ask(
        self, method: str, path: str, query: Mapping[str, str], raw: bytes, content_type: str, timeout_s: float
    ) -> Response:
        headers = {"content-type": content_type, "user-agent": self.client}
        request = Request(method, path, dict(query), headers, raw, self.client, self.clock())
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.spawn(self._carry(request, answer))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise Unavailable(f"{method} {path} was not answered in {timeout_s:g} s") from None

    async def _carry(self, request: Request, answer: asyncio.Future[Response]) -> None:
        await asyncio.sleep(self.chance.uniform(*LATENCY_S))
        try:
            found = await self.handler(request)
        except Dropped:
            if self.chance.random() < 0.5 and not answer.done():
                answer.set_exception(Unavailable(f"{request.method} {request.path}: the connection was closed"))
            return  # otherwise nobody ever answers
        await asyncio.sleep(self.chance.uniform(*LATENCY_S))
        if not answer.done():
            answer.set_result(found)
