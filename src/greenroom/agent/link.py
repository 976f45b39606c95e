"""The agent's end of one link: keeps a stream to a replica of the control plane open and feeds its calls to the agent.

When the stream breaks the agent goes on as it is (residents run, calls are finished and recorded) and connects again;
the control plane then asks once more for what it has no answer to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import msgspec
import structlog

from greenroom.agent import clock
from greenroom.agent.agent import Agent
from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2, link_pb2_grpc
from greenroom.api.access import Access
from greenroom.api.errors import from_rpc_error
from greenroom.api.frames import MAX_BODY_BYTES, WINDOW, cut, gather_frames
from greenroom.core import agentapi as api
from greenroom.core.errors import GreenroomError, Internal
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
#: Heartbeats are not sent more often, whatever the control plane asks for: each costs it a write.
MIN_HEARTBEAT_S = 0.05
#: Part of the time between heartbeats by which it varies, so that those of many workers spread.
HEARTBEAT_JITTER = 0.1
#: Heartbeats whose sending is remembered until they are answered. An older peer answers none, and one that does not
#: reach its store none of that time; an answer that is so late would prove nothing.
MAX_UNANSWERED = 100
#: Frames that may wait to be sent before no heartbeats are added to them: the peer does not read, and is soon found to
#: be dead.
MAX_WAITING = 100
#: How long what waits to be sent may take when the link is closed: longer than a replica on a busy machine stands
#: still, and no more than half of what a pod is given to end (`greenroom.operator.worker_pod.KILL_AFTER_S`), which a
#: peer that is dead takes all of.
FLUSH_S = 5.0

#: Why a link fails while replicas come and go.
_PASSING = frozenset({"SERVER_NOT_RUNNING", "CALL_CANCELLED", "CONNECTION_CLOSED", "UNAVAILABLE", "CANCELLED"})

_encode = msgspec.json.Encoder().encode
_decode_call = msgspec.json.Decoder(api.AgentCall).decode
_decode_welcome = msgspec.json.Decoder(api.Welcome).decode


class AgentLink:
    """``target``: a gRPC address, for example ``unix:/run/greenroom/agents.sock``. ``on_welcome`` hears of every
    `Welcome`. ``elsewhere``: another link that leads to the same replica just now, which this one then leaves alone,
    because a replica takes one link of each worker. ``access``: what to know the replica by, on TCP."""

    def __init__(
        self,
        agent: Agent,
        target: str,
        on_welcome: Callable[[AgentLink], None] = lambda link: None,
        elsewhere: Callable[[AgentLink], AgentLink | None] = lambda link: None,
        access: Access | None = None,
    ) -> None:
        self.target = target
        #: What was heard last on this link, also while it is down.
        self.welcome = api.Welcome()
        #: Set while there is no connection to a replica that has answered.
        self.down = asyncio.Event()
        self.down.set()
        self._agent = agent
        self._access = access or Access()
        #: Why attempts fail that a person has been told of (reason).
        self._trouble = ""
        self._on_welcome = on_welcome
        self._elsewhere = elsewhere
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return not self.down.is_set()

    def start(self) -> None:
        """Connects, again and again, until `close`."""
        self._task = asyncio.create_task(self._run(), name=f"link-{self.target}")

    async def close(self) -> None:
        """What waits to be sent is sent first."""
        if self._connection is not None and self._connection.welcomed:
            # Not by cancelling its task: what was written and not yet read at the other end would be lost.
            self._connection.finish()
            await asyncio.wait({self._connection.ended}, timeout=FLUSH_S)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            while (other := self._elsewhere(self)) is not None:
                await other.down.wait()
            try:
                welcomed = await self._connect()
            except GreenroomError as error:  # a file that can't be read
                self._complain(error)
                welcomed = False
            except Exception:  # one replica that makes trouble is not all of them
                log.exception("a link failed in a way nobody thought of", target=self.target)
                welcomed = False
            pause = FIRST_PAUSE_S if welcomed else min(pause * 2, LAST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    async def _connect(self) -> bool:
        """One connection from its beginning to its end; returns whether it was welcomed."""
        # Made anew for each connection, so that what is renewed in its files is used.
        async with self._access.aio_channel(self.target, KEEPALIVE) as channel:
            connection = _Connection(self._agent, self, link_pb2_grpc.AgentLinkStub(channel).Connect())
            self._connection = connection
            try:
                await connection.run()
            except grpc.aio.AioRpcError as error:
                self._complain(from_rpc_error(error, self.target))
            finally:
                self._connection = None
                self.down.set()
        return connection.welcomed

    def _complain(self, error: GreenroomError) -> None:
        """Of what a person has to put right it is said once, also when in between nobody answers, which is nothing
        unusual."""
        is_grave = error.reason not in _PASSING and error.reason != self._trouble
        if is_grave:
            self._trouble = error.reason
        (log.warning if is_grave else log.debug)(
            "no link to the control plane", target=self.target, error=error.message, reason=error.reason
        )

    def heard(self, welcome: api.Welcome, sent_at: float) -> None:
        self._trouble = ""
        if not self.is_up:
            log.info("linked to the control plane", target=self.target, replica=welcome.replica)
        self.welcome = welcome
        self.down.clear()
        self._agent.heard(welcome, sent_at)
        self._on_welcome(self)


class _Connection:
    """One stream; see `greenroom.agent.agent.Link`. Calls run as tasks of their own and outlive it."""

    def __init__(self, agent: Agent, link: AgentLink, stream: Any) -> None:
        self._agent = agent
        self._link = link
        self._stream = stream
        self._out: asyncio.Queue[link_pb2.Frame | None] = asyncio.Queue()
        self._open: dict[int, _Reporter] = {}
        #: When what awaits a WELCOME was sent (`clock.boot_time`), by the number of the heartbeat; HELLO is 0.
        self._unanswered: dict[int, float] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.welcomed = False
        self.closed = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self) -> None:
        """Sends what waits, then says that nothing more comes; the other end then ends the stream."""
        self._out.put_nowait(None)

    def send(self, frame: link_pb2.Frame) -> None:
        if not self.closed:
            self._out.put_nowait(frame)

    def exited(self, event: api.SandboxExited) -> None:
        self.send(Frame(kind=Frame.EVENT, body=_encode(event)))

    def leaving(self, leaving: api.Leaving) -> None:
        if self.welcomed:  # else it is said on being welcome
            self.send(Frame(kind=Frame.LEAVING, body=_encode(leaving)))

    async def run(self) -> None:
        # Before it is said who lives here: what happens from then on is an event.
        self._agent.links.add(self)
        try:
            self._unanswered[0] = clock.boot_time()
            hello = Frame(kind=Frame.HELLO, body=_encode(self._agent.hello()))
            await self._stream.write(Frames(frames=[hello]))
            self._tasks.append(asyncio.create_task(self._write()))
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                for frame in message.frames:
                    self._receive(frame)
        finally:
            self._agent.links.discard(self)
            self.closed = True
            self.ended.set_result(None)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for reporter in list(self._open.values()):
                if reporter.streaming:
                    reporter.task.cancel()
            self._stream.cancel()

    async def _write(self) -> None:
        while (frames := await gather_frames(self._out)) is not None:
            await self._stream.write(Frames(frames=frames))
        await self._stream.done_writing()

    async def _beat(self) -> None:
        """Says that the agent lives, as often as the control plane wants to hear it."""
        number = 0
        while True:
            every = max(self._link.welcome.heartbeat_s, MIN_HEARTBEAT_S)
            await asyncio.sleep(every * random.uniform(1 - HEARTBEAT_JITTER, 1))
            number += 1
            self._unanswered[number] = clock.boot_time()
            if len(self._unanswered) > MAX_UNANSWERED:
                del self._unanswered[min(self._unanswered)]
            if self._out.qsize() < MAX_WAITING:
                self.send(Frame(kind=Frame.HEARTBEAT, id=number, body=_encode(self._agent.heartbeat())))

    def _receive(self, frame: link_pb2.Frame) -> None:
        match frame.kind:
            case Frame.WELCOME:
                self._welcome(frame)
            case Frame.CALL:
                call = _decode_call(frame.body)
                reporter = _Reporter(self, frame.id, streaming=isinstance(call, api.StreamingCall))
                self._open[frame.id] = reporter
                reporter.task = asyncio.create_task(self._serve(frame.id, call, reporter))
            case Frame.DATA | Frame.CREDIT | Frame.CANCEL if frame.id in self._open:
                self._open[frame.id].receive(frame)

    def _welcome(self, frame: link_pb2.Frame) -> None:
        welcome = _decode_welcome(frame.body) if frame.body else api.Welcome()
        # It was alive when it got what it answers. When that was only it knows, but it was after this was sent; when
        # the answer came proves less: it may have been on the way for long.
        sent_at = self._unanswered.get(frame.id, float("-inf"))
        if frame.id in self._unanswered:  # answers are in order: those to earlier ones do not come any more
            self._unanswered = {number: at for number, at in self._unanswered.items() if number > frame.id}
        first, self.welcomed = not self.welcomed, True
        self._link.heard(welcome, sent_at)
        if first:
            self._tasks.append(asyncio.create_task(self._beat()))
            if self._agent.is_leaving:
                self.leaving(self._agent.farewell())

    async def _serve(self, number: int, call: api.AgentCall, reporter: _Reporter) -> None:
        try:
            answer = await self._agent.handle(call, reporter)
            body = _encode(answer)
            if len(body) > MAX_BODY_BYTES:
                raise Internal(
                    f"the answer to {type(call).__name__} has {len(body)} bytes; at most {MAX_BODY_BYTES} are sent",
                    reason="ANSWER_TOO_LARGE",
                )
            self.send(Frame(kind=Frame.RESULT, id=number, body=body))
        except asyncio.CancelledError:
            self._fail(number, "CANCELLED", "CANCELLED", "the call was cancelled")
            raise
        except GreenroomError as error:
            self._fail(number, error.code, error.reason, error.message, error.facts())
        except Exception as error:
            log.exception("a call failed in a way nobody thought of", call=type(call).__name__)
            self._fail(number, "INTERNAL", "INTERNAL", f"{type(error).__name__}: {error}")
        finally:
            self._open.pop(number, None)

    def _fail(self, number: int, code: str, reason: str, message: str, metadata: dict[str, str] | None = None) -> None:
        failure = Failure(code=code, reason=reason, message=message, metadata=metadata or {})
        self.send(Frame(kind=Frame.ERROR, id=number, body=_encode(cut(failure))))


class _Reporter:
    """See `greenroom.agent.progress.Reporter`."""

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
