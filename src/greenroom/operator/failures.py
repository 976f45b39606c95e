"""What is told of a failure, whoever's it is."""

from __future__ import annotations

import structlog

from greenroom.core.errors import GreenroomError

_log = structlog.get_logger("greenroom.operator")


def message_of(error: Exception) -> str:
    """One that nobody foresaw is a defect of ours, so all of it goes to the log. What it came of is tried again all the
    same, as after any failure: one object that it can't cope with is not to stop an operator of hundreds."""
    if isinstance(error, GreenroomError):
        return error.message
    report(error)
    return f"{type(error).__name__}: {error}"


def report(error: Exception) -> None:
    """Tests raise it instead (`greenroom.testing.defects`)."""
    _log.error("a defect; please report it", exc_info=error)
