"""What actors write to stdout and stderr: from the sandbox's named pipe into bounded files, one per incarnation."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

#: Bytes kept of one incarnation; the older half is dropped when a file reaches it.
MAX_FILE_BYTES = 1 << 20
#: Incarnations of one actor whose output is kept on a worker.
KEPT_FILES = 8
_READ_BYTES = 1 << 16


class LogPump:
    """Copies one sandbox's pipe into its file. The pipe is opened for both directions, so that it never ends."""

    def __init__(self, fifo: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.grown = asyncio.Event()
        self._file = path.open("ab", buffering=0)
        self._fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._fd, self._copy)

    def _copy(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        try:
            self._file.write(data)
            if self._file.tell() > MAX_FILE_BYTES:
                self._shorten()
        except OSError:
            pass  # a full disk costs log lines, never the actor: the pipe must go on being drained
        self.grown.set()
        self.grown = asyncio.Event()

    def _shorten(self) -> None:
        with self.path.open("rb") as old:
            old.seek(-MAX_FILE_BYTES // 2, os.SEEK_END)
            old.readline()
            kept = old.read()
        self._file.truncate(0)
        self._file.write(kept)

    def close(self) -> None:
        """Takes what is still in the pipe and ends."""
        if self._fd < 0:
            return
        asyncio.get_running_loop().remove_reader(self._fd)
        try:
            while data := os.read(self._fd, _READ_BYTES):
                self._file.write(data)
        except OSError:
            pass  # empty (EAGAIN), or the disk is full
        os.close(self._fd)
        self._file.close()
        self._fd = -1
        self.grown.set()


class LogFiles:
    """All logs of a worker: ``<root>/<actor uid>/<generation>``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pumps: dict[str, LogPump] = {}

    def attach(self, actor_uid: str, generation: int, fifo: Path | None) -> None:
        self.detach(actor_uid)
        if fifo is None:
            return
        self._pumps[actor_uid] = LogPump(fifo, self._root / actor_uid / f"{generation:012d}")
        for old in self._files(actor_uid)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)

    def detach(self, actor_uid: str) -> None:
        if pump := self._pumps.pop(actor_uid, None):
            pump.close()

    def forget(self, actor_uid: str) -> None:
        self.detach(actor_uid)
        shutil.rmtree(self._root / actor_uid, ignore_errors=True)

    def close(self) -> None:
        for actor_uid in list(self._pumps):
            self.detach(actor_uid)

    def _files(self, actor_uid: str) -> list[Path]:
        directory = self._root / actor_uid
        return sorted(directory.iterdir()) if directory.is_dir() else []

    def tail(self, actor_uid: str, lines: int) -> bytes:
        """The last ``lines`` lines of the latest incarnation."""
        files = self._files(actor_uid)
        return b"\n".join(files[-1].read_bytes().splitlines()[-lines:]) if files else b""

    async def read(self, actor_uid: str, tail_lines: int, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        """(generation, bytes), oldest first; the last ``tail_lines`` lines (-1: all)."""
        segments = [(int(f.name), f.read_bytes()) for f in self._files(actor_uid)]
        skip = sum(data.count(b"\n") for _, data in segments) - tail_lines if tail_lines >= 0 else 0
        for generation, data in segments:
            while skip > 0 and data:
                _, _, data = data.partition(b"\n")
                skip -= 1
            for start in range(0, len(data), _READ_BYTES):
                yield generation, data[start : start + _READ_BYTES]
        pump = self._pumps.get(actor_uid)
        if not follow or pump is None:
            return
        generation = int(pump.path.name)
        at = len(segments[-1][1]) if segments else 0
        while True:
            grown = pump.grown
            with pump.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(min(at, size) if size >= at else 0)
                while data := file.read(_READ_BYTES):
                    yield generation, data
                at = file.tell()
            if pump is not self._pumps.get(actor_uid):
                return
            await grown.wait()
