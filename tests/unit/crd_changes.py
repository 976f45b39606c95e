"""What a new CustomResourceDefinition may not change: objects that were taken by the old one must be taken by the new
one, and mean the same, because nobody converts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: Of a schema: what a value may not exceed, and what it may not fall short of.
_UPPER = ("maximum", "maxLength", "maxItems", "maxProperties")
_LOWER = ("minimum", "minLength", "minItems", "minProperties")
_FIXED = ("type", "pattern", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string")


def breaking(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each change that would refuse, or drop a part of, an object that is there."""
    found = []
    for field in ("group", "scope"):
        if old["spec"][field] != new["spec"][field]:
            found.append(f"spec.{field} has changed")
    for field in ("kind", "plural", "listKind", "singular"):
        if old["spec"]["names"][field] != new["spec"]["names"][field]:
            found.append(f"spec.names.{field} has changed")
    versions = {v["name"]: v for v in new["spec"]["versions"]}
    for version in old["spec"]["versions"]:
        after = versions.get(version["name"])
        if after is None or (version["served"] and not after["served"]):
            found.append(f"version {version['name']} is not served any more: first a release that stores another one")
            continue
        gone = set(version.get("subresources", {})) - set(after.get("subresources", {}))
        found += [f"{version['name']}: subresource {name} is gone" for name in sorted(gone)]
        found += [
            f"{version['name']}: {line}"
            for line in _schema(version["schema"]["openAPIV3Schema"], after["schema"]["openAPIV3Schema"], "")
        ]
    return found


def _schema(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[str]:
    at = path or "the object"
    for name in _FIXED:
        if old.get(name) != new.get(name) and name in new:
            yield f"{at}: {name} was {old.get(name)!r} and is {new[name]!r}"
    for name in _UPPER:
        if name in new and new[name] < old.get(name, float("inf")):
            yield f"{at}: {name} is lower than it was"
    for name in _LOWER:
        if name in new and new[name] > old.get(name, float("-inf")):
            yield f"{at}: {name} is higher than it was"
    if "enum" in new and (gone := [v for v in old.get("enum", ["anything"]) if v not in new["enum"]]):
        yield f"{at}: {', '.join(map(str, gone))} is not allowed any more"
    had = {rule["rule"] for rule in old.get("x-kubernetes-validations", ())}
    for rule in new.get("x-kubernetes-validations", ()):
        if rule["rule"] not in had:
            yield f"{at}: there is a new rule: {rule['rule']}"
    properties = new.get("properties", {})
    for name in new.get("required", ()):
        if name not in old.get("required", ()) and "default" not in properties.get(name, {}):
            yield f"{_join(path, name)} is required now, and has no default"
    for name, child in old.get("properties", {}).items():
        if name in properties:
            yield from _schema(child, properties[name], _join(path, name))
        elif not new.get("additionalProperties") and not new.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{_join(path, name)} is gone, and with it what objects have there"
    for name in ("items", "additionalProperties"):
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            yield from _schema(old[name], new[name], f"{path}[]")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
