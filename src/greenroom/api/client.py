"""Calls the API: channels with the right options, stubs of all services, errors as `GreenroomError`.

`Client` blocks, `AioClient` is for asyncio. Attributes are the stubs of the services; calls take a message of
``greenroom.v1alpha1`` and optionally ``timeout`` (seconds) and ``metadata``.

    with Client("unix:/run/greenroom/api.sock") as client:
        client.actors.ResumeActor(pb.ActorRequest(namespace="default", name="counter"))
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from greenroom.api import errors
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.access import CONNECT_TIMEOUT_MS, Access
from greenroom.core.errors import FailedPrecondition, GreenroomError

#: A page of 1000 operations with all their layers stays well below.
MAX_MESSAGE_BYTES = 32 << 20

#: See `greenroom.api.server` for what keepalive does. A channel to a socket that is not there tries again after a time
#: that grows from the initial to the longest of these; the least is how long each try may take (`CONNECT_TIMEOUT_MS`).
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A unix socket has no host name of its own: without this the path would be sent as :authority.
    ("grpc.default_authority", "greenroom"),
    # Proxies of the environment are for web sites, not for the control plane.
    ("grpc.enable_http_proxy", 0),
]

_STUBS: dict[str, Any] = {
    "actors": pb_grpc.ActorsStub,
    "templates": pb_grpc.TemplatesStub,
    "pools": pb_grpc.PoolsStub,
    "workers": pb_grpc.WorkersStub,
    "snapshots": pb_grpc.SnapshotsStub,
    "images": pb_grpc.ImagesStub,
    "operations": pb_grpc.OperationsStub,
    "system": pb_grpc.SystemStub,
}


class _Stubs:
    actors: Any
    templates: Any
    pools: Any
    workers: Any
    snapshots: Any
    images: Any
    operations: Any
    system: Any

    def __init__(self, address: str, access: Access) -> None:
        self.address = address
        self._access = access
        self._channels: list[Any] = []
        self._open()

    def _open(self) -> None:
        self._authority = self._access.authority()
        self._channels.append(self._new_channel())
        for name, stub in _STUBS.items():
            setattr(self, name, _Translated(stub(self._channels[-1]), self._wrap))

    def _new_channel(self) -> Any:
        raise NotImplementedError

    def _wrap(self, call: Any) -> Any:
        raise NotImplementedError

    def translated(self, error: Any) -> GreenroomError:
        """What a call's failure means. A channel knows its authorities for life: when they have changed in their file
        since, and the server is another one's by now, the next call goes over a new one. (On the one before nothing is
        open; it is closed with the client.)"""
        found = errors.from_rpc_error(error, self.address)
        if found.reason == errors.CERTIFICATE_UNKNOWN:
            with contextlib.suppress(FailedPrecondition):  # it is being replaced just now
                if self._access.authority() != self._authority:
                    self._open()
        return found


class _Translated:
    """A stub whose calls raise `GreenroomError`."""

    def __init__(self, stub: Any, wrap: Callable[[Any], Any]) -> None:
        self._stub, self._wrap = stub, wrap

    def __getattr__(self, name: str) -> Any:
        call = self._wrap(getattr(self._stub, name))
        setattr(self, name, call)
        return call


# --- blocking ---------------------------------------------------------------------------------------------------


class Client(_Stubs):
    """Usable from several threads. Streaming calls answer with a `Stream`."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        """``access``: what to know a server on TCP by, and to show it; by default what the environment says. Raises
        as `Access.aio_channel`."""
        super().__init__(address, access or Access.from_environment())

    def _new_channel(self) -> Any:
        return self._access.channel(self.address, CHANNEL_OPTIONS)

    def _wrap(self, call: Any) -> Any:
        if isinstance(call, (grpc.UnaryStreamMultiCallable, grpc.StreamStreamMultiCallable)):
            return lambda *args, **kwargs: Stream(call(*args, **kwargs), self.translated)
        return errors.translating(call, self.translated)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """Messages of a streaming call. `cancel` ends it; leaving a ``with`` block too."""

    def __init__(self, call: Any, translated: Callable[[Any], GreenroomError]) -> None:
        self._call, self._translated = call, translated

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise self._translated(error) from None

    def cancel(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


# --- asyncio ----------------------------------------------------------------------------------------------------


class AioClient(_Stubs):
    """Belongs to the event loop that it was made in. Streaming calls answer with an `AioStream`. Cancelling the task
    that awaits a call cancels the call, and never an operation."""

    def __init__(self, address: str, access: Access | None = None) -> None:
        """As `Client`."""
        super().__init__(address, access or Access.from_environment())

    def _new_channel(self) -> Any:
        return self._access.aio_channel(self.address, CHANNEL_OPTIONS)

    def _wrap(self, call: Any) -> Any:
        if isinstance(call, (grpc.aio.UnaryStreamMultiCallable, grpc.aio.StreamStreamMultiCallable)):
            return lambda *args, **kwargs: AioStream(call(*args, **kwargs), self.translated)

        @functools.wraps(call.__call__)
        async def translated(*args: Any, **kwargs: Any) -> Any:
            try:
                return await call(*args, **kwargs)
            except grpc.RpcError as error:
                raise self.translated(error) from None

        return translated

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> AioClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AioStream:
    """Messages of a streaming call; as `Stream`."""

    def __init__(self, call: Any, translated: Callable[[Any], GreenroomError]) -> None:
        self._call, self._translated = call, translated

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        except grpc.RpcError as error:
            raise self._translated(error) from None

    def cancel(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> AioStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
