"""``get``, ``wait`` and ``watch``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import Settings, common, duration, pair, settings, with_output
from greenroom.cli.kinds import BY_NAME, Kind
from greenroom.cli.manifest import to_document
from greenroom.cli.output import Table, clean, dump
from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, GreenroomError, NotFound


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
@click.option("-w", "--watch", "watching", is_flag=True, help="Then show changes, until Ctrl-C.")
@with_output("table", "wide", "json", "yaml", "name")
@common
def get(what: tuple[str, ...], all_namespaces: bool, labels: Any, watching: bool, output: str) -> None:
    """Lists actors, templates, pools, workers, snapshots or operations, or shows single ones."""
    options, wanted = settings(), kinds.targets(what)
    kind = wanted[0][0]
    names = [name for _, name in wanted if name]
    if any(other is not kind for other, _ in wanted):
        raise click.UsageError("one type at a time, please")
    if labels and kind is not kinds.ACTORS:
        raise click.UsageError("only actors have labels")
    namespace = "" if all_namespaces else options.namespace
    with options.connect() as client:
        if names:
            records = [kind.fetch(client, options.namespace, name, options.read_timeout_s) for name in names]
        else:
            filters = {"labels": dict(labels)} if labels else {}
            records = list(kind.fetch_all(client, namespace, options.read_timeout_s, **filters))
        table = _show(kind, records, output, all_namespaces, single=len(names) == 1)
        if watching:
            seen = {kind.ref(r): r.version for r in records}
            for deleted, record in _changes(client, kind, namespace, names, dict(labels), seen):
                _show_change(kind, record, output, all_namespaces, table, deleted)


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
    client: Client, kind: Kind, namespace: str, names: list[str], labels: dict[str, str], seen: dict[str, int]
) -> Iterator[tuple[bool, Any]]:
    for event in _events(client, [kind.name], namespace):
        record = _record(event)
        if record is None:
            continue
        name = kind.ref(record).partition("/")[2]
        if (names and name not in names) or any(record.labels.get(k) != v for k, v in labels.items()):
            continue
        deleted = event.type == pb.WatchEvent.TYPE_DELETED
        if not deleted and record.version <= seen.get(kind.ref(record), 0):
            continue
        yield deleted, record


def _events(client: Client, names: list[str], namespace: str, timeout_s: float | None = None) -> Iterator[Any]:
    with client.system.Watch(pb.WatchRequest(kinds=names, namespace=namespace), timeout=timeout_s) as stream:
        yield from stream


def _record(event: Any) -> Any:
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
    wanted = [kinds.find(name).name for name in types] or ["actor", "template", "pool", "worker", "operation"]
    synced = False
    with options.connect() as client:
        for event in _events(client, wanted, "" if all_namespaces else options.namespace):
            if event.type == pb.WatchEvent.TYPE_SYNCED:
                synced = True
                click.echo("watching; Ctrl-C ends", err=True)
                continue
            record = _record(event)
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


# --- wait -------------------------------------------------------------------------------------------------------

#: What a condition means, by kind: condition -> state.
CONDITIONS = {
    "actor": {"ready": "Running", "running": "Running", "suspended": "Suspended"},
    "template": {"ready": "Ready"},
    "operation": {"done": "Done", "complete": "Done"},
    "worker": {"ready": "Active"},
}
#: States that lead nowhere by themselves: waiting for another one is in vain.
HOPELESS = {"template": {"Failed"}, "operation": {"Failed", "Done"}}


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="TYPE NAME | TYPE/NAME")
@click.option(
    "--for", "goal", metavar="GOAL", help="state=STATE, condition=Ready or delete; without it: ready, or done."
)
@click.option(
    "--timeout", type=duration, metavar="DURATION", default=300.0, show_default="5m", help="Then it exits with 124."
)
@common
def wait(what: tuple[str, ...], goal: str | None, timeout: float) -> None:
    """Waits until one thing is in a state, has a condition or is gone.

    \b
    greenroom wait template counter --for=condition=Ready
    greenroom wait actor mine --for=state=Suspended --timeout=30s
    greenroom wait operation 0198c... (until it is done)
    """
    options, wanted = settings(), kinds.targets(what)
    if len(wanted) != 1 or not wanted[0][1]:
        raise click.UsageError("name one thing: TYPE NAME or TYPE/NAME")
    kind, name = wanted[0]
    state = _goal(kind, goal)
    with options.connect() as client:
        try:
            _wait(client, options, kind, name, state, timeout)
        except DeadlineExceeded as error:
            if error.reason != "REQUEST_TIMEOUT":
                raise
            raise DeadlineExceeded(
                f"{kind.name}/{name} was not {state or 'deleted'} after {timeout:g} s; "
                f"`greenroom describe {kind.name} {name}` tells more"
            ) from None
    click.echo(f"{kind.name}/{name} {state.lower() or 'deleted'}")


def _goal(kind: Kind, goal: str | None) -> str:
    """The state to wait for; "" for: gone."""
    if goal is None:
        goal = "condition=done" if kind is kinds.OPERATIONS else "condition=ready"
    if goal == "delete":
        return ""
    what, _, value = goal.partition("=")
    states = {str(s).lower(): str(s) for s in _states(kind)}
    if what == "condition" and value.lower() in CONDITIONS.get(kind.name, {}):
        return CONDITIONS[kind.name][value.lower()]
    if what == "state" and value.lower() in states:
        return states[value.lower()]
    known = [f"condition={c.capitalize()}" for c in CONDITIONS.get(kind.name, {})] + ["delete"]
    raise click.UsageError(
        f"--for={goal} is not known for {kind.names[1]}; use "
        + ", ".join([*(f"state={s}" for s in states.values()), *known])
    )


def _states(kind: Kind) -> list[Any]:
    import typing

    state = typing.get_type_hints(kind.cls).get("state")
    return list(state) if state is not None else []


def _wait(client: Client, options: Settings, kind: Kind, name: str, state: str, timeout_s: float) -> None:
    namespace = options.namespace if kind in (kinds.ACTORS, kinds.TEMPLATES) else ""
    if state:  # a thing that is not there is an error at once, not a wait in vain
        kind.fetch(client, options.namespace, name, options.read_timeout_s)
    present = False
    for event in _events(client, [kind.name], namespace, timeout_s):
        record = _record(event)
        if record is None:  # the list is complete
            if not present and not state:
                return
            continue
        if kind.ref(record) != f"{kind.name}/{name}":
            continue
        present = True
        if event.type == pb.WatchEvent.TYPE_DELETED:
            if not state:
                return
            raise NotFound(f"{kind.name}/{name} was deleted while waiting for it to be {state}")
        if state and record.state == state:
            return
        if state and record.state in HOPELESS.get(kind.name, ()):
            raise _in_vain(kind, name, record, state)


def _in_vain(kind: Kind, name: str, record: Any, state: str) -> GreenroomError:
    error = getattr(record, "error", None)
    message = error.message if error else getattr(record, "message", "")
    return FailedPrecondition(
        f"{kind.name}/{name} is {record.state}, so it will not be {state}" + (f": {clean(message)}" if message else "")
    )
