"""Errors as the API server tells them: a ``Status`` object."""

from __future__ import annotations

from typing import Any


class KubeError(Exception):
    """What a request is answered with when it is refused. Source: k8s.io/apimachinery, api/errors."""

    def __init__(
        self, code: int, reason: str, message: str, details: dict[str, Any] | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.details = dict(details or {})
        if retry_after_s:
            self.details["retryAfterSeconds"] = retry_after_s
        self.retry_after_s = retry_after_s

    def status(self) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


def not_found(plural: str, group: str, name: str) -> KubeError:
    full = f"{plural}.{group}" if group else plural
    return KubeError(404, "NotFound", f'{full} "{name}" not found', {"name": name, "group": group, "kind": plural})


def already_exists(plural: str, group: str, name: str) -> KubeError:
    full = f"{plural}.{group}" if group else plural
    return KubeError(
        409, "AlreadyExists", f'{full} "{name}" already exists', {"name": name, "group": group, "kind": plural}
    )


def conflict(plural: str, group: str, name: str, why: str) -> KubeError:
    full = f"{plural}.{group}" if group else plural
    message = f'Operation cannot be fulfilled on {full} "{name}": {why}'
    return KubeError(409, "Conflict", message, {"name": name, "group": group, "kind": plural})


def bad_request(message: str) -> KubeError:
    return KubeError(400, "BadRequest", message)


def invalid(kind: str, group: str, name: str, causes: list[tuple[str, str]]) -> KubeError:
    """``causes``: field and what is wrong with it."""
    shown = ", ".join(f"{field}: {what}" for field, what in causes)
    shown = f"[{shown}]" if len(causes) > 1 else shown
    full = f"{kind}.{group}" if group else kind
    details = {
        "name": name,
        "group": group,
        "kind": kind,
        "causes": [{"reason": "FieldValueInvalid", "message": what, "field": field} for field, what in causes],
    }
    return KubeError(422, "Invalid", f'{full} "{name}" is invalid: {shown}', details)


def gone(message: str) -> KubeError:
    return KubeError(410, "Expired", message)
