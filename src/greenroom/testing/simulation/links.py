"""Connections of agents to replicas, and the hub that is a replica's end of them.

As `greenroom.api.link` does it: an agent connects to each replica, says hello and is welcomed, says again and again
that it lives, and carries out calls, which go on when the connection breaks. Who hears nothing of the other for a while
takes the connection for dead; so either end may be closed while the other does not know yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenroom.core.agentapi import AgentCall, Heartbeat, Hello, SandboxExited, StreamingCall, Welcome
from greenroom.core.errors import GreenroomError, Unavailable, rebuild
from greenroom.core.records import Record
from greenroom.engine.workers import CallStream, OnProgress, WorkerListener
from greenroom.testing.simloop import Process
from greenroom.testing.simulation.faults import AT_CALL, HEAVY, Fault
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.trace import Trace

if TYPE_CHECKING:
    from greenroom.testing.simulation.agent import Agent

#: Who has heard nothing for this many heartbeats takes the connection for dead.
DEAD_AFTER = 3.0


class Link:
    """One connection. Messages of one direction arrive in the order of sending, except those that a fault holds up."""

    def __init__(self, network: Network, agent: Agent, replica: str) -> None:
        self.network = network
        self.agent = agent
        self.replica = replica
        self.hub: SimHub | None = None
        #: Whether the agent's, and the replica's, end is open.
        self.agent_open = True
        self.hub_open = False
        self.hello = agent.hello()
        #: When the replica last heard the agent, and when the agent could last have reached the replica.
        self.hub_heard = self.agent_heard = network.loop.time()
        #: When the agent sent its heartbeats that are not answered yet, by number; 0 is its hello.
        self.unanswered: dict[int, float] = {0: network.loop.time()}
        self.beaten = 0
        #: Whether the agent has begun to say that it lives.
        self.beats = False
        self._last_up = self._last_down = 0.0

    def up(self, act: Callable[..., None], *args: Any) -> None:
        """To the replica."""
        assert self.hub is not None
        self._last_up = max(self._last_up, self.network.loop.time() + self.network.latency())
        self._send(self._last_up, self.hub.process, act, *args)

    def down(self, act: Callable[..., None], *args: Any, late_s: float = 0.0) -> None:
        """To the agent. What is late is overtaken by what comes after it."""
        when = max(self._last_down, self.network.loop.time() + self.network.latency())
        if not late_s:
            self._last_down = when
        self._send(when + late_s, self.agent.process, act, *args)

    def _send(self, when: float, to: Process, act: Callable[..., None], *args: Any) -> None:
        loop = self.network.loop
        loop.call_at(when, self._arrive, to, act, *args, context=loop.main.context)

    def _arrive(self, to: Process, act: Callable[..., None], *args: Any) -> None:
        if self.network.reaches(self.replica, self.agent.worker):
            self.network.loop.call_soon(act, *args, context=to.context)

    def reset(self) -> None:
        """The connection breaks, and both ends are told as soon as they can be."""
        self.down(self.agent.hung_up, self)
        if self.hub is not None:
            self.up(self.hub.hung_up, self)


class _Pending:
    """One call under way."""

    __slots__ = ("answer", "on_progress")

    def __init__(self, answer: asyncio.Future[Record], on_progress: OnProgress | None) -> None:
        self.answer = answer
        self.on_progress = on_progress


class SimHub:
    """See `greenroom.engine.workers.WorkerHub`; one for each process of a replica."""

    def __init__(self, network: Network, process: Process, trace: Trace) -> None:
        self.listener: WorkerListener | None = None
        self.welcome = Welcome()
        self.network = network
        self.process = process
        self._trace = trace
        self._links: dict[str, Link] = {}
        self._pending: dict[Link, list[_Pending]] = {}
        #: Kills an agent; set by whoever runs the world.
        self.kill_agent: Callable[[Agent], None] = lambda agent: None

    # --- the engine's side --------------------------------------------------------------------------------

    def connected(self) -> dict[str, Hello]:
        return {name: link.hello for name, link in self._links.items()}

    def heard(self) -> dict[str, float]:
        return {name: link.hub_heard for name, link in self._links.items()}

    def open(self, worker: str, call: StreamingCall) -> CallStream:
        raise _disconnected(worker)

    def acknowledge(self, hello: Hello) -> None:
        link = self._links.get(hello.worker)
        if link is not None and link.hello is hello:
            link.down(link.agent.welcomed, link, self.welcome, 0)

    async def call(self, worker: str, call: AgentCall, on_progress: OnProgress | None = None) -> Record:
        link = self._links.get(worker)
        if link is None:
            raise _disconnected(worker)
        pending = _Pending(self.network.loop.create_future(), on_progress)
        self._pending[link].append(pending)
        self._trace(self.process.name, worker, type(call).__name__, getattr(call, "generation", ""))
        try:
            self._send(link, call, pending)
            return await pending.answer
        finally:
            if pending in (waiting := self._pending.get(link, [])):
                waiting.remove(pending)

    def _send(self, link: Link, call: AgentCall, pending: _Pending) -> None:
        """With what goes wrong. A call that is lost, or its answer, is noticed when the connection breaks of it."""
        network, loop = self.network, self.network.loop
        handle, answered = link.agent.called, self._answered
        match network.faults.at(AT_CALL, HEAVY):
            case None:
                link.down(handle, link, call, pending, answered)
            case Fault.SLOW:
                link.down(handle, link, call, pending, answered, late_s=network.lateness())
            case Fault.LOST:
                loop.call_later(network.patience(), link.reset, context=loop.main.context)
            case Fault.REPLY_LOST:
                link.down(handle, link, call, pending, _unheard)
                loop.call_later(network.lateness(), link.reset, context=loop.main.context)
            case Fault.LATE:
                link.down(handle, link, call, pending, _unheard, late_s=network.lateness())
                loop.call_later(network.patience(), link.reset, context=loop.main.context)
            case Fault.TWICE:
                link.down(handle, link, call, pending, answered)
                link.down(handle, link, call, pending, _unheard, late_s=network.lateness())
            case Fault.CRASH_AFTER:
                link.down(handle, link, call, pending, self._die)
            case Fault.AGENT_BEFORE:
                self.kill_agent(link.agent)
            case Fault.AGENT_AFTER:
                link.down(handle, link, call, pending, lambda *_: self.kill_agent(link.agent))
            case _:
                network.crash(self.process)

    def _die(self, *_: Any) -> None:
        self.network.crash(self.process)

    def _answered(self, link: Link, pending: _Pending, outcome: Record | GreenroomError) -> None:
        """On the agent's side: the answer is sent."""
        if link.agent_open:
            link.up(self._settle, link, pending, outcome)

    def _settle(self, link: Link, pending: _Pending, outcome: Record | GreenroomError) -> None:
        if pending.answer.done() or not link.hub_open:
            return
        if isinstance(outcome, GreenroomError):
            pending.answer.set_exception(rebuild(outcome.code, outcome.reason, outcome.message, outcome.metadata))
            pending.answer.exception()  # a caller that has gone away leaves no warning behind
        else:
            pending.answer.set_result(outcome)

    # --- the agents' side ---------------------------------------------------------------------------------

    def accept(self, link: Link, hello: Hello) -> None:
        """An agent says hello."""
        link.hub_open, link.hub_heard = True, self.network.loop.time()
        old = self._links.get(hello.worker)
        self._links[hello.worker] = link
        self._pending[link] = []
        if old is not None:
            self._close(old, replaced=True)
        self._trace(self.process.name, "hello", hello.worker, hello.boot_id)
        self._look_after(link)
        if self.listener is not None:
            self.listener.worker_connected(hello)

    def beat(self, link: Link, heartbeat: Heartbeat, number: int) -> None:
        """An agent says that it lives."""
        if not link.hub_open:
            link.down(link.agent.hung_up, link)
            return
        link.hub_heard = self.network.loop.time()
        if self.listener is not None and self.listener.worker_heard(link.agent.worker, heartbeat):
            link.down(link.agent.welcomed, link, self.welcome, number)

    def exited(self, link: Link, event: SandboxExited) -> None:
        if link.hub_open and self.listener is not None:
            self.listener.sandbox_exited(link.agent.worker, event)

    def leaving(self, link: Link, boot_id: str) -> None:
        if link.hub_open and self.listener is not None:
            self.listener.worker_leaving(link.agent.worker, boot_id)

    def hung_up(self, link: Link) -> None:
        if link.hub_open:
            self._close(link, replaced=False)

    def _look_after(self, link: Link) -> None:
        """Takes a connection for dead over which nothing has come for long."""
        loop = self.network.loop
        if not link.hub_open:
            return
        dead_at = link.hub_heard + DEAD_AFTER * self.welcome.heartbeat_s
        if loop.time() >= dead_at:
            link.down(link.agent.hung_up, link)
            self._close(link, replaced=False)
        else:
            loop.call_at(dead_at, self._look_after, link)

    def _close(self, link: Link, *, replaced: bool) -> None:
        worker = link.agent.worker
        link.hub_open = False
        for pending in self._pending.pop(link, []):
            if not pending.answer.done():
                pending.answer.set_exception(_disconnected(worker))
                pending.answer.exception()
        if not replaced and self._links.get(worker) is link:
            del self._links[worker]
            self._trace(self.process.name, "gone", worker)
            if self.listener is not None:
                self.listener.worker_gone(worker, link.agent.boot_id)

    def shut(self) -> None:
        """The process has ended: the kernel closes its connections."""
        for link in self._links.values():
            link.hub_open = False
            link.down(link.agent.hung_up, link)


def _unheard(link: Link, pending: _Pending, outcome: Record | GreenroomError) -> None:
    """An answer that is lost."""


def _disconnected(worker: str) -> Unavailable:
    return Unavailable(f"worker {worker} is not connected", reason="WORKER_DISCONNECTED")
