"""A model of the agent process: its connections to the replicas, as `greenroom.agent.link` keeps them. What it does is
in `calls`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, Protocol

from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, Hello, ResidentState, Welcome
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Record
from greenroom.testing.simloop import Process
from greenroom.testing.simulation.calls import BACKEND, FINGERPRINT, Calls
from greenroom.testing.simulation.links import DEAD_AFTER, Link, SimHub
from greenroom.testing.simulation.machine import Machine, Sandbox
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.snapshots import Bucket
from greenroom.testing.simulation.trace import Trace

POOL = "default"

#: Between two tries to connect, at most.
REDIAL_S = 1.0
#: How often an agent that is not welcome yet looks whether anybody is there.
HELLO_S = 2.0

Reply = Callable[[Link, Any, Record | GreenroomError], None]


class Directory(Protocol):
    """Where agents find replicas."""

    names: tuple[str, ...]

    def hub(self, replica: str) -> SimHub | None: ...


class Agent:
    """One agent process on a machine.

    Attributes:
        calls: what carries out the calls.
    """

    def __init__(
        self,
        machine: Machine,
        network: Network,
        bucket: Bucket,
        directory: Directory,
        number: int,
        seed: str,
        trace: Trace,
    ) -> None:
        self.machine = machine
        self.worker = machine.name
        self.network = network
        self.directory = directory
        self.trace = trace
        self.boot_id = f"{machine.name}-boot-{number}"
        self.process: Process = network.loop.process(machine.name)
        self.labels: dict[str, str] = {}
        self._random = random.Random(f"agent {self.boot_id} {seed}")
        self.calls = Calls(machine, network, bucket, self._random, trace)
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._welcome = Welcome()
        self.leaving = False

    # --- its life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects to every replica."""
        loop = self.network.loop
        for replica in self.directory.names:
            loop.call_soon(self._dial, replica, context=self.process.context)
        loop.call_soon(self.calls.begin, context=self.process.context)

    def hello(self) -> Hello:
        return Hello(
            worker=self.worker,
            pool=POOL,
            backend=BACKEND,
            fingerprint=FINGERPRINT,
            capacity=self.machine.capacity,
            boot_id=self.boot_id,
            memory_snapshots=True,
            freeze=True,
            residents=self.calls.residents(),
            labels=self.labels,
        )

    # --- connections --------------------------------------------------------------------------------------

    def _dial(self, replica: str) -> None:
        loop = self.network.loop
        link = Link(self.network, self, replica)
        self._links[replica] = link
        loop.call_later(self.network.latency(), self._knock, link, context=loop.main.context)
        loop.call_later(HELLO_S, self._await_welcome, link)

    def _knock(self, link: Link) -> None:
        """On the network: whoever has the replica's name now gets it."""
        hub = self.directory.hub(link.replica)
        if hub is not None and link.agent_open and self.network.reaches(link.replica, self.worker):
            link.hub = hub
            self.network.loop.call_soon(hub.accept, link, link.hello, context=hub.process.context)

    def _await_welcome(self, link: Link) -> None:
        """Until it is welcome, or nobody is there."""
        if link.agent_open and not link.beats:
            if not link.hub_open:
                self.hung_up(link)
            elif not self._is_dead(link):
                self.network.loop.call_later(HELLO_S, self._await_welcome, link)

    def hung_up(self, link: Link) -> None:
        """The connection is closed, or counts as dead."""
        if not link.agent_open:
            return
        link.agent_open = False
        if self._links.get(link.replica) is link:
            self.network.loop.call_later(self._random.random() * REDIAL_S, self._dial, link.replica)

    def welcomed(self, link: Link, welcome: Welcome, beat: int) -> None:
        """The answer to its hello, or to a heartbeat."""
        if not link.agent_open:
            return
        self._welcome = welcome
        if (sent_at := link.unanswered.pop(beat, None)) is not None:
            self.calls.alone.heard(welcome, sent_at)
        if not link.beats:
            link.beats = True
            if self.leaving:
                self._say_leaving(link)
            self.network.loop.call_later(welcome.heartbeat_s, self._beat, link)

    def _beat(self, link: Link) -> None:
        loop = self.network.loop
        if not link.agent_open or link.hub is None or self._is_dead(link):
            return
        link.beaten += 1
        link.unanswered[link.beaten] = loop.time()
        link.up(link.hub.beat, link, api.Heartbeat(boot_id=self.boot_id, residents=self.calls.residents()), link.beaten)
        loop.call_later(self._welcome.heartbeat_s, self._beat, link)

    def _is_dead(self, link: Link) -> bool:
        """What keepalive messages of the transport tell: nobody is there any more, or has not been for a while."""
        now = self.network.loop.time()
        if self.network.reaches(link.replica, self.worker):
            link.agent_heard = now
            if self.directory.hub(link.replica) is link.hub:
                return False
        elif now - link.agent_heard <= DEAD_AFTER * self._welcome.heartbeat_s:
            return False
        self.hung_up(link)
        return True

    # --- what happens here --------------------------------------------------------------------------------

    def called(self, link: Link, call: AgentCall, pending: Any, reply: Reply) -> None:
        """A call has arrived. It goes on when the connection breaks."""
        if not link.agent_open:
            return
        task = asyncio.create_task(self._serve(link, call, pending, reply), name=type(call).__name__)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, link: Link, call: AgentCall, pending: Any, reply: Reply) -> None:
        try:
            reply(link, pending, await self.calls.handle(call))
        except GreenroomError as error:
            reply(link, pending, error)

    def program_ends(self, sandbox: Sandbox) -> None:
        """A sandbox ends by itself; all replicas that can be told are told."""
        if sandbox.gone:
            return
        self.machine.remove(sandbox)
        if sandbox.state is ResidentState.STARTING:
            return
        generation = self.calls.generation(sandbox.uid)
        event = api.SandboxExited(actor_uid=sandbox.uid, generation=generation, code=3)
        for link in self._links.values():
            if link.agent_open and link.hub is not None:
                link.up(link.hub.exited, link, event)

    def cut(self, replica: str) -> None:
        """Its connection to that replica breaks."""
        if (link := self._links.get(replica)) is not None and link.agent_open:
            link.reset()

    def hang_up(self) -> None:
        """The process has ended: the kernel closes its connections."""
        for link in self._links.values():
            link.agent_open = False
            if link.hub is not None:
                link.up(link.hub.hung_up, link)

    def leave(self) -> None:
        """It was asked to end: its actors are to be suspended first."""
        self.leaving = True
        for link in self._links.values():
            self._say_leaving(link)

    def _say_leaving(self, link: Link) -> None:
        if link.agent_open and link.hub is not None and link.beats:
            link.up(link.hub.leaving, link, self.boot_id)
