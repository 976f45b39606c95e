"""``wait``: until a thing is in a state, or gone."""

from __future__ import annotations

from typing import Any

import click

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds
from greenroom.cli.app import Settings, common, duration, settings
from greenroom.cli.follow import follow
from greenroom.cli.kinds import Kind
from greenroom.cli.look import events, record_of
from greenroom.cli.output import clean
from greenroom.cli.progress import live
from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, GreenroomError, NotFound
from greenroom.core.records import OperationState

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
    greenroom wait operation 0198c... (until it is done; on a terminal it shows how far it is)
    """
    options, wanted = settings(), kinds.targets(what)
    if len(wanted) != 1 or not wanted[0][1]:
        raise click.UsageError("name one thing: TYPE NAME or TYPE/NAME")
    kind, name = wanted[0]
    if kind.list_only:
        raise click.UsageError(f"{kind.names[1]} can't be waited for")
    state = _goal(kind, goal)
    with options.connect() as client:
        try:
            if kind is kinds.OPERATIONS and state:
                _wait_operation(client, name, state, timeout)
            else:
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
    if what == "condition" and value.lower() in CONDITIONS.get(kind.name, {}):
        return CONDITIONS[kind.name][value.lower()]
    if what == "state" and (state := kind.state(value)):
        return state
    known = [f"condition={c.capitalize()}" for c in CONDITIONS.get(kind.name, {})] + ["delete"]
    raise click.UsageError(
        f"--for={goal} is not known for {kind.names[1]}; use "
        + ", ".join([*(f"state={s}" for s in kind.states()), *known])
    )


def _wait_operation(client: Client, operation_id: str, state: str, timeout_s: float) -> None:
    ref = f"operation/{operation_id}"
    operation = follow(client, operation_id, timeout_s, live(ref))
    if operation is None or operation.state is OperationState.RUNNING:
        raise NotFound(f"{ref} was dropped while waiting for it to be {state}")
    if operation.state != state:
        raise _in_vain(kinds.OPERATIONS, operation_id, operation, state)


def _wait(client: Client, options: Settings, kind: Kind, name: str, state: str, timeout_s: float) -> None:
    namespace = options.namespace if kind in (kinds.ACTORS, kinds.TEMPLATES) else ""
    if state:  # a thing that is not there is an error at once, not a wait in vain
        kind.fetch(client, options.namespace, name, options.read_timeout_s)
    present = False
    for event in events(client, [kind.name], namespace, timeout_s):
        record = record_of(event)
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
