"""Replicas of a control plane as far as an agent sees them: real gRPC servers on unix sockets, each with a hub."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc.aio

from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2_grpc
from greenroom.api.access import Guard
from greenroom.api.link import AgentHub
from greenroom.api.server import listen_tcp
from greenroom.core.agentapi import Enrol, Heartbeat, Hello, Present, SandboxExited, Welcome
from greenroom.core.errors import Unavailable
from greenroom.core.gc.records import Registered

#: Heartbeats of the tests: quick, and yet some of them last longer than a busy machine stands still.
HEARTBEAT_S = 0.2


class Replica:
    """Also the hub's listener; keeps what it hears. ``guard``: it takes agents over TCP, with this."""

    def __init__(self, root: Path, name: str, guard: Guard | None = None) -> None:
        self.name = name
        self.guard = guard
        self.address = "127.0.0.1:0" if guard else f"unix:{root}/{name}.sock"
        self.hub = AgentHub()
        self.hub.listener = self
        #: False: as when it does not reach the store.
        self.answers = True
        self.say()
        self.connects: list[Hello] = []
        #: Whether it registers whoever comes.
        self.enrols = False
        self.enrolled: list[str] = []
        self.gone: list[str] = []
        self.heartbeats: list[Heartbeat] = []
        self.leaving: list[str] = []
        self.exits: list[SandboxExited] = []
        self._server: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    def say(self, *links: Replica, alone_s: float = 0.0) -> None:
        addresses = tuple(link.address for link in links)
        self.hub.welcome = Welcome(replica=self.name, links=addresses, heartbeat_s=HEARTBEAT_S, alone_s=alone_s)

    async def start(self, *more: str) -> None:
        self._server = grpc.aio.server(
            interceptors=self.guard.interceptors() if self.guard else [], options=[("grpc.so_reuseport", 0)]
        )
        link_pb2_grpc.add_AgentLinkServicer_to_server(self.hub, self._server)
        if self.guard:
            self.address = listen_tcp(self._server, self.address, self.guard, "--agents", "--agent-token-file")
        for address in more if self.guard else (self.address, *more):
            self._server.add_insecure_port(address)
        await self._server.start()

    async def kill(self) -> None:
        """Its connections break at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def connected(self) -> bool:
        return bool(self.hub.connected())

    # --- greenroom.engine.workers.WorkerListener ---

    def worker_connected(self, hello: Hello) -> None:
        self.connects.append(hello)
        if self.enrols:
            task = asyncio.get_running_loop().create_task(self._enrol(hello.worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self.answers:
            self.hub.acknowledge(hello)

    async def _enrol(self, worker: str) -> None:
        with contextlib.suppress(Unavailable):  # it has gone again
            said: Any = await self.hub.call(worker, Present())
            await self.hub.call(worker, Enrol(registered=Registered(claim=said.claim, epoch=1, closed_seq=0)))
            self.enrolled.append(worker)

    def worker_heard(self, worker: str, heartbeat: Heartbeat) -> bool:
        self.heartbeats.append(heartbeat)
        return self.answers

    def worker_leaving(self, worker: str, boot_id: str) -> None:
        self.leaving.append(boot_id)

    def worker_gone(self, worker: str, boot_id: str) -> None:
        self.gone.append(worker)

    def sandbox_exited(self, worker: str, event: SandboxExited) -> None:
        self.exits.append(event)
