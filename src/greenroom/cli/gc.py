"""``gc``: what is garbage and why, and a round of collection now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli.app import Settings, common, settings, with_output
from greenroom.cli.manifest import to_document
from greenroom.cli.output import Table, clean, dump
from greenroom.core.errors import Unavailable
from greenroom.core.gc.verdict import Judged
from greenroom.core.quantity import human_age, human_bytes
from greenroom.engine.removals import Removal


@click.command()
@click.option("--dry-run", is_flag=True, help="Only list what would go, and why.")
@click.option("--images", is_flag=True, help="Also images that nobody uses, as `greenroom images prune`.")
@click.option(
    "--explain",
    "explained",
    metavar="OBJECT",
    default="",
    help="Tell why something is kept or goes: a snapshot, a sandbox, an object's key, an image digest, a worker, an "
    "actor (NAME or NAMESPACE/NAME), or KIND/NAME.",
)
@click.option("--history", is_flag=True, help="List what the server has destroyed since it started, newest first.")
@with_output("table", "json", "yaml")
@common
def gc(dry_run: bool, images: bool, explained: str, history: bool, output: str) -> None:
    """Collects garbage now, and tells what was destroyed. It is collected all the time by itself; this is for who does
    not want to wait, or wants to know.

    \b
    greenroom gc --dry-run                       what would go, and why
    greenroom gc --explain default/mine          an actor, its snapshots and its sandbox
    """
    if sum((dry_run, bool(explained), history)) > 1:
        raise click.UsageError("--dry-run, --explain and --history each ask for something else: say one of them")
    if images and (explained or history):
        raise click.UsageError("--images is about a round: leave it out, or the other")
    options = settings()
    with options.connect() as client:
        if explained:
            _explain(client, options, explained, output)
        elif history:
            answer = client.system.ListRemovals(pb.ListRemovalsRequest(), timeout=options.read_timeout_s)
            _show([convert.from_message(Removal, one) for one in answer.removals], output, "nothing was destroyed")
        else:
            _collect(client, options, pb.CollectRequest(dry_run=dry_run, images=images), output)


def _collect(client: Client, options: Settings, request: Any, output: str) -> None:
    answer = client.system.Collect(request, timeout=options.request_timeout_s)
    found: Sequence[Judged | Removal] = (
        [convert.from_message(Judged, one) for one in answer.would_go]
        if request.dry_run
        else [convert.from_message(Removal, one) for one in answer.removed]
    )
    _show(found, output, "nothing would go" if request.dry_run else "nothing to destroy")
    if found:
        click.echo(f"{totals(found)} {'would go' if request.dry_run else 'destroyed'}", err=True)
    for failure in answer.failures:
        click.echo(clean(failure), err=True)
    if answer.failures:
        raise Unavailable(f"{len(answer.failures)} things could not be looked at or destroyed; they are tried again")


def _show(found: Sequence[Judged | Removal], output: str, nothing: str) -> None:
    if output != "table":
        dump([to_document(one) for one in found], output, single=False)
    elif not found:
        click.echo(nothing, err=True)
    elif isinstance(found[0], Judged):
        Table(["KIND", "ID", "WHERE", "SIZE", "AGE", "WHY", "WHEN"]).print(_row(one) for one in found)
    else:
        Table(["KIND", "ID", "WHERE", "SIZE", "AGO", "WHY"]).print(_row(one) for one in found)


def _row(one: Judged | Removal) -> list[str]:
    now = time.time()
    size = human_bytes(one.size_bytes) if one.size_bytes else ""
    if isinstance(one, Judged):
        age = human_age(now - one.made_at) if one.made_at is not None else ""
        return [one.kind, one.id, one.where, size, age, one.why, one.when]
    failed = f"; failed: {one.failure}" if one.failure else ""
    return [one.kind, one.id, one.where, size, human_age(now - one.at), one.why + failed]


def totals(found: Iterable[Judged | Removal]) -> str:
    """``2 sandboxes, 3 snapshots (144.0 MiB)``"""
    by_kind: dict[str, list[int]] = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one.size_bytes)
    return ", ".join(_counted(kind, sizes) for kind, sizes in sorted(by_kind.items()))


def _counted(kind: str, sizes: list[int]) -> str:
    plural = "sandboxes" if kind == "sandbox" else "copies" if kind == "copy" else f"{kind}s"
    size = f" ({human_bytes(sum(sizes))})" if sum(sizes) else ""
    return f"{len(sizes)} {kind if len(sizes) == 1 else plural}{size}"


def _explain(client: Client, options: Settings, name: str, output: str) -> None:
    request = pb.ExplainObjectRequest(object=name, namespace=options.namespace)
    answer = client.system.ExplainObject(request, timeout=options.read_timeout_s)
    found = [convert.from_message(Judged, one) for one in answer.found]
    if output != "table":
        dump([to_document(one) for one in found], output, single=False)
        return
    for one in found:
        click.echo(clean(sentence(one)))


def sentence(one: Judged) -> str:
    facts = [f"on {one.where}" if one.kind in ("sandbox", "copy", "image") else f"in the {one.where}"]
    if one.where.startswith("worker "):
        facts = [f"on {one.where}"]
    if one.size_bytes:
        facts.append(human_bytes(one.size_bytes))
    if one.made_at is not None:
        facts.append(f"{human_age(time.time() - one.made_at)} old")
    said = f"will go {one.when} because {one.why}" if one.goes else f"kept because {one.why}"
    return f"{one.kind}/{one.id} ({', '.join(facts)}): {said}"
