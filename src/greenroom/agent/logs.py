"""What actors write to stdout and stderr: from the sandbox's named pipe into bounded files, one per incarnation.

An actor that floods is slowed down, not the worker: its pipe is read at `MAX_BYTES_PER_S`, and when it is full the
actor waits. All files of a worker together are bounded too; the longest unchanged go first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Collection
from pathlib import Path

#: Bytes kept of one incarnation; the older half is dropped when a file reaches it.
MAX_FILE_BYTES = 1 << 20
#: Incarnations of one actor whose output is kept on a worker.
KEPT_FILES = 8
#: Of all actors that ever were on a worker. Looked after when an actor comes, at most every `TIDY_EVERY` times.
MAX_TOTAL_BYTES = 512 << 20
TIDY_EVERY = 100
#: Ten times what a talkative server logs; a flood at full speed would be hundreds of MB/s of disk.
MAX_BYTES_PER_S = 2 << 20
_READ_BYTES = 1 << 16
#: Of what an actor wrote last, that an error or a crash report quotes: whatever it writes, a message stays short.
QUOTED_LINES = 20
QUOTED_BYTES = 4 << 10


class LogPump:
    """Copies one sandbox's pipe into its file. The pipe is opened for both directions, so that it never ends."""

    def __init__(self, fifo: Path, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self.grown = asyncio.Event()
        #: Bytes dropped from the front of the file so far: position in the file + this = position in the output.
        self.dropped = 0
        self._file = path.open("ab", buffering=0)
        self._fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._fd, self._copy)

    def _copy(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        self._keep(data)
        self.grown.set()
        self.grown = asyncio.Event()
        if len(data) == _READ_BYTES:  # there is more: not before this much was due
            self._loop.remove_reader(self._fd)
            self._pause = self._loop.call_later(_READ_BYTES / MAX_BYTES_PER_S, self._go_on)

    def catch_up(self) -> None:
        """Takes what has been written and is due, though the loop has not come to it yet."""
        if self._pause is None:
            self._copy()

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._copy)

    def _keep(self, data: bytes) -> None:
        try:
            self._file.write(data)
            if self._file.tell() > MAX_FILE_BYTES:
                self._shorten()
        except OSError:
            pass  # a full disk costs log lines, never the actor: the pipe must go on being drained

    def _shorten(self) -> None:
        with Path(f"/proc/self/fd/{self._file.fileno()}").open("rb") as old:  # also when it has lost its name
            size = old.seek(-MAX_FILE_BYTES // 2, os.SEEK_END) + MAX_FILE_BYTES // 2
            old.readline()
            kept = old.read()
        self._file.truncate(0)
        self._file.write(kept)
        self.dropped += size - len(kept)

    def close(self) -> None:
        """Takes what is still in the pipe (64 KiB at most) and ends."""
        if self._fd < 0:
            return
        if self._pause:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._fd)
        try:
            self._keep(os.read(self._fd, _READ_BYTES))
        except BlockingIOError:
            pass  # empty
        os.close(self._fd)
        self._file.close()
        self._fd = -1
        self.grown.set()


class LogFiles:
    """All logs of a worker: ``<root>/<actor uid>/<generation>``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pumps: dict[str, LogPump] = {}
        self._attached = 0

    def attach(self, actor_uid: str, generation: int, fifo: Path | None) -> None:
        self.detach(actor_uid)
        if fifo is None:
            return
        self._pumps[actor_uid] = LogPump(fifo, self._root / actor_uid / f"{generation:012d}")
        for old in self._files(actor_uid)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
        self._attached += 1
        if self._attached % TIDY_EVERY == 1:
            spared = frozenset(pump.path for pump in self._pumps.values())
            asyncio.get_running_loop().run_in_executor(None, tidy, self._root, MAX_TOTAL_BYTES, spared)

    def detach(self, actor_uid: str) -> None:
        if pump := self._pumps.pop(actor_uid, None):
            pump.close()

    def uids(self) -> list[str]:
        """Of the actors that have logs here."""
        return [path.name for path in self._root.iterdir()]

    def has(self, actor_uid: str) -> bool:
        return bool(actor_uid) and "/" not in actor_uid and (self._root / actor_uid).is_dir()

    async def forget(self, actor_uid: str) -> None:
        """Removes the logs of an actor that is deleted. Idempotent."""
        self.detach(actor_uid)
        if (self._root / actor_uid).is_dir():
            await asyncio.to_thread(shutil.rmtree, self._root / actor_uid, ignore_errors=True)

    def close(self) -> None:
        for actor_uid in list(self._pumps):
            self.detach(actor_uid)

    def _files(self, actor_uid: str) -> list[Path]:
        directory = self._root / actor_uid
        return sorted(directory.iterdir()) if directory.is_dir() else []

    def _catch_up(self, actor_uid: str) -> LogPump | None:
        """Who has an actor's answer finds in its log what it wrote before it."""
        pump = self._pumps.get(actor_uid)
        if pump:
            pump.catch_up()
        return pump

    def last_words(self, actor_uid: str) -> str:
        """The last lines of the latest incarnation, as a text to be shown; "" for none."""
        self._catch_up(actor_uid)
        files = self._files(actor_uid)
        if not files:
            return ""
        with files[-1].open("rb") as file:
            file.seek(-min(QUOTED_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            is_cut = file.tell() > 0
            data = file.read(QUOTED_BYTES)
        return quote(data, is_cut)

    async def read(self, actor_uid: str, tail_lines: int, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        """(generation, bytes), oldest first; the last ``tail_lines`` lines (-1: all)."""
        pump = self._catch_up(actor_uid)
        segments = [(int(f.name), f.read_bytes()) for f in self._files(actor_uid)]
        seen = (pump.dropped if pump else 0) + (len(segments[-1][1]) if segments else 0)
        skip = sum(data.count(b"\n") for _, data in segments) - tail_lines if tail_lines >= 0 else 0
        for generation, data in segments:
            while skip > 0 and data:
                _, _, data = data.partition(b"\n")
                skip -= 1
            for start in range(0, len(data), _READ_BYTES):
                yield generation, data[start : start + _READ_BYTES]
        while follow and pump is not None:
            grown = pump.grown
            with pump.path.open("rb") as file:
                file.seek(max(0, seen - pump.dropped))
                while data := file.read(_READ_BYTES):
                    yield int(pump.path.name), data
                seen = pump.dropped + file.tell()
            if pump is not self._pumps.get(actor_uid):
                return
            await grown.wait()


def quote(data: bytes, is_cut: bool) -> str:
    """The last lines of an output. ``is_cut``: ``data`` begins somewhere in it, perhaps within a character."""
    if is_cut:
        data = data.lstrip(bytes(range(0x80, 0xC0)))
    lines = data.splitlines()
    shown = b"\n".join(lines[-QUOTED_LINES:]).decode(errors="replace")
    readable = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)
    return f"...{readable}" if is_cut and len(lines) <= QUOTED_LINES else readable


def tidy(root: Path, max_bytes: int, spared: Collection[Path] = ()) -> None:
    """Removes the longest unchanged files until all together have at most ``max_bytes``; not those that are ``spared``,
    which somebody writes."""
    files = [(f.stat().st_mtime, f.stat().st_size, f) for f in root.glob("*/*")]
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= max_bytes:
            break
        if file in spared:
            continue
        file.unlink(missing_ok=True)
        total -= size
        try:
            file.parent.rmdir()
        except OSError:
            pass  # has others
