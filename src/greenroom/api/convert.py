"""Records <-> messages, by their definitions instead of field by field.

A message of ``resources.proto`` is named like its record and so are its fields; only a ``Duration`` drops the record's
suffix ``_s``. Enum values are named by the member of the record's enum (``ActorState.RUNNING`` <->
``ACTOR_STATE_RUNNING``). What to do with each field is worked out once per class.

A message field that can be absent and is takes the record's default; an unspecified enum too.
"""

from __future__ import annotations

import enum
import functools
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from greenroom.api._gen.greenroom.v1alpha1 import resources_pb2 as pb
from greenroom.core.errors import InvalidArgument
from greenroom.core.records import Record

R = TypeVar("R", bound=Record)
_NANOS = 1_000_000_000


def to_message(record: Record) -> Any:
    """The message of the same name, for example `Actor` -> ``resources_pb2.Actor``.

    Raises:
        InvalidArgument: a value is one that no message can hold, as a size beyond 64 bits.
    """
    message = getattr(pb, type(record).__name__)()
    for field in _plan(type(record), _class_of(message)):
        value = getattr(record, field.record_name)
        if value is not None:
            try:
                field.write(message, value)
            except (ValueError, OverflowError) as error:
                what = f"{type(record).__name__}.{field.record_name}: {error}"
                raise InvalidArgument(what, reason="OUT_OF_RANGE") from None
    return message


def from_message(cls: type[R], message: Message) -> R:
    """Raises:
    InvalidArgument: a required message is absent, or an enum value is unknown to this version.
    """
    values: dict[str, Any] = {}
    for field in _plan(cls, _class_of(message)):
        value = field.read(message)
        if value is not _ABSENT:
            values[field.record_name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise InvalidArgument(f"{cls.__name__}: {error}", reason="FIELD_MISSING") from None


def timestamp(seconds: float) -> Timestamp:
    """From seconds since the epoch."""
    whole, nanos = _split(seconds)
    return Timestamp(seconds=whole, nanos=nanos)


def duration(seconds: float) -> Duration:
    """From seconds, not negative. What is not 0 does not become 0, which often means none."""
    whole, nanos = _split(max(seconds, 1 / _NANOS) if seconds > 0 else seconds)
    return Duration(seconds=whole, nanos=nanos)


def seconds(message: Timestamp | Duration) -> float:
    return (message.seconds * _NANOS + message.nanos) / _NANOS  # of whole numbers: rounded once, to what was sent


def _split(value: float) -> tuple[int, int]:
    whole = math.floor(value)
    nanos = round((value - whole) * _NANOS)
    return (whole + 1, 0) if nanos == _NANOS else (whole, nanos)


def _class_of(message: Message) -> Any:  # Any: the stubs say that message classes can't be hashed; they can
    return type(message)


# --- what to do with each field ---------------------------------------------------------------------------------

_ABSENT: Any = object()


class _Field(typing.NamedTuple):
    """``write`` is given a value other than None; ``read`` may answer `_ABSENT`."""

    record_name: str
    write: Callable[[Any, Any], None]
    read: Callable[[Any], Any]


@functools.cache
def _plan(cls: type[Record], message_cls: Any) -> tuple[_Field, ...]:
    """Every field of the record must have one in the message; the message may have more (computed, output only)."""
    hints = typing.get_type_hints(cls)
    fields = []
    for descriptor in message_cls.DESCRIPTOR.fields:
        is_duration = descriptor.message_type is not None and descriptor.message_type.full_name == _DURATION
        name = descriptor.name + "_s" if is_duration else descriptor.name
        if name not in cls.__struct_fields__:
            assert isinstance(getattr(cls, name, None), property), f"{cls.__name__} has no field {name}"
            fields.append(_Field(name, _setter(descriptor.name), lambda m: _ABSENT))
            continue
        fields.append(_field(name, _strip_optional(hints[name]), descriptor))
    missing = set(cls.__struct_fields__) - {f.record_name for f in fields}
    assert not missing, f"message {cls.__name__} lacks {', '.join(sorted(missing))}"
    return tuple(fields)


_TIMESTAMP = Timestamp.DESCRIPTOR.full_name
_DURATION = Duration.DESCRIPTOR.full_name


def _field(record_name: str, hint: Any, descriptor: Any) -> _Field:
    name, kind = descriptor.name, descriptor.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return _Field(record_name, lambda m, v: getattr(m, name).update(v), lambda m: dict(getattr(m, name)))
    if descriptor.is_repeated:
        if kind is None:
            return _Field(record_name, lambda m, v: getattr(m, name).extend(v), lambda m: tuple(getattr(m, name)))
        item = typing.get_args(hint)[0]
        return _Field(
            record_name,
            lambda m, v: getattr(m, name).extend(to_message(one) for one in v),
            lambda m: tuple(from_message(item, one) for one in getattr(m, name)),
        )
    if kind is not None and kind.full_name in (_TIMESTAMP, _DURATION):
        make = timestamp if kind.full_name == _TIMESTAMP else duration
        return _Field(record_name, lambda m, v: getattr(m, name).CopyFrom(make(v)), _if_set(name, lambda v: seconds(v)))
    if kind is not None:
        return _Field(
            record_name,
            lambda m, v: getattr(m, name).CopyFrom(to_message(v)),
            _if_set(name, lambda v: from_message(hint, v)),
        )
    if descriptor.enum_type is not None:
        return _enum_field(record_name, hint, descriptor)
    if descriptor.has_presence:
        return _Field(record_name, _setter(name), _if_set(name, lambda v: v))
    return _Field(record_name, _setter(name), lambda m: getattr(m, name))


def _enum_field(record_name: str, hint: type[enum.StrEnum], descriptor: Any) -> _Field:
    name = descriptor.name
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", hint.__name__).upper() + "_"
    numbers = {member: descriptor.enum_type.values_by_name[prefix + member.name].number for member in hint}
    members = {number: member for member, number in numbers.items()}

    def read(message: Any) -> Any:
        number = getattr(message, name)
        if number == 0:
            return _ABSENT
        try:
            return members[number]
        except KeyError:
            raise InvalidArgument(
                f"{name}: this server does not know value {number} of {hint.__name__}; use one of "
                + ", ".join(prefix + m.name for m in hint)
            ) from None

    return _Field(record_name, lambda m, v: setattr(m, name, numbers[v]), read)


def _setter(name: str) -> Callable[[Any, Any], None]:
    return lambda message, value: setattr(message, name, value)


def _if_set(name: str, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda message: convert(getattr(message, name)) if message.HasField(name) else _ABSENT


def _strip_optional(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint
