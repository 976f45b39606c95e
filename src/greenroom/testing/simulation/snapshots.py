"""The snapshot store in memory: a simulated actor's memory is one number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from greenroom.core.errors import Conflict, DataLoss, NotFound, Unavailable
from greenroom.core.records import FileDigest, Snapshot, SnapshotState
from greenroom.snapshots.objects import OnBytes
from greenroom.testing.simulation.faults import AT_ASK, HEAVY, Fault
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.trace import Trace

T = TypeVar("T")

#: What the network calls it.
SNAPSHOTS = "snapshots"
#: What may go wrong when an agent asks.
OF_AN_AGENT = tuple(f for f in AT_ASK if f not in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER))


class Bucket:
    """What is stored, by snapshot id: the manifest, and the count that is the actor's memory."""

    def __init__(self, network: Network, trace: Trace) -> None:
        self.network = network
        self.trace = trace
        self.stored: dict[str, tuple[Snapshot, int]] = {}
        #: Ids whose content is not what was written.
        self.corrupt: set[str] = set()

    async def ask(self, what: str, act: Callable[[], T], possible: tuple[Fault, ...] = AT_ASK) -> T:
        self.trace(self.network.loop.current().name, "snapshots", what)
        return await self.network.ask(SNAPSHOTS, act, _away, possible, HEAVY)

    async def publish(self, snapshot: Snapshot, count: int) -> Snapshot:
        """See `greenroom.snapshots.port.SnapshotStore.publish`."""

        def act() -> Snapshot:
            if snapshot.id in self.stored:
                manifest, before = self.stored[snapshot.id]
                if before != count:
                    raise Conflict(f"snapshot {snapshot.id} is already published with another content")
                return manifest
            file = FileDigest(name="count", size_bytes=8, sha256=f"{count:064x}")
            manifest = replace(snapshot, files=(file,), state=SnapshotState.PRESENT)
            self.stored[snapshot.id] = manifest, count
            return manifest

        return await self.ask(f"publish {snapshot.id}", act, OF_AN_AGENT)

    async def load(self, snapshot: Snapshot) -> int:
        """The count; what a worker does by fetching and verifying."""

        def act() -> int:
            if snapshot.id not in self.stored or snapshot.id in self.corrupt:
                raise DataLoss(f"snapshot {snapshot.id} is damaged", reason="SNAPSHOT_CORRUPT")
            return self.stored[snapshot.id][1]

        return await self.ask(f"load {snapshot.id}", act, OF_AN_AGENT)


class SimSnapshots:
    """See `greenroom.snapshots.port.SnapshotStore`, as far as the control plane uses it."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def publish(self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None) -> Snapshot:
        raise AssertionError("only workers publish")

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        raise AssertionError("only workers fetch")

    async def verify(self, snapshot: Snapshot, directory: Path, progress: OnBytes | None = None) -> None:
        raise AssertionError("only workers verify")

    async def manifest(self, snapshot_id: str) -> Snapshot:
        def act() -> Snapshot:
            if snapshot_id not in self._bucket.stored:
                raise NotFound(f"no snapshot {snapshot_id}", reason="SNAPSHOT_NOT_FOUND")
            return self._bucket.stored[snapshot_id][0]

        return await self._bucket.ask(f"manifest {snapshot_id}", act)

    async def delete(self, snapshot_id: str) -> None:
        await self._bucket.ask(f"delete {snapshot_id}", lambda: self._bucket.stored.pop(snapshot_id, None))

    async def list(self) -> list[str]:
        return await self._bucket.ask("list", lambda: sorted(self._bucket.stored))


def _away() -> Unavailable:
    return Unavailable("the snapshot store does not answer")
