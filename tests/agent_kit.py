"""An agent of a test: the real one, with simulated sandboxes that outlive it as real ones do."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from greenroom.agent.agent import Agent, AgentConfig
from greenroom.agent.progress import PROGRESS_INTERVAL_S, QUIET_S
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.gc.records import Registered
from greenroom.core.records import Record, Snapshot, SnapshotScope, TemplateSpec
from greenroom.images.store import DiskImageStore
from greenroom.sandbox.port import Found
from greenroom.sandbox.sim import SimBackend, SimScript
from greenroom.snapshots.port import SnapshotStore
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import make_snapshot

SPEC = TemplateSpec(image="sim:t")
#: No test waits this long for anything.
PATIENCE_S = 60.0


@contextmanager
def short_directory() -> Iterator[Path]:
    """Socket addresses are limited to 107 bytes. On a real disk: links and syncs are to be real."""
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    yield directory
    shutil.rmtree(directory)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true"
        await asyncio.sleep(0.002)


class LastingSim(SimBackend):
    """Simulated sandboxes that go on when their agent ends."""

    async def close(self, *, keep_running: bool) -> None:
        if not keep_running:
            await super().close(keep_running=False)
        elif self._server is not None:
            self._server.close()
            self._server = None

    async def reconcile(self) -> list[Found]:
        return [
            Found(
                sid=box.sid,
                owner=box.owner,
                state=ResidentState.FROZEN if box.frozen else ResidentState.RUNNING,
                endpoint=self._endpoint,
            )
            for box in self._sandboxes.values()
        ]


class Said:
    """A reporter that keeps what it was told, with the loop's time since it began."""

    def __init__(self) -> None:
        self.progresses: list[tuple[float, api.Progress]] = []
        self._began = 0.0
        self.begin()

    def begin(self) -> None:
        """Right before the call that is to be heard."""
        self.progresses.clear()
        self._began = asyncio.get_running_loop().time()

    def progress(self, progress: api.Progress) -> None:
        self.progresses.append((asyncio.get_running_loop().time() - self._began, progress))

    async def data(self, channel: int, data: bytes) -> None:
        pass

    async def input(self) -> AsyncIterator[bytes]:
        return
        yield b""

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(p.phase for _, p in self.progresses))

    def check_rate(self) -> None:
        """Silent at first, and then never more than ten a second. Counted from the call's beginning, because a machine
        that stands still makes any of them late, and the next one seem early."""
        for number, (at, _) in enumerate(self.progresses):
            assert at > QUIET_S + number * PROGRESS_INTERVAL_S - 0.001, self.progresses


class Bench:
    """One worker's agent, which can be killed and started again, and the calls that a control plane makes."""

    def __init__(
        self, root: Path, snapshots: SnapshotStore | None = None, script: SimScript | None = None, **config: Any
    ) -> None:
        self.root = root
        self.snapshots = snapshots or ObjectSnapshotStore(root / "store")
        self.backend = LastingSim(script or SimScript())
        self.config = AgentConfig(
            worker="w", pool="default", capacity=8, state_dir=root / "w", **({"warm": 0} | config)
        )
        self.said = Said()
        self.agent: Agent

    async def __aenter__(self) -> Bench:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.close(wipe=True)

    async def start(self) -> None:
        self.agent = Agent(self.config, self.backend, DiskImageStore(self.root / "images"), self.snapshots)
        await self.agent.open()
        # As a replica does that it connects to; what is tested here begins after that.
        presented = self.agent._enrolment.present(0)
        self.agent._enrolment.registered(Registered(claim=presented.claim, epoch=presented.epoch + 1, closed_seq=0))

    async def restart(self) -> None:
        """Another agent process; what ran goes on."""
        await self.agent.close(wipe=False)
        await self.start()

    async def call(self, call: api.AgentCall) -> Any:
        answer: Record = await self.agent.handle(call, self.said)
        return answer

    def state(self, uid: str = "a") -> ResidentState | None:
        """What the agent says of the actor; what the backend says has to be the same."""
        said = {r.actor_uid: r.state for r in self.agent.hello().residents}.get(uid)
        real = {b.owner.uid: self.backend.state(b.sid) for b in self.backend._sandboxes.values()}.get(uid)
        assert said is real or said is ResidentState.STARTING, (said, real)
        return said

    # --- calls --------------------------------------------------------------------------------------------

    def ids(self, op: str = "op", generation: int = 1, uid: str = "a") -> dict[str, Any]:
        return {"operation_id": op, "actor_uid": uid, "generation": generation}

    def identity(self, generation: int = 1, uid: str = "a") -> api.Identity:
        return api.Identity(namespace="ns", name=uid, uid=uid, generation=generation)

    async def boot(
        self, op: str = "boot", generation: int = 1, uid: str = "a", spec: TemplateSpec = SPEC
    ) -> api.Started:
        identity = self.identity(generation, uid)
        call = api.Start(**self.ids(op, generation, uid), identity=identity, spec=spec, image_digest="")
        answer: api.Started = await self.call(call)
        return answer

    def manifest(self, uid: str = "a") -> Snapshot:
        """What a control plane announces for a checkpoint."""
        return replace(make_snapshot(), actor=uid, actor_uid=uid, scope=SnapshotScope.MEMORY)

    async def checkpoint(self, snapshot: Snapshot, op: str = "sleep", generation: int = 2) -> api.Checkpointed:
        answer: api.Checkpointed = await self.call(
            api.Checkpoint(**self.ids(op, generation, snapshot.actor_uid), snapshot=snapshot)
        )
        return answer

    async def publish(self, snapshot: Snapshot, op: str = "sleep", generation: int = 2, hold: bool = True) -> Snapshot:
        call = api.Publish(**self.ids(op, generation, snapshot.actor_uid), snapshot_id=snapshot.id, hold=hold)
        answer: Snapshot = (await self.call(call)).snapshot
        return answer

    async def discard(self, op: str = "sleep", generation: int = 2, uid: str = "a") -> None:
        await self.call(api.Discard(**self.ids(op, generation, uid)))

    async def suspend(self, op: str = "sleep", generation: int = 2, hold: bool = True) -> Snapshot:
        """From a running actor to a snapshot; returns its manifest."""
        announced = self.manifest()
        await self.checkpoint(announced, op, generation)
        saved = await self.publish(announced, op, generation, hold)
        await self.discard(op, generation)
        return saved

    async def restore(self, snapshot: Snapshot, op: str = "wake", generation: int = 3) -> api.Started:
        identity = self.identity(generation, snapshot.actor_uid)
        ids = self.ids(op, generation, snapshot.actor_uid)
        call = api.Restore(**ids, identity=identity, spec=SPEC, image_digest="", snapshot=snapshot)
        answer: api.Started = await self.call(call)
        return answer
