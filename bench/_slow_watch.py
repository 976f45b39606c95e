"""What the slow pull is watched with: what has crossed the link, what was told of it and when, and agents' memory."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.live import LiveServer

SAMPLE_PERIOD_S = 0.05


class Link:
    """Makes a proxy's link a bad one for the ``size`` bytes to come, broken ``cuts`` times on the way; tells when so
    many have crossed it."""

    def __init__(self, proxy: FaultProxy, size: int, *, bits_per_s: float, latency_s: float, cuts: int) -> None:
        self._proxy = proxy
        self._before = proxy.blob_bytes
        self._marks: list[tuple[int, asyncio.Event]] = []
        self.size = size
        proxy.bits_per_s, proxy.latency_s = bits_per_s, latency_s
        proxy.cut_every_bytes = size // (cuts + 1) if cuts else None
        proxy.before_chunk = self._look

    @property
    def blob_bytes(self) -> int:
        return self._proxy.blob_bytes - self._before

    async def reached(self, blob_bytes: int) -> None:
        event = asyncio.Event()
        self._marks.append((blob_bytes, event))
        await event.wait()

    async def _look(self) -> None:
        for at, event in self._marks:
            if self.blob_bytes >= at:
                event.set()


@dataclass
class Course:
    """What was told of something: for each change when, in which phase, and the bytes done."""

    told: list[tuple[float, str, int]] = field(default_factory=list)

    def add(self, phase: str, done_bytes: int) -> None:
        if not self.told or self.told[-1][1:] != (phase, done_bytes):
            self.told.append((time.monotonic(), phase, done_bytes))

    def silences(self, phases: tuple[str, ...]) -> list[tuple[float, float, str]]:
        """From, until, and the phase, of each pause between two changes that began in one of ``phases``."""
        pairs = itertools.pairwise(self.told)
        return [(at, then, phase) for (at, phase, _), (then, _, _) in pairs if phase in phases]

    def seconds(self, phase: str) -> float:
        return sum(until - since for since, until, _ in self.silences((phase,)))


class Memory:
    """Samples what the agents take, each with its unpacker. Sandboxes are not the agent's memory. Pages that processes
    share are divided among them (PSS): the two agents and the unpackers run the same Python."""

    def __init__(self, live: LiveServer, link: Link) -> None:
        self._live, self._link = live, link
        self.agent_mib = self.unpacker_mib = self.tree_mib = self.early_mib = self.late_mib = 0.0

    async def sample(self) -> None:
        while True:
            for agent in self._live.pids()[1:]:
                own = _resident(agent)
                below = sum(_resident(child) for child in _children(agent) if _is_ours(child))
                self.agent_mib, self.unpacker_mib = max(self.agent_mib, own), max(self.unpacker_mib, below)
                self.tree_mib = max(self.tree_mib, own + below)
                share = self._link.blob_bytes / self._link.size
                if share < 0.1:
                    self.early_mib = max(self.early_mib, own)
                elif share > 0.9:
                    self.late_mib = max(self.late_mib, own)
            await asyncio.sleep(SAMPLE_PERIOD_S)


def _resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return []


def _is_ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").samefile(sys.executable)
    except OSError:
        return False
