"""The errors of Greenroom: one root, one class per gRPC code, data as attributes.

A message names the thing that is wrong and says what to do next. ``reason`` is the stable, machine-readable
word (``google.rpc.ErrorInfo.reason``); the class decides the gRPC code and the exit code of the command line.
"""

from __future__ import annotations

from typing import ClassVar


class GreenroomError(Exception):
    """Root of every error that Greenroom raises on purpose.

    Attributes:
        code: name of the gRPC status code that this error travels as.
        exit_code: exit status of the command line.
        reason: stable upper-case word for programs, for example ``TEMPLATE_NOT_READY``.
        message: one or two sentences for people: what is wrong and the way out.
        metadata: further facts as strings (``google.rpc.ErrorInfo.metadata``).
    """

    code: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})

    def facts(self) -> dict[str, str]:
        """``metadata``, and what the class keeps beside it: all that `rebuild` needs, besides code, reason and message,
        to make the same error again from where it was stored."""
        return dict(self.metadata)


class NotFound(GreenroomError):
    code = "NOT_FOUND"
    exit_code = 3
    default_reason = "NOT_FOUND"


class AlreadyExists(GreenroomError):
    code = "ALREADY_EXISTS"
    exit_code = 4
    default_reason = "ALREADY_EXISTS"


class InvalidArgument(GreenroomError):
    code = "INVALID_ARGUMENT"
    exit_code = 2
    default_reason = "INVALID_ARGUMENT"


class Unauthenticated(GreenroomError):
    """Nobody knows who asks."""

    code = "UNAUTHENTICATED"
    exit_code = 5
    default_reason = "UNAUTHENTICATED"


class Conflict(GreenroomError):
    """Somebody else holds or changed the thing; the same call may succeed later."""

    code = "ABORTED"
    exit_code = 4
    default_reason = "CONFLICT"


class LeaseHeld(Conflict):
    """Another operation holds the actor. ``metadata``: ``holder``, ``operation``, ``until`` (epoch seconds)."""

    default_reason = "LEASE_HELD"


class LeaseLost(Conflict):
    """The caller's lease was taken over or has run out: its generation is stale and it must stop at once."""

    default_reason = "LEASE_LOST"


class FailedPrecondition(GreenroomError):
    code = "FAILED_PRECONDITION"
    exit_code = 4
    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(GreenroomError):
    code = "RESOURCE_EXHAUSTED"
    exit_code = 6
    default_reason = "NO_CAPACITY"

    def __init__(
        self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s

    def facts(self) -> dict[str, str]:
        return {**self.metadata, "retry_after_s": f"{self.retry_after_s:g}"}


class Unavailable(GreenroomError):
    """A part that is needed does not answer now (worker not connected, registry down). ``retry_after_s``: 0 when
    nobody knows."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"

    def __init__(
        self, message: str, *, reason: str = "", metadata: dict[str, str] | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s

    def facts(self) -> dict[str, str]:
        known = {"retry_after_s": f"{self.retry_after_s:g}"} if self.retry_after_s > 0 else {}
        return {**self.metadata, **known}


class Cancelled(GreenroomError):
    """An operation that was given up because somebody asked for it."""

    code = "CANCELLED"
    exit_code = 4
    default_reason = "OPERATION_CANCELLED"


class DeadlineExceeded(GreenroomError):
    code = "DEADLINE_EXCEEDED"
    exit_code = 124
    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(GreenroomError):
    """The backend lacks this optional power."""

    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class DataLoss(GreenroomError):
    """Stored bytes are not what was written (digest mismatch, missing file)."""

    code = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class Internal(GreenroomError):
    pass


BY_CODE: dict[str, type[GreenroomError]] = {
    cls.code: cls
    for cls in (
        NotFound,
        AlreadyExists,
        InvalidArgument,
        Unauthenticated,
        Conflict,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        Cancelled,
        DeadlineExceeded,
        Unimplemented,
        DataLoss,
        Internal,
    )
}
BY_REASON: dict[str, type[GreenroomError]] = {"LEASE_HELD": LeaseHeld, "LEASE_LOST": LeaseLost}


def rebuild(code: str, reason: str, message: str, metadata: dict[str, str] | None = None) -> GreenroomError:
    """Makes the error again that was sent as (code, reason, message, metadata); unknown codes become Internal."""
    cls = BY_REASON.get(reason) or BY_CODE.get(code, Internal)
    if issubclass(cls, ResourceExhausted | Unavailable):
        retry = float((metadata or {}).get("retry_after_s", "1" if issubclass(cls, ResourceExhausted) else "0"))
        return cls(message, reason=reason, metadata=metadata, retry_after_s=retry)
    return cls(message, reason=reason, metadata=metadata)
