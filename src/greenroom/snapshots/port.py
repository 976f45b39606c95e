"""The port of the snapshot store: where sleeping actors are.

A snapshot is a directory of plain files plus a manifest (`greenroom.core.records.Snapshot` as JSON,
``manifest.json``) that
says what made it, how large each file is and its SHA-256. The manifest is written last and never overwritten: a
snapshot
without one does not exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from greenroom.core.records import Snapshot


class SnapshotStore(Protocol):
    async def publish(self, snapshot: Snapshot, source: Path) -> Snapshot:
        """Uploads every file of ``source``, then the manifest; returns it with ``files`` filled in. What was stored
        is
        checked (sizes and digests) before the manifest is written. Idempotent by ``snapshot.id``: publishing the same
        content again returns the same manifest. Durable when it returns.

        Raises:
            ResourceExhausted: the store is full (reason ``DISK_FULL``); nothing of it remains.
            Conflict: another content is already published under this id.
        """

    async def manifest(self, snapshot_id: str) -> Snapshot:
        """Raises `NotFound` when there is none, `DataLoss` when it can't be read."""

    async def fetch(self, snapshot: Snapshot, cache: Path) -> Path:
        """A directory on this machine that holds the files: the store's own where it is local (no copy), else
        ``cache/<id>``, downloaded and complete. Does not verify digests: see `verify`.

        Raises:
            DataLoss: a file is missing or has the wrong size (reason ``SNAPSHOT_CORRUPT``).
        """

    async def verify(self, snapshot: Snapshot, directory: Path) -> None:
        """Reads every file and compares its digest; runs in threads, so that it can overlap a restore.

        Raises:
            DataLoss: names the file (reason ``SNAPSHOT_CORRUPT``).
        """

    async def delete(self, snapshot_id: str) -> None:
        """Manifest first, then the files. Idempotent."""

    async def list(self) -> list[str]:
        """Ids of the published snapshots, sorted."""
