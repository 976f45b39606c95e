"""``get`` and ``watch``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import common, pair, settings, with_output
from greenroom.cli.kinds import BY_NAME, Column, Kind
from greenroom.cli.manifest import to_document
from greenroom.cli.output import Table, clean, dump


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="TYPE [NAME...] | TYPE/NAME...")
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@click.option(
    "-l",
    "--label",
    "labels",
    type=pair,
    metavar="KEY=VALUE",
    multiple=True,
    help="Only actors with this label; repeatable.",
)
@click.option("--state", metavar="STATE", help="Only those in this state, as Running or failed.")
@click.option("-w", "--watch", "watching", is_flag=True, help="Then show changes, until Ctrl-C.")
@with_output("table", "wide", "json", "yaml", "name")
@common
def get(
    what: tuple[str, ...], all_namespaces: bool, labels: Any, state: str | None, watching: bool, output: str
) -> None:
    """Lists actors, templates, pools, workers, snapshots, operations or replicas, or shows single ones.

    \b
    greenroom get operations --state=running -w    what is under way, followed
    """
    options, wanted = settings(), kinds.targets(what)
    kind = wanted[0][0]
    names = [name for _, name in wanted if name]
    if any(other is not kind for other, _ in wanted):
        raise click.UsageError("one type at a time, please")
    if labels and kind is not kinds.ACTORS:
        raise click.UsageError("only actors have labels")
    if watching and kind.list_only:
        raise click.UsageError(f"{kind.names[1]} can't be watched")
    filters: dict[str, Any] = {"labels": dict(labels)} if labels else {}
    if state is not None:
        filters["state"] = _state(kind, state, names)
    namespace = "" if all_namespaces else options.namespace
    with options.connect() as client:
        if names:
            records = [kind.fetch(client, options.namespace, name, options.read_timeout_s) for name in names]
        else:
            records = list(kind.fetch_all(client, namespace, options.read_timeout_s, **filters))
        seen = {kind.ref(r): r for r in records}
        changes = _changes(client, kind, namespace, names, filters, seen) if watching else iter(())
        followed = kind in (kinds.OPERATIONS, kinds.TEMPLATES) and output in ("table", "wide")
        if watching and followed and sys.stdout.isatty():
            columns = kind.shown_columns(wide=output == "wide", all_namespaces=all_namespaces)
            _follow_on_screen(kind, columns, records, changes)
            return
        table = _show(kind, records, output, all_namespaces, single=len(names) == 1)
        for deleted, record in changes:
            _show_change(kind, record, output, all_namespaces, table, deleted)


def _follow_on_screen(
    kind: Kind, columns: list[Column], records: list[Any], changes: Iterator[tuple[bool, Any]]
) -> None:
    from greenroom.cli.live import LiveTable  # rich takes a moment to import

    with LiveTable(kind, columns, records) as table:
        for deleted, record in changes:
            table.change(record, deleted)


def _state(kind: Kind, state: str, names: list[str]) -> str:
    if names:
        raise click.UsageError("--state is for lists: leave the names out, or it")
    found = kind.state(state)
    if not found:
        known = ", ".join(map(str, kind.states()))
        what = f"states of {kind.names[1]} are: {known}" if known else f"{kind.names[1]} have no states"
        raise click.UsageError(f"there is no state {state!r}; {what}")
    return found


def _show(kind: Kind, records: list[Any], output: str, all_namespaces: bool, *, single: bool) -> Table | None:
    if output in ("json", "yaml"):
        dump([to_document(r) for r in records], output, single=single)
        return None
    if output == "name":
        for record in records:
            click.echo(kind.ref(record))
        return None
    columns = kind.shown_columns(wide=output == "wide", all_namespaces=all_namespaces)
    table = Table([title for title, _ in columns])
    if records:
        table.print([kind.row(r, columns) for r in records])
    else:
        scope = f" in namespace {settings().namespace}" if kind.namespaced and not all_namespaces else ""
        click.echo(f"no {kind.names[1]}{scope}", err=True)
    return table


def _show_change(
    kind: Kind, record: Any, output: str, all_namespaces: bool, table: Table | None, deleted: bool
) -> None:
    if output in ("json", "yaml"):
        click.echo(json.dumps(to_document(record) | ({"deleted": True} if deleted else {})))
    elif table is None:
        click.echo(kind.ref(record))
    else:
        columns = kind.shown_columns(wide=output == "wide", all_namespaces=all_namespaces)
        cells = kind.row(record, columns)
        if deleted:
            titles = [title for title, _ in columns]
            cells[titles.index("STATE") if "STATE" in titles else -1] = "(deleted)"
        table.row(cells)


def _changes(
    client: Client, kind: Kind, namespace: str, names: list[str], filters: dict[str, Any], seen: dict[str, Any]
) -> Iterator[tuple[bool, Any]]:
    """What changes from ``seen`` (by reference) on. What was shown once is followed into any state."""
    labels, state = filters.get("labels", {}), filters.get("state")
    for event in events(client, [kind.name], namespace):
        record = record_of(event)
        if record is None:
            continue
        name = kind.ref(record).partition("/")[2]
        if (names and name not in names) or any(record.labels.get(k) != v for k, v in labels.items()):
            continue
        deleted = event.type == pb.WatchEvent.TYPE_DELETED
        before = seen.get(kind.ref(record))
        if not deleted and before is not None and (record.version < before.version or record == before):
            continue
        if state and record.state != state and before is None:
            continue
        seen[kind.ref(record)] = record
        yield deleted, record


def events(client: Client, names: list[str], namespace: str, timeout_s: float | None = None) -> Iterator[Any]:
    with client.system.Watch(pb.WatchRequest(kinds=names, namespace=namespace), timeout=timeout_s) as stream:
        yield from stream


def record_of(event: Any) -> Any:
    which = event.WhichOneof("record")
    return convert.from_message(BY_NAME[which].cls, getattr(event, which)) if which else None


# --- watch ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("types", nargs=-1, metavar="[TYPE...]")
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@with_output("table", "json")
@common
def watch(types: tuple[str, ...], all_namespaces: bool, output: str) -> None:
    """Shows every change of actors, templates, workers and operations as it happens, until Ctrl-C."""
    options = settings()
    found = [kinds.find(name) for name in types]
    if never := [kind.names[1] for kind in found if kind.list_only]:
        raise click.UsageError(f"{never[0]} can't be watched")
    wanted = [kind.name for kind in found] or ["actor", "template", "pool", "worker", "operation"]
    synced = False
    with options.connect() as client:
        for event in events(client, wanted, "" if all_namespaces else options.namespace):
            if event.type == pb.WatchEvent.TYPE_SYNCED:
                synced = True
                click.echo("watching; Ctrl-C ends", err=True)
                continue
            record = record_of(event)
            if not synced or record is None:
                continue
            deleted = event.type == pb.WatchEvent.TYPE_DELETED
            if output == "json":
                click.echo(json.dumps(to_document(record) | ({"deleted": True} if deleted else {})))
            else:
                click.echo(_line(record, deleted))


def _line(record: Any, deleted: bool) -> str:
    kind = BY_NAME[type(record).__name__.lower()]
    moment = time.strftime("%H:%M:%S")
    if deleted:
        return f"{moment}  {kind.ref(record)}  deleted"
    what = [str(getattr(record, "kind", "")), getattr(record, "name", "")] if kind is kinds.OPERATIONS else []
    parts = [*what, str(getattr(record, "state", "changed")), getattr(record, "phase", "")]
    parts += [str(getattr(record, "reason", "")), getattr(record, "message", "")]
    parts += [f"on {record.worker}"] if getattr(record, "worker", "") else []
    return f"{moment}  {kind.ref(record)}  {clean('  '.join(p for p in parts if p))}"
