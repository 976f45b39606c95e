"""The gateway's own answers, which always look the same: JSON, and the header ``Greenroom-Error``, which no actor can
send. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import msgspec

from greenroom.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.gateway.heads import BadMessage

#: After an error that may pass by itself, when nobody knows more.
RETRY_AFTER_S = 1.0
_REASONS = {
    400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 417: "Expectation Failed",
    431: "Request Header Fields Too Large", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip
_WORD = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    code: str
    reason: str
    message: str
    retry_after_s: float = 0.0

    def render(self, *, head_only: bool, keep_alive: bool) -> bytes:
        """The whole response."""
        error = {"code": self.code, "reason": self.reason, "message": self.message}
        body = msgspec.json.encode({"error": error}) + b"\n"
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"Greenroom-Error: {self.reason}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
        ]
        if self.retry_after_s:
            lines.append(f"Retry-After: {math.ceil(self.retry_after_s)}")
        return "\r\n".join((*lines, "", "")).encode() + (b"" if head_only else body)


def refusal(error: GreenroomError) -> Refusal:
    """How an error of the control plane is said in HTTP. What may pass by itself says when to come again: in whole
    seconds (RFC 9110, 10.2.3) and at least one, so that nobody comes back at once."""
    retry_after_s = 0.0
    match error:
        case NotFound():
            status = 404
        case ResourceExhausted() | Unavailable():
            status, retry_after_s = 503, max(error.retry_after_s, RETRY_AFTER_S)
        case FailedPrecondition(reason="ACTOR_CRASHED" | "TEMPLATE_NOT_READY") | Cancelled():
            status = 503
        case DeadlineExceeded():
            status = 504
        case _:
            status = 502
    reason = error.reason if _WORD.fullmatch(error.reason) else error.default_reason
    return Refusal(status, error.code, reason, error.message, retry_after_s)


def bad_request(error: BadMessage) -> Refusal:
    return Refusal(error.status, "INVALID_ARGUMENT", "BAD_REQUEST", f"the request is not acceptable: {error}")


def head_too_large(limit: int) -> Refusal:
    message = f"the request's head is longer than {limit} bytes; send fewer or shorter header fields"
    return Refusal(431, "INVALID_ARGUMENT", "HEAD_TOO_LARGE", message)


def too_slow(what: str) -> Refusal:
    return Refusal(408, "DEADLINE_EXCEEDED", "REQUEST_TIMEOUT", f"{what} did not arrive in time; send it again")


#: To a client beyond the bound on connections.
TOO_MANY_CLIENTS = Refusal(
    503,
    "RESOURCE_EXHAUSTED",
    "TOO_MANY_CLIENTS",
    "the gateway has too many connections; try again later",
    RETRY_AFTER_S,
).render(head_only=False, keep_alive=False)
