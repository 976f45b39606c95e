"""What the gRPC services share: how a handler is wrapped, how what it asks for is read, how a page is listed.

The services are in `greenroom.api.actors`, `fleet` and `system`; each method checks its request, asks the control
plane, and answers with messages. Every handler is a coroutine, the streaming ones write through ``context.write``: so
all are wrapped alike (`rpc`), and a client that goes away cancels exactly one task. Cancelling a handler never cancels
an operation: the control plane only stops waiting for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from greenroom.api import convert, errors
from greenroom.core.errors import InvalidArgument, Unavailable
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.records import Actor, Key, Operation, Pool, Record, Replica, Snapshot, Template, Worker
from greenroom.engine.port import DEFAULT_WAIT_S, ControlPlane
from greenroom.store.port import MAX_PAGE, Store

T = TypeVar("T")
R = TypeVar("R", Actor, Template, Pool, Worker, Replica, Snapshot, Operation)

#: The longest that one call waits for an operation; longer waits ask again, so that a dead peer is noticed.
MAX_WAIT_S = 3600.0
#: A wait ends this long before the deadline of its call: then "still running" reaches the caller instead of an error.
DEADLINE_MARGIN_S = 0.5


def rpc(method: Callable[[Any, Any, Any], Awaitable[T]]) -> Callable[[Any, Any, Any], Awaitable[T]]:
    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> T:
        return await errors.answer(context, method.__qualname__, method(self, request, context))

    return handler


class Streams:
    """The calls that may be open for long, so that a server that shuts down can end them at once."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Raises `Unavailable` (reason ``SERVER_CLOSING``) out of its body when `close` is called."""
        scope = asyncio.timeout(0 if self._closed else None)
        try:
            async with scope:
                self._scopes.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise Unavailable(
                "the server is shutting down; what was started goes on, ask again when it is back",
                reason="SERVER_CLOSING",
            ) from None
        finally:
            self._scopes.discard(scope)

    def close(self) -> None:
        self._closed = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())


class ServerInfo(Record, frozen=True, kw_only=True):
    """What the server tells about itself. ``gateway_url`` as clients reach it, for example ``http://127.0.0.1:8080``;
    actors answer there as ``<name>.<namespace>.<domain>``."""

    version: str = ""
    backends: tuple[str, ...] = ()
    gateway_url: str = ""
    domain: str = ""
    started_at: float = 0.0


class Service:
    def __init__(self, control: ControlPlane, streams: Streams, info: ServerInfo) -> None:
        self._control = control
        self._streams = streams
        self._info = info

    @property
    def _store(self) -> Store:
        return self._control.store

    async def _page(self, cls: type[R], request: Any, field: str, answer: Any, **where: str) -> list[R]:
        """Lists one page into ``answer``, with its ``next_page_token``, and returns the records too."""
        limit = request.page_size or MAX_PAGE
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidArgument(f"page_size must be between 1 and {MAX_PAGE}, or 0, not {limit}")
        records = await self._store.list(
            cls,
            namespace=getattr(request, "namespace", ""),
            where={name: value for name, value in where.items() if value},
            after=request.page_token,
            limit=limit,
        )
        if len(records) == limit:
            answer.next_page_token = records[-1].pk
        if field:
            getattr(answer, field).extend(convert.to_message(r) for r in records)
        return records


def key_of(request: Any) -> Key:
    if not request.name:
        raise InvalidArgument("name is empty: say which one is meant", reason="INVALID_NAME")
    return Key(request.namespace or DEFAULT_NAMESPACE, request.name)


def member(cls: type[enum.StrEnum], value: str) -> str:
    """``value`` if it is one of the enum's, or ""."""
    if value and value not in set(cls):
        raise InvalidArgument(f"{value!r} is not a {cls.__name__}; use one of: {', '.join(cls)}")
    return value


def wait_s_of(request: Any, context: Any) -> float:
    """How long this call may wait: what it asks for, and not past its own deadline."""
    wait_s = convert.seconds(request.wait) if request.HasField("wait") else DEFAULT_WAIT_S
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidArgument(f"wait must be between 0 and {MAX_WAIT_S:g} s, not {wait_s:g} s")
    remaining = context.time_remaining()
    return wait_s if remaining is None else max(0.0, min(wait_s, remaining - DEADLINE_MARGIN_S))


def pk_of(request: Any) -> str:
    key = key_of(request)
    return f"{key.namespace}/{key.name}"


@contextlib.asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes an iterator that can be closed, however its use ends."""
    try:
        yield items
    finally:
        aclose = getattr(items, "aclose", None)
        if aclose is not None:
            await aclose()
