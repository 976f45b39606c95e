"""A machine of the simulation: sandboxes, a disk, and the process of an agent that may die without them.

A sandbox's memory is one number, which every request counts up. Nothing here is atomic that is not in the real world:
to write a snapshot takes a while, a sandbox that is being destroyed runs until it is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from greenroom.agent.journal import KEPT_FENCES
from greenroom.core.agentapi import ActorCall, Identity, ResidentState
from greenroom.core.records import Endpoint, Snapshot
from greenroom.testing.simloop import SimLoop
from greenroom.testing.simulation.network import data_path

Answer = Callable[[int], None]


class Sandbox:
    """One incarnation of an actor.

    Attributes:
        number: in the order of making; no two have the same.
        count: what the actor has in memory.
        origin: what it began with.
        frozen: its CPU is stopped; requests wait.
        gone: it has ended.
        epoch: in which it was let run (`greenroom.agent.alone`).
        ended_by_call: an agent was told to end it.
    """

    __slots__ = (
        "count",
        "ended_by_call",
        "epoch",
        "frozen",
        "gone",
        "identity",
        "machine",
        "number",
        "operation_id",
        "origin",
        "state",
        "waiting",
    )

    def __init__(self, number: int, machine: Machine, identity: Identity, count: int, operation_id: str) -> None:
        self.number = number
        self.machine = machine
        self.identity = identity
        self.count = self.origin = count
        self.operation_id = operation_id
        self.epoch = -1
        self.state = ResidentState.STARTING
        self.frozen = False
        self.gone = self.ended_by_call = False
        self.waiting: list[Answer] = []

    @property
    def uid(self) -> str:
        return self.identity.uid

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(path=f"{self.machine.name}/{self.number}")

    def __repr__(self) -> str:
        how = "gone" if self.gone else "frozen" if self.frozen else "running"
        return (
            f"<sandbox {self.number} of {self.identity.name} (generation {self.identity.generation}) on "
            f"{self.machine.name}: {how}, {self.origin} -> {self.count}>"
        )

    def request(self, answer: Answer) -> None:
        """Counts up, now or when it is thawed, and answers with the new count."""
        if self.gone:
            return
        if self.frozen:
            self.waiting.append(answer)
            return
        self.count += 1
        answer(self.count)

    def freeze(self) -> None:
        self.frozen = True
        self.state = ResidentState.FROZEN

    def thaw(self) -> None:
        self.frozen = False
        self.state = ResidentState.RUNNING
        waiting, self.waiting = self.waiting, []
        for answer in waiting:
            self.request(answer)


class Watch(Protocol):
    """Who is told in the instant in which it happens."""

    def runs(self, sandbox: Sandbox) -> None: ...
    def goes_on(self, sandbox: Sandbox) -> None: ...
    def call_arrived(self, machine: str, call: ActorCall) -> bool: ...
    def call_acts(self, machine: str, call: ActorCall) -> None: ...
    def sweeps(self, sandbox: Sandbox) -> None: ...
    def drops(self, machine: str, snapshot_id: str) -> None: ...


class MemoryJournal:
    """`greenroom.agent.journal.Journal` without a file: what a machine's disk keeps when its agent dies."""

    def __init__(self) -> None:
        self._fences: dict[str, tuple[int, str]] = {}
        self._results: dict[tuple[str, str], bytes] = {}

    def generation(self, actor_uid: str) -> int:
        return self._fences.get(actor_uid, (0, ""))[0]

    def raise_fence(self, actor_uid: str, generation: int) -> None:
        if generation > self.generation(actor_uid):
            assert len(self._fences) < KEPT_FENCES, "as many as the real one remembers"
            self._fences[actor_uid] = generation, ""

    def ended(self, actor_uid: str) -> str:
        return self._fences.get(actor_uid, (0, ""))[1]

    def end_operation(self, actor_uid: str, operation_id: str) -> None:
        self._fences[actor_uid] = self.generation(actor_uid), operation_id

    def answer(self, operation_id: str, call: str) -> bytes | None:
        return self._results.get((operation_id, call))

    def record(self, operation_id: str, call: str, answer: bytes) -> None:
        self._results[operation_id, call] = answer

    def close(self) -> None:
        pass


class MemoryFile:
    """As much of a `pathlib.Path` as keeps one small thing, written anew beside it and moved over it."""

    def __init__(self) -> None:
        self._content: bytes | None = None

    def read_bytes(self) -> bytes:
        if self._content is None:
            raise FileNotFoundError
        return self._content

    def write_bytes(self, content: bytes) -> None:
        self._content = content

    def with_suffix(self, suffix: str) -> MemoryFile:
        return MemoryFile()

    def replace(self, target: MemoryFile) -> None:
        target._content = self._content


class Machine:
    """Args:
        register: every sandbox that there ever was, anywhere, by the path of its endpoint.

    Attributes:
        process: of the sandboxes; the agent's is another one.
        sandboxes: by actor uid.
        staged: snapshots that were written and not published, by actor uid.
        held: snapshots that are kept here until they are uploaded, by id.
        welcome: where agents keep what they must remember of the control plane.
        papers: where they keep whose disk it is.
    """

    def __init__(self, loop: SimLoop, name: str, capacity: int, watch: Watch, register: dict[str, Sandbox]) -> None:
        self.loop = loop
        self.name = name
        self.capacity = capacity
        self.watch = watch
        self._register = register
        self.disk_full_until = 0.0
        self.format()
        self.boot()

    def format(self) -> None:
        """A new disk."""
        self.journal = MemoryJournal()
        self.staged: dict[str, tuple[Snapshot, int]] = {}
        self.held: dict[str, tuple[Snapshot, int]] = {}
        self.welcome = MemoryFile()
        self.papers = MemoryFile()

    def boot(self) -> None:
        self.up = True
        self.process = self.loop.process(data_path(self.name))
        self.sandboxes: dict[str, Sandbox] = {}

    def crash(self) -> None:
        """Everything that ran here is gone at once; the disk is not."""
        self.up = False
        self.loop.kill(self.process)
        for sandbox in self.sandboxes.values():
            sandbox.gone = True
        self.sandboxes = {}

    def make(self, identity: Identity, count: int, operation_id: str) -> Sandbox:
        sandbox = Sandbox(len(self._register) + 1, self, identity, count, operation_id)
        self._register[sandbox.endpoint.path] = sandbox
        self.sandboxes[identity.uid] = sandbox
        self.watch.runs(sandbox)
        return sandbox

    def thaw(self, sandbox: Sandbox) -> None:
        sandbox.thaw()
        self.watch.runs(sandbox)

    def remove(self, sandbox: Sandbox) -> None:
        sandbox.gone = True
        sandbox.waiting.clear()
        if self.sandboxes.get(sandbox.uid) is sandbox:
            del self.sandboxes[sandbox.uid]
