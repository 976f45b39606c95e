"""The engine's port towards its workers, whatever carries it (gRPC in a process of its own, a direct call in a
test)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from greenroom.core.agentapi import (
    AgentCall,
    Heartbeat,
    Hello,
    Progress,
    SandboxExited,
    StreamingCall,
    Welcome,
)
from greenroom.core.records import Record

OnProgress = Callable[[Progress], None]


class WorkerListener(Protocol):
    """What the hub tells the engine. All are called on the engine's loop and return at once."""

    def worker_connected(self, hello: Hello) -> None: ...
    def worker_heard(self, worker: str, heartbeat: Heartbeat) -> bool:
        """Whether the heartbeat may be answered with a `Welcome`."""

    def worker_leaving(self, worker: str, boot_id: str) -> None: ...
    def worker_gone(self, worker: str, boot_id: str) -> None: ...
    def sandbox_exited(self, worker: str, event: SandboxExited) -> None: ...


class CallStream(Protocol):
    """A streaming call (`Exec`, `Logs`, `ImportImage`): see `greenroom.core.agentapi`."""

    async def send(self, data: bytes) -> None:
        """stdin; empty closes it."""

    def chunks(self) -> AsyncIterator[tuple[int, bytes]]:
        """(channel, bytes) until the call ends; ends by raising what the call failed with."""

    async def result(self) -> Record: ...

    def cancel(self) -> None:
        """Ends the call on the worker's side. Idempotent."""


class WorkerHub(Protocol):
    """``welcome``: what agents are told when they connect and whenever they say that they live; may be set at any
    time."""

    listener: WorkerListener | None
    welcome: Welcome

    def connected(self) -> dict[str, Hello]:
        """The agents that are connected now, by worker name."""

    def heard(self) -> dict[str, float]:
        """When each of them was last heard (loop time)."""

    def acknowledge(self, hello: Hello) -> None:
        """It may be answered: it is written down that this worker lives. It is the object that stands for a connection;
        one that is not there any more is fine."""

    async def call(self, worker: str, call: AgentCall, on_progress: OnProgress | None = None) -> Record:
        """Sends a call and waits for its answer. A caller that is cancelled does not stop the work on the worker.

        Raises:
            Unavailable: not connected, or the connection broke before the answer (reason ``WORKER_DISCONNECTED``): the
                call may have been carried out; send it again, with the same operation id, when the worker is back.
            GreenroomError: what the agent answered.
        """

    def open(self, worker: str, call: StreamingCall) -> CallStream:
        """Starts a streaming call. Raises `Unavailable` when the worker is not connected."""
