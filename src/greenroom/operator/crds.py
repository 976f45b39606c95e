"""CustomResourceDefinitions, from the records that also say what manifests of one machine hold.

Source: Kubernetes documentation, "Extend the Kubernetes API with CustomResourceDefinitions" (structural schemas, CEL
rules, printer columns, subresources). What a schema can't say `greenroom.api.validate` does.
"""

from __future__ import annotations

import enum
import inspect
import typing
from typing import Any

import msgspec
import yaml

from greenroom.api import validate
from greenroom.core.assets import Asset
from greenroom.core.quantity import format_bytes, format_cpus, format_duration
from greenroom.core.records import IMAGE_PORTS, Probe, Record, Resources, Retention, TemplateSpec
from greenroom.core.words import MAX_ARGUMENTS
from greenroom.operator import forms
from greenroom.operator.objects import GROUP, VERSION
from greenroom.operator.specs import MAX_REPLICAS, SandboxConfigSpec, WorkerPodSpec, WorkerPoolSpec

_LABEL = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
_LABEL_OR_NONE = f"^$|{_LABEL}"
_COUNT = {"minimum": 0, "maximum": MAX_REPLICAS}
_WORDS = {"maxItems": MAX_ARGUMENTS}
#: An argument or a variable. Shorter than what Linux takes: the cost of comparing two specs, which the API server
#: estimates from the longest that they may be, has to stay below its limit.
MAX_WORD_CHARS = 16_384
#: Of lists and maps of which nobody says how long they may be: CEL's cost is estimated from it.
MAX_ITEMS = 256
MAX_TEXT = 4096

#: Ranges of fields, by record and field. They are those of `greenroom.api.validate`.
LIMITS: dict[tuple[type[Record], str], dict[str, Any]] = {
    (WorkerPoolSpec, "replicas"): _COUNT,
    (WorkerPoolSpec, "slots"): {"minimum": 1, "maximum": validate.MAX_SLOTS},
    (WorkerPoolSpec, "backend"): {"pattern": _LABEL},
    (WorkerPoolSpec, "min_replicas"): _COUNT,
    (WorkerPoolSpec, "max_replicas"): _COUNT,
    (WorkerPoolSpec, "min_free"): {"minimum": 0, "maximum": validate.MAX_SLOTS},
    (WorkerPoolSpec, "max_surge"): _COUNT,
    (WorkerPoolSpec, "victims"): {"maxItems": MAX_REPLICAS, "x-kubernetes-list-type": "set"},
    (WorkerPoolSpec, "max_unavailable"): _COUNT,
    (WorkerPoolSpec, "sandbox_config"): {"pattern": _LABEL_OR_NONE},
    (WorkerPodSpec, "image"): {"maxLength": 1024},
    (TemplateSpec, "image"): {"minLength": 1, "maxLength": 1024},
    (TemplateSpec, "command"): _WORDS,
    (TemplateSpec, "args"): _WORDS,
    (TemplateSpec, "workdir"): {"pattern": "^(/.*)?$", "maxLength": MAX_TEXT},
    (TemplateSpec, "pool"): {"pattern": _LABEL},
    (TemplateSpec, "ports"): {"maxItems": validate.MAX_PORTS, "x-kubernetes-list-type": "set"},
    (TemplateSpec, "worker_selector"): {"maxProperties": validate.MAX_LABELS},
    (Probe, "path"): {"pattern": r"^/\S*$", "maxLength": MAX_TEXT},
    (Probe, "port"): {"minimum": 0, "maximum": 65535},
    (Retention, "keep_last"): {"minimum": validate.MIN_KEPT, "maximum": validate.MAX_KEPT},
    (Resources, "pids"): {"minimum": 1, "maximum": validate.MAX_PIDS},
    (Asset, "url"): {"pattern": "^https?://", "maxLength": MAX_TEXT},
    (Asset, "sha256"): {"pattern": "^[0-9a-f]{64}$"},
    (Asset, "path"): {"pattern": "^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$", "maxLength": 255},
    (SandboxConfigSpec, "backend"): {"pattern": _LABEL},
}
#: The same of the items of lists.
ITEM_LIMITS: dict[tuple[type[Record], str], dict[str, Any]] = {
    (TemplateSpec, "ports"): {"minimum": 1, "maximum": 65535},
    (TemplateSpec, "command"): {"maxLength": MAX_WORD_CHARS},
    (TemplateSpec, "args"): {"maxLength": MAX_WORD_CHARS},
}
#: Rules between fields, in CEL.
RULES: dict[type[Record], list[dict[str, str]]] = {
    WorkerPoolSpec: [
        {
            "rule": "self.minReplicas <= self.maxReplicas",
            "message": "must not be more than maxReplicas",
            "fieldPath": ".minReplicas",
        },
        {
            "rule": "self.backend == oldSelf.backend",
            "message": "can't change: snapshots of its actors fit no other; make another pool",
            "fieldPath": ".backend",
        },
        {
            "rule": "(has(self.managedBy) ? self.managedBy : '') == (has(oldSelf.managedBy) ? oldSelf.managedBy : '')",
            "message": "can't change: who has made the workers of a pool ends them; make another pool",
            "fieldPath": ".managedBy",
        },
    ],
    TemplateSpec: [
        {
            "rule": "self == oldSelf",
            "message": "a template can't change, because actors were made from it; give the new one another name",
        }
    ],
}


