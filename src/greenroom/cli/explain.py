"""``explain``: what happened to an actor, and why it is not awake."""

from __future__ import annotations

import itertools
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.cli import story
from greenroom.cli.act import plain_names
from greenroom.cli.app import common, settings, with_output
from greenroom.cli.manifest import API_VERSION, plain, spec_to_plain
from greenroom.cli.output import clean, dump
from greenroom.core.explanation import Explanation

#: Width of what a line of the summary is about.
_ABOUT = max(len(about) for about in ("snapshot", "survives", "held by"))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="ACTOR...")
@click.option(
    "--last",
    type=click.IntRange(1, 100),
    default=10,
    show_default=True,
    metavar="NUMBER",
    help="How many of its operations to show.",
)
@with_output("text", "json", "yaml", default="text")
@common
def explain(names: tuple[str, ...], last: int, output: str) -> None:
    """Tells what happened to actors: where each is and since when, who holds it, where it could wake now and where not
    and why, what would survive the loss of every worker, and its last operations, newest last, with who asked for them
    and who decided."""
    options = settings()
    told = []
    with options.connect() as client:
        for name in plain_names(names):
            request = pb.ExplainActorRequest(namespace=options.namespace, name=name, operations=last)
            answer = client.actors.ExplainActor(request, timeout=options.read_timeout_s)
            told.append(convert.from_message(Explanation, answer))
    if output != "text":
        dump([document(one) for one in told], output, single=len(told) == 1)
        return
    for number, one in enumerate(told):
        if number:
            click.echo()
        _print(one)


def _print(told: Explanation) -> None:
    actor = told.actor
    click.echo(f"actor {actor.key} of template {actor.template}, uid {actor.uid}")
    click.echo()
    for about, lines in itertools.groupby(story.summary(told), key=lambda line: line[0]):
        for number, (_, text) in enumerate(lines):
            click.echo(f"{'' if number else about:<{_ABOUT}}   {clean(text)}")
    click.echo()
    older = f"; {told.older_operations} before these" if told.older_operations else ""
    click.echo(f"what happened, newest last ({story.zone(told.read_at)}{older}):")
    for when, (headline, *details) in story.history(told):
        click.echo(f"{when}   {clean(headline)}")
        for detail in details:
            click.echo(f"{'':<{len(when)}}   {'':<8} {clean(detail)}")


def document(told: Explanation) -> dict[str, Any]:
    """As JSON has it: the facts, and the summary in words."""
    actor, template = told.actor, told.template
    shown: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": "Explanation",
        "metadata": {"name": actor.name, "namespace": actor.namespace, "uid": actor.uid},
        "summary": [f"{about}: {text}" for about, text in story.summary(told)],
        **plain(told, leave_out=("template",)),
    }
    if template is not None:
        spec = spec_to_plain(template.spec)
        policy = ("pool", "onCrash", "durability", "evictable", "idleTimeout", "workerSelector")
        shown["template"] = {
            **plain(template, leave_out=("spec",)),
            "policy": {name: spec[name] for name in policy if name in spec},
        }
    return shown
