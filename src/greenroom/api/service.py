"""The gRPC services: each method checks its request, asks the control plane, and answers with messages.

Every handler is a coroutine, the streaming ones write through ``context.write``: so all are wrapped alike (`rpc`), and
a client that goes away cancels exactly one task. Cancelling a handler never cancels an operation: the control plane
only stops waiting for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import structlog
from google.protobuf.empty_pb2 import Empty

from greenroom.api import convert, errors, validate
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.core.errors import GreenroomError, InvalidArgument, Unavailable
from greenroom.core.names import DEFAULT_NAMESPACE, check_actor_name, check_label
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    PoolSpec,
    Record,
    Replica,
    Snapshot,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.engine.port import DEFAULT_WAIT_S, ControlPlane, ExecStream
from greenroom.store.port import MAX_PAGE, EventType, Store

log = structlog.get_logger(__name__)
T = TypeVar("T")
R = TypeVar("R", Actor, Template, Pool, Worker, Snapshot, Operation)

#: The longest that one call waits for an operation; longer waits ask again, so that a dead peer is noticed.
MAX_WAIT_S = 3600.0
#: A wait ends this long before the deadline of its call: then "still running" reaches the caller instead of an error.
DEADLINE_MARGIN_S = 0.5
#: How long a client may take to close its side of an Exec after it was told the exit code.
INPUT_DRAIN_S = 5.0
#: Bytes of output in one frame: large enough to be cheap, small enough that a stream is fair to its neighbours.
MAX_CHUNK_BYTES = 64 << 10

#: What the API shows; leases stay inside.
Shown = Actor | Template | Pool | Worker | Snapshot | Operation

KINDS: dict[str, type[Shown]] = {
    "actor": Actor,
    "template": Template,
    "pool": Pool,
    "worker": Worker,
    "snapshot": Snapshot,
    "operation": Operation,
}
_KIND_NAMES = {cls: name for name, cls in KINDS.items()}


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


class _Service:
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


def _key(request: Any) -> Key:
    if not request.name:
        raise InvalidArgument("name is empty: say which one is meant", reason="INVALID_NAME")
    return Key(request.namespace or DEFAULT_NAMESPACE, request.name)


def _member(cls: type[enum.StrEnum], value: str) -> str:
    """``value`` if it is one of the enum's, or ""."""
    if value and value not in set(cls):
        raise InvalidArgument(f"{value!r} is not a {cls.__name__}; use one of: {', '.join(cls)}")
    return value


def _wait_s(request: Any, context: Any) -> float:
    """How long this call may wait: what it asks for, and not past its own deadline."""
    wait_s = convert.seconds(request.wait) if request.HasField("wait") else DEFAULT_WAIT_S
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidArgument(f"wait must be between 0 and {MAX_WAIT_S:g} s, not {wait_s:g} s")
    remaining = context.time_remaining()
    return wait_s if remaining is None else max(0.0, min(wait_s, remaining - DEADLINE_MARGIN_S))


# --- actors -----------------------------------------------------------------------------------------------------


class Actors(_Service, pb_grpc.ActorsServicer):
    @rpc
    async def GetActor(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Actor, _pk(request)))

    @rpc
    async def ListActors(self, request: Any, context: Any) -> Any:
        answer = pb.ListActorsResponse()
        records = await self._page(
            Actor,
            request,
            "",
            answer,
            state=_member(ActorState, request.state),
            template=request.template,
            worker=request.worker,
        )
        wanted = request.labels.items()
        answer.actors.extend(
            convert.to_message(a)
            for a in records
            if (request.show_golden or not a.golden) and all(a.labels.get(k) == v for k, v in wanted)
        )
        return answer

    @rpc
    async def CreateActor(self, request: Any, context: Any) -> Any:
        key = _key(request)
        check_label("namespace", key.namespace)
        check_actor_name(key.name)
        check_label("template", request.template)
        actor, operation = await self._control.create_actor(
            key,
            request.template,
            labels=validate.labels(request.labels),
            request_id=validate.request_id(request.request_id),
        )
        return pb.CreateActorResponse(actor=convert.to_message(actor), operation=convert.to_message(operation))

    @rpc
    async def ResumeActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.resume, request, context)

    @rpc
    async def SuspendActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.suspend, request, context)

    @rpc
    async def PauseActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.pause, request, context)

    @rpc
    async def DeleteActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.delete, request, context)

    async def _mutate(self, call: Callable[..., Awaitable[Operation]], request: Any, context: Any) -> Any:
        request_id = validate.request_id(request.request_id)
        async with self._streams.open():
            return convert.to_message(
                await call(_key(request), request_id=request_id, wait_s=_wait_s(request, context))
            )

    @rpc
    async def Exec(self, requests: Any, context: Any) -> None:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("frame") != "start":
            raise InvalidArgument("the first frame of Exec must be `start`", reason="NO_START_FRAME")
        start = first.start
        async with self._streams.open():
            session = await self._control.exec(
                _key(start),
                validate.argv(tuple(start.argv)),
                env=dict(start.env),
                cwd=start.cwd,
                timeout_s=convert.seconds(start.timeout),
            )
            feeder = asyncio.create_task(_feed(session, requests))
            try:
                await context.write(pb.ExecResponse(started=True))
                async for stream, data in session.output():
                    for chunk in _chunks(data):
                        frame = pb.ExecResponse(stdout=chunk) if stream == 1 else pb.ExecResponse(stderr=chunk)
                        await context.write(frame)
                await context.write(pb.ExecResponse(exit_code=await session.wait()))
                await session.kill()  # a write that still waits ends
                await asyncio.wait([feeder], timeout=INPUT_DRAIN_S)
            finally:
                feeder.cancel()
                await asyncio.wait([feeder])
                await session.kill()

    @rpc
    async def Logs(self, request: Any, context: Any) -> None:
        tail = request.tail_lines if request.HasField("tail_lines") else -1
        if tail < -1:
            raise InvalidArgument(f"tail_lines must be -1 or more, not {tail}")
        async with (
            self._streams.open(),
            _closing(self._control.logs(_key(request), tail_lines=tail, follow=request.follow)) as chunks,
        ):
            async for data in chunks:
                for chunk in _chunks(data):
                    await context.write(pb.LogsResponse(data=chunk))

    @rpc
    async def GetActorStats(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.stats(_key(request)))


