"""Structural schemas: what an object may hold. Source: Kubernetes documentation, "Extend the Kubernetes API with
CustomResourceDefinitions", and the OpenAPI v3 subset that it names. Rules in CEL (``x-kubernetes-validations``) are
evaluated by `Rules`, when a library for that is there.
"""

from __future__ import annotations

import re
from typing import Any

Cause = tuple[str, str]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def prune(value: Any, schema: dict[str, Any], path: str, dropped: list[str], *, root: bool = False) -> Any:
    """The value without fields that the schema does not know; these are added to ``dropped``."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        kept = {}
        for name, child in value.items():
            if root and name in ("apiVersion", "kind", "metadata"):
                kept[name] = child
            elif name in properties:
                kept[name] = prune(child, properties[name], _join(path, name), dropped)
            elif isinstance(more, dict):
                kept[name] = prune(child, more, _join(path, name), dropped)
            elif more:
                kept[name] = child
            else:
                dropped.append(_join(path, name))
        return kept
    if isinstance(value, list) and "items" in schema:
        return [prune(child, schema["items"], f"{path}[{i}]", dropped) for i, child in enumerate(value)]
    return value


def default(value: Any, schema: dict[str, Any]) -> Any:
    """The value with defaults where nothing was given."""
    if isinstance(value, dict):
        filled = {name: default(child, _child(schema, name)) for name, child in value.items()}
        for name, inner in schema.get("properties", {}).items():
            if "default" in inner and (name not in filled or (filled[name] is None and not inner.get("nullable"))):
                filled[name] = default(inner["default"], inner)
        return filled
    if isinstance(value, list) and "items" in schema:
        return [default(child, schema["items"]) for child in value]
    return value


def check(value: Any, schema: dict[str, Any], path: str = "") -> list[Cause]:
    """What is wrong, by field."""
    if value is None:
        return [] if schema.get("nullable") or not schema else [(path, "must not be null")]
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            return [(path, "must be a number or a string")]
        return _limits(value, schema, path)
    wanted = schema.get("type")
    if wanted is not None and (
        not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted in ("integer", "number"))
    ):
        return [(path, f'Invalid value: "{_type_of(value)}": must be of type {wanted}')]
    causes = _limits(value, schema, path)
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                causes.append((_join(path, name), "Required value"))
        for name, child in value.items():
            causes += check(child, _child(schema, name), _join(path, name))
    if isinstance(value, list) and "items" in schema:
        for i, child in enumerate(value):
            causes += check(child, schema["items"], f"{path}[{i}]")
        causes += _list_kind(value, schema, path)
    return causes


def _child(schema: dict[str, Any], name: str) -> dict[str, Any]:
    found = schema.get("properties", {}).get(name)
    if found is None:
        more = schema.get("additionalProperties")
        found = more if isinstance(more, dict) else {}
    return dict(found)


def _limits(value: Any, schema: dict[str, Any], path: str) -> list[Cause]:
    causes = []

    def bad(what: str) -> None:
        shown = f'"{value}"' if isinstance(value, str) else value
        causes.append((path, f"Invalid value: {shown}: {what}"))

    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(f'"{v}"' for v in schema["enum"])
        causes.append((path, f'Unsupported value: "{value}": supported values: {allowed}'))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "minimum" in schema and value < schema["minimum"]:
            bad(f"should be greater than or equal to {schema['minimum']}")
        if "maximum" in schema and value > schema["maximum"]:
            bad(f"should be less than or equal to {schema['maximum']}")
    if isinstance(value, str):
        if len(value) > schema.get("maxLength", len(value)):
            bad(f"may not be longer than {schema['maxLength']}")
        if len(value) < schema.get("minLength", 0):
            bad(f"should be at least {schema['minLength']} chars long")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            bad(f"should match '{schema['pattern']}'")
    if isinstance(value, list) and not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        bad(f"must have {schema.get('minItems', 0)} to {schema.get('maxItems', 'any')} items")
    if isinstance(value, dict) and len(value) > schema.get("maxProperties", len(value)):
        bad(f"must have at most {schema['maxProperties']} items")
    return causes


def _list_kind(value: list[Any], schema: dict[str, Any], path: str) -> list[Cause]:
    kind = schema.get("x-kubernetes-list-type")
    if kind == "set":
        keys = [repr(item) for item in value]
    elif kind == "map":
        names = schema["x-kubernetes-list-map-keys"]
        keys = [repr([item.get(name) for name in names]) for item in value if isinstance(item, dict)]
    else:
        return []
    return [(f"{path}[{i}]", "Duplicate value") for i, key in enumerate(keys) if key in keys[:i]]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _type_of(value: Any) -> str:
    for name, types in _TYPES.items():
        if isinstance(value, types) and not (isinstance(value, bool) and name in ("integer", "number")):
            return name
    return "null"
