"""What the blocking and the asyncio client share: everything but the calls."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core import errors
from greenroom.core.records import Key, Operation, OperationState

#: What one command may print before `run` gives up, in bytes: all of it is held in memory.
MAX_OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. ``exit_code`` is its exit status, or 128 + signal number (137: killed)."""

    exit_code: int
    stdout: str
    stderr: str


class CommandFailed(errors.GreenroomError):
    """A command that was run with ``check=True`` ended with another status than 0. ``result`` has its output."""

    code = "FAILED_PRECONDITION"
    default_reason = "COMMAND_FAILED"

    def __init__(self, command: str, result: CommandResult) -> None:
        last = result.stderr.strip().splitlines()[-1:] or ["it wrote nothing to stderr"]
        super().__init__(f"command {command} ended with exit code {result.exit_code}: {last[0]}")
        self.result = result


def random_name(template: str) -> str:
    return f"{template[:54]}-{secrets.token_hex(4)}"


def request_id() -> str:
    return secrets.token_hex(16)


def create_request(
    key: Key, template: str, labels: Mapping[str, str] | None, worker_selector: Mapping[str, str] | None
) -> Any:
    return pb.CreateActorRequest(
        namespace=key.namespace,
        name=key.name,
        template=template,
        labels=dict(labels or {}),
        worker_selector=dict(worker_selector or {}),
        request_id=request_id(),
    )


def actor_request(key: Key) -> Any:
    return pb.ActorRequest(namespace=key.namespace, name=key.name, request_id=request_id())


def get_request(key: Key) -> Any:
    return pb.GetActorRequest(namespace=key.namespace, name=key.name)


def logs_request(key: Key, tail: int | None, follow: bool) -> Any:
    return pb.LogsRequest(
        namespace=key.namespace, name=key.name, tail_lines=-1 if tail is None else tail, follow=follow
    )


def check_done(message: Any) -> Operation:
    """The operation, if it is done.

    Raises:
        GreenroomError: what it failed with.
        DeadlineExceeded: it is still under way (reason ``STILL_RUNNING``); it goes on.
    """
    operation = convert.from_message(Operation, message)
    if operation.error is not None:
        failure = operation.error
        raise errors.rebuild(failure.code, failure.reason, failure.message, failure.metadata)
    if operation.state is OperationState.RUNNING:
        raise errors.DeadlineExceeded(
            f"operation {operation.id} ({operation.kind} of {operation.key}) is still in phase {operation.phase!r}; "
            f"it goes on, watch it with `greenroom wait operation {operation.id}`",
            reason="STILL_RUNNING",
            metadata={"operation": operation.id},
        )
    return operation


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it is sent, and what came back of it."""

    argv: tuple[str, ...]
    out: bytearray
    err: bytearray

    @classmethod
    def of(cls, command: str | Sequence[str]) -> Command:
        argv = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
        return cls(argv, bytearray(), bytearray())

    def start(self, key: Key, env: Mapping[str, str] | None, cwd: str | None, timeout: float | None) -> Any:
        return pb.ExecStart(
            namespace=key.namespace,
            name=key.name,
            argv=self.argv,
            env=dict(env or {}),
            cwd=cwd or "",
            timeout=convert.duration(timeout or 0.0),
        )

    def take(self, frame: Any) -> int | None:
        """Keeps the output of a frame; the exit code if it was the last."""
        if frame.WhichOneof("frame") == "exit_code":
            return int(frame.exit_code)
        self.out.extend(frame.stdout)
        self.err.extend(frame.stderr)
        if len(self.out) + len(self.err) > MAX_OUTPUT_BYTES:
            raise errors.ResourceExhausted(
                f"command {shlex.join(self.argv)} printed more than {MAX_OUTPUT_BYTES >> 20} MiB and was killed; "
                "let it write to a file instead",
                reason="OUTPUT_TOO_LARGE",
            )
        return None

    def result(self, exit_code: int, check: bool) -> CommandResult:
        result = CommandResult(exit_code, self.out.decode(errors="replace"), self.err.decode(errors="replace"))
        if check and exit_code != 0:
            raise CommandFailed(shlex.join(self.argv), result)
        return result


def encode(stdin: str | bytes | None) -> bytes:
    return stdin.encode() if isinstance(stdin, str) else stdin or b""


def actor_url(info: Any, key: Key, port: int | None) -> str:
    """``http://[<port>--]<actor>.<namespace>.<domain>:<gateway port>``"""
    if not info.gateway_url:
        raise errors.FailedPrecondition(
            "the server runs no gateway, so actors have no URL; start it with one", reason="NO_GATEWAY"
        )
    gateway = urlsplit(info.gateway_url)
    host = f"{_prefix(port)}{key.name}.{key.namespace}.{info.domain}"
    return f"{gateway.scheme}://{host}" + (f":{gateway.port}" if gateway.port else "")


def request_headers(key: Key, port: int | None) -> dict[str, str]:
    headers = {"Greenroom-Actor": str(key)}
    if _prefix(port):
        headers["Greenroom-Port"] = str(port)
    return headers


def _prefix(port: int | None) -> str:
    if port is None:
        return ""
    if not 1 <= port <= 65535:
        raise errors.InvalidArgument(f"port {port} is not within 1 to 65535")
    return f"{port}--"


#: What is so long without an end is no line, and is given as it comes.
MAX_LINE_BYTES = 1 << 20


class Lines:
    """Of output that comes in pieces of any length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Those that are whole by now."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = [line.decode(errors="replace") + "\n" for line in whole]
        return found + self.end() if len(self._rest) > MAX_LINE_BYTES else found

    def end(self) -> list[str]:
        """What is left without its end."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace")] if rest else []
