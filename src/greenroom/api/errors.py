"""`GreenroomError` <-> gRPC status, both ways, without loss.

An error travels as its status code and message, and in the trailing metadata as a ``google.rpc.Status`` with an
``ErrorInfo`` (reason, domain ``greenroom.dev``, metadata) and, for `ResourceExhausted`, and for `Unavailable` when it
is known, a ``RetryInfo``.
Source: https://google.aip.dev/193 and google/rpc/error_details.proto.

grpcio-status offers the same packing; it is not used because it adds a dependency for ten lines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from greenroom.api import convert
from greenroom.core.errors import DeadlineExceeded, GreenroomError, Internal, ResourceExhausted, Unavailable, rebuild

DOMAIN = "greenroom.dev"
STATUS_KEY = "grpc-status-details-bin"
#: Of a message, as it is sent. It goes out twice, in grpc-message and in the details, and gRPC clients refuse more than
#: 8 KiB of metadata.
MAX_MESSAGE_BYTES = 1500
#: Further facts beyond this many bytes in all are left out, for the same reason.
MAX_METADATA_BYTES = 1500
_CUT = " [cut]"

log = structlog.get_logger(__name__)
T = TypeVar("T")


# --- server -----------------------------------------------------------------------------------------------------


def to_status(error: GreenroomError) -> Status:
    code: int = getattr(grpc.StatusCode, error.code).value[0]
    status = Status(code=code, message=_cut(error.message))
    _pack(status, ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_bounded(error.metadata)))
    if isinstance(error, ResourceExhausted) or (isinstance(error, Unavailable) and error.retry_after_s > 0):
        _pack(status, RetryInfo(retry_delay=convert.duration(max(error.retry_after_s, 0.0))))
    return status


def _pack(status: Status, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(message: str) -> str:
    raw = _utf8(message)
    if len(raw) > MAX_MESSAGE_BYTES:
        return raw[:MAX_MESSAGE_BYTES].decode(errors="ignore") + _CUT
    return raw.decode()


def _headline(message: str) -> str:
    """The message for grpc-message, in which a byte takes three unless it is printable ASCII. Ours read the details."""
    room = MAX_MESSAGE_BYTES + len(_CUT)
    for index, char in enumerate(message):
        room -= 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if room < 0:
            return message[:index] + _CUT
    return message


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    kept, room = {}, MAX_METADATA_BYTES
    for key, value in metadata.items():
        raw = _utf8(str(value))
        room -= len(key) + len(raw)
        if room < 0:
            break
        kept[key] = raw.decode()
    return kept


def _utf8(text: str) -> bytes:
    """Names of files that are no UTF-8 come as surrogates, which no message can hold."""
    return text.encode(errors="backslashreplace")


async def answer(context: Any, method: str, work: Awaitable[T]) -> T:
    """Awaits the work of one RPC and sends what it raises as a status.

    An exception that is not a `GreenroomError` is our own bug: it is logged with its traceback, and the client learns
    no more than that. Cancellation passes through: gRPC cancels the handler when the client has gone or its deadline
    has passed.
    """
    try:
        return await work
    except GreenroomError as error:
        failure = error
    except (grpc.RpcError, grpc.aio.AbortError, grpc.aio.UsageError):
        raise  # the call is over: the client has gone
    except Exception:
        log.exception("api call failed unexpectedly", method=method)
        failure = Internal(f"{method} failed by a bug in the server; its log has the details", reason="INTERNAL")
    status = to_status(failure)
    code = getattr(grpc.StatusCode, failure.code)
    await context.abort(code, _headline(status.message), ((STATUS_KEY, status.SerializeToString()),))
    raise AssertionError("abort raises")


# --- client -----------------------------------------------------------------------------------------------------


def from_rpc_error(error: Any, address: str) -> GreenroomError:
    """The error that the server raised, or what the missing answer means. ``error``: a `grpc.RpcError` that is a call
    (both stacks have ``code()``, ``details()`` and ``trailing_metadata()``)."""
    code: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    raw = _status_bytes(error.trailing_metadata() or ())
    if raw is not None:
        return _from_status(Status.FromString(raw), code)
    if code is grpc.StatusCode.UNAVAILABLE:
        return unreachable(details, address)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(
            f"the server at {address} did not answer in time; what was started goes on: see `greenroom get operations`",
            reason="REQUEST_TIMEOUT",
        )
    if code is grpc.StatusCode.CANCELLED:
        return Unavailable(f"the server at {address} ended the call; is it shutting down?", reason="CALL_CANCELLED")
    return rebuild(code.name, "", details or f"the server at {address} answered {code.name}")


#: The reason when the server is not known by the authorities that are.
CERTIFICATE_UNKNOWN = "CERTIFICATE_UNKNOWN"

#: What is in gRPC's words when TLS fails, and what that means. The first that fits counts.
_TROUBLE = (
    (
        "certificate has expired",
        "CERTIFICATE_EXPIRED",
        "shows a certificate that has expired: renew it, the server takes it up by itself; or set this machine's clock",
    ),
    (
        "Hostname Verification Check failed",
        "CERTIFICATE_OF_ANOTHER",
        "shows a certificate that is not for that name: use an address that it is for, or set GREENROOM_SERVER_NAME",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        CERTIFICATE_UNKNOWN,
        "shows a certificate of an authority that is not known here: set GREENROOM_CA to the certificate of that one",
    ),
    (
        "Getting metadata from plugin failed",
        "NO_TOKEN",
        "was not asked: the token can't be read any more; look at GREENROOM_TOKEN_FILE",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "NO_TLS",
        "does not speak TLS: take GREENROOM_CA away, or use the address that does",
    ),
)


def _status_bytes(metadata: Iterable[tuple[str, Any]]) -> bytes | None:
    return next((bytes(value) for key, value in metadata if key == STATUS_KEY), None)


def _from_status(status: Status, code: grpc.StatusCode) -> GreenroomError:
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(retry)
    error = rebuild(code.name, info.reason, status.message, dict(info.metadata))
    if isinstance(error, ResourceExhausted | Unavailable) and retry.HasField("retry_delay"):
        error.retry_after_s = convert.seconds(retry.retry_delay)
    return error


def unreachable(details: str, address: str) -> Unavailable:
    """Why there is no connection, by what gRPC says of it."""
    for sign, reason, text in _TROUBLE:
        if sign in details:
            return Unavailable(f"the server at {address} {text}", reason=reason)
    if "Socket closed" in details and not address.startswith("unix:"):
        return Unavailable(
            f"the server at {address} closed the connection at once: it may want TLS; set GREENROOM_CA to the "
            "certificate of its authority (and GREENROOM_TOKEN_FILE to a file with a token)",
            reason="CONNECTION_CLOSED",
        )
    if "Permission denied" in details:
        return Unavailable(
            f"may not open {address}: run as the user who started the server, or with sudo", reason="PERMISSION_DENIED"
        )
    return Unavailable(
        f"no Greenroom server answers at {address}; start one with: greenroom up", reason="SERVER_NOT_RUNNING"
    )


def translating(call: Any, translate: Callable[[Any], GreenroomError]) -> Callable[..., Any]:
    """Wraps a synchronous unary call so that it raises `GreenroomError`. Its ``future`` is gRPC's own, for many calls
    at once: what its ``result()`` raises is for `from_rpc_error`."""

    def translated(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except grpc.RpcError as error:
            raise translate(error) from None

    translated.future = call.future  # type: ignore[attr-defined]
    return translated
