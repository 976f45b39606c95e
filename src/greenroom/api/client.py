"""Calls the API: channels with the right options, stubs of all services, errors as `GreenroomError`.

`Client` blocks, `AioClient` is for asyncio. Attributes are the stubs of the services; calls take a message of
``greenroom.v1alpha1`` and optionally ``timeout`` (seconds) and ``metadata``.

    with Client("unix:/run/greenroom/api.sock") as client:
        client.actors.ResumeActor(pb.ActorRequest(namespace="default", name="counter"))
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from greenroom.api import errors
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc

#: A page of 1000 operations with all their layers stays well below.
MAX_MESSAGE_BYTES = 32 << 20

#: See `greenroom.api.server` for what keepalive does. A channel to a socket that is not there tries again after these.
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
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

    def __init__(self, address: str, channel: Any, wrap: Callable[[Any, str], Any]) -> None:
        self.address = address
        self._channel = channel
        for name, stub in _STUBS.items():
            setattr(self, name, _Translated(stub(channel), address, wrap))


class _Translated:
    """A stub whose calls raise `GreenroomError`."""

    def __init__(self, stub: Any, address: str, wrap: Callable[[Any, str], Any]) -> None:
        self._stub, self._address, self._wrap = stub, address, wrap

    def __getattr__(self, name: str) -> Any:
        call = self._wrap(getattr(self._stub, name), self._address)
        setattr(self, name, call)
        return call


# --- blocking ---------------------------------------------------------------------------------------------------


class Client(_Stubs):
    """Usable from several threads. Streaming calls answer with a `Stream`."""

    def __init__(self, address: str) -> None:
        super().__init__(address, grpc.insecure_channel(address, options=CHANNEL_OPTIONS), _wrap_sync)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """Messages of a streaming call. `cancel` ends it; leaving a ``with`` block too."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._address = call, address

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, self._address) from None

    def cancel(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _wrap_sync(call: Any, address: str) -> Any:
    if isinstance(call, (grpc.UnaryStreamMultiCallable, grpc.StreamStreamMultiCallable)):
        return lambda *args, **kwargs: Stream(call(*args, **kwargs), address)
    return errors.translating(call, address)


# --- asyncio ----------------------------------------------------------------------------------------------------


class AioClient(_Stubs):
    """Belongs to the event loop that it was made in. Streaming calls answer with an `AioStream`. Cancelling the task
    that awaits a call cancels the call, and never an operation."""

    def __init__(self, address: str) -> None:
        super().__init__(address, grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), _wrap_aio)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AioClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AioStream:
    """Messages of a streaming call; as `Stream`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._address = call, address

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                yield message
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, self._address) from None

    def cancel(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> AioStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _wrap_aio(call: Any, address: str) -> Any:
    if isinstance(call, (grpc.aio.UnaryStreamMultiCallable, grpc.aio.StreamStreamMultiCallable)):
        return lambda *args, **kwargs: AioStream(call(*args, **kwargs), address)

    @functools.wraps(call.__call__)
    async def translated(*args: Any, **kwargs: Any) -> Any:
        try:
            return await call(*args, **kwargs)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address) from None

    return translated
