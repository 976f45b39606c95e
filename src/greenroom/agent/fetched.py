"""Directories with the files of snapshots, as long as somebody reads them.

A sandbox backend restores from a directory that has the files under their names; the snapshot store has them under
keys. `SnapshotStore.fetch` makes that directory, of links or of what it downloads; here it is shared by those who want
the same snapshot at the same time (many actors wake from one golden snapshot), and goes with the last of them: an
actor's own snapshot is read once. What is read again and again is kept, up to a bound, the latest
used. What an agent was killed over the next one removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

#: Of what is kept for those who come later, together.
MAX_KEPT_BYTES = 2 << 30


class Fetched:
    """``root``: the directory for them. `clear` first."""

    def __init__(self, root: Path, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._root = root
        self._max_kept_bytes = max_kept_bytes
        self._readers: Counter[str] = Counter()
        self._kept: OrderedDict[str, int] = OrderedDict()  # sizes in bytes; the latest used last

    async def clear(self) -> None:
        """Removes what an earlier process left; no sandbox that runs needs it."""
        self._kept.clear()
        # The directory itself stays: on a full disk there might be no room to make it again.
        self._root.mkdir(parents=True, exist_ok=True)
        for left in [*self._root.iterdir()]:
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)

    def kept(self) -> frozenset[str]:
        """Ids of snapshots that nobody reads now."""
        return frozenset(self._kept)

    def forget(self, snapshot_id: str) -> None:
        """Nobody will come for it. One that is read now stays for its readers."""
        if self._kept.pop(snapshot_id, None) is not None:
            self._drop(snapshot_id)

    @asynccontextmanager
    async def reading(
        self, snapshot_id: str, fetch: Callable[[Path], Awaitable[Path]], keep_bytes: int = 0
    ) -> AsyncIterator[Path]:
        """``fetch`` makes ``<directory it is given>/<snapshot id>``, or finds it. ``keep_bytes``: its size, if others
        will come for it. What somebody fails over is not kept."""
        self._readers[snapshot_id] += 1
        self._kept.pop(snapshot_id, None)
        try:
            yield await fetch(self._root)
        except BaseException:
            keep_bytes = 0
            raise
        finally:
            self._readers[snapshot_id] -= 1
            if not self._readers[snapshot_id]:
                del self._readers[snapshot_id]
                self._leave(snapshot_id, keep_bytes)

    def _leave(self, snapshot_id: str, keep_bytes: int) -> None:
        if not 0 < keep_bytes <= self._max_kept_bytes:
            self._drop(snapshot_id)
            return
        self._kept[snapshot_id] = keep_bytes
        while sum(self._kept.values()) > self._max_kept_bytes:
            self._drop(self._kept.popitem(last=False)[0])

    def _drop(self, snapshot_id: str) -> None:
        """Out of the way at once, so that whoever fetches it next makes it anew; removed behind the caller's back, for
        a downloaded one may be large."""
        gone = self._root / f".gone-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            (self._root / snapshot_id).rename(gone)
            asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, gone, True)
