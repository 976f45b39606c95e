"""Rules of a schema in CEL (``x-kubernetes-validations``), with ``self`` and ``oldSelf``.

Evaluated when the package `cel` (common-expression-language) is there; it is one of the project's development packages.
A server without it takes what its rules would refuse, and says so once.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

Cause = tuple[str, str]


def check_rules(schema: dict[str, Any], value: Any, old: Any, path: str = "") -> list[Cause]:
    """What is refused, by field. Rules that name ``oldSelf`` are for updates only."""
    causes = []
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = "oldSelf" in rule["rule"]
        if (transition and old is None) or _holds(rule["rule"], value, old):
            continue
        field = path + rule.get("fieldPath", "")
        causes.append((field, f"Invalid value: {rule.get('message', 'failed rule: ' + rule['rule'])}"))
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                causes += check_rules(inner, value[name], before.get(name), f"{path}.{name}" if path else name)
    elif isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            causes += check_rules(schema["items"], item, None, f"{path}[{i}]")
    return causes


@functools.cache
def _program(rule: str) -> Any:
    try:
        import cel
    except ImportError:
        warnings.warn("the fake API server does not check CEL rules: install common-expression-language", stacklevel=2)
        return None
    return cel.compile(rule)


def _holds(rule: str, value: Any, old: Any) -> bool:
    program = _program(rule)
    if program is None:
        return True
    context = {"self": value} if old is None else {"self": value, "oldSelf": old}
    return bool(program.execute(context))
