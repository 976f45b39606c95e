"""What the errors of PostgreSQL and of its client mean."""

from __future__ import annotations

import psycopg
from psycopg import errors

from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

#: When a caller who was told that the database is away may try again, in seconds: about what a restart takes.
RETRY_AFTER_S = 1.0

#: Another transaction was in the way; the same one may succeed at once. A key that was taken since it was looked for
#: is of that kind, and what the functions of the schema raise when a row has changed (``GR001``).
CONFLICTS = ("40001", "40P01", "23505", "GR001")

_AWAY = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.IdleInTransactionSessionTimeout,
    errors.LockNotAvailable,
    errors.QueryCanceled,
    errors.ReadOnlySqlTransaction,  # a standby, or a server on its way to be one
    errors.TooManyConnections,
)
_DAMAGED = (errors.DataCorrupted, errors.IndexCorrupted)


def unavailable(where: str, detail: object) -> Unavailable:
    """``detail``: what the client or the server said."""
    said = str(detail).strip().replace("\n", "; ") or type(detail).__name__
    return Unavailable(
        f"the database {where} does not answer: {said}",
        reason="STORE_UNAVAILABLE",
        retry_after_s=RETRY_AFTER_S,
    )


def overloaded(waiting: int) -> ResourceExhausted:
    return ResourceExhausted(f"{waiting} calls wait for the store already; try again later", reason="STORE_OVERLOADED")


class Overtaken(Exception):
    """Another transaction was in the way; nothing was written."""


def is_conflict(error: Exception) -> bool:
    return isinstance(error, psycopg.Error) and error.sqlstate in CONFLICTS


def translate(error: Exception, where: str) -> GreenroomError:
    """``where``: which database, in words for people (never with its password)."""
    match error:
        case GreenroomError():
            return error
        case errors.DiskFull():
            return ResourceExhausted(
                f"the disk of the database {where} is full ({_first_line(error)}); make room there",
                reason="DISK_FULL",
                retry_after_s=10.0,
            )
        case errors.OutOfMemory() | errors.ConfigurationLimitExceeded():
            return ResourceExhausted(f"the database {where}: {_first_line(error)}", reason="STORE_OVERLOADED")
        case errors.InsufficientPrivilege():
            return FailedPrecondition(
                f"the database {where} refuses: {_first_line(error)}; grant its user the schema's tables",
                reason="STORE_NOT_WRITABLE",
            )
        case psycopg.Error() if isinstance(error, _DAMAGED):
            return DataLoss(f"the database {where} is damaged: {_first_line(error)}", reason="DATABASE_CORRUPT")
        case psycopg.Error() if isinstance(error, _AWAY) or (error.sqlstate or "08")[:2] == "08":
            if isinstance(error, psycopg.DataError):  # found by the client: a NUL in a key, for example
                return InvalidArgument(_first_line(error))
            return unavailable(where, error)
        case OSError():
            return unavailable(where, error)
        case _:
            return Internal(f"the database {where}: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
