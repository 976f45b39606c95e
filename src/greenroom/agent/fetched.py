"""Directories with the files of snapshots, as long as somebody reads them.

A sandbox backend restores from a directory that has the files under their names; the snapshot store has them under
keys. `SnapshotStore.fetch` makes that directory, of links or of what it downloads; here it is shared by those who want
the same snapshot at the same time (many actors wake from one golden snapshot), and goes with the last of them. What an
agent was killed over the next one removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path


class Fetched:
    """``root``: the directory for them. `clear` first."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._readers: Counter[str] = Counter()

    async def clear(self) -> None:
        """Removes what an earlier process left; no sandbox that runs needs it."""
        await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)
        self._root.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def reading(self, snapshot_id: str, fetch: Callable[[Path], Awaitable[Path]]) -> AsyncIterator[Path]:
        """``fetch`` makes ``<directory it is given>/<snapshot id>``, or finds it."""
        self._readers[snapshot_id] += 1
        try:
            yield await fetch(self._root)
        finally:
            self._readers[snapshot_id] -= 1
            if not self._readers[snapshot_id]:
                del self._readers[snapshot_id]
                self._drop(snapshot_id)

    def _drop(self, snapshot_id: str) -> None:
        """Out of the way at once, so that whoever fetches it next makes it anew; removed behind the caller's back, for
        a downloaded one may be large."""
        gone = self._root / f".gone-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            (self._root / snapshot_id).rename(gone)
            asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, gone, True)