def _pk(request: Any) -> str:
    key = _key(request)
    return f"{key.namespace}/{key.name}"


async def _feed(session: ExecStream, requests: Any) -> None:
    """Passes stdin on until the client has no more, then closes it. That the command no longer reads is not an error of
    the call: its output and exit status tell. What comes then is read all the same and dropped, because a Python client
    whose write fails loses the answer (https://github.com/grpc/grpc/issues/36066)."""
    is_open = True
    async for frame in requests:
        if is_open and (frame.WhichOneof("frame") == "stdin_closed" or frame.stdin):
            is_open = await _write(session, frame.stdin)
    if is_open:
        await _write(session, b"")


async def _write(session: ExecStream, data: bytes) -> bool:
    """Whether stdin is still open."""
    try:
        await session.write(data)
        return bool(data)
    except (GreenroomError, OSError) as error:
        log.debug("stdin of exec ended early", error=str(error))
        return False


def _chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), MAX_CHUNK_BYTES):
        yield data[start : start + MAX_CHUNK_BYTES]


@contextlib.asynccontextmanager
async def _closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes an iterator that can be closed, however its use ends."""
    try:
        yield items
    finally:
        aclose = getattr(items, "aclose", None)
        if aclose is not None:
            await aclose()


# --- templates, pools, workers, snapshots -----------------------------------------------------------------------


class Templates(_Service, pb_grpc.TemplatesServicer):
    @rpc
    async def GetTemplate(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Template, _pk(request)))

    @rpc
    async def ListTemplates(self, request: Any, context: Any) -> Any:
        answer = pb.ListTemplatesResponse()
        await self._page(Template, request, "templates", answer, state=_member(TemplateState, request.state))
        return answer

    @rpc
    async def ApplyTemplate(self, request: Any, context: Any) -> Any:
        key = _key(request)
        check_label("namespace", key.namespace)
        check_label("template", key.name)
        spec = convert.from_message(TemplateSpec, request.spec)
        validate.refuse("template", str(key), validate.template_spec(spec))
        wait_s = _wait_s(request, context)
        template, operation = await self._control.apply_template(
            key, spec, request_id=validate.request_id(request.request_id)
        )
        if operation is not None and wait_s > 0:
            async with self._streams.open():
                operation = await self._control.wait_operation(operation.id, wait_s)
            template = await self._store.get(Template, template.pk)
        answer = pb.ApplyTemplateResponse(template=convert.to_message(template))
        if operation is not None:
            answer.operation.CopyFrom(convert.to_message(operation))
        return answer

    @rpc
    async def DeleteTemplate(self, request: Any, context: Any) -> Any:
        await self._control.delete_template(_key(request))
        return Empty()


class Pools(_Service, pb_grpc.PoolsServicer):
    @rpc
    async def GetPool(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Pool, request.name))

    @rpc
    async def ListPools(self, request: Any, context: Any) -> Any:
        answer = pb.ListPoolsResponse()
        await self._page(Pool, request, "pools", answer)
        return answer

    @rpc
    async def ApplyPool(self, request: Any, context: Any) -> Any:
        name = check_label("pool", request.name)
        spec = convert.from_message(PoolSpec, request.spec)
        validate.refuse("pool", name, validate.pool_spec(spec))
        if spec.backend not in self._info.backends:
            raise InvalidArgument(
                f"pool {name}: spec.backend: there is no sandbox backend {spec.backend!r}; installed are: "
                f"{', '.join(self._info.backends)}",
                reason="UNKNOWN_BACKEND",
            )
        return convert.to_message(await self._control.apply_pool(name, spec))

    @rpc
    async def DeletePool(self, request: Any, context: Any) -> Any:
        await self._control.delete_pool(request.name)
        return Empty()


class Workers(_Service, pb_grpc.WorkersServicer):
    @rpc
    async def GetWorker(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Worker, request.name))

    @rpc
    async def ListWorkers(self, request: Any, context: Any) -> Any:
        answer = pb.ListWorkersResponse()
        state = _member(WorkerState, request.state)
        await self._page(Worker, request, "workers", answer, pool=request.pool, state=state)
        return answer


class Snapshots(_Service, pb_grpc.SnapshotsServicer):
    @rpc
    async def GetSnapshot(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Snapshot, request.id))

    @rpc
    async def ListSnapshots(self, request: Any, context: Any) -> Any:
        answer = pb.ListSnapshotsResponse()
        await self._page(
            Snapshot,
            request,
            "snapshots",
            answer,
            actor_uid=request.actor_uid,
            template=request.template,
            state=_member(SnapshotState, request.state),
        )
        return answer


# --- operations -------------------------------------------------------------------------------------------------


class Operations(_Service, pb_grpc.OperationsServicer):
    @rpc
    async def GetOperation(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Operation, request.id))

    @rpc
    async def ListOperations(self, request: Any, context: Any) -> Any:
        answer = pb.ListOperationsResponse()
        await self._page(
            Operation,
            request,
            "operations",
            answer,
            uid=request.uid,
            state=_member(OperationState, request.state),
            kind=_member(OperationKind, request.kind),
        )
        return answer

    @rpc
    async def WaitOperation(self, request: Any, context: Any) -> Any:
        async with self._streams.open():
            return convert.to_message(await self._control.wait_operation(request.id, _wait_s(request, context)))

    @rpc
    async def WatchOperation(self, request: Any, context: Any) -> None:
        async with self._streams.open(), _closing(self._store.watch()) as events:
            operation = await self._store.get(Operation, request.id)
            await context.write(convert.to_message(operation))
            if operation.state is not OperationState.RUNNING:
                return
            async for event in events:
                record = event.record
                if not isinstance(record, Operation) or record.id != operation.id:
                    continue
                if event.type is EventType.DELETED:
                    return
                if record.version > operation.version:
                    operation = record
                    await context.write(convert.to_message(operation))
                if operation.state is not OperationState.RUNNING:
                    return


# --- the server itself ------------------------------------------------------------------------------------------


class System(_Service, pb_grpc.SystemServicer):
    @rpc
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = self._info
        return pb.ServerInfo(
            version=info.version,
            backends=info.backends,
            gateway_url=info.gateway_url,
            domain=info.domain,
            started_at=convert.timestamp(info.started_at),
        )

    @rpc
    async def Watch(self, request: Any, context: Any) -> None:
        classes = _classes(request.kinds)
        # Subscribed before listing, so that no change falls between. What the list already showed is not shown again.
        async with self._streams.open(), _closing(self._store.watch()) as events:
            listed: dict[tuple[str, str], int] = {}
            for cls in classes:
                async for there in self._all(cls, request.namespace):
                    listed[_KIND_NAMES[cls], there.pk] = there.version
                    if _shown(there, request):
                        await context.write(_event(pb.WatchEvent.TYPE_PUT, there))
            await context.write(pb.WatchEvent(type=pb.WatchEvent.TYPE_SYNCED))
            async for event in events:
                record = event.record
                if isinstance(record, Lease | Replica) or type(record) not in classes or not _shown(record, request):
                    continue
                deleted = event.type is EventType.DELETED
                if _is_news(deleted, record, listed):
                    kind = pb.WatchEvent.TYPE_DELETED if deleted else pb.WatchEvent.TYPE_PUT
                    await context.write(_event(kind, record))

    async def _all(self, cls: type[Shown], namespace: str) -> AsyncIterator[Shown]:
        after = ""
        namespace = namespace if "namespace" in cls.__struct_fields__ else ""
        while True:
            page = cast(list[Shown], await self._store.list(cls, namespace=namespace, after=after))
            for record in page:
                yield record
            if len(page) < MAX_PAGE:
                return
            after = page[-1].pk


def _is_news(deleted: bool, record: Shown, listed: dict[tuple[str, str], int]) -> bool:
    key = (_KIND_NAMES[type(record)], record.pk)
    version = listed.get(key)
    if version is None:
        return True
    if not deleted and record.version <= version:
        return False
    del listed[key]  # from here on events are newer anyhow
    return True


def _classes(kinds: Any) -> list[type[Shown]]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InvalidArgument(f"there is no kind {unknown[0]!r}; use: {', '.join(KINDS)}", reason="UNKNOWN_KIND")
    return [cls for name, cls in KINDS.items() if not kinds or name in kinds]


def _shown(record: Shown, request: Any) -> bool:
    if isinstance(record, Actor) and record.golden and not request.show_golden:
        return False
    namespace = getattr(record, "namespace", "")
    return not request.namespace or not namespace or namespace == request.namespace


def _event(kind: Any, record: Shown) -> Any:
    message: Mapping[str, Any] = {_KIND_NAMES[type(record)]: convert.to_message(record)}
    return pb.WatchEvent(type=kind, **message)


SERVICES = (Actors, Templates, Pools, Workers, Snapshots, Operations, System)
