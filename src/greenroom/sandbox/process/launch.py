"""The agent's side of the conversation with `_init`: sandboxes and commands are started here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import marshal
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from greenroom.core.agentapi import Identity
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from greenroom.sandbox.port import ExecSpec, SandboxClass
from greenroom.sandbox.reaper import Process

_INIT = Path(__file__).with_name("_init.py")
#: From the first process to the actor's program; takes 30 ms. Only a machine in deep trouble needs longer.
LAUNCH_TIMEOUT_S = 30.0
#: An init that hears nothing more ends within milliseconds; one that hangs in the kernel must not hang us.
HANG_UP_TIMEOUT_S = 5.0
#: Of one message from the init; the longest is an error.
MAX_MESSAGE = 64 << 10
#: How much of a command's output is read at once.
CHUNK = 64 << 10
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Message = tuple[Any, ...]


class Control:
    """The socket to one `_init` process. An end of file on either side ends the conversation."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def pair(cls) -> AsyncIterator[tuple[Control, socket.socket]]:
        """Our end and the socket for the child, which the caller closes once the child has it."""
        ours, theirs = socket.socketpair()
        with theirs:
            control = cls(*await asyncio.open_unix_connection(sock=ours))
            try:
                yield control, theirs
            finally:
                control._writer.close()

    async def send(self, message: Mapping[str, Any]) -> None:
        raw = marshal.dumps(dict(message))
        self._writer.write(len(raw).to_bytes(4, "little") + raw)
        await self._writer.drain()

    async def receive(self) -> Message:
        """The next message, or an empty tuple at the end. Raises what the other side reports as an error."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "little")
            if size > MAX_MESSAGE:
                raise Internal(f"a message of {size} bytes from a sandbox's init")
            message: Message = marshal.loads(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return ()
        if message[0] == "error":
            raise _error(*message[1:])
        return message

    async def hang_up(self) -> None:
        """Ends the conversation from our side and waits until nobody is left on the other: an init that was being set
        up must not go on to write to files that are being removed."""
        self._writer.write_eof()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(HANG_UP_TIMEOUT_S):
                while await self._reader.read(MAX_MESSAGE):
                    pass

    async def expect(self, *words: str) -> Message:
        message = await self.receive()
        if not message:
            raise Internal(f"a sandbox's init ended before it said {' or '.join(words)}")
        assert message[0] in words, message
        return message


def _error(reason: str, number: int, text: str) -> GreenroomError:
    if reason:
        return FailedPrecondition(text, reason=reason)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"the worker's disk is full: {text}", reason="DISK_FULL")
    if number in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENODEV):
        return FailedPrecondition(text, reason="SANDBOX_REFUSED")
    return Internal(f"the sandbox could not be set up: {text}")


def _command(control: socket.socket, directory: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(_INIT), str(control.fileno()), directory)


def _write_id_maps(pid: int, cls: SandboxClass) -> None:
    """Root gives its sandboxes all the ids that it has itself, one to one. Anybody else has just one, and the sandbox
    sees it as the id that the image wants to run as. Source: user_namespaces(7)."""
    proc = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        for name in ("uid_map", "gid_map"):
            own = [line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines()]
            (proc / name).write_text("".join(f"{inside} {inside} {count}\n" for inside, _, count in own))
    else:
        (proc / "setgroups").write_text("deny")
        (proc / "uid_map").write_text(f"{cls.uid} {os.geteuid()} 1\n")
        (proc / "gid_map").write_text(f"{cls.gid} {os.getegid()} 1\n")


def _request(mode: str, cls: SandboxClass, env: Mapping[str, str], argv: tuple[str, ...], cwd: str) -> dict[str, Any]:
    home = "/root" if cls.uid == 0 else "/"
    return {
        "mode": mode,
        "argv": list(argv),
        "env": {"PATH": DEFAULT_PATH, "HOME": home, **env},
        "cwd": cwd,
        "uid": cls.uid,
        "gid": cls.gid,
        # Without root there is only one id inside, and it is the right one from the start.
        "change_user": os.geteuid() == 0,
        "pids": cls.resources.pids,
        "stop_signal": cls.stop_signal,
    }


async def check(mode: str, directory: Path | None) -> None:
    """Tries namespaces, overlayfs (on the file system of ``directory``, or on a tmpfs) and /proc.

    Raises:
        GreenroomError: says what the system refused.
    """
    nobody = SandboxClass(rootfs=Path("/"), image_digest="", argv=(), env=())
    async with _helper(str(directory) if directory else "") as (control, child):
        await control.send({"do": "check", "mode": mode})
        while message := await control.receive():
            assert message[0] == "userns", message
            _write_id_maps(child.pid, nobody)
            await control.send({})
        if await child.wait():
            raise Internal(f"the self-test ended with status {child.returncode}")


async def launch(
    mode: str,
    directory: Path,
    cls: SandboxClass,
    owner: Identity,
    env: Mapping[str, str],
    journal: Callable[[Process], None],
) -> Process:
    """Starts the actor over the files in ``directory`` and returns its init once the program runs.

    ``journal`` is called with the init before anything of the actor runs. Whatever goes wrong, cancellation too,
    nothing is left running.

    Raises:
        FailedPrecondition: no such command (reason ``COMMAND_NOT_FOUND``), or the system refuses something.
        DeadlineExceeded: the machine is too busy or something hangs.
    """
    identity = {
        "name": owner.name,
        "namespace": owner.namespace,
        "uid": owner.uid,
        "generation": str(owner.generation),
        "hostname": owner.hostname,
    }
    request = {"do": "run", "rootfs": str(cls.rootfs), "identity": identity}
    init: Process | None = None
    try:
        async with _helper(str(directory)) as (control, child):
            await control.send({**request, **_request(mode, cls, env, cls.argv, cls.cwd)})
            if mode == "user":
                await control.expect("userns")
                _write_id_maps(child.pid, cls)
                await control.send({})
            # Two processes say these, so either may come first.
            for _ in range(2):
                word, *rest = await control.expect("pid", "ready")
                if word == "pid":
                    init = Process.find(rest[0])
            if init is None:
                raise Internal("the sandbox's init was gone at once")
            journal(init)
            await control.send({})
            await control.receive()  # the end, or an error
        return init
    except BaseException as error:
        if init is not None:
            init.kill()
            await asyncio.shield(init.ended())
            init.close()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"the sandbox did not start within {LAUNCH_TIMEOUT_S:.0f} s") from error
        raise


def _kill(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()


@contextlib.asynccontextmanager
async def _helper(directory: str) -> AsyncIterator[tuple[Control, asyncio.subprocess.Process]]:
    """Runs `_init` for one conversation. At its end the first process has ended; an init that is still waiting for a
    word of ours ends by itself."""
    child: asyncio.subprocess.Process | None = None
    try:
        async with asyncio.timeout(LAUNCH_TIMEOUT_S), Control.pair() as (control, theirs):
            child = await asyncio.create_subprocess_exec(
                *_command(theirs, directory),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            try:
                yield control, child
            except BaseException:
                _kill(child)
                await control.hang_up()
                raise
    finally:
        if child is not None:
            # Ended already where all went well.
            _kill(child)
            await asyncio.shield(child.wait())


class _Streams(asyncio.subprocess.SubprocessStreamProtocol):
    """`asyncio`'s own, and it says when the process has ended: `Process.wait` also waits for its pipes, which a
    process in the background may hold open for ever (CPython issue 119710)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=CHUNK, loop=loop)
        self.exited: asyncio.Future[None] = loop.create_future()

    def process_exited(self) -> None:
        super().process_exited()
        self.exited.set_result(None)