def schema_of(cls: type[Record]) -> dict[str, Any]:
    """The structural schema of a record."""
    properties, required = {}, []
    for info in msgspec.structs.fields(cls):
        name = forms.name_of(info.name, info.type)
        properties[name] = _with_default(_field(cls, info.name, info.type), info)
        if info.required:
            required.append(name)
    made: dict[str, Any] = {"type": "object", "description": _describe(cls), "properties": properties}
    if required:
        made["required"] = required
    if cls in RULES:
        made["x-kubernetes-validations"] = RULES[cls]
    return made


def _field(cls: type[Record], field: str, hint: Any) -> dict[str, Any]:
    hint = forms.optional(hint) or hint
    limits = _limits(LIMITS, cls, field)
    if forms.is_duration(field, hint):
        return {"type": "string", "pattern": forms.DURATION, "maxLength": 64}
    if forms.is_quantity(field, hint):
        either = [{"type": "integer"}, {"type": "string"}]
        return {"anyOf": either, "pattern": forms.QUANTITY, "maxLength": 64, "x-kubernetes-int-or-string": True}
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        inner = schema_of(item) if _is_record(item) else {**_scalar(item), **_limits(ITEM_LIMITS, cls, field)}
        return {"type": "array", "items": inner, "maxItems": MAX_ITEMS, **limits}
    if origin is dict:
        texts = {"type": "string", "maxLength": MAX_WORD_CHARS}
        return {"type": "object", "additionalProperties": texts, "maxProperties": MAX_ITEMS, **limits}
    if _is_record(hint):
        return schema_of(hint)
    return {**_scalar(hint), **limits}


def _scalar(hint: Any) -> dict[str, Any]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"type": "string", "enum": [str(value) for value in hint]}
    if hint is bool:
        return {"type": "boolean"}
    if hint is int:
        return {"type": "integer", "format": "int64"}
    if hint is float:
        return {"type": "number"}
    assert hint is str, hint
    return {"type": "string", "maxLength": MAX_TEXT}


def _limits(table: dict[tuple[type[Record], str], dict[str, Any]], cls: type[Record], field: str) -> dict[str, Any]:
    """Also those that the record inherits."""
    for base in cls.__mro__:
        if (base, field) in table:
            return table[base, field]
    return {}


def _with_default(schema: dict[str, Any], info: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """What is not given is shown as what it then is."""
    if info.required or info.default_factory is not msgspec.NODEFAULT:
        return schema
    value = info.default
    if value is None or value in ("", (), {}, IMAGE_PORTS):  # the image says which ports, and that is not known here
        return schema
    if isinstance(value, Record):
        return {**schema, "default": {}}
    if forms.is_duration(info.name, info.type):
        value = format_duration(value)
    elif info.name == "cpus":
        value = format_cpus(value)
    elif forms.is_quantity(info.name, info.type):
        value = format_bytes(value)
    elif isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, enum.Enum):
        value = str(value)
    return {**schema, "default": value}


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)


def _describe(cls: type[Record]) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").replace("``", "").split())


# --- status -----------------------------------------------------------------------------------------------

