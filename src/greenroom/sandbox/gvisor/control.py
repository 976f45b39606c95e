"""Telling a created sandbox what to do, by its control socket. `cli.CliControl` does the same by `runsc` commands.

What gVisor 20240729 really does, found by trying:
    - Pausing counts. Saving pauses for itself and gives back only its own pause, so a sandbox that was paused before
      is still paused after `checkpoint`: no instruction of the actor runs between the image and the freeze. A second
      `resume` without a pause would crash the sandbox; whoever calls must keep count.
    - A save that fails leaves the sandbox as it was when ``Resume`` is set, and ends it when it is not.
    - Processes that are started while it is paused wait for `resume`.
    - Saving resets the open TCP connections of the actor, also when it goes on afterwards; pausing alone does not.
    - A process that was started over the control socket with descriptors of the outside is saved without complaint,
      but such an image can't be restored: there must be none, see `box.Box.holds_foreign_pipes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from greenroom.sandbox.gvisor import urpc
from greenroom.sandbox.gvisor.network import Slot, links_and_routes
from greenroom.sandbox.gvisor.spec import mask

#: The files of a snapshot, in the order in which gVisor wants them.
SNAPSHOT_FILES = ("checkpoint.img", "pages_meta.img", "pages.img")


@dataclass(frozen=True)
class Target:
    """A sandbox as far as commands are concerned: ``directory`` is its own `runsc --root`."""

    sid: str
    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / f"runsc-{self.sid}.sock"


@dataclass(frozen=True)
class Command:
    """A further process. ``program`` is a path inside; ``capabilities`` a tuple of names."""

    program: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    capabilities: tuple[str, ...]


class Started(Protocol):
    """A further process that runs."""

    async def wait(self) -> int:
        """Exit status or 128 + signal number; 137 when the sandbox ends first. Called once."""

    async def kill(self) -> None: ...


class Control(Protocol):
    """Methods raise `urpc.UrpcError`, and `urpc.UrpcClosed` when the sandbox is gone."""

    #: Whether the network must be prepared in a namespace that is named when the sandbox is created.
    needs_netns: bool

    async def connect(self, target: Target, slot: Slot) -> None:
        """Gives a created sandbox its network; once."""

    async def start(self, target: Target) -> None: ...

    async def restore(self, target: Target, source: Path) -> None: ...

    async def pause(self, target: Target) -> None: ...

    async def resume(self, target: Target) -> None: ...

    async def checkpoint(self, target: Target, dest: Path) -> None:
        """Of a paused sandbox, which stays paused. On an error too; ``dest`` then holds some files."""

    async def execute(self, target: Target, command: Command, stdio: tuple[int, ...]) -> Started:
        """``stdio``: three descriptors, which stay the caller's, or none."""

    async def wait(self, target: Target) -> int:
        """Exit status, or 128 + signal number, of the main process."""

    async def usage(self, target: Target) -> tuple[int, int]:
        """Memory of the actor in bytes, and how many processes it has."""

    async def stacks(self, target: Target) -> str:
        """Of all goroutines of the sandbox's kernel, as Go prints them. Also while it is paused."""


class SocketControl:
    needs_netns = False

    async def connect(self, target: Target, slot: Slot) -> None:
        fds = [slot.packet_socket.fileno()]
        await urpc.call(target.socket, "Network.CreateLinksAndRoutes", links_and_routes(), fds)

    async def start(self, target: Target) -> None:
        await urpc.call(target.socket, "containerManager.StartRoot", target.sid)

    async def restore(self, target: Target, source: Path) -> None:
        options = {"HavePagesFile": True, "HaveDeviceFile": False}
        with _opened(source, os.O_RDONLY) as fds:
            await urpc.call(target.socket, "containerManager.Restore", options, fds, timeout_s=urpc.TRANSFER_TIMEOUT_S)

    async def pause(self, target: Target) -> None:
        await urpc.call(target.socket, "containerManager.Pause")

    async def resume(self, target: Target) -> None:
        await urpc.call(target.socket, "containerManager.Resume")

    async def checkpoint(self, target: Target, dest: Path) -> None:
        options = {
            "key": None,
            "metadata": {"compression": "none"},
            # Zero pages are left out of the image anyway when they were never written.
            "MemoryFileSaveOpts": {"ExcludeCommittedZeroPages": False},
            "have_pages_file": True,
            "Resume": True,
        }
        with _opened(dest, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fds:
            await urpc.call(
                target.socket, "containerManager.Checkpoint", options, fds, timeout_s=urpc.TRANSFER_TIMEOUT_S
            )

    async def execute(self, target: Target, command: Command, stdio: tuple[int, ...]) -> Started:
        # Capabilities must be named: without them gVisor gives root all that there are.
        caps = mask(command.capabilities)
        arguments = {
            "filename": command.program,
            "argv": list(command.argv),
            "envv": [f"{k}={v}" for k, v in command.env.items()],
            "wd": command.cwd,
            "KUID": command.uid,
            "KGID": command.gid,
            "Capabilities": {
                "PermittedCaps": caps,
                "EffectiveCaps": caps,
                "BoundingCaps": caps,
                "InheritableCaps": 0,
                "AmbientCaps": 0,
            },
            "ContainerID": target.sid,
            "GuestFDs": [0, 1, 2][: len(stdio)],
        }
        pid = await urpc.call(target.socket, "containerManager.ExecuteAsync", arguments, stdio)
        return _Started(target, int(pid))

    async def wait(self, target: Target) -> int:
        status = await urpc.call(target.socket, "containerManager.Wait", target.sid, timeout_s=None)
        return exit_code(int(status))

    async def usage(self, target: Target) -> tuple[int, int]:
        memory, event = await asyncio.gather(
            urpc.call(target.socket, "Usage.Collect", {"Full": False}),
            urpc.call(target.socket, "containerManager.Event", target.sid),
        )
        return int(memory["Total"]), int(event["event"]["data"]["pids"].get("current", 0))

    async def stacks(self, target: Target) -> str:
        return str(await urpc.call(target.socket, "debug.Stacks"))


class _Started:
    def __init__(self, target: Target, pid: int) -> None:
        self._target = target
        self._pid = pid

    async def wait(self) -> int:
        arguments: dict[str, Any] = {"CID": self._target.sid, "PID": self._pid}
        try:
            status = await urpc.call(self._target.socket, "containerManager.WaitPID", arguments, timeout_s=None)
        except urpc.UrpcClosed:
            return 137
        return exit_code(int(status))

    async def kill(self) -> None:
        arguments = {"CID": self._target.sid, "Signo": 9, "PID": self._pid, "Mode": 0}
        with contextlib.suppress(urpc.UrpcError):  # it has ended by itself
            await urpc.call(self._target.socket, "containerManager.Signal", arguments)


def exit_code(wait_status: int) -> int:
    """Exit status, or 128 + signal number, of a status as wait(2) gives it."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _opened(directory: Path, flags: int) -> Iterator[list[int]]:
    fds: list[int] = []
    try:
        for name in SNAPSHOT_FILES:
            fds.append(os.open(directory / name, flags | os.O_CLOEXEC, 0o600))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)
