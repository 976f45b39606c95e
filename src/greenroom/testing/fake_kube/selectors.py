"""Label and field selectors. Source: Kubernetes documentation, "Labels and Selectors" and "Field Selectors"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from greenroom.testing.fake_kube.errors import bad_request

Test = Callable[[dict[str, Any]], bool]

_SET = re.compile(r"(\S+)\s+(in|notin)\s+\(([^()]*)\)")
_EQUAL = re.compile(r"([^=!\s]+)\s*(==|=|!=)\s*([^=!\s]*)")
_EXISTS = re.compile(r"(!?)\s*([^=!\s,()]+)")
_SPLIT = re.compile(r",(?![^()]*\))")


def labels(selector: str) -> Test:
    """Raises `KubeError` (400) unless it is one."""
    tests = [_label(part.strip()) for part in _SPLIT.split(selector) if part.strip()]
    return lambda obj: all(test(obj["metadata"].get("labels") or {}) for test in tests)


def _label(part: str) -> Callable[[dict[str, str]], bool]:
    if found := _SET.fullmatch(part):
        key, word, values = found[1], found[2], {v.strip() for v in found[3].split(",")}
        if word == "in":
            return lambda have: have.get(key) in values
        return lambda have: have.get(key) not in values
    if found := _EQUAL.fullmatch(part):
        key, sign, value = found[1], found[2], found[3]
        if sign == "!=":
            return lambda have: have.get(key) != value
        return lambda have: have.get(key) == value
    if found := _EXISTS.fullmatch(part):
        absent, key = bool(found[1]), found[2]
        return lambda have: (key in have) != absent
    raise bad_request(f"unable to parse requirement: {part!r}")


def fields(selector: str) -> Test:
    tests = []
    for part in filter(None, (p.strip() for p in selector.split(","))):
        found = _EQUAL.fullmatch(part)
        if found is None:
            raise bad_request(f"invalid field selector: {part!r}")
        tests.append((found[1].split("."), found[2] == "!=", found[3]))
    return lambda obj: all((str(_dig(obj, path) or "") == value) != unequal for path, unequal, value in tests)


def _dig(obj: Any, path: list[str]) -> Any:
    for part in path:
        obj = obj.get(part) if isinstance(obj, dict) else None
    return obj


_STEP = re.compile(
    r"\.([A-Za-z0-9_-]+)|\[['\"]([^'\"]+)['\"]\]|\[\?\(@\.([A-Za-z0-9_]+)\s*==\s*['\"]([^'\"]*)['\"]\)\]"
)


def json_path(obj: Any, path: str) -> Any:
    """The value at a path of the simple kind: ``.a.b``, ``.a['b']``, ``.a[?(@.type=="Ready")].status``."""
    for step in _STEP.finditer(path):
        name = step[1] or step[2]
        if name:
            obj = obj.get(name) if isinstance(obj, dict) else None
        else:
            found = [i for i in obj or () if isinstance(i, dict) and str(i.get(step[3])) == step[4]]
            obj = found[0] if found else None
    return obj


def set_json_path(obj: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a path of names."""
    head, _, rest = path.strip(".").partition(".")
    inner = obj.get(head) or {}
    return {**obj, head: set_json_path(inner, rest, value) if rest else value}
