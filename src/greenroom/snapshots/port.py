"""The port of the snapshot store: where sleeping actors are.

A snapshot is a directory of plain files plus a manifest (`greenroom.core.records.Snapshot` as JSON,
``manifest.json``) that says what made it, how large each file is and its SHA-256. The manifest is written last and
never overwritten: a snapshot without one does not exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from greenroom.core.records import Snapshot
from greenroom.snapshots.objects import OnBytes


class SnapshotStore(Protocol):
    async def publish(self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None) -> Snapshot:
        """Uploads every file of ``source``, then the manifest; returns it with ``files`` filled in. What was stored is
        checked (sizes and digests) before the manifest is written. Idempotent by ``snapshot.id``: publishing the same
        content again returns the same manifest. Durable when it returns.

        Args:
            snapshot: where its ``files`` are filled in already, these are taken from ``source``, and have to be so.
            progress: hears of bytes that are stored and checked.

        Raises:
            DataLoss: ``source`` holds something else than ``snapshot.files`` says (reason ``SNAPSHOT_CORRUPT``);
                nothing of it remains.
            ResourceExhausted: the store is full (reason ``DISK_FULL``); nothing of it remains.
            Conflict: another content is already published under this id.
        """

    async def manifest(self, snapshot_id: str) -> Snapshot:
        """Raises `NotFound` when there is none, `DataLoss` when it can't be read."""

    async def fetch(self, snapshot: Snapshot, cache: Path, progress: OnBytes | None = None) -> Path:
        """A directory on this machine that holds the files: the store's own where it is local (no copy), else
        ``cache/<id>``, downloaded and complete. Does not verify digests: see `verify`.

        Raises:
            DataLoss: a file is missing or has the wrong size (reason ``SNAPSHOT_CORRUPT``).
        """

    async def verify(self, snapshot: Snapshot, directory: Path, progress: OnBytes | None = None) -> None:
        """Reads every file and compares its digest; runs in threads, so that it can overlap a restore.

        Raises:
            DataLoss: names the file (reason ``SNAPSHOT_CORRUPT``).
        """

    async def delete(self, snapshot_id: str) -> None:
        """Manifest first, then the files. Idempotent."""

    async def list(self) -> list[str]:
        """Ids of the published snapshots, sorted."""
