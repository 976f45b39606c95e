"""Objects as protobuf, which ``kubectl create secret`` and Helm send: those kinds, and the fields that people give.

Answers are JSON, as clients accept besides. Whatever else is sent as protobuf is refused, as a server without it would.

Source: Kubernetes documentation, "Kubernetes Protobuf encoding" (the envelope), and the numbers of
k8s.io/api/core/v1, k8s.io/api/rbac/v1 and k8s.io/apimachinery/pkg/apis/meta/v1, generated.proto.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from greenroom.testing.fake_kube.errors import KubeError

MAGIC = b"k8s\x00"
_FIXED64 = 1


@dataclass(frozen=True)
class _Field:
    """``kind``: text, bytes (base64 in JSON), bool, int, or the fields of a message. ``many``: a list; ``pairs``: a
    map, whose values are of this kind."""

    name: str
    kind: Any = "text"
    many: bool = False
    pairs: bool = False


_Fields = Mapping[int, _Field]

_META: _Fields = {
    1: _Field("name"),
    2: _Field("generateName"),
    3: _Field("namespace"),
    5: _Field("uid"),
    6: _Field("resourceVersion"),
    11: _Field("labels", pairs=True),
    12: _Field("annotations", pairs=True),
    14: _Field("finalizers", many=True),
}
_SUBJECT: _Fields = {1: _Field("kind"), 2: _Field("apiGroup"), 3: _Field("name"), 4: _Field("namespace")}
_ROLE_REF: _Fields = {1: _Field("apiGroup"), 2: _Field("kind"), 3: _Field("name")}
_METADATA = _Field("metadata", _META)
_TYPE_META: _Fields = {1: _Field("apiVersion"), 2: _Field("kind")}
_BINDING: _Fields = {1: _METADATA, 2: _Field("subjects", _SUBJECT, many=True), 3: _Field("roleRef", _ROLE_REF)}

_PRECONDITIONS: _Fields = {1: _Field("uid"), 2: _Field("resourceVersion")}

#: Fields of each kind; those that are left out are dropped.
KINDS: Mapping[tuple[str, str], _Fields] = {
    ("v1", "Namespace"): {1: _METADATA},
    ("v1", "Secret"): {
        1: _METADATA,
        2: _Field("data", "bytes", pairs=True),
        3: _Field("type"),
        4: _Field("stringData", pairs=True),
        5: _Field("immutable", "bool"),
    },
    ("v1", "ConfigMap"): {1: _METADATA, 2: _Field("data", pairs=True), 3: _Field("binaryData", "bytes", pairs=True)},
    ("v1", "ServiceAccount"): {1: _METADATA},
    ("v1", "DeleteOptions"): {
        1: _Field("gracePeriodSeconds", "int"),
        2: _Field("preconditions", _PRECONDITIONS),
        4: _Field("propagationPolicy"),
    },
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): _BINDING,
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): _BINDING,
}


def decode(body: bytes) -> dict[str, Any]:
    """The object as JSON has it. Raises `KubeError` for a kind that is not known here, and for what can't be read."""
    try:
        if not body.startswith(MAGIC):
            raise ValueError("it does not begin as Kubernetes' protobuf does")
        envelope = dict(_wire(body[len(MAGIC) :]))
        about = _message(envelope[1], _TYPE_META)
        fields = KINDS.get((about.get("apiVersion", ""), about.get("kind", "")))
        if fields is None:
            raise KubeError(415, "UnsupportedMediaType", f"this server takes no protobuf of {about}; send JSON")
        return {**about, **_message(envelope[2], fields)}
    except (ValueError, IndexError, KeyError) as error:
        raise KubeError(400, "BadRequest", f"the body can't be read: {error}") from None


def _message(body: bytes, fields: _Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _wire(body):
        field = fields.get(number)
        if field is None:
            continue
        if field.pairs:
            entry = dict(_wire(value))
            key = bytes(entry.get(1, b"")).decode()
            found.setdefault(field.name, {})[key] = _value(entry.get(2, b""), field.kind)
        elif field.many:
            found.setdefault(field.name, []).append(_value(value, field.kind))
        elif value != b"":  # what is not given is sent as nothing
            found[field.name] = _value(value, field.kind)
    return found


def _value(value: Any, kind: Any) -> Any:
    if kind == "text":
        return value.decode()
    if kind == "bytes":
        return base64.b64encode(value).decode()
    if kind in ("bool", "int"):
        return bool(value) if kind == "bool" else value
    return _message(value, kind)


def _wire(body: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values: integers, or bytes. Source: protobuf.dev, "Encoding"."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        match tag & 7:
            case 0:
                value, at = _varint(body, at)
                yield tag >> 3, value
            case 2:
                size, at = _varint(body, at)
                if at + size > len(body):
                    raise ValueError("a field is cut off")
                yield tag >> 3, body[at : at + size]
                at += size
            case 1 | 5 as kind:
                at += 8 if kind == _FIXED64 else 4
            case other:
                raise ValueError(f"wire type {other}")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (body[at] & 0x7F) << shift
        at += 1
        if not body[at - 1] & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
