"""YAML manifests <-> records, by the definitions of the records.

A manifest is a Kubernetes-style document: ``apiVersion``, ``kind``, ``metadata``, ``spec``. What may stand in ``spec``
are the record's fields: in camelCase, a duration without ``_s`` (``timeout: 60s``), a size without ``_bytes``
(``memory: 512Mi``), ``cpus`` as ``cpu`` (``500m``).

Nothing is guessed: an unknown field, a wrong type and a bad value are problems, each with its file, line and field
path, and all of them are reported together.
"""

from __future__ import annotations

import enum
import functools
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

from greenroom.api import validate
from greenroom.core import quantity
from greenroom.core.errors import GreenroomError, InvalidArgument
from greenroom.core.names import DEFAULT_NAMESPACE, check_label
from greenroom.core.records import PoolSpec, Record, TemplateSpec

API_VERSION = "greenroom.dev/v1alpha1"
#: Bytes of one file and documents of one `apply`: far above what people write, below what hurts.
MAX_FILE_BYTES = 1 << 20
MAX_DOCUMENTS = 1000
#: Further problems help nobody.
MAX_PROBLEMS = 20

#: Kind in a manifest -> (record of its spec, whether it has a namespace, rules).
SPECS: dict[str, tuple[type[Record], bool, Callable[[Any], list[validate.Violation]]]] = {
    "WorkerPool": (PoolSpec, False, validate.pool_spec),
    "Template": (TemplateSpec, True, validate.template_spec),
}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One document. ``source`` is ``file:line``; ``namespace`` is "" where there is none."""

    source: str
    kind: str
    namespace: str
    name: str
    labels: dict[str, str]
    spec: Any


class ManifestError(InvalidArgument):
    """All problems of the given manifests, one a line."""

    def __init__(self, problems: list[str]) -> None:
        more = len(problems) - MAX_PROBLEMS
        shown = problems[:MAX_PROBLEMS] + ([f"and {more} more problems"] if more > 0 else [])
        super().__init__("\n".join([*shown, "nothing was applied"]), reason="INVALID_MANIFEST")
        self.problems = problems


# --- files ------------------------------------------------------------------------------------------------------


def load(paths: Iterable[str], default_namespace: str = DEFAULT_NAMESPACE) -> list[Manifest]:
    """Reads files, directories (their ``*.yaml``, ``*.yml`` and ``*.json``) and ``-`` (stdin); pools come first.

    Raises:
        ManifestError: there is any problem.
    """
    problems: list[str] = []
    found: list[Manifest] = []
    for name, text in _texts(paths, problems):
        found += parse(text, name, default_namespace, problems)
    seen: dict[tuple[str, str, str], str] = {}
    for one in found:
        first = seen.setdefault((one.kind, one.namespace, one.name), one.source)
        if first != one.source:
            problems.append(f"{one.source}: metadata.name: {one.kind} {one.name} is there already, at {first}")
    if not found and not problems:
        problems.append("there is no document in " + " ".join(paths))
    if problems:
        raise ManifestError(problems)
    return sorted(found, key=lambda m: list(SPECS).index(m.kind))


def _texts(paths: Iterable[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    for given in paths:
        if given == "-":
            yield "<stdin>", sys.stdin.read(MAX_FILE_BYTES + 1)
            continue
        path = Path(given)
        files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml", ".json")) if path.is_dir() else [path]
        if not files:
            problems.append(f"{given}: this directory has no .yaml, .yml or .json file")
        for file in files:
            try:
                with file.open(encoding="utf-8") as stream:
                    yield str(file), stream.read(MAX_FILE_BYTES + 1)
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}")


def parse(text: str, name: str, default_namespace: str, problems: list[str]) -> list[Manifest]:
    """The documents of one file; problems are added to ``problems``."""
    if len(text) > MAX_FILE_BYTES:
        problems.append(f"{name}: is larger than {MAX_FILE_BYTES >> 20} MiB")
        return []
    found = []
    try:
        for number, node in enumerate(yaml.compose_all(text, Loader=yaml.SafeLoader)):
            if number >= MAX_DOCUMENTS:
                problems.append(f"{name}: holds more than {MAX_DOCUMENTS} documents")
                break
            if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
                continue  # nothing between two ---
            manifest = _Reader(name, problems).document(node, default_namespace)
            if manifest is not None:
                found.append(manifest)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(f"{name}:{mark.line + 1 if mark else 1}: is not YAML: {error.problem or error}")
    except yaml.YAMLError as error:
        problems.append(f"{name}: is not YAML: {error}")
    except RecursionError:
        problems.append(f"{name}: is nested too deeply")
    return found


# --- one document -----------------------------------------------------------------------------------------------


class _Bad(Exception):
    """A value that can't be used; already reported."""


