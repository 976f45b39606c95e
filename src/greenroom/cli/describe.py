"""``describe``: everything about one thing, for people."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import click
import yaml

from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import Settings, common, settings
from greenroom.cli.kinds import Kind, pairs_text, progress, took
from greenroom.cli.manifest import camel, spec_to_plain
from greenroom.cli.output import Table, clean, pairs
from greenroom.core.quantity import human_age, human_bytes
from greenroom.core.records import Actor, Operation, Pool, Record, Snapshot, Template, Worker

#: How many of the latest operations are shown.
RECENT = 10

#: Shown in a form of their own.
_SPECIAL = {
    "name", "namespace", "spec", "phases", "layers", "files", "error", "endpoint", "rejected", "done_bytes",
    "total_bytes", "request_digest",
}  # fmt: skip


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="TYPE NAME... | TYPE/NAME...")
@common
def describe(what: tuple[str, ...]) -> None:
    """Shows everything about single things: state and why, phases in ms, snapshots, recent operations."""
    options = settings()
    with options.connect() as client:
        for number, (kind, name) in enumerate(kinds.targets(what)):
            if not name:
                raise click.UsageError(f"say which: describe {kind.name} NAME")
            if number:
                click.echo()
            _describe(client, options, kind, kind.fetch(client, options.namespace, name, options.read_timeout_s))


def _describe(client: Client, options: Settings, kind: Kind, record: Any) -> None:
    click.echo(kind.ref(record))
    pairs(_facts(record), "  ")
    if isinstance(record, (Template, Pool)):
        _section("Spec")
        text = yaml.safe_dump(spec_to_plain(record.spec), sort_keys=False, allow_unicode=True)
        click.echo("".join(f"  {line}\n" for line in text.splitlines()), nl=False)
    if isinstance(record, Operation):
        _rejected(record)
        _phases(record)
        _layers(record)
    if isinstance(record, Snapshot):
        _section("Files")
        table = Table(["  NAME", "SIZE", "SHA256"])
        table.print(["  " + f.name, human_bytes(f.size_bytes), f.sha256] for f in record.files)
    if isinstance(record, Actor):
        _table(client, options, kinds.SNAPSHOTS, "Snapshots", namespace=record.namespace, actor_uid=record.uid)
    if isinstance(record, (Actor, Template)):
        _operations(client, options, record)
    if isinstance(record, Worker):
        _table(client, options, kinds.ACTORS, "Actors", namespace="", worker=record.name)
    if isinstance(record, Pool):
        _table(client, options, kinds.WORKERS, "Workers", namespace="", pool=record.name)


def _facts(record: Any) -> Iterator[tuple[str, str]]:
    now = time.time()
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if name == "namespace" or (name == "name" and isinstance(record, Operation)):
            yield name, value
        elif name == "endpoint" and value is not None:
            yield "endpoint", _compact(value)
        elif name == "error" and value is not None:
            yield "error", f"{value.reason} ({value.code}): {value.message}"
            yield from value.metadata.items()
        elif name == "unsaved_since" and value is not None:
            yield "unsaved since", f"{_moment(value, now)}; what it did after that is lost"
        elif name not in _SPECIAL and value not in (None, "", (), {}, False):
            yield camel_to_words(name), _value(name, value, now)
    if isinstance(record, Snapshot):
        yield "size", human_bytes(record.size_bytes)
    if isinstance(record, Operation):
        if moved := progress(record):
            yield "progress", moved
        yield "took", took(record) or f"still going on, for {human_age(now - record.created_at)}"


def _value(name: str, value: Any, now: float) -> str:
    if isinstance(value, float) and name.endswith(("_at", "_since", "_seen", "_until")):
        return _moment(value, now)
    if isinstance(value, dict):
        return pairs_text(value, ", ")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if value is True:
        return "yes"
    return str(value)


def _moment(seconds: float, now: float) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
    ago = f"{human_age(now - seconds)} ago" if seconds <= now else f"in {human_age(seconds - now)}"
    return f"{stamp} ({ago})"


def camel_to_words(name: str) -> str:
    return name.removesuffix("_at").replace("_", " ")


def _compact(record: Record) -> str:
    fields = ((f, getattr(record, f)) for f in record.__struct_fields__)
    return ", ".join(f"{camel(f)} {v}" for f, v in fields if v)


def _section(title: str) -> None:
    click.echo(f"{title}:")


def _rejected(operation: Operation) -> None:
    if operation.rejected:
        _section("Workers that it could not have")
        pairs([(rejection.worker, rejection.why) for rejection in operation.rejected], "  ")


def _phases(operation: Operation) -> None:
    if operation.phases:
        _section("Phases")
        total = sum(p.seconds for p in operation.phases)
        rows = [(p.name, f"{p.seconds * 1000:10.1f} ms") for p in operation.phases]
        pairs([*rows, ("total", f"{total * 1000:10.1f} ms")], "  ")


def _layers(operation: Operation) -> None:
    if operation.layers:
        _section("Layers")
        table = Table(["  DIGEST", "PHASE", "DONE", "TOTAL"])
        table.print(
            ["  " + layer.digest[:19], layer.phase, human_bytes(layer.done_bytes), human_bytes(layer.total_bytes)]
            for layer in operation.layers
        )


def _operations(client: Client, options: Settings, record: Actor | Template) -> None:
    """The latest, newest last, with their phases in ms."""
    found = kinds.OPERATIONS.fetch_all(client, record.namespace, options.read_timeout_s, uid=record.uid)
    latest = deque(found, RECENT)
    if not latest:
        return
    _section("Recent operations")
    now = time.time()
    table = Table(["  ID", "KIND", "STATE", "CAUSE", "TOOK", "AGE", "PHASES (ms) OR ERROR"])
    table.print(
        [
            "  " + op.id,
            str(op.kind),
            str(op.state),
            op.cause,
            took(op),
            human_age(now - op.created_at),
            f"{op.error.reason}: {op.error.message}"
            if op.error
            else ", ".join(f"{p.name} {p.seconds * 1000:.1f}" for p in op.phases) or op.phase,
        ]
        for op in latest
    )


def _table(client: Client, options: Settings, kind: Kind, title: str, *, namespace: str, **filters: str) -> None:
    records = list(kind.fetch_all(client, namespace, options.read_timeout_s, **filters))
    if not records:
        return
    _section(title)
    columns = kind.shown_columns(wide=False, all_namespaces=namespace == "")
    table = Table([("  " if i == 0 else "") + name for i, (name, _) in enumerate(columns)])
    rows = [kind.row(record, columns) for record in records]
    table.print([["  " + clean(row[0]), *row[1:]] for row in rows])
