"""The agent's end of the link: keeps one stream to the control plane open and feeds its calls to the agent.

When the stream breaks the agent goes on as it is (residents run, calls are finished and recorded) and connects again;
the control plane then asks once more for what it has no answer to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec
import structlog

from greenroom.agent.agent import Agent
from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2, link_pb2_grpc
from greenroom.api.frames import WINDOW, gather_frames
from greenroom.core import agentapi as api
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Failure

log = structlog.get_logger(__name__)

Frame = link_pb2.Frame
Frames = link_pb2.Frames

#: Between attempts to connect, doubling from the first to the last, with jitter so that agents spread.
FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
#: A dead peer is noticed within about 25 s (gRPC keepalive), also where no packet ever comes back.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

_encode = msgspec.json.Encoder().encode
_decode_call = msgspec.json.Decoder(api.AgentCall).decode


class AgentLink:
    def __init__(self, agent: Agent, target: str) -> None:
        """``target``: a gRPC address, for example ``unix:/run/greenroom/agents.sock``."""
        self._agent = agent
        self._target = target
        self._connection: _Connection | None = None
        agent.on_exit = self._exited

    async def run(self) -> None:
        """Connects, again and again, until cancelled."""
        pause = FIRST_PAUSE_S
        while True:
            async with grpc.aio.insecure_channel(self._target, options=KEEPALIVE) as channel:
                connection = _Connection(self._agent, link_pb2_grpc.AgentLinkStub(channel).Connect())
                self._connection = connection
                try:
                    await connection.run()
                except grpc.aio.AioRpcError as error:
                    log.debug("no link to the control plane", error=error.details())
                finally:
                    self._connection = None
            pause = FIRST_PAUSE_S if connection.welcomed else min(pause * 2, LAST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    def _exited(self, event: api.SandboxExited) -> None:
        # Without a connection the event is not lost: the next HELLO lists the residents, and this one is missing there.
        if self._connection:
            self._connection.send(Frame(kind=Frame.EVENT, body=_encode(event)))


class _Connection:
    """One stream. Calls run as tasks of their own and outlive it."""

    def __init__(self, agent: Agent, stream: Any) -> None:
        self._agent = agent
        self._stream = stream
        self._out: asyncio.Queue[link_pb2.Frame | None] = asyncio.Queue()
        self._open: dict[int, _Reporter] = {}
        self.welcomed = False
        self.closed = False

    def send(self, frame: link_pb2.Frame) -> None:
        if not self.closed:
            self._out.put_nowait(frame)

    async def run(self) -> None:
        hello = Frame(kind=Frame.HELLO, body=_encode(self._agent.hello()))
        await self._stream.write(Frames(frames=[hello]))
        writer = asyncio.create_task(self._write())
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                for frame in message.frames:
                    self._receive(frame)
        finally:
            self.closed = True
            writer.cancel()
            for reporter in list(self._open.values()):
                if reporter.streaming:
                    reporter.task.cancel()
            self._stream.cancel()

    async def _write(self) -> None:
        while (frames := await gather_frames(self._out)) is not None:
            await self._stream.write(Frames(frames=frames))

    def _receive(self, frame: link_pb2.Frame) -> None:
        match frame.kind:
            case Frame.WELCOME:
                self.welcomed = True
                log.info("linked to the control plane")
            case Frame.CALL:
                call = _decode_call(frame.body)
                reporter = _Reporter(self, frame.id, streaming=isinstance(call, api.Exec | api.Logs))
                self._open[frame.id] = reporter
                reporter.task = asyncio.create_task(self._serve(frame.id, call, reporter))
            case Frame.DATA | Frame.CREDIT | Frame.CANCEL if frame.id in self._open:
                self._open[frame.id].receive(frame)

    async def _serve(self, number: int, call: api.AgentCall, reporter: _Reporter) -> None:
        try:
            answer = await self._agent.handle(call, reporter)
            self.send(Frame(kind=Frame.RESULT, id=number, body=_encode(answer)))
        except asyncio.CancelledError:
            self._fail(number, "CANCELLED", "CANCELLED", "the call was cancelled")
            raise
        except GreenroomError as error:
            self._fail(number, error.code, error.reason, error.message, error.metadata)
        except Exception as error:
            log.exception("a call failed in a way nobody thought of", call=type(call).__name__)
            self._fail(number, "INTERNAL", "INTERNAL", f"{type(error).__name__}: {error}")
        finally:
            self._open.pop(number, None)

    def _fail(self, number: int, code: str, reason: str, message: str, metadata: dict[str, str] | None = None) -> None:
        failure = Failure(code=code, reason=reason, message=message, metadata=metadata or {})
        self.send(Frame(kind=Frame.ERROR, id=number, body=_encode(failure)))


class _Reporter:
    """See `greenroom.agent.agent.Reporter`."""

    task: asyncio.Task[None]

    def __init__(self, connection: _Connection, number: int, *, streaming: bool) -> None:
        self._connection = connection
        self._number = number
        self.streaming = streaming
        if streaming:
            self._credit = asyncio.Semaphore(WINDOW)
            self._input: asyncio.Queue[bytes] = asyncio.Queue()

    def receive(self, frame: link_pb2.Frame) -> None:
        if not self.streaming:
            return
        match frame.kind:
            case Frame.DATA if self._input.qsize() < WINDOW:
                self._input.put_nowait(frame.data)
            case Frame.CREDIT:
                for _ in range(min(frame.channel, WINDOW)):
                    self._credit.release()
            case Frame.CANCEL:
                self.task.cancel()

    def progress(self, progress: api.Progress) -> None:
        self._connection.send(Frame(kind=Frame.PROGRESS, id=self._number, body=_encode(progress)))

    async def data(self, channel: int, data: bytes) -> None:
        await self._credit.acquire()
        self._connection.send(Frame(kind=Frame.DATA, id=self._number, channel=channel, data=data))

    async def input(self) -> AsyncIterator[bytes]:
        taken = 0
        while True:
            data = await self._input.get()
            yield data
            if not data:
                return
            taken += 1
            if taken % (WINDOW // 4) == 0:
                self._connection.send(Frame(kind=Frame.CREDIT, id=self._number, channel=WINDOW // 4))