@dataclass
class _Reader:
    """Reads composed nodes, which know their line. ``nodes``: where each field of ``spec`` stands, by record path."""

    name: str
    problems: list[str]
    nodes: dict[Path_, Any] = field(default_factory=dict)

    def document(self, node: Any, default_namespace: str) -> Manifest | None:
        before = len(self.problems)
        try:
            top = self.fields(node, ("apiVersion", "kind", "metadata", "spec", "status"), ())
            if self.text(self.required(top, "apiVersion", node, ()), ("apiVersion",)) != API_VERSION:
                self.report(top["apiVersion"], ("apiVersion",), f"must be {API_VERSION}")
            kind = self.text(self.required(top, "kind", node, ()), ("kind",))
            if kind not in SPECS:
                self.report(top["kind"], ("kind",), f"must be one of {', '.join(sorted(SPECS))}, not {kind!r}")
                return None
            spec_cls, has_namespace, rules = SPECS[kind]
            name, namespace, labels = self.metadata(
                self.required(top, "metadata", node, ()), default_namespace if has_namespace else ""
            )
            spec = self.record(spec_cls, self.required(top, "spec", node, ()), ("spec",), ())
        except _Bad:
            return None
        for violation in rules(spec):
            self.report(self.at(violation.path, node), ("spec", *_shown(spec_cls, violation.path)), violation.message)
        if len(self.problems) > before:
            return None
        return Manifest(self.where(node), kind, namespace, name, labels, spec)

    def metadata(self, node: Any, default_namespace: str) -> tuple[str, str, dict[str, str]]:
        ignored = ("uid", "creationTimestamp")  # so that what `get -o yaml` shows can be applied
        allowed = ("name", "namespace", "labels", *ignored)
        given = self.fields(node, allowed, ("metadata",))
        name = self.text(self.required(given, "name", node, ("metadata",)), ("metadata", "name"))
        self.checked(given["name"], ("metadata", "name"), lambda: check_label("resource", name))
        namespace = default_namespace
        if "namespace" in given:
            if not default_namespace:
                self.report(given["namespace"], ("metadata", "namespace"), "this kind has no namespace; leave it out")
            namespace = self.text(given["namespace"], ("metadata", "namespace"))
            self.checked(given["namespace"], ("metadata", "namespace"), lambda: check_label("namespace", namespace))
        labels: dict[str, str] = {}
        if "labels" in given:
            labels = self.strings(given["labels"], ("metadata", "labels"))
            self.checked(given["labels"], ("metadata", "labels"), lambda: validate.labels(labels))
        return name, namespace, labels

    # --- values ---

    def record(self, cls: type[Record], node: Any, path: Path_, key: Path_) -> Any:
        schema = _schema(cls)
        given = self.fields(node, tuple(schema), path)
        values, bad = {}, False
        for name, child in given.items():
            column = schema[name]
            self.nodes[*key, column.field] = child
            if child.tag == _NULL:
                continue  # as Kubernetes: null means not given
            try:
                values[column.field] = self.value(column, child, (*path, name), (*key, column.field))
            except _Bad:
                bad = True
        for name, column in schema.items():
            if column.required and column.field not in values and name not in given:
                self.report(node, (*path, name), "is required")
                bad = True
        if bad:
            raise _Bad
        return cls(**values)

    def value(self, column: _Column, node: Any, path: Path_, key: Path_) -> Any:
        hint = column.hint
        if (parse := column.parse) is not None:
            if column.form == "duration" and node.tag == _INT and node.value != "0":
                self.report(node, path, f"needs a unit: write {node.value}s for seconds")
                raise _Bad
            if node.tag not in (_STR, _INT, _FLOAT):
                raise self.wrong(node, path, f"a {column.form}")
            return self.checked(node, path, lambda: parse(node.value))
        origin = typing.get_origin(hint)
        if origin is tuple:
            item = typing.get_args(hint)[0]
            if not isinstance(node, yaml.SequenceNode):
                raise self.wrong(node, path, "a list")
            for index, child in enumerate(node.value):
                self.nodes[*key, index] = child
            return tuple(self.scalar(item, child, (*path, index)) for index, child in enumerate(node.value))
        if origin is dict:
            values = self.strings(node, path)
            self.nodes |= {(*key, k.value): v for k, v in node.value}
            return values
        if issubclass(hint, Record):
            return self.record(hint, node, path, key)
        return self.scalar(hint, node, path)

    def scalar(self, hint: Any, node: Any, path: Path_) -> Any:
        if issubclass(hint, enum.StrEnum):
            text = self.text(node, path)
            if text not in set(hint):
                self.report(node, path, f"must be one of {', '.join(hint)}, not {text!r}")
                raise _Bad
            return hint(text)
        if hint is str:
            return self.text(node, path)
        tag, word = (_BOOL, "true or false") if hint is bool else (_INT, "a whole number")
        if node.tag != tag:
            raise self.wrong(node, path, word)
        return yaml.constructor.SafeConstructor().construct_object(node)

    def text(self, node: Any, path: Path_) -> str:
        if node.tag != _STR:
            hint = f'a string: write "{node.value}"' if isinstance(node, yaml.ScalarNode) else "a string"
            raise self.wrong(node, path, hint)
        return str(node.value)

    def strings(self, node: Any, path: Path_) -> dict[str, str]:
        given = self.fields(node, None, path)
        return {name: self.text(child, (*path, name)) for name, child in given.items()}

    def fields(self, node: Any, allowed: tuple[str, ...] | None, path: Path_) -> dict[str, Any]:
        """The entries of a mapping, each name once and among ``allowed``."""
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(node, path, "a mapping (name: value)")
        found: dict[str, Any] = {}
        for key, child in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            if allowed is not None and name not in allowed:
                self.report(key, (*path, name), f"unknown field; known are: {', '.join(sorted(allowed))}")
            elif name in found:
                self.report(key, (*path, name), "is there twice")
            else:
                found[name] = child
        return found

    # --- reporting ---

    def required(self, given: dict[str, Any], name: str, node: Any, path: Path_) -> Any:
        if name not in given:
            self.report(node, (*path, name), "is required")
            raise _Bad
        return given[name]

    def checked(self, node: Any, path: Path_, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except GreenroomError as error:
            self.report(node, path, error.message)
        except ValueError as error:
            self.report(node, path, str(error))
        raise _Bad

    def wrong(self, node: Any, path: Path_, wanted: str) -> _Bad:
        self.report(node, path, f"must be {wanted}, not {_NAMES.get(node.tag, 'this')}")
        return _Bad()

    def report(self, node: Any, path: Path_, message: str) -> None:
        self.problems.append(f"{self.where(node)}: {validate.join(path) or 'document'}: {message}")

    def where(self, node: Any) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def at(self, path: Path_, default: Any) -> Any:
        """The node of a record path, or of the nearest one above that was given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.nodes:
                return self.nodes[path[:length]]
        return default


_TAG = "tag:yaml.org,2002:"
_STR, _INT, _FLOAT, _BOOL, _NULL = (_TAG + t for t in ("str", "int", "float", "bool", "null"))
_NAMES = {
    _STR: "a string",
    _INT: "a number",
    _FLOAT: "a number",
    _BOOL: "true or false",
    _NULL: "nothing",
    _TAG + "seq": "a list",
    _TAG + "map": "a mapping",
    _TAG + "timestamp": "a date",
}


# --- names and forms, from the records --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """One field: how it is called and written in YAML. ``parse`` is set where a string stands for a number."""

    field: str
    hint: Any
    required: bool
    default: Any
    form: str = ""
    parse: Callable[[str], Any] | None = None
    show: Callable[[Any], Any] | None = None


@functools.cache
def _schema(cls: type[Record]) -> dict[str, _Column]:
    """YAML name -> field."""
    schema = {}
    for info in msgspec.structs.fields(cls):
        yaml_name, form, parse, show = _form(info.name, info.type)
        schema[yaml_name] = _Column(info.name, info.type, info.required, _default(info), form, parse, show)
    return schema


def _default(info: msgspec.structs.FieldInfo) -> Any:
    return info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory()


def _form(name: str, hint: Any) -> tuple[str, str, Callable[[str], Any] | None, Callable[[Any], Any] | None]:
    if name.endswith("_s") and hint is float:
        return camel(name.removesuffix("_s")), "duration", quantity.parse_duration, quantity.format_duration
    if name.endswith("_bytes") and hint is int:
        return camel(name.removesuffix("_bytes")), "quantity", quantity.parse_bytes, quantity.format_bytes
    if name == "cpus":
        return "cpu", "quantity", lambda text: float(quantity.parse_quantity(text)), quantity.format_cpus
    return camel(name), "", None, None


def _shown(cls: type[Record], path: Path_) -> Path_:
    """A record path as YAML has it."""
    shown: list[str | int] = []
    current: Any = cls
    for part in path:
        columns = {c.field: (n, c) for n, c in _schema(current).items()} if _is_record(current) else {}
        name, column = columns.get(part, (part, None)) if isinstance(part, str) else (part, None)
        shown.append(name)
        current = column.hint if column else None
    return tuple(shown)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Record)


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


# --- records as documents ---------------------------------------------------------------------------------------

#: Fields that go to metadata; the rest of a record is its status, except ``spec``.
_METADATA = {"name": "name", "id": "name", "namespace": "namespace", "uid": "uid", "labels": "labels"}
_KIND_NAMES = {"Pool": "WorkerPool"}


def to_document(record: Record) -> dict[str, Any]:
    """A record as Kubernetes would show it; of a template or pool it can be applied again."""
    metadata: dict[str, Any] = {}
    status: dict[str, Any] = {}
    document: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": _KIND_NAMES.get(type(record).__name__, type(record).__name__),
        "metadata": metadata,
    }
    taken = "id" if "id" in record.__struct_fields__ else "name"
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if name in _METADATA and (name != "name" or taken == "name"):
            if value:
                metadata[_METADATA[name]] = value
        elif name == "created_at":
            metadata["creationTimestamp"] = rfc3339(value)
        elif name == "spec":
            document["spec"] = spec_to_plain(value)
        elif not _is_empty(name, value):
            status["actor" if name == "name" else camel(name)] = _plain(name, value)
    if status:
        document["status"] = status
    return document


def spec_to_plain(record: Record) -> dict[str, Any]:
    """A spec as a manifest has it: every field, also those with their default, but not those that are empty by default
    and are so still."""
    plain: dict[str, Any] = {}
    for name, column in _schema(type(record)).items():
        value = getattr(record, column.field)
        if value in ("", (), {}) and value == column.default:
            continue
        if column.show is not None:
            plain[name] = column.show(value)
        elif isinstance(value, Record):
            plain[name] = spec_to_plain(value)
        elif isinstance(value, tuple):
            plain[name] = list(value)
        else:
            plain[name] = str(value) if isinstance(value, enum.StrEnum) else value
    return plain


#: Fields that hold seconds since the epoch.
_TIMES = ("_at", "_since", "_seen", "_until")


def plain(record: Record, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every field that is not empty, in camelCase, times as RFC 3339 has them."""
    fields = ((name, getattr(record, name)) for name in record.__struct_fields__ if name not in leave_out)
    return {camel(name): _plain(name, value) for name, value in fields if not _is_empty(name, value)}


def _is_empty(name: str, value: Any) -> bool:
    """A time of 0 stands for never."""
    return value in (None, "", (), {}) or (name.endswith(_TIMES) and not value)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, enum.StrEnum):
        return str(value)
    if isinstance(value, float) and name.endswith(_TIMES):
        return rfc3339(value)
    if isinstance(value, Record):
        return plain(value)
    if isinstance(value, tuple):
        return [_plain(name, item) for item in value]
    return value


def rfc3339(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
