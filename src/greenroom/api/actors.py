"""The service of actors; see `greenroom.api.service`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import structlog

from greenroom.api import convert, explain, validate
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.service import Service, closing, key_of, member, pk_of, rpc, wait_s_of
from greenroom.core.errors import GreenroomError, InvalidArgument
from greenroom.core.names import check_actor_name, check_label
from greenroom.core.records import Actor, ActorState, Operation
from greenroom.engine.port import ExecStream

log = structlog.get_logger(__name__)

#: How long a client may take to close its side of an Exec after it was told the exit code.
INPUT_DRAIN_S = 5.0
#: Bytes of output in one frame: large enough to be cheap, small enough that a stream is fair to its neighbours.
MAX_CHUNK_BYTES = 64 << 10
#: Of its latest operations an explanation shows so many, unless more are asked for: what fits on a screen.
EXPLAINED_OPERATIONS = 10
MAX_EXPLAINED_OPERATIONS = 100


class Actors(Service, pb_grpc.ActorsServicer):
    @rpc
    async def GetActor(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Actor, pk_of(request)))

    @rpc
    async def ListActors(self, request: Any, context: Any) -> Any:
        answer = pb.ListActorsResponse()
        records = await self._page(
            Actor,
            request,
            "",
            answer,
            state=member(ActorState, request.state),
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
        key = key_of(request)
        check_label("namespace", key.namespace)
        check_actor_name(key.name)
        check_label("template", request.template)
        actor, operation = await self._control.create_actor(
            key,
            request.template,
            labels=validate.labels(request.labels),
            worker_selector=validate.labels(request.worker_selector, "worker selector"),
            request_id=validate.request_id(request.request_id),
        )
        return pb.CreateActorResponse(actor=convert.to_message(actor), operation=convert.to_message(operation))

    @rpc
    async def ResumeActor(self, request: Any, context: Any) -> Any:
        resume = functools.partial(self._control.resume, snapshot_id=request.snapshot)
        return await self._mutate(resume, request, context, may_name=True)

    @rpc
    async def SuspendActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.suspend, request, context)

    @rpc
    async def PauseActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.pause, request, context)

    @rpc
    async def DeleteActor(self, request: Any, context: Any) -> Any:
        return await self._mutate(self._control.delete, request, context)

    async def _mutate(
        self, call: Callable[..., Awaitable[Operation]], request: Any, context: Any, *, may_name: bool = False
    ) -> Any:
        if request.snapshot and not may_name:
            raise InvalidArgument("only ResumeActor takes a snapshot")
        request_id = validate.request_id(request.request_id)
        async with self._streams.open():
            return convert.to_message(
                await call(key_of(request), request_id=request_id, wait_s=wait_s_of(request, context))
            )

    @rpc
    async def Exec(self, requests: Any, context: Any) -> None:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("frame") != "start":
            raise InvalidArgument("the first frame of Exec must be `start`", reason="NO_START_FRAME")
        start = first.start
        argv, env, timeout_s = tuple(start.argv), dict(start.env), convert.seconds(start.timeout)
        validate.command(argv, env, start.cwd, timeout_s)
        async with self._streams.open():
            session = await self._control.exec(key_of(start), argv, env=env, cwd=start.cwd, timeout_s=timeout_s)
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
            closing(self._control.logs(key_of(request), tail_lines=tail, follow=request.follow)) as chunks,
        ):
            async for data in chunks:
                for chunk in _chunks(data):
                    await context.write(pb.LogsResponse(data=chunk))

    @rpc
    async def GetActorStats(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.stats(key_of(request)))

    @rpc
    async def ExplainActor(self, request: Any, context: Any) -> Any:
        latest = request.operations or EXPLAINED_OPERATIONS
        if not 1 <= latest <= MAX_EXPLAINED_OPERATIONS:
            raise InvalidArgument(f"operations must be between 1 and {MAX_EXPLAINED_OPERATIONS}, or 0, not {latest}")
        return convert.to_message(await explain.read(self._store, pk_of(request), latest))


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
