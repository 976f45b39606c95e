"""How records look as fields of a custom resource: the same names and forms as in a manifest of one machine.

A field is in camelCase; a duration without ``_s`` (``60s``), a size without ``_bytes`` (``512Mi``), and ``cpus`` is
``cpu``.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from greenroom.core import quantity
from greenroom.core.errors import InvalidArgument
from greenroom.core.records import Record

R = TypeVar("R", bound=Record)

#: What `greenroom.core.quantity` takes, as patterns of a schema (RE2 and ECMA 262).
DURATION = r"^(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h))+$|^0$"
QUANTITY = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2}|[numkMGTPE]|[KMGTPE]i)?$"


def name_of(field: str, hint: Any) -> str:
    """The name of a record's field in a manifest."""
    if field.endswith("_s") and hint is float:
        field = field.removesuffix("_s")
    elif field.endswith("_bytes") and hint is int:
        field = field.removesuffix("_bytes")
    elif field == "cpus":
        field = "cpu"
    head, *rest = field.split("_")
    return head + "".join(part.capitalize() for part in rest)


def is_duration(field: str, hint: Any) -> bool:
    return field.endswith("_s") and hint is float


def is_quantity(field: str, hint: Any) -> bool:
    return field == "cpus" or (field.endswith("_bytes") and hint is int)


def optional(hint: Any) -> Any:
    """``X`` of ``X | None``; None for any other type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else None
    return None


def read(cls: type[R], plain: object, path: str = "spec") -> R:
    """The record of a ``spec``. What the schema refuses does not get here from a server that knows the schema, so the
    first thing that is wrong is enough.

    Raises:
        InvalidArgument: names the field.
    """
    if not isinstance(plain, Mapping):
        raise InvalidArgument(f"{path}: must be a mapping", reason="INVALID_SPEC")
    values = {}
    for info in msgspec.structs.fields(cls):
        name = name_of(info.name, info.type)
        given = plain.get(name)
        if given is not None:
            values[info.name] = _value(info.name, info.type, given, f"{path}.{name}")
        elif info.required:
            raise InvalidArgument(f"{path}.{name}: is required", reason="INVALID_SPEC")
    return cls(**values)


def _value(field: str, hint: Any, given: Any, path: str) -> Any:
    hint = optional(hint) or hint
    try:
        if is_duration(field, hint):
            return quantity.parse_duration(str(given))
        if is_quantity(field, hint):
            return quantity.parse_bytes(str(given)) if hint is int else float(quantity.parse_quantity(str(given)))
        if isinstance(hint, type) and issubclass(hint, Record):
            return read(hint, given, path)
        if typing.get_origin(hint) is tuple and _is_record(typing.get_args(hint)[0]):
            return tuple(read(typing.get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(given))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return hint(given)
        return msgspec.convert(given, hint)
    except (ValueError, TypeError) as error:  # msgspec's is one
        raise InvalidArgument(f"{path}: {error}", reason="INVALID_SPEC") from error


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)
