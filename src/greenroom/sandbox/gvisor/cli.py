"""The same commands as `control.SocketControl`, given by `runsc` itself: some 25 ms each, but a documented interface.

It is the way out when a release of gVisor speaks its private control socket differently: the self-test decides, and
``GREENROOM_GVISOR_CONTROL=cli`` forces it.

`runsc` finds the network by looking at the interfaces of the namespace that the sandbox was created with, and refuses
when it believes to be in the host's own. It believes so when ``/proc/sys/net/core/rmem_default`` is there, which newer
kernels show in every namespace. So the commands that set the network up run in a mount namespace in which an empty
directory hides ``/proc/sys/net``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

from greenroom.sandbox.gvisor import urpc
from greenroom.sandbox.gvisor.control import Command, Started, Target
from greenroom.sandbox.gvisor.network import Slot

_MASK = 'mount --bind "$1" /proc/sys/net && shift && exec "$@"'
_EMPTY = "empty"
#: How much of what a failed command printed is passed on.
_SHOWN = 400


class CliControl:
    needs_netns = True

    def __init__(self, base: Sequence[str]) -> None:
        """``base``: the command with its global flags; ``--root`` is relative to the sandbox's directory."""
        self._base = tuple(base)

    async def connect(self, target: Target, slot: Slot) -> None:
        (target.directory / _EMPTY).mkdir(exist_ok=True)

    async def start(self, target: Target) -> None:
        await self._run(target, "start", target.sid, network=True)

    async def restore(self, target: Target, source: Path) -> None:
        # The bundle again: `runsc` compares it with that of the sandbox.
        await self._run(
            target,
            "restore",
            "--detach",
            f"--bundle={target.directory}",
            f"--image-path={source}",
            target.sid,
            network=True,
            timeout_s=urpc.TRANSFER_TIMEOUT_S,
        )

    async def pause(self, target: Target) -> None:
        await self._run(target, "pause", target.sid)

    async def resume(self, target: Target) -> None:
        await self._run(target, "resume", target.sid)

    async def checkpoint(self, target: Target, dest: Path) -> None:
        await self._run(
            target,
            "checkpoint",
            "--leave-running",
            "--compression=none",
            f"--image-path={dest}",
            target.sid,
            timeout_s=urpc.TRANSFER_TIMEOUT_S,
        )

    async def execute(self, target: Target, command: Command, stdio: tuple[int, ...]) -> Started:
        caps = list(command.capabilities)
        spec = {
            "args": [command.program or command.argv[0], *command.argv[1:]],
            "env": [f"{k}={v}" for k, v in command.env.items()],
            "cwd": command.cwd,
            "user": {"uid": command.uid, "gid": command.gid},
            "noNewPrivileges": True,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        }
        # `runsc exec` reads it from a file; a pipe is one too, and leaves nothing behind.
        read, write = os.pipe()
        try:
            os.write(write, json.dumps(spec).encode())
            os.close(write)
            streams = stdio or (asyncio.subprocess.DEVNULL,) * 3
            process = await asyncio.create_subprocess_exec(
                *self._base,
                "exec",
                f"--process=/proc/self/fd/{read}",
                target.sid,
                cwd=target.directory,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=(read,),
                env={},
            )
        finally:
            os.close(read)
        return _Started(process)

    async def wait(self, target: Target) -> int:
        out = await self._run(target, "wait", target.sid, timeout_s=None)
        return int(json.loads(out)["exitStatus"])

    async def usage(self, target: Target) -> tuple[int, int]:
        data = json.loads(await self._run(target, "events", "--stats", target.sid))["data"]
        return int(data["memory"]["usage"].get("usage", 0)), int(data["pids"].get("current", 0))

    async def _run(
        self, target: Target, *arguments: str, network: bool = False, timeout_s: float | None = urpc.CALL_TIMEOUT_S
    ) -> bytes:
        command = (*self._base, *arguments)
        if network:
            mask = ("sh", "-c", _MASK, "sh", _EMPTY)
            command = ("unshare", "--mount", "--propagation=private", *mask, *command)
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=target.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            text = out.decode(errors="replace").strip()
            gone = "is not running" in text or "connection refused" in text or "stopped" in text
            raise (urpc.UrpcClosed if gone else urpc.UrpcError)(arguments[0], text[-_SHOWN:])
        return out


class _Started:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def wait(self) -> int:
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()  # `runsc exec` passes no signal on, but its end hangs the command up
