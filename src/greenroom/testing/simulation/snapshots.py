"""The snapshot store in memory: a simulated actor's memory is one number."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from greenroom.core.errors import Conflict, DataLoss, NotFound, Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import FileDigest, Snapshot, SnapshotState
from greenroom.snapshots.objects import OnBytes
from greenroom.snapshots.port import StoredObject
from greenroom.testing.simulation.faults import AT_ASK, HEAVY, Fault
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.trace import Trace

T = TypeVar("T")

#: What the network calls it.
SNAPSHOTS = "snapshots"
#: What may go wrong when an agent asks.
OF_AN_AGENT = tuple(f for f in AT_ASK if f not in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER))


class Bucket:
    """What is stored: manifests by snapshot id, and by key the files' contents (an actor's memory is one number)."""

    def __init__(self, network: Network, trace: Trace) -> None:
        self.network = network
        self.trace = trace
        self.stored: dict[str, Snapshot] = {}
        self.files: dict[str, int] = {}
        self.mark = ""
        #: Ids whose content is not what was written.
        self.corrupt: set[str] = set()
        self._attempts = itertools.count()

    async def ask(self, what: str, act: Callable[[], T], possible: tuple[Fault, ...] = AT_ASK) -> T:
        self.trace(self.network.loop.current().name, "snapshots", what)
        return await self.network.ask(SNAPSHOTS, act, _away, possible, HEAVY)

    async def publish(self, snapshot: Snapshot, count: int, base: Sequence[FileDigest] = ()) -> Snapshot:
        """See `greenroom.snapshots.port.SnapshotStore.publish`."""
        new = self.file(snapshot, count)

        def act() -> Snapshot:
            if (manifest := self.stored.get(snapshot.id)) is not None:
                if self.count(manifest) != count:
                    raise Conflict(f"snapshot {snapshot.id} is already published with another content")
                return manifest
            file = next(iter(snapshot.files), None) or blobs.reusable(base, new.size_bytes, new.sha256) or new
            if file not in base:
                self.files[blobs.blob_key(snapshot.actor_uid, file)] = count
            manifest = replace(snapshot, files=(file,), state=SnapshotState.PRESENT)
            self.stored[snapshot.id] = manifest
            return manifest

        return await self.ask(f"publish {snapshot.id}", act, OF_AN_AGENT)

    def file(self, snapshot: Snapshot, count: int) -> FileDigest:
        """As one more attempt to publish it would call it."""
        upload = blobs.upload_name(snapshot.id, next(self._attempts))
        return FileDigest(name="count", size_bytes=8, sha256=f"{count:064x}", upload=upload)

    def count(self, manifest: Snapshot) -> int | None:
        return self.files.get(blobs.blob_key(manifest.actor_uid, manifest.files[0]))

    def listed(self) -> list[str]:
        return [blobs.manifest_key(s.actor_uid, s.id) for s in self.stored.values()] + [*self.files]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            place = blobs.place_of(key)
            assert place is not None, key
            if place.is_manifest:
                self.stored.pop(place.snapshot_id, None)
            self.files.pop(key, None)

    async def load(self, snapshot: Snapshot) -> int:
        """The count; what a worker does by fetching and verifying."""

        def act() -> int:
            count = self.count(snapshot)
            if count is None or snapshot.id in self.corrupt:
                raise DataLoss(f"snapshot {snapshot.id} is damaged", reason="SNAPSHOT_CORRUPT")
            return count

        return await self.ask(f"load {snapshot.id}", act, OF_AN_AGENT)


class SimSnapshots:
    """See `greenroom.snapshots.port.SnapshotStore`, as far as the control plane uses it."""

    is_near = False

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def mark(self, value: str = "") -> str:
        self._bucket.mark = self._bucket.mark or value
        return self._bucket.mark

    def expect(self, mark: str) -> None:
        pass

    async def publish(
        self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None, base: Sequence[FileDigest] = ()
    ) -> Snapshot:
        raise AssertionError("only workers publish")

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        raise AssertionError("only workers fetch")

    async def verify(self, snapshot: Snapshot, directory: Path, progress: OnBytes | None = None) -> None:
        raise AssertionError("only workers verify")

    async def manifest(self, actor_uid: str, snapshot_id: str) -> Snapshot:
        def act() -> Snapshot:
            if snapshot_id not in self._bucket.stored:
                raise NotFound(f"no snapshot {snapshot_id}", reason="SNAPSHOT_NOT_FOUND")
            return self._bucket.stored[snapshot_id]

        return await self._bucket.ask(f"manifest {snapshot_id}", act)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._bucket.ask(f"delete {', '.join(keys)}", lambda: self._bucket.delete(keys))

    async def retract(self, actor_uid: str, snapshot_id: str) -> None:
        def act() -> None:
            places = {key: blobs.place_of(key) for key in self._bucket.listed()}
            self._bucket.delete([key for key, place in places.items() if place and place.snapshot_id == snapshot_id])

        await self._bucket.ask(f"retract {snapshot_id}", act)

    async def list(self) -> list[tuple[str, str]]:
        return await self._bucket.ask("list", lambda: sorted((s.actor_uid, i) for i, s in self._bucket.stored.items()))

    async def objects(self) -> AsyncIterator[tuple[str, Sequence[StoredObject]]]:
        """All of any age: no promise depends on it."""
        listed = await self._bucket.ask("list objects", lambda: sorted(self._bucket.listed()))
        for uid, keys in itertools.groupby(listed, lambda key: key.split("/")[2]):
            yield uid, [StoredObject(key, 2 * blobs.SCRUB_AGE_S) for key in keys]


def _away() -> Unavailable:
    return Unavailable("the snapshot store does not answer")
