"""The control plane's end of the agent link: a gRPC service that is the engine's `WorkerHub`.

Agents connect to it. Each has one stream; calls are numbered and multiplexed on it. An agent says regularly that it
lives and is answered with what the engine wants agents to know just then (``welcome``). A frame costs about 0.17 ms of
CPU on both sides together, half of what a unary call costs, and the order of frames is the order of sending.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import grpc.aio
import msgspec
import structlog

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2, link_pb2_grpc
from greenroom.api.frames import MAX_BODY_BYTES, MAX_DATA_BYTES, WINDOW, gather_frames
from greenroom.core import agentapi
from greenroom.core.agentapi import (
    AgentCall,
    Heartbeat,
    Hello,
    Leaving,
    Progress,
    SandboxExited,
    StreamingCall,
    Welcome,
)
from greenroom.core.errors import GreenroomError, Internal, InvalidArgument, ResourceExhausted, Unavailable, rebuild
from greenroom.core.records import Failure, Record
from greenroom.engine.workers import CallStream, OnProgress, WorkerListener

log = structlog.get_logger(__name__)

Frame = link_pb2.Frame
Frames = link_pb2.Frames
Context: TypeAlias = Any  # grpc.aio.ServicerContext; grpcio ships no types

#: Frames waiting to be sent to one agent; more means that it does not read, and calls are refused.
MAX_QUEUED_FRAMES = 10_000
#: How long an agent may take for its first frame.
HELLO_TIMEOUT_S = 10.0

#: The number of the WELCOME that answers no heartbeat: the agent is linked, but nobody has promised anything yet.
NO_HEARTBEAT = (1 << 63) - 1

_encode = msgspec.json.Encoder().encode
_decode_hello = msgspec.json.Decoder(Hello).decode
_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
_decode_leaving = msgspec.json.Decoder(Leaving).decode
_decode_failure = msgspec.json.Decoder(Failure).decode
_decode_progress = msgspec.json.Decoder(Progress).decode
_decode_exited = msgspec.json.Decoder(SandboxExited).decode
_decode_answer = {name: msgspec.json.Decoder(cls).decode for name, cls in agentapi.ANSWERS.items()}


@dataclass(slots=True)
class _Pending:
    """One call under way. ``chunks`` only for streaming calls (None in it means the end); it is bounded by ``WINDOW``,
    since the agent may send no more than it has credit for. ``credit``: how many DATA frames this side may send."""

    name: str
    answer: asyncio.Future[Record]
    on_progress: OnProgress | None = None
    chunks: asyncio.Queue[tuple[int, bytes] | None] | None = None
    credit: asyncio.Semaphore | None = None


@dataclass(slots=True, eq=False)
class _Peer:
    """One connected agent."""

    hello: Hello
    heard_at: float
    #: The engine has registered it.
    acknowledged: bool = False
    out: asyncio.Queue[link_pb2.Frame | None] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED_FRAMES))
    calls: dict[int, _Pending] = field(default_factory=dict)
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def send(self, frame: link_pb2.Frame) -> None:
        try:
            self.out.put_nowait(frame)
        except asyncio.QueueFull:
            raise ResourceExhausted(
                f"worker {self.hello.worker} does not take its messages ({MAX_QUEUED_FRAMES} are waiting)",
                reason="WORKER_OVERLOADED",
            ) from None

    def begin(self, call: AgentCall, *, on_progress: OnProgress | None = None, stream: bool = False) -> int:
        body = _encode(call)
        if len(body) > MAX_BODY_BYTES:
            raise InvalidArgument(
                f"{type(call).__name__} for worker {self.hello.worker} has {len(body)} bytes; at most {MAX_BODY_BYTES} "
                "are sent",
                reason="CALL_TOO_LARGE",
            )
        number = next(self.ids)
        pending = _Pending(type(call).__name__, asyncio.get_running_loop().create_future(), on_progress)
        if stream:
            pending.chunks = asyncio.Queue()
            pending.credit = asyncio.Semaphore(WINDOW)
        self.send(Frame(kind=Frame.CALL, id=number, body=body))
        self.calls[number] = pending
        return number

    def fail_all(self, error: GreenroomError) -> None:
        for pending in self.calls.values():
            _settle(pending, error)
        self.calls.clear()


def _settle(pending: _Pending, outcome: Record | GreenroomError) -> None:
    if not pending.answer.done():
        if isinstance(outcome, GreenroomError):
            pending.answer.set_exception(outcome)
            pending.answer.exception()  # a caller that has gone away leaves no warning behind
        else:
            pending.answer.set_result(outcome)
    if pending.chunks is not None and pending.credit is not None:
        pending.chunks.put_nowait(None)
        pending.credit.release()  # whoever waits to send sees that the call has ended


class AgentHub(link_pb2_grpc.AgentLinkServicer):
    """See `greenroom.engine.workers.WorkerHub`."""

    def __init__(self) -> None:
        self.listener: WorkerListener | None = None
        self.welcome = Welcome()
        self._peers: dict[str, _Peer] = {}

    # --- the engine's side --------------------------------------------------------------------------------

    def connected(self) -> dict[str, Hello]:
        return {name: peer.hello for name, peer in self._peers.items()}

    def heard(self) -> dict[str, float]:
        return {name: peer.heard_at for name, peer in self._peers.items()}

    def _peer(self, worker: str) -> _Peer:
        peer = self._peers.get(worker)
        if peer is None:
            raise _disconnected(worker)
        return peer

    async def call(self, worker: str, call: AgentCall, on_progress: OnProgress | None = None) -> Record:
        peer = self._peer(worker)
        number = peer.begin(call, on_progress=on_progress)
        try:
            return await peer.calls[number].answer
        finally:
            peer.calls.pop(number, None)  # a caller that has gone hears no progress any more

    def open(self, worker: str, call: StreamingCall) -> CallStream:
        peer = self._peer(worker)
        return _Stream(peer, peer.begin(call, stream=True))

    # --- the agents' side ---------------------------------------------------------------------------------

    async def Connect(self, request_iterator: object, context: Context) -> None:
        hello = await self._greet(context)
        old = self._peers.get(hello.worker)
        if old is not None and old.acknowledged and old.hello.berth != hello.berth:
            # Agents share their tokens: a name alone must not be enough to cut off, or to hear, whoever has it.
            log.warning("refused an agent: another pod of its name is connected", worker=hello.worker)
            why = f"worker {hello.worker} is connected, and is another pod; names of pods are not used twice"
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, why)
        peer = _Peer(hello, asyncio.get_running_loop().time())
        self._answer(peer, NO_HEARTBEAT)
        self._peers[hello.worker] = peer
        if old is not None:  # the agent restarted before its old connection was seen to be dead
            self._drop(old)
        structlog.contextvars.bind_contextvars(worker=hello.worker)
        log.info("agent connected", boot_id=hello.boot_id, residents=len(hello.residents))
        # The first that ends, ends the stream: the reader when the agent has gone, the writer when it was replaced.
        parts = [asyncio.create_task(part, name=f"link-{hello.worker}") for part in self._parts(peer, context)]
        try:
            if self.listener:
                self.listener.worker_connected(hello)
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the server stops, or the agent has gone; grpcio would print a traceback
        finally:
            self._drop(peer)
            for part in parts:
                part.cancel()
            for failure in await asyncio.gather(*parts, return_exceptions=True):
                if isinstance(failure, Exception):
                    log.warning("the link to an agent broke", error=str(failure))
            log.info("agent disconnected")

    def _parts(self, peer: _Peer, context: Context) -> tuple[Coroutine[Any, Any, None], ...]:
        return self._read(peer, context), self._write(peer, context)

    async def _read(self, peer: _Peer, context: Context) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            for frame in message.frames:
                self._receive(peer, frame)

    async def _greet(self, context: Context) -> Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await context.read()
            if message is grpc.aio.EOF or len(message.frames) != 1 or message.frames[0].kind != Frame.HELLO:
                raise ValueError("the first frame must be HELLO")
            return _decode_hello(message.frames[0].body)
        except (TimeoutError, ValueError, msgspec.MsgspecError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no proper HELLO: {error}")
            raise AssertionError("abort raises") from error

    def _drop(self, peer: _Peer) -> None:
        name = peer.hello.worker
        peer.fail_all(_disconnected(name))
        if not peer.out.full():
            peer.out.put_nowait(None)
        if self._peers.get(name) is peer:
            del self._peers[name]
            if self.listener:
                self.listener.worker_gone(name, peer.hello.boot_id)

    async def _write(self, peer: _Peer, context: Context) -> None:
        while (frames := await gather_frames(peer.out)) is not None:
            await context.write(Frames(frames=frames))

    def acknowledge(self, hello: Hello) -> None:
        peer = self._peers.get(hello.worker)
        if peer is not None and peer.hello is hello:  # another one may have the name by now
            peer.acknowledged = True
            self._answer(peer, 0)

    def _answer(self, peer: _Peer, number: int) -> None:
        """Answers a heartbeat (HELLO is number 0) with what agents are to know."""
        peer.send(Frame(kind=Frame.WELCOME, id=number, body=_encode(self.welcome)))

    def _listen(self, peer: _Peer, frame: link_pb2.Frame) -> None:
        """To what an agent says unasked."""
        hello, listener = peer.hello, self.listener
        match frame.kind:
            case Frame.HEARTBEAT:
                said = Heartbeat(boot_id=hello.boot_id, residents=hello.residents, images=hello.images)
                said = _decode_heartbeat(frame.body) if frame.body else said
                if listener is None or listener.worker_heard(hello.worker, said):
                    self._answer(peer, frame.id)
            case Frame.LEAVING if listener:
                boot_id = _decode_leaving(frame.body).boot_id if frame.body else hello.boot_id
                listener.worker_leaving(hello.worker, boot_id)
            case Frame.EVENT if listener:
                listener.sandbox_exited(hello.worker, _decode_exited(frame.body))
            case _:
                pass

    def _receive(self, peer: _Peer, frame: link_pb2.Frame) -> None:
        peer.heard_at = asyncio.get_running_loop().time()
        if frame.kind in (Frame.EVENT, Frame.HEARTBEAT, Frame.LEAVING):
            if self._peers.get(peer.hello.worker) is peer:  # else it has been replaced, and what it says is old
                self._listen(peer, frame)
            return
        pending = peer.calls.get(frame.id)
        if pending is None:
            return  # the answer to a call whose stream was cancelled
        match frame.kind:
            case Frame.RESULT | Frame.ERROR:
                peer.calls.pop(frame.id, None)
                _settle(pending, _outcome(peer.hello.worker, pending.name, frame))
            case Frame.PROGRESS if pending.on_progress is not None:
                pending.on_progress(_decode_progress(frame.body))
            case Frame.DATA if pending.chunks is not None and pending.chunks.qsize() < WINDOW:
                pending.chunks.put_nowait((frame.channel, frame.data))
            case Frame.CREDIT if pending.credit is not None:
                for _ in range(min(frame.channel, WINDOW)):
                    pending.credit.release()
            case _:
                pass


def _outcome(worker: str, call: str, frame: link_pb2.Frame) -> Record | GreenroomError:
    try:
        if frame.kind == Frame.RESULT:
            return _decode_answer[call](frame.body)
        failure = _decode_failure(frame.body)
        return rebuild(failure.code, failure.reason, failure.message, failure.metadata)
    except (msgspec.MsgspecError, ValueError) as error:  # the link goes on: on a new one it would answer the same
        return Internal(
            f"worker {worker} answered {call} with what can't be read: {error}; run the same version there",
            reason="ANSWER_UNREADABLE",
        )


def _disconnected(worker: str) -> Unavailable:
    return Unavailable(
        f"worker {worker} is not connected; `greenroom get workers` shows which are", reason="WORKER_DISCONNECTED"
    )


class _Stream:
    """See `greenroom.engine.workers.CallStream`."""

    def __init__(self, peer: _Peer, number: int) -> None:
        self._peer = peer
        self._number = number
        self._pending = peer.calls[number]

    async def send(self, data: bytes) -> None:
        assert self._pending.credit is not None
        for start in range(0, max(1, len(data)), MAX_DATA_BYTES):
            await self._pending.credit.acquire()
            if self._pending.answer.done():
                self._pending.credit.release()  # who sends next need not wait either
                return
            chunk = data[start : start + MAX_DATA_BYTES]
            self._peer.send(Frame(kind=Frame.DATA, id=self._number, channel=0, data=chunk))

    async def chunks(self) -> AsyncIterator[tuple[int, bytes]]:
        assert self._pending.chunks is not None
        taken = 0
        while (item := await self._pending.chunks.get()) is not None:
            yield item
            taken += 1
            if taken % (WINDOW // 4) == 0 and not self._pending.answer.done():
                self._peer.send(Frame(kind=Frame.CREDIT, id=self._number, channel=WINDOW // 4))
        await self._pending.answer

    async def result(self) -> Record:
        return await self._pending.answer

    def cancel(self) -> None:
        if not self._pending.answer.done():
            self._peer.send(Frame(kind=Frame.CANCEL, id=self._number))