class Exec:
    """A command in a sandbox; an `ExecSession`. What is not read makes the command wait: nothing is queued here."""

    def __init__(self, transport: asyncio.SubprocessTransport, streams: _Streams) -> None:
        self._transport = transport
        self._streams = streams
        self._process = asyncio.subprocess.Process(transport, streams, asyncio.get_running_loop())
        # Signals go through a handle of our own: `subprocess` looks before it sends whether the process has ended, and
        # takes its status away from `asyncio` if it has just done so.
        self._helper = Process.find(self._process.pid)
        streams.exited.add_done_callback(self._over)
        self._timer: asyncio.TimerHandle | None = None

    def _over(self, _: object) -> None:
        if self._helper is not None:
            self._helper.close()

    @classmethod
    async def begin(
        cls, mode: str, init: Process, sandbox: SandboxClass, env: Mapping[str, str], spec: ExecSpec
    ) -> Exec:
        """Raises `FailedPrecondition` when there is no such command, `Unavailable` when the sandbox has ended."""
        request = _request(mode, sandbox, {**env, **dict(spec.env)}, spec.argv, spec.cwd or sandbox.cwd)
        loop = asyncio.get_running_loop()
        session: Exec | None = None
        try:
            pidfd = os.pidfd_open(init.pid)
        except ProcessLookupError:
            raise Unavailable("the sandbox has ended", reason="SANDBOX_GONE") from None
        try:
            async with asyncio.timeout(LAUNCH_TIMEOUT_S), Control.pair() as (control, theirs):
                session = cls(
                    *await loop.subprocess_exec(
                        lambda: _Streams(loop),
                        *_command(theirs, ""),
                        pass_fds=(theirs.fileno(), pidfd),
                        start_new_session=True,
                    )
                )
                theirs.close()
                await control.send({"do": "exec", "pidfd": pidfd, **request})
                await control.receive()  # the end, or an error
        except BaseException as error:
            if session is not None:
                session._transport.close()  # kills, too
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"the command did not start within {LAUNCH_TIMEOUT_S:.0f} s") from error
            raise
        finally:
            os.close(pidfd)
        if spec.timeout_s:
            session._timer = loop.call_later(spec.timeout_s, session._kill)
        return session

    async def write(self, data: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        if not data:
            stdin.close()
            return
        # A command may end, or close its input, without having read all: no error of the writer's.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(data)
            await stdin.drain()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        assert self._process.stdout is not None and self._process.stderr is not None
        streams = {1: self._process.stdout, 2: self._process.stderr}
        reads = {asyncio.create_task(stream.read(CHUNK)): number for number, stream in streams.items()}
        try:
            while reads:
                done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
                for read in sorted(done, key=reads.__getitem__):
                    number = reads.pop(read)
                    if chunk := read.result():
                        yield number, chunk
                        reads[asyncio.create_task(streams[number].read(CHUNK))] = number
        finally:
            for read in reads:
                read.cancel()

    async def wait(self) -> int:
        await asyncio.shield(self._streams.exited)
        if self._timer is not None:
            self._timer.cancel()
        code = self._transport.get_returncode()
        assert code is not None
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        self._kill()

    def abort(self) -> None:
        # Not the transport's own end, which kills the helper before it has passed on that the command is to end.
        for number in range(3):
            if (pipe := self._transport.get_pipe_transport(number)) is not None:
                pipe.close()

    def _kill(self) -> None:
        # The helper passes it on as SIGKILL to the command and its process group. The pipes are closed with it: what
        # the command left in the background must not keep `output` waiting.
        if self._helper is not None:
            self._helper.send(signal.SIGTERM)
        self._streams.exited.add_done_callback(lambda _: self._transport.close())
