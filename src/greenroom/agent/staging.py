"""Snapshots that a worker has written and not yet published, or not yet been told to forget: at most one an actor.

    staging/<actor uid>/<snapshot id>/       the files
    staging/<actor uid>/<snapshot id>.json   the manifest as far as it is known; written when the files are complete

A staged snapshot is what a *frozen* sandbox is worth: it is dropped before the sandbox is thawed, frozen for a pause,
or ended, so one that is there is never older than the sandbox. The sandbox may also end by itself; then it is what is
left of the actor, until it is dropped by a call, or because none comes.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec

from greenroom.agent import clock
from greenroom.core.records import Snapshot
from greenroom.images.download import to_the_end


class Staging:
    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        #: By actor (uid), when a call last had to do with what is staged of it; what an earlier agent process left
        #: counts from the start of this one.
        self._touched_at: dict[str, float] = {}
        self._opened_at = clock.boot_time()

    def path(self, actor_uid: str, snapshot_id: str) -> Path:
        return self._root / actor_uid / snapshot_id

    async def begin(self, actor_uid: str, snapshot_id: str) -> Path:
        """An empty directory for the files; what was staged of the actor before is gone. When this is cancelled nothing
        of it goes on: the next call about the actor looks whether anything is staged."""
        await self.clear(actor_uid)
        path = self.path(actor_uid, snapshot_id)
        path.mkdir(mode=0o700, parents=True)
        self.touch(actor_uid)
        return path

    def complete(self, snapshot: Snapshot) -> None:
        """All files are there."""
        manifest = self._manifest(snapshot.actor_uid, snapshot.id)
        new = manifest.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(snapshot))
        new.replace(manifest)

    def touch(self, actor_uid: str) -> None:
        """A call has to do with what is staged of the actor."""
        self._touched_at[actor_uid] = clock.boot_time()

    def untouched_s(self, actor_uid: str) -> float:
        """For how long no call has had to do with it (seconds)."""
        return clock.boot_time() - self._touched_at.get(actor_uid, self._opened_at)

    def uids(self) -> list[str]:
        """Of the actors of which anything is staged."""
        return [path.name for path in self._root.iterdir()]

    def find(self, actor_uid: str, snapshot_id: str) -> Snapshot | None:
        """The manifest of a complete one."""
        try:
            return msgspec.json.decode(self._manifest(actor_uid, snapshot_id).read_bytes(), type=Snapshot)
        except FileNotFoundError:
            return None

    def holds(self, actor_uid: str) -> bool:
        """Whether there is anything to `drop`."""
        return (self._root / actor_uid).exists()

    def drop(self, actor_uid: str) -> None:
        self._touched_at.pop(actor_uid, None)
        shutil.rmtree(self._root / actor_uid, ignore_errors=True)

    async def clear(self, actor_uid: str) -> None:
        """As `drop`, off the loop, and to its end."""
        if self.holds(actor_uid):  # mostly not, and a look is cheaper than a thread
            await to_the_end(self.drop, actor_uid)

    def keep_only(self, actor_uids: Collection[str]) -> None:
        """Drops what belongs to nobody of these, whatever it is."""
        for path in self._root.iterdir():
            if path.name not in actor_uids:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def _manifest(self, actor_uid: str, snapshot_id: str) -> Path:
        return self._root / actor_uid / f"{snapshot_id}.json"
