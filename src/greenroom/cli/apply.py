"""``apply``: templates and pools from YAML."""

from __future__ import annotations

import secrets
import time
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli import kinds, manifest
from greenroom.cli.app import INTERRUPTED, Settings, common, duration, settings
from greenroom.cli.follow import follow
from greenroom.cli.manifest import Manifest, ManifestError
from greenroom.cli.progress import display
from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, NotFound, rebuild
from greenroom.core.records import OperationState, Pool, PoolSpec, Template, TemplateState


@click.command()
@click.option(
    "-f", "--filename", "files", multiple=True, required=True, metavar="FILE|DIR|-", help="What to apply; repeatable."
)
@click.option("--wait/--no-wait", default=True, help="Wait until templates are Ready [default: wait].")
@click.option(
    "--timeout",
    type=duration,
    metavar="DURATION",
    default=None,
    help="How long to wait for each; it goes on after that  [default: as long as something moves].",
)
@common
def apply(files: tuple[str, ...], wait: bool, timeout: float | None) -> None:
    """Creates or changes the templates and pools that YAML files describe.

    Nothing is applied if any document is wrong. A template can't be changed once it is there: give a changed one a new
    name.
    """
    options = settings()
    wanted = manifest.load(files, options.namespace)
    for one in wanted:
        if one.labels:
            click.echo(f"{one.source}: metadata.labels: labels of {one.kind}s are not kept yet", err=True)
    with options.connect() as client:
        _check_backends(client, options, wanted)
        begun = []
        for one in wanted:
            if isinstance(one.spec, PoolSpec):
                _apply_pool(client, options, one)
            else:
                begun.append((one, _apply_template(client, options, one)))
        if wait:
            for one, template in begun:
                _follow(client, options, one, template, timeout)


def _check_backends(client: Client, options: Settings, wanted: list[Manifest]) -> None:
    """The one thing about a manifest that only the server knows; asked before anything is applied."""
    pools = [one for one in wanted if isinstance(one.spec, PoolSpec)]
    if not pools:
        return
    info = client.system.GetServerInfo(pb.GetServerInfoRequest(), timeout=options.read_timeout_s)
    problems = [
        f"{one.source}: spec.backend: there is no sandbox backend {one.spec.backend!r}; "
        f"installed are: {', '.join(info.backends)}"
        for one in pools
        if one.spec.backend not in info.backends
    ]
    if problems:
        raise ManifestError(problems)


def _apply_pool(client: Client, options: Settings, one: Manifest) -> None:
    try:
        before = kinds.POOLS.fetch(client, "", one.name, options.read_timeout_s)
    except NotFound:
        before = None
    request = pb.ApplyPoolRequest(name=one.name, spec=convert.to_message(one.spec))
    after = convert.from_message(Pool, client.pools.ApplyPool(request, timeout=options.read_timeout_s))
    how = "created" if before is None else "unchanged" if before.spec == after.spec else "configured"
    click.echo(f"pool/{one.name} {how}")


def _apply_template(client: Client, options: Settings, one: Manifest) -> Template:
    request = pb.ApplyTemplateRequest(
        namespace=one.namespace,
        name=one.name,
        spec=convert.to_message(one.spec),
        request_id=secrets.token_hex(16),
        wait=convert.duration(0.0),
    )
    answer = client.templates.ApplyTemplate(request, timeout=options.read_timeout_s)
    template = convert.from_message(Template, answer.template)
    click.echo(f"template/{one.name} {'applied' if answer.HasField('operation') else 'unchanged'}")
    if answer.HasField("operation") and not template.operation:
        return _with_operation(template, answer.operation.id)
    return template


def _with_operation(template: Template, operation: str) -> Template:
    import msgspec

    return msgspec.structs.replace(template, operation=operation)


def _follow(client: Client, options: Settings, one: Manifest, template: Template, timeout_s: float | None) -> None:
    """Shows the preparation of a template until it is Ready."""
    ref = f"template/{one.name}"
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while template.state is not TemplateState.READY:
            if template.state is TemplateState.FAILED:
                raise FailedPrecondition(f"{ref} failed: {template.message or template.reason}")
            if template.operation:
                _follow_operation(client, ref, template.operation, end)
            template = _next_state(client, options, one, end)
    except KeyboardInterrupt:
        click.echo(
            f"{ref}: no longer waiting; its preparation goes on: watch it with `greenroom wait template {one.name} -n "
            f"{one.namespace}`, or give it up with `greenroom cancel operation/{template.operation}`",
            err=True,
        )
        raise SystemExit(INTERRUPTED) from None
    except DeadlineExceeded as error:
        if timeout_s is None or error.reason != "REQUEST_TIMEOUT":
            raise
        raise DeadlineExceeded(
            f"{ref} is not Ready after {timeout_s:g} s; its preparation goes on, watch it with "
            f"`greenroom wait template {one.name} -n {one.namespace}`"
        ) from None
    click.echo(f"{ref} ready")


def _follow_operation(client: Client, ref: str, operation_id: str, end: float | None) -> None:
    operation = follow(client, operation_id, _left(end), display(ref))
    if operation is not None and operation.error is not None:
        failure = operation.error
        raise rebuild(failure.code, failure.reason, f"{ref}: {failure.message}", failure.metadata)
    if operation is not None and operation.state is OperationState.DONE and operation.phases:
        phases = ", ".join(f"{p.name} {p.seconds * 1000:.0f} ms" for p in operation.phases)
        click.echo(f"{ref}: {phases}", err=True)


def _next_state(client: Client, options: Settings, one: Manifest, end: float | None) -> Template:
    """The template once it is ready or failed (the operation's row may be a moment ahead of it)."""
    request = pb.WatchRequest(kinds=["template"], namespace=one.namespace)
    with client.system.Watch(request, timeout=_left(end)) as stream:
        for event in stream:
            if event.template.name == one.name and event.WhichOneof("record") == "template":
                if event.type == pb.WatchEvent.TYPE_DELETED:
                    break
                template: Any = convert.from_message(Template, event.template)
                if template.state in (TemplateState.READY, TemplateState.FAILED):
                    assert isinstance(template, Template)
                    return template
    raise NotFound(f"template/{one.name} was deleted while it was being prepared")


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.001, end - time.monotonic())
