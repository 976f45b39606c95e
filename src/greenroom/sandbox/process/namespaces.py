"""All processes of one sandbox at once: found by their pid namespace, stopped, continued, measured."""

# This looks at every process of the machine, and pathlib would double its time:
# ruff: noqa: PTH116, PTH208

from __future__ import annotations

import os
import signal
from pathlib import Path

from greenroom.core.agentapi import ActorStats
from greenroom.core.errors import ResourceExhausted

#: A process that forks while the others are stopped is seen in the next round; more rounds than this means a fork bomb.
MAX_ROUNDS = 100
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def members(init: int) -> set[int]:
    """Every process in the pid namespace of ``init``, itself and commands run later included. Takes about 3 us per
    process of the machine. Source: namespaces(7)."""
    try:
        wanted = os.stat(f"/proc/{init}/ns/pid").st_ino
    except OSError:
        return set()
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == wanted:
                    found.add(int(entry))
            except OSError:
                continue  # ended just now, or another user's
    return found


def stop(init: int) -> None:
    """Stops all but the init, until a look finds nobody new.

    That is complete: `fork` does not succeed in a process with a signal pending, so once each has its SIGSTOP, none
    can make another.

    Raises:
        ResourceExhausted: they multiply faster than they can be stopped; all go on.
    """
    stopped = {init}
    for _ in range(MAX_ROUNDS):
        new = members(init) - stopped
        if not new:
            return
        _signal(new, signal.SIGSTOP)
        stopped |= new
    _signal(stopped - {init}, signal.SIGCONT)
    raise ResourceExhausted(f"the sandbox makes processes faster than they can be stopped ({len(stopped)})")


def go_on(init: int) -> None:
    _signal(members(init) - {init}, signal.SIGCONT)


def measure(init: int) -> ActorStats:
    """Memory is what is resident, pages that processes share counted for each. CPU time includes that of processes
    that have ended."""
    memory = ticks = count = 0
    for pid in members(init) - {init}:
        try:
            memory += int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
            ticks += _cpu_ticks(pid, own=True)
            count += 1
        except OSError:
            continue  # ended just now
    try:
        ticks += _cpu_ticks(init, own=False)
    except OSError:
        pass
    return ActorStats(memory_bytes=memory, cpu_seconds=ticks / _TICKS, pids=count)


def _cpu_ticks(pid: int, *, own: bool) -> int:
    """User and system time, of its own and of children that it has waited for. Source: proc(5), stat 14 to 17."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    fields = [int(field) for field in stat[stat.rindex(b")") + 2 :].split()[11:15]]
    return sum(fields if own else fields[2:])


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