_INT, _TEXT, _BOOL = {"type": "integer", "format": "int64"}, {"type": "string"}, {"type": "boolean"}
_CONDITIONS = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "required": ["type", "status"],
        "properties": {
            "type": _TEXT,
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": _TEXT,
            "message": _TEXT,
            "observedGeneration": _INT,
            "lastTransitionTime": {"type": "string", "format": "date-time"},
        },
    },
}
_SLOT = {
    "type": "object",
    "required": ["state", "term"],
    "properties": {
        "state": {"type": "string", "enum": ["R", "L", "D"]},
        "term": _INT,
        "podUID": _TEXT,
        "settled": _BOOL,
        "reason": _TEXT,
        "since": _INT,
    },
}
_LEDGER = {
    "type": "object",
    "description": "Which workers there are, were and are to be. Kept by the operator alone: edited by hand it counts "
    "as lost, and is made anew from the pods that there are.",
    "properties": {
        "poolUID": _TEXT,
        "epoch": _INT,
        "term": _INT,
        "nextOrdinal": _INT,
        "suspending": _BOOL,
        "slots": {"type": "object", "additionalProperties": _SLOT},
        "digest": _TEXT,
    },
}
_POOL_STATUS = {
    "type": "object",
    "properties": {
        "observedGeneration": _INT,
        "replicas": _INT,
        "readyReplicas": _INT,
        "desiredReplicas": _INT,
        "endingReplicas": _INT,
        "victims": {"type": "array", "items": _TEXT},
        "selector": _TEXT,
        "conditions": _CONDITIONS,
        "ledger": _LEDGER,
    },
}
_PLAIN_STATUS = {"type": "object", "properties": {"observedGeneration": _INT, "conditions": _CONDITIONS}}
_CONFIG_STATUS = {
    "type": "object",
    "properties": {**_PLAIN_STATUS["properties"], "pools": {"type": "array", "items": _TEXT}},  # type: ignore[dict-item]
}
_TEMPLATE_STATUS = {
    "type": "object",
    "properties": {**_PLAIN_STATUS["properties"], "goldenSnapshot": _TEXT, "operation": _TEXT},  # type: ignore[dict-item]
}


# --- the definitions --------------------------------------------------------------------------------------


def _column(name: str, kind: str, path: str, priority: int = 0) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def _ready(name: str = "Ready") -> dict[str, Any]:
    return _column(name, "string", f'.status.conditions[?(@.type=="{name}")].status')


_AGE = _column("Age", "date", ".metadata.creationTimestamp")


def definitions() -> list[dict[str, Any]]:
    """All of them, as they are given to the API server."""
    return [
        _define(
            "WorkerPool",
            "workerpools",
            ["wp"],
            schema_of(WorkerPoolSpec),
            _POOL_STATUS,
            [
                _column("Desired", "integer", ".status.desiredReplicas"),
                _column("Current", "integer", ".status.replicas"),
                _ready(),
                _column("Workers", "integer", ".status.readyReplicas"),
                _column("Backend", "string", ".spec.backend"),
                _column("Ending", "integer", ".status.endingReplicas", priority=1),
                _AGE,
            ],
            scale={
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        ),
        _define(
            "ActorTemplate",
            "actortemplates",
            ["at"],
            schema_of(TemplateSpec),
            _TEMPLATE_STATUS,
            [
                _ready(),
                _column("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
                _column("Image", "string", ".spec.image"),
                _column("Pool", "string", ".spec.pool", priority=1),
                _AGE,
            ],
        ),
        _define(
            "SandboxConfig",
            "sandboxconfigs",
            ["sbc"],
            schema_of(SandboxConfigSpec),
            _CONFIG_STATUS,
            [_column("Backend", "string", ".spec.backend"), _column("Pools", "string", ".status.pools"), _AGE],
            namespaced=False,
        ),
    ]


def _define(
    kind: str,
    plural: str,
    short: list[str],
    spec: dict[str, Any],
    status: dict[str, Any],
    columns: list[dict[str, Any]],
    *,
    scale: dict[str, str] | None = None,
    namespaced: bool = True,
) -> dict[str, Any]:
    subresources: dict[str, Any] = {"status": {}}
    if scale is not None:
        subresources["scale"] = scale
    # The names of pods, and the hosts of actors, are made from it.
    named = {"name": {"type": "string", "maxLength": 63, "pattern": _LABEL}}
    whole = {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": _TEXT,
            "kind": _TEXT,
            "metadata": {"type": "object", "properties": named},
            "spec": spec,
            "status": status,
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if namespaced else "Cluster",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": short,
                "categories": ["greenroom"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": whole},
                }
            ],
        },
    }


class _Plain(yaml.SafeDumper):
    """Without anchors: what is the same in two places is there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render() -> str:
    """All of them as YAML, for ``kubectl apply --server-side -f``."""
    head = "# Made by scripts/crds.py from the records of greenroom; don't edit.\n"
    return head + yaml.dump_all(definitions(), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
