"""Waiting for processes that are not Python's children, and reaping those that became ours.

A sandbox is left behind by the command that created it, so its processes are orphans. Their zombies stay until their
new parent reaps them, and init may take seconds. `become_subreaper` makes this process that parent. Reaping is always
of one named process or process group, never of "any child", so that `asyncio` and `subprocess` find their own children
untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36

#: A killed group is gone within milliseconds; one that is stuck in the kernel (a hung disk) must not stop its caller.
GROUP_TIMEOUT_S = 5.0

_READ_BYTES = 1 << 16


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, for as long as it lives. Source: prctl(2)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start_time(pid: int) -> int:
    """When the process began, in clock ticks since boot; with the pid it names a process for ever. 0: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


class Process:
    """A handle on one process that stays valid, and harmless, after the process has ended.

    `Process.find` gives None unless the process with this pid began at ``started``.
    """

    def __init__(self, pid: int, started: int, pidfd: int) -> None:
        self.pid = pid
        self.started = started
        self._pidfd = pidfd
        self._ended: asyncio.Future[int | None] | None = None

    @classmethod
    def find(cls, pid: int, started: int = 0) -> Process | None:
        """``started`` 0 accepts any."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        # In this order: the descriptor now holds the process fast, so the time read is that of the same process.
        began = start_time(pid)
        if not began or (started and began != started) or _is_zombie(pid):
            os.close(pidfd)
            return None
        return cls(pid, began, pidfd)

    def kill(self) -> None:
        """Idempotent."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Sends a signal; to a process that has ended, nothing happens."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def alive(self) -> bool:
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    async def ended(self) -> int | None:
        """Waits until the process has ended, and reaps it when it is a child. Many may wait.

        Returns:
            Exit status, 128 + signal number, or None when it was another process's child.
        """
        if self._ended is None:
            self._ended = asyncio.ensure_future(self._wait())
        return await asyncio.shield(self._ended)

    async def _wait(self) -> int | None:
        await readable(self._pidfd)
        return _reap(os.P_PIDFD, self._pidfd)

    def groups(self) -> set[int]:
        """The process groups of its direct children."""
        found = set()
        for pid in _children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                found.add(os.getpgid(pid))
        return found

    def close(self) -> None:
        if self._ended is not None:
            self._ended.cancel()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


async def reap_group(pgid: int) -> None:
    """Waits until no child of this process is left in the process group ``pgid``, and reaps them all."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GROUP_TIMEOUT_S):
            while True:
                if not _reap_members(pgid):
                    return
                for pid in _children(os.getpid()):
                    await _end_of_member(pid, pgid)


def _reap_members(pgid: int) -> bool:
    """Reaps the zombies of a group; whether a child is left that lives."""
    try:
        while os.waitid(os.P_PGID, pgid, os.WEXITED | os.WNOHANG) is not None:
            pass
    except ChildProcessError:
        return False
    return True


async def readable(fd: int) -> None:
    """Waits until ``fd`` can be read. One waiter per descriptor."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Waits until ``fd`` can be written. One waiter per descriptor."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _end_of_member(pid: int, pgid: int) -> None:
    try:
        if os.getpgid(pid) != pgid:
            return
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await readable(pidfd)
    finally:
        os.close(pidfd)


def _reap(kind: int, which: int) -> int | None:
    try:
        result = os.waitid(kind, which, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def _children(pid: int) -> list[int]:
    """Direct children. Source: proc(5), ``/proc/pid/task/tid/children``.

    Without `pathlib` and buffered files, which take four times as long (0.1 ms for a sandbox, on every wake).
    """
    found: list[int] = []
    tasks = f"/proc/{pid}/task"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(tasks):  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, _read(f"{tasks}/{task}/children").split())
    return found


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _READ_BYTES):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat[stat.rindex(b")") + 2 :].split()[0] in (b"Z", b"X")
