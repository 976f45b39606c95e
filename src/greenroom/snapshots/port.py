"""The port of the snapshot store: where sleeping actors are.

A snapshot is a few plain files and a manifest (`greenroom.core.records.Snapshot` as JSON) that says what made it, how
large each file is, its SHA-256, and which upload put it there: files are objects of their own, and snapshots of one
actor share those that are equal. The manifest is written last and never overwritten: a snapshot without one does not
exist. Who may reuse and who may delete is decided by `greenroom.core.gc.blobs`, not here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from greenroom.core.records import FileDigest, Snapshot
from greenroom.snapshots.objects import OnBytes


class StoredObject(NamedTuple):
    """``age_s``: since it was put there, by the store's own clock (seconds; below 0 when that was set back)."""

    key: str
    age_s: float


class SnapshotStore(Protocol):
    """Once `expect` was called every call raises `Unavailable` (reason ``SNAPSHOT_STORE_AWAY``) when another store, or
    none, is where this one should be (a disk that is not mounted, a wrong address): what is missing there is not lost,
    and what is put there would be.
    """

    @property
    def is_near(self) -> bool:
        """Whether `fetch` costs nothing: the files are on this machine."""

    async def mark(self, value: str = "") -> str:
        """What the store is known by (`greenroom.core.marks`), and "" if that is nothing yet; it is ``value`` then, if
        given, from now on. Never changes."""

    def expect(self, mark: str) -> None:
        """What it has to be known by; "": anything."""

    async def publish(
        self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None, base: Sequence[FileDigest] = ()
    ) -> Snapshot:
        """Uploads the files of ``source``, then the manifest; returns it with ``files`` filled in. What was stored is
        checked (sizes and digests) before the manifest is written. Idempotent by ``snapshot.id``: publishing the same
        content again returns the same manifest. Durable when it returns.

        Args:
            snapshot: where its ``files`` are filled in already, these are taken from ``source``, and have to be so.
            progress: hears of bytes that are stored and checked.
            base: files that are stored already, and stay as long as the caller's operation runs: what is equal to one
                of them is not stored again.

        Raises:
            DataLoss: ``source`` holds something else than ``snapshot.files`` says (reason ``SNAPSHOT_CORRUPT``).
            ResourceExhausted: the store is full (reason ``DISK_FULL``).
            Conflict: another content is already published under this id.

        When it fails before the manifest was sent, nothing of it remains; but for a snapshot whose ``files`` were
        filled in, of which the rows of its actor speak.
        """

    async def retract(self, actor_uid: str, snapshot_id: str) -> None:
        """Removes whatever was put for this snapshot, its manifest first. Only for one that was never committed, and
        never will be: nothing is shared with it then. Idempotent."""

    async def manifest(self, actor_uid: str, snapshot_id: str) -> Snapshot:
        """Raises `NotFound` when there is none, `DataLoss` when it can't be read."""

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        """A directory ``cache/<id>`` on this machine that holds the files under their names: links where the store is
        local, else downloaded. It is the caller's to remove. Does not verify digests: see `verify`.

        Raises:
            DataLoss: a file is missing or has the wrong size (reason ``SNAPSHOT_CORRUPT``).
        """

    async def verify(self, snapshot: Snapshot, directory: Path, progress: OnBytes | None = None) -> None:
        """Reads every file and compares its digest; runs in threads, so that it can overlap a restore.

        Raises:
            DataLoss: names the file (reason ``SNAPSHOT_CORRUPT``).
        """

    async def delete(self, keys: Sequence[str]) -> None:
        """Removes objects. Idempotent.

        Raises:
            Unavailable: the store does not answer, or refuses (reason ``SNAPSHOT_STORE_REFUSES``); some may be gone.
        """

    async def list(self) -> list[tuple[str, str]]:
        """(actor uid, id) of the published snapshots, sorted. For one of the layout before (`greenroom.core.gc.blobs`)
        its manifest is read; when that is damaged, its actor is "unknown"."""

    def objects(self) -> AsyncIterator[tuple[str, Sequence[StoredObject]]]:
        """All objects, by actor (uid): what is listed may be gone, and what is there may be missing, if the store lists
        late. An actor may come more than once."""
