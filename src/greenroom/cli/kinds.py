"""The kinds of things that `get`, `describe`, `delete` and `wait` know: names, columns, and how they are fetched."""

from __future__ import annotations

import enum
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.core.errors import NotFound
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.quantity import human_age, human_bytes
from greenroom.core.records import (
    Actor,
    LayerProgress,
    Operation,
    OperationState,
    Pool,
    Replica,
    Snapshot,
    Template,
    TemplateState,
    Worker,
)

Column = tuple[str, Callable[[Any, float], str]]


def _age(record: Any, now: float) -> str:
    return human_age(now - record.created_at)


def _text(field: str) -> Callable[[Any, float], str]:
    return lambda record, now: str(getattr(record, field))


def _since(field: str) -> Callable[[Any, float], str]:
    def show(record: Any, now: float) -> str:
        value = getattr(record, field)
        return human_age(now - value) if value else ""

    return show


def pairs_text(values: Mapping[str, str], separator: str = ",") -> str:
    """``a=b,c=d``"""
    return separator.join(f"{key}={value}" for key, value in sorted(values.items()))


@dataclass(frozen=True, slots=True)
class Kind:
    """``names``: the singular first, then plural and short forms. ``wide``: further columns of ``-o wide``.
    ``service``: the stub that lists it. ``list_only``: there is no call for a single one, and no watch."""

    cls: Any
    names: tuple[str, ...]
    namespaced: bool
    columns: tuple[Column, ...]
    wide: tuple[Column, ...] = ()
    service: str = ""
    list_only: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    def fetch(self, client: Client, namespace: str, name: str, timeout_s: float) -> Any:
        """Raises `NotFound`."""
        if self.list_only:
            for record in self.fetch_all(client, namespace, timeout_s):
                if record.name == name:
                    return record
            raise NotFound(
                f"{self.name} {name} does not exist; `greenroom get {self.names[1]}` lists those there are",
                reason=f"{self.name.upper()}_NOT_FOUND",
            )
        stub = getattr(client, f"{self.name}s")
        request = getattr(pb, f"Get{self.cls.__name__}Request")()
        if self.cls in (Snapshot, Operation):
            request.id = name
        else:
            request.name = name
        if self.cls in (Actor, Template):
            request.namespace = namespace or DEFAULT_NAMESPACE
        message = getattr(stub, f"Get{self.cls.__name__}")(request, timeout=timeout_s)
        return convert.from_message(self.cls, message)

    def fetch_all(self, client: Client, namespace: str, timeout_s: float, **filters: Any) -> Iterator[Any]:
        """All of them, page by page; ``namespace`` "" means all."""
        stub = getattr(client, self.service or f"{self.name}s")
        request = getattr(pb, f"List{self.cls.__name__}sRequest")(**filters)
        if self.namespaced:
            request.namespace = namespace
        while True:
            page = getattr(stub, f"List{self.cls.__name__}s")(request, timeout=timeout_s)
            for message in getattr(page, f"{self.name}s"):
                yield convert.from_message(self.cls, message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def shown_columns(self, *, wide: bool, all_namespaces: bool) -> list[Column]:
        first: list[Column] = [("NAMESPACE", _text("namespace"))] if all_namespaces and self.namespaced else []
        return [*first, *self.columns, *(self.wide if wide else ())]

    def row(self, record: Any, columns: list[Column]) -> list[str]:
        now = time.time()
        return [show(record, now) for _, show in columns]

    def states(self) -> list[enum.StrEnum]:
        """In the order of their life; [] when these have none."""
        state = typing.get_type_hints(self.cls).get("state")
        return list(state) if state is not None else []

    def state(self, text: str) -> str:
        """The state that is meant, in any case of letters; "" when there is none such."""
        return next((str(state) for state in self.states() if state.lower() == text.lower()), "")

    def ref(self, record: Any) -> str:
        """``actor/counter``"""
        return f"{self.name}/{record.id if self.cls in (Snapshot, Operation) else record.name}"


def took(operation: Operation) -> str:
    if operation.finished_at is None:
        return ""
    return f"{(operation.finished_at - operation.created_at) * 1000:.0f} ms"


def bytes_of(operation: Operation) -> tuple[int, int]:
    """Bytes done and in all (0: not known) of the phase that an operation is in; those of an image are its layers'."""
    if operation.done_bytes or operation.total_bytes or not operation.layers:
        return operation.done_bytes, operation.total_bytes
    return layer_bytes(operation.layers)


def layer_bytes(layers: Sequence[LayerProgress]) -> tuple[int, int]:
    """Bytes done and in all of an image's layers. One that is not unpacked yet, while others are, has none done."""
    total = sum(layer.total_bytes for layer in layers) if all(layer.total_bytes for layer in layers) else 0
    unpacking = any(layer.phase == "unpack" for layer in layers)
    return sum(layer.done_bytes for layer in layers if not unpacking or layer.phase == "unpack"), total


def template_progress(template: Template) -> str:
    """``download 25% of 48.0 MiB``; of one that failed why, as ``IMAGE_NOT_FOUND``; else ""."""
    if template.state is TemplateState.FAILED:
        return template.reason
    if template.state is not TemplateState.PREPARING:
        return ""
    done, total = layer_bytes(template.layers)
    far = f" {done * 100 // total}% of {human_bytes(total)}" if total else ""
    return f"{template.phase}{far}"


def progress(operation: Operation) -> str:
    """``25% of 48.0 MiB``; "" for one that has ended, or whose phase moves no bytes."""
    done, total = bytes_of(operation)
    if operation.state is not OperationState.RUNNING or not (done or total):
        return ""
    return f"{done * 100 // total}% of {human_bytes(total)}" if total else human_bytes(done)


def _operation_state(operation: Operation, now: float) -> str:
    cancelling = operation.state is OperationState.RUNNING and operation.cancel_requested
    return "Cancelling" if cancelling else str(operation.state)


def _failures(worker: Worker, now: float) -> str:
    if worker.quarantined_until > now:
        return f"{worker.failures}, quarantine {human_age(worker.quarantined_until - now)}"
    return str(worker.failures)


def _worker_state(worker: Worker, now: float) -> str:
    return f"{worker.state}, distrusted" if worker.distrust else str(worker.state)


def _images(worker: Worker) -> str:
    """``3.2 GiB``, and how much of it is too much."""
    over = f", {human_bytes(worker.image_over_bytes)} over" if worker.image_over_bytes else ""
    return f"{human_bytes(worker.image_bytes)}{over}"


ACTORS = Kind(
    Actor,
    ("actor", "actors", "ac"),
    True,
    (
        ("NAME", _text("name")),
        ("STATE", _text("state")),
        ("TEMPLATE", _text("template")),
        ("WORKER", _text("worker")),
        ("WAKES", _text("wakes")),
        ("AGE", _age),
    ),
    (
        ("SINCE", _since("state_since")),
        ("DURABLE", _since("durable_at")),
        ("SNAPSHOT", _text("snapshot")),
        ("REASON", _text("reason")),
        ("UID", _text("uid")),
    ),
)
TEMPLATES = Kind(
    Template,
    ("template", "templates", "tpl"),
    True,
    (
        ("NAME", _text("name")),
        ("STATE", _text("state")),
        ("PROGRESS", lambda t, now: template_progress(t)),
        ("IMAGE", lambda t, now: t.spec.image),
        ("POOL", lambda t, now: t.spec.pool),
        ("AGE", _age),
    ),
    (
        ("REASON", _text("reason")),
        ("DIGEST", lambda t, now: t.image_digest[:19]),
        ("GOLDEN", _text("golden_snapshot")),
    ),
)
POOLS = Kind(
    Pool,
    ("pool", "pools", "wp", "workerpool", "workerpools"),
    False,
    (
        ("NAME", _text("name")),
        ("WORKERS", lambda p, now: str(p.spec.replicas)),
        ("SLOTS", lambda p, now: str(p.spec.slots)),
        ("BACKEND", lambda p, now: p.spec.backend),
        ("AGE", _age),
    ),
)
WORKERS = Kind(
    Worker,
    ("worker", "workers", "wk"),
    False,
    (
        ("NAME", _text("name")),
        ("POOL", _text("pool")),
        ("STATE", _worker_state),
        ("USED", lambda w, now: f"{w.used}/{w.capacity}"),
        ("BACKEND", _text("backend")),
        ("FAILURES", _failures),
        ("SEEN", _since("last_seen")),
        ("LABELS", lambda w, now: pairs_text(w.labels)),
    ),
    (
        ("CORDON", _text("cordon")),
        ("EPOCH", _text("epoch")),
        ("IMAGES", lambda w, now: _images(w)),
        ("FINGERPRINT", _text("fingerprint")),
        ("MESSAGE", _text("message")),
    ),
)
SNAPSHOTS = Kind(
    Snapshot,
    ("snapshot", "snapshots", "snap"),
    True,
    (
        ("ID", _text("id")),
        ("ACTOR", _text("actor")),
        ("TEMPLATE", _text("template")),
        ("STATE", _text("state")),
        ("SCOPE", _text("scope")),
        ("SIZE", lambda s, now: human_bytes(s.size_bytes)),
        ("TAGS", lambda s, now: ",".join(s.tags)),
        ("AGE", _age),
    ),
    (("WORKER", _text("worker")), ("PARENT", _text("parent")), ("FINGERPRINT", _text("fingerprint"))),
)
OPERATIONS = Kind(
    Operation,
    ("operation", "operations", "op", "ops"),
    True,
    (
        ("ID", _text("id")),
        ("KIND", _text("kind")),
        ("NAME", _text("name")),
        ("STATE", _operation_state),
        ("PHASE", _text("phase")),
        ("PROGRESS", lambda o, now: progress(o)),
        ("WORKER", _text("worker")),
        ("OWNER", _text("owner")),
        ("TOOK", lambda o, now: took(o)),
        ("AGE", _age),
    ),
    (
        ("CAUSE", _text("cause")),
        ("ATTEMPTS", _text("attempts")),
        ("TAKEOVERS", _text("takeovers")),
        ("ERROR", lambda o, now: o.error.reason if o.error else ""),
    ),
)
REPLICAS = Kind(
    Replica,
    ("replica", "replicas", "rep"),
    False,
    (
        ("NAME", _text("name")),
        ("INCARNATION", _text("incarnation")),
        ("LINK", _text("link")),
        ("STARTED", _since("started_at")),
        ("SEEN", _since("seen_at")),
    ),
    service="system",
    list_only=True,
)
KINDS = (ACTORS, TEMPLATES, POOLS, WORKERS, SNAPSHOTS, OPERATIONS, REPLICAS)
BY_NAME = {name: kind for kind in KINDS for name in kind.names}


def find(name: str) -> Kind:
    kind = BY_NAME.get(name.lower())
    if kind is None:
        raise click.UsageError(f"there is no type {name!r}; types are: {', '.join(k.names[1] for k in KINDS)}")
    return kind


def targets(arguments: tuple[str, ...]) -> list[tuple[Kind, str]]:
    """``TYPE NAME...`` or ``TYPE/NAME...`` -> (kind, name)s; ``TYPE`` alone -> [(kind, "")]."""
    if "/" in arguments[0]:
        found = []
        for argument in arguments:
            kind, slash, name = argument.partition("/")
            if not slash or not name:
                raise click.UsageError(f"{argument!r} is not TYPE/NAME")
            found.append((find(kind), name))
        return found
    kind_ = find(arguments[0])
    if any("/" in name for name in arguments[1:]):
        raise click.UsageError("write either TYPE NAME... or TYPE/NAME...")
    return [(kind_, name) for name in arguments[1:]] or [(kind_, "")]
