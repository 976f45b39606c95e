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
import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from greenroom.sandbox.gvisor import urpc
from greenroom.sandbox.gvisor.control import Command, Started, Target
from greenroom.sandbox.gvisor.network import Slot

_MASK = 'mount --bind "$1" /proc/sys/net && shift && exec "$@"'
_EMPTY = "empty"
#: How much of what a failed command printed is passed on.
_SHOWN = 400
#: What `runsc exec` ends with when it was not the command that failed; but a command may say it as well.
_RUNSC_FAILED = 128
#: How often it is looked whether a command has begun; that takes some 30 ms.
_PID_RETRY_S = 0.005


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
        # `runsc exec` reads it from a file; this one is on no disk, and unlike a pipe takes it all before it is read.
        memory = os.memfd_create("greenroom-exec", os.MFD_CLOEXEC)
        pid_file = target.directory / f"exec-{secrets.token_hex(8)}.pid"
        try:
            os.write(memory, json.dumps(spec).encode())
            streams = stdio or (asyncio.subprocess.DEVNULL,) * 3
            process = await asyncio.create_subprocess_exec(
                *self._base,
                "exec",
                f"--process=/proc/self/fd/{memory}",
                f"--internal-pid-file={pid_file}",
                target.sid,
                cwd=target.directory,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=(memory,),
                env={},
            )
        finally:
            os.close(memory)
        return _Started(self, target, process, await _started_pid(target, process, pid_file))

    async def kill(self, target: Target, pid: int) -> None:
        with contextlib.suppress(urpc.UrpcError):  # it has ended by itself
            await self._run(target, "kill", f"--pid={pid}", target.sid, "KILL")

    async def wait(self, target: Target) -> int:
        out = await self._run(target, "wait", target.sid, timeout_s=None)
        return int(json.loads(out)["exitStatus"])

    async def usage(self, target: Target) -> tuple[int, int]:
        data = json.loads(await self._run(target, "events", "--stats", target.sid))["data"]
        return int(data["memory"]["usage"].get("usage", 0)), int(data["pids"].get("current", 0))

    async def stacks(self, target: Target) -> str:
        return (await self._run(target, "debug", "--stacks", target.sid)).decode(errors="replace")

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
    def __init__(self, control: CliControl, target: Target, process: asyncio.subprocess.Process, pid: int) -> None:
        self._control = control
        self._target = target
        self._process = process
        self._pid = pid

    async def wait(self) -> int:
        code = await self._process.wait()
        if code == _RUNSC_FAILED:
            try:
                await self._control.usage(self._target)
            except (urpc.UrpcError, OSError):
                return 137
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        if self._process.returncode is None:
            await self._control.kill(self._target, self._pid)


async def _started_pid(target: Target, process: asyncio.subprocess.Process, pid_file: Path) -> int:
    """Waits until the command has begun: `runsc exec` then writes down its pid. When it can't, it ends."""
    ended = asyncio.ensure_future(process.wait())
    try:
        while True:
            done, _ = await asyncio.wait({ended}, timeout=_PID_RETRY_S)
            if pid_file.exists() and (text := pid_file.read_text()):
                pid_file.unlink()
                return int(text)
            if done:
                said = (target.directory / "runsc.log").read_text(errors="replace").strip()
                raise urpc.UrpcError("exec", said.rpartition("\n")[2][-_SHOWN:])
    finally:
        ended.cancel()
