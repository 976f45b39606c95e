"""A worker hub without a wire: agents of the same process, reached by direct calls.

It behaves as `greenroom.api.link` does where it matters: calls of one worker begin in the order in which they were
sent; a call goes on when its caller goes away or the link breaks; everything passes through JSON, so that nothing is
shared by accident. An agent may be connected to any number of hubs. Heartbeats are sent when a test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from greenroom.agent import clock
from greenroom.agent.agent import Agent
from greenroom.core import agentapi as api
from greenroom.core.agentapi import (
    AgentCall,
    Heartbeat,
    Hello,
    Leaving,
    SandboxExited,
    StreamingCall,
    Welcome,
)
from greenroom.core.errors import GreenroomError, Unavailable, rebuild
from greenroom.core.records import Record
from greenroom.engine.workers import CallStream, OnProgress, WorkerListener

#: Chunks of one streaming call that may wait unread, in each direction.
WINDOW = 64

_encode = msgspec.json.Encoder().encode
_decode_call = msgspec.json.Decoder(AgentCall).decode
_decode_hello = msgspec.json.Decoder(Hello).decode
_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
_decode_leaving = msgspec.json.Decoder(Leaving).decode
_decode_welcome = msgspec.json.Decoder(Welcome).decode
_decode_exited = msgspec.json.Decoder(SandboxExited).decode


class LocalHub:
    """See `greenroom.engine.workers.WorkerHub`."""

    def __init__(self) -> None:
        self.listener: WorkerListener | None = None
        self.welcome = Welcome()
        #: What agents failed with that is no `GreenroomError`: bugs.
        self.bugs: list[Exception] = []
        self._links: dict[str, _Link] = {}

    # --- the engine's side --------------------------------------------------------------------------------

    def connected(self) -> dict[str, Hello]:
        return {name: link.hello for name, link in self._links.items()}

    def heard(self) -> dict[str, float]:
        now = asyncio.get_running_loop().time()
        return dict.fromkeys(self._links, now)  # who is in the same process is heard all the time

    def acknowledge(self, hello: Hello) -> None:
        link = self._links.get(hello.worker)
        if link is not None and link.hello is hello:
            link.welcome()

    async def call(self, worker: str, call: AgentCall, on_progress: OnProgress | None = None) -> Record:
        return await self._link(worker).send(call, _Reporter(on_progress))

    def open(self, worker: str, call: StreamingCall) -> CallStream:
        reporter = _Reporter(None)
        return _Stream(reporter, self._link(worker).send(call, reporter))

    def _link(self, worker: str) -> _Link:
        if worker not in self._links:
            raise _disconnected(worker)
        return self._links[worker]

    # --- the agents' side ---------------------------------------------------------------------------------

    def connect(self, agent: Agent) -> None:
        """The agent is reachable from now on, and the listener is told."""
        link = _Link(self, agent, _decode_hello(_encode(agent.hello())))
        worker = link.hello.worker
        if (old := self._links.get(worker)) is not None:
            old.cut(_disconnected(worker))
        self._links[worker] = link
        agent.links.add(link)
        if self.listener:
            self.listener.worker_connected(link.hello)
        if agent.is_leaving:
            link.leaving(agent.farewell())

    def disconnect(self, worker: str) -> None:
        """Cuts the link; the agent goes on with what it does. Unknown is fine."""
        link = self._links.pop(worker, None)
        if link is None:
            return
        link.cut(_disconnected(worker))
        if self.listener:
            self.listener.worker_gone(worker, link.hello.boot_id)

    def heartbeat(self, worker: str = "") -> None:
        """That agent, or every one that is connected, says that it lives, and is answered."""
        for link in [self._link(worker)] if worker else [*self._links.values()]:
            link.heartbeat()

    def bug(self, error: Exception) -> None:
        self.bugs.append(error)

    def is_current(self, link: _Link) -> bool:
        return self._links.get(link.hello.worker) is link


def _disconnected(worker: str) -> Unavailable:
    return Unavailable(f"worker {worker} is not connected", reason="WORKER_DISCONNECTED")


class _Link:
    """See `greenroom.agent.agent.Link`."""

    def __init__(self, hub: LocalHub, agent: Agent, hello: Hello) -> None:
        self.hello = hello
        self._hub = hub
        self._agent = agent
        self._answers: set[asyncio.Future[Record]] = set()
        self._work: set[asyncio.Task[None]] = set()

    def exited(self, event: SandboxExited) -> None:
        if self._hub.listener and self._hub.is_current(self):
            self._hub.listener.sandbox_exited(self.hello.worker, _decode_exited(_encode(event)))

    def leaving(self, leaving: Leaving) -> None:
        if self._hub.listener and self._hub.is_current(self):
            self._hub.listener.worker_leaving(self.hello.worker, _decode_leaving(_encode(leaving)).boot_id)

    def heartbeat(self) -> None:
        said = _decode_heartbeat(_encode(self._agent.heartbeat()))
        listener = self._hub.listener
        if listener is None or listener.worker_heard(self.hello.worker, said):
            self.welcome()

    def welcome(self) -> None:
        self._agent.heard(_decode_welcome(_encode(self._hub.welcome)), clock.boot_time())

    def send(self, call: AgentCall, reporter: _Reporter) -> asyncio.Future[Record]:
        """The future of the answer; to cancel it stops nothing."""
        answer: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._answers.add(answer)
        task = asyncio.create_task(self._serve(_encode(call), reporter, answer))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        reporter.task = task
        return answer

    async def _serve(self, body: bytes, reporter: _Reporter, answer: asyncio.Future[Record]) -> None:
        outcome: Record | GreenroomError
        try:
            call = _decode_call(body)
            made = await self._agent.handle(call, reporter)
            outcome = msgspec.json.decode(_encode(made), type=api.ANSWERS[type(call).__name__])
        except GreenroomError as error:
            outcome = rebuild(error.code, error.reason, error.message, error.metadata)
        except asyncio.CancelledError:
            outcome = rebuild("CANCELLED", "CANCELLED", "the call was cancelled")
            raise
        except Exception as error:
            self._hub.bug(error)
            outcome = rebuild("INTERNAL", "INTERNAL", f"{type(error).__name__}: {error}")
        finally:
            self._answers.discard(answer)
            _settle(answer, outcome)
            reporter.chunks.put_nowait(None)

    def cut(self, error: GreenroomError) -> None:
        self._agent.links.discard(self)
        for answer in self._answers:
            _settle(answer, error)
        self._answers.clear()


def _settle(answer: asyncio.Future[Record], outcome: Record | GreenroomError) -> None:
    if answer.done():
        return
    if isinstance(outcome, GreenroomError):
        answer.set_exception(outcome)
        answer.exception()  # a caller that has gone away leaves no warning behind
    else:
        answer.set_result(outcome)


class _Reporter:
    """See `greenroom.agent.progress.Reporter`."""

    task: asyncio.Task[None]

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self.chunks: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()
        self.credit = asyncio.Semaphore(WINDOW)
        self.given: asyncio.Queue[bytes] = asyncio.Queue(WINDOW)

    def progress(self, progress: api.Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    async def data(self, channel: int, data: bytes) -> None:
        await self.credit.acquire()
        self.chunks.put_nowait((channel, data))

    async def input(self) -> AsyncIterator[bytes]:
        while True:
            data = await self.given.get()
            yield data
            if not data:
                return


class _Stream:
    """See `greenroom.engine.workers.CallStream`."""

    def __init__(self, reporter: _Reporter, answer: asyncio.Future[Record]) -> None:
        self._reporter = reporter
        self._answer = answer

    async def send(self, data: bytes) -> None:
        if not self._answer.done():
            await self._reporter.given.put(data)

    async def chunks(self) -> AsyncIterator[tuple[int, bytes]]:
        while (item := await self._reporter.chunks.get()) is not None:
            yield item
            self._reporter.credit.release()
        await self._answer

    async def result(self) -> Record:
        return await self._answer

    def cancel(self) -> None:
        if not self._answer.done():
            self._reporter.task.cancel()
