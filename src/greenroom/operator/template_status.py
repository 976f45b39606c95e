"""An ActorTemplate's status: the same state makes the same status, so that nothing is written while nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from greenroom.core.errors import GreenroomError, InvalidArgument
from greenroom.core.records import Template, TemplateState

#: Of messages, which may hold what an image's program has written.
MAX_MESSAGE_CHARS = 1000


class Condition(NamedTuple):
    kind: str
    holds: bool
    reason: str
    message: str = ""


class Told(NamedTuple):
    conditions: tuple[Condition, ...]
    golden_snapshot: str = ""
    operation: str = ""


def following(template: Template) -> Told:
    """As the control plane has it."""
    ready = template.state is TemplateState.READY
    failed = template.state is TemplateState.FAILED
    reason = template.reason or str(template.state)
    message = template.message
    return Told(
        (
            Condition("Accepted", True, "Applied"),
            Condition(
                "GoldenReady", bool(template.golden_snapshot), "Snapshot" if template.golden_snapshot else reason
            ),
            Condition("Ready", ready, reason, message),
            Condition("Failed", failed, reason if failed else "NoFailure", message if failed else ""),
        ),
        template.golden_snapshot,
        template.operation,
    )


def refused(error: GreenroomError) -> Told:
    """The control plane does not take it."""
    reason = "InvalidSpec" if isinstance(error, InvalidArgument) else "Refused"
    message = error.message
    if error.reason == "TEMPLATE_IMMUTABLE":
        reason = "OtherSpec"
        message += "; delete that one in the control plane (`greenroom delete template`), or give this one another name"
    return Told(
        (
            Condition("Accepted", False, reason, message),
            Condition("GoldenReady", False, reason),
            Condition("Ready", False, reason, message),
            Condition("Failed", True, reason, message),
        )
    )


def held(error: GreenroomError, before: Mapping[str, Any]) -> Told:
    """It is to be deleted, and can't be yet: what was said of it stays."""
    kept = tuple(
        Condition(str(c.get("type")), c.get("status") == "True", str(c.get("reason")), str(c.get("message") or ""))
        for c in before.get("conditions") or ()
        if isinstance(c, dict) and c.get("type") != "Deletable"
    )
    reason = "ActorsExist" if error.reason == "TEMPLATE_IN_USE" else "Refused"
    held = Condition("Deletable", False, reason, error.message)
    return Told((*kept, held), str(before.get("goldenSnapshot") or ""), str(before.get("operation") or ""))


def is_accepted(status: Mapping[str, Any]) -> bool:
    """Whether the control plane was last said to have it."""
    conditions = status.get("conditions") or ()
    return any(c.get("type") == "Accepted" and c.get("status") == "True" for c in conditions if isinstance(c, dict))


def make(told: Told, before: Mapping[str, Any], generation: int, wall: float) -> dict[str, Any]:
    """The whole status. ``before``: the one that there is; times of conditions that have not changed are kept."""
    old = {c.get("type"): c for c in before.get("conditions") or () if isinstance(c, dict)}
    when = datetime.fromtimestamp(int(wall), tz=UTC).isoformat().replace("+00:00", "Z")
    conditions = []
    for kind, holds, reason, message in told.conditions:
        status = "True" if holds else "False"
        was = old.get(kind, {})
        same = was.get("status") == status and was.get("lastTransitionTime")
        conditions.append(
            {
                "type": kind,
                "status": status,
                "reason": reason or "Unknown",
                "message": message[:MAX_MESSAGE_CHARS],
                "observedGeneration": generation,
                "lastTransitionTime": str(was["lastTransitionTime"]) if same else when,
            }
        )
    made: dict[str, Any] = {"observedGeneration": generation, "conditions": conditions}
    if told.golden_snapshot:
        made["goldenSnapshot"] = told.golden_snapshot
    if told.operation:
        made["operation"] = told.operation
    return made
