"""``images``: what workers have of images, and what is done about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.cli.app import INTERRUPTED, Settings, common, settings, with_output
from greenroom.cli.archive import read_archive
from greenroom.cli.manifest import to_document
from greenroom.cli.output import Table, clean, dump, pairs
from greenroom.cli.progress import Lines, Several, on_terminal
from greenroom.core.errors import InvalidArgument, rebuild
from greenroom.core.quantity import human_age, human_bytes
from greenroom.core.records import (
    CachedImage,
    Evicted,
    ImageCache,
    ImageDetail,
    Operation,
    OperationKind,
    PullProgress,
)

F = TypeVar("F", bound=Callable[..., Any])

#: Digits of a digest that are shown; as many as docker shows.
SHOWN_DIGITS = 12


def on_workers(command: F) -> F:
    return click.option(
        "--worker",
        "workers",
        metavar="NAME",
        multiple=True,
        help="Only in the image store of this worker; repeatable [default: of all that are connected].",
    )(command)


@click.group()
def images() -> None:
    """Shows, fetches, keeps and removes the images that workers have.

    Workers of one machine share a store. What nobody uses goes by itself when there is too much (`greenroom up
    --images-high`), the longest unused first.
    """


# --- list and inspect -------------------------------------------------------------------------------------------


@images.command("list")
@on_workers
@with_output("table", "wide", "json", "yaml")
@common
def list_(workers: tuple[str, ...], output: str) -> None:
    """Lists images with their size, last use and users."""
    options = settings()
    with options.connect() as client:
        caches = _caches(client, options, workers)
    if output in ("json", "yaml"):
        dump([to_document(cache) for cache in caches], output, single=False)
        return
    titles = ["IMAGE", "DIGEST", "STATE", "SIZE", "DISK", "USED", "BY", "WORKERS"]
    rows = [_row(cache, image, wide=output == "wide") for cache in caches for image in reversed(cache.images)]
    if rows:
        Table(titles).print(rows)
    else:
        click.echo("no images", err=True)
    for cache in caches:
        click.echo(f"{','.join(cache.workers)}: {_summary(cache)}", err=True)


def _row(cache: ImageCache, image: CachedImage, *, wide: bool) -> list[str]:
    users = ", ".join(image.users) if wide else f"{len(image.users)}" if image.users else ""
    return [
        ", ".join(image.references) if wide else _names(image),
        image.digest if wide else _short(image.digest),
        "Pinned" if image.pinned else "Ready" if image.ready else "Partial",
        human_bytes(image.size_bytes),
        human_bytes(image.disk_bytes),
        f"{human_age(time.time() - image.last_used_at)} ago",
        users,
        ",".join(cache.workers),
    ]


def _summary(cache: ImageCache) -> str:
    said = f"{human_bytes(cache.used_bytes)} used"
    if cache.high_bytes:
        said += f" of {human_bytes(cache.high_bytes)}"
    if cache.over_bytes:
        said += f", {human_bytes(cache.over_bytes)} too much and all in use or pinned"
    return f"{said}, {human_bytes(cache.free_bytes)} free on the disk"


@images.command()
@click.argument("image")
@on_workers
@with_output("table", "json", "yaml")
@common
def inspect(image: str, workers: tuple[str, ...], output: str) -> None:
    """Shows what an image is made of and how it says that it is run. IMAGE: a reference, or (the first digits of) its
    digest."""
    options = settings()
    with options.connect() as client:
        request = pb.ImageRequest(image=image, workers=workers)
        answer = client.images.InspectImage(request, timeout=options.read_timeout_s)
    there = [(tuple(one.workers), convert.from_message(ImageDetail, one.detail)) for one in answer.there]
    if output != "table":
        dump([{"workers": list(names), **to_document(detail)} for names, detail in there], output, single=False)
        return
    for number, (names, detail) in enumerate(there):
        if number:
            click.echo()
        _inspect(names, detail)


def _inspect(workers: tuple[str, ...], detail: ImageDetail) -> None:
    image = detail.image
    pairs(
        [
            ("Digest", image.digest),
            ("References", ", ".join(image.references)),
            ("Workers", ", ".join(workers)),
            ("Size", f"{human_bytes(image.size_bytes)} compressed, {human_bytes(image.disk_bytes)} on disk"),
            ("Used", f"{human_age(time.time() - image.last_used_at)} ago"),
            ("By", ", ".join(image.users)),
            ("Pinned", "yes" if image.pinned else "no"),
            ("Entrypoint", " ".join(detail.entrypoint)),
            ("Command", " ".join(detail.cmd)),
            ("Env", " ".join(f"{key}={value}" for key, value in detail.env.items())),
            ("Directory", detail.workdir),
            ("User", detail.user),
            ("Ports", ", ".join(map(str, detail.exposed_ports))),
            ("Stop signal", detail.stop_signal),
            *((f"Layer {number}", digest) for number, digest in enumerate(detail.layers)),
        ]
    )


# --- pull -------------------------------------------------------------------------------------------------------


@images.command(short_help="Fetches an image before a template needs it.")
@click.argument("reference")
@click.option("--pin", is_flag=True, help="Never evict it.")
@on_workers
@common
def pull(reference: str, pin: bool, workers: tuple[str, ...]) -> None:
    """Fetches and unpacks an image before a template needs it, and shows how far it is. Ctrl-C stops only the
    showing."""
    options = settings()
    request = pb.PullImageRequest(image=reference, workers=workers, pin=pin)
    with options.connect() as client:
        try:
            with client.images.PullImage(request, timeout=options.request_timeout_s) as stream:
                last = _follow(reference, (convert.from_message(PullProgress, message) for message in stream))
        except KeyboardInterrupt:
            click.echo("no longer watching; it goes on, and `greenroom images list` shows when it is there", err=True)
            raise SystemExit(INTERRUPTED) from None
    failed = [report for report in last.values() if report.error is not None]
    for report in last.values():
        if report.error is None:
            click.echo(f"{reference} {_short(report.digest)} on {report.worker} ({human_bytes(report.size_bytes)})")
    for report in failed[1:]:
        assert report.error is not None
        click.echo(f"{report.worker}: {clean(report.error.message)}", err=True)
    if failed and (failure := failed[0].error) is not None:
        raise rebuild(failure.code, failure.reason, f"{failed[0].worker}: {failure.message}", failure.metadata)


def _follow(reference: str, reports: Iterable[PullProgress]) -> dict[str, PullProgress]:
    """Shows how far each worker is; returns the last report of each."""
    last: dict[str, PullProgress] = {}
    lines: dict[str, Lines] = {}
    with Several() if on_terminal() else nullcontext() as shown:
        for report in reports:
            last[report.worker] = report
            if shown is not None:
                under_way = [one for one in last.values() if not one.done and one.error is None]
                shown.update({f"{reference} on {one.worker}": _operation(one) for one in under_way})
            elif not report.done and report.error is None:
                lines.setdefault(report.worker, Lines(report.worker)).update(_operation(report))
    return last


def _operation(report: PullProgress) -> Operation:
    """As what is shown of operations."""
    return Operation(
        id="",
        kind=OperationKind.PREPARE,
        namespace="",
        name="",
        uid="",
        created_at=0,
        updated_at=0,
        deadline_at=0,
        phase=report.phase,
        layers=report.layers,
    )


# --- pin, remove, prune -----------------------------------------------------------------------------------------


@images.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@on_workers
@common
def pin(names: tuple[str, ...], workers: tuple[str, ...]) -> None:
    """Keeps images whatever comes."""
    _pin(names, workers, undo=False)


@images.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@on_workers
@common
def unpin(names: tuple[str, ...], workers: tuple[str, ...]) -> None:
    """Lets images go when there is too much."""
    _pin(names, workers, undo=True)


def _pin(names: tuple[str, ...], workers: tuple[str, ...], *, undo: bool) -> None:
    options = settings()
    with options.connect() as client:
        for name in names:
            request = pb.PinImageRequest(image=name, workers=workers, undo=undo)
            answer = client.images.PinImage(request, timeout=options.read_timeout_s)
            click.echo(f"{name} {'unpinned' if undo else 'pinned'} on {_on(answer.caches)}")


@images.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--unpin", "unpin_", is_flag=True, help="Also one that is pinned.")
@on_workers
@common
def rm(names: tuple[str, ...], unpin_: bool, workers: tuple[str, ...]) -> None:
    """Removes images; one that is in use is refused. What a template needs is fetched again when an actor wakes.
    IMAGE: a reference, or (the first digits of) its digest."""
    options = settings()
    with options.connect() as client:
        for name in names:
            request = pb.RemoveImageRequest(image=name, workers=workers, unpin=unpin_)
            answer = client.images.RemoveImage(request, timeout=options.request_timeout_s)
            click.echo(f"{name} removed from {_on(answer.caches)}")


@images.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@on_workers
@common
def prune(dry_run: bool, workers: tuple[str, ...]) -> None:
    """Removes all images that are neither used nor pinned, half fetched ones too."""
    options = settings()
    with options.connect() as client:
        request = pb.PruneImagesRequest(dry_run=dry_run, workers=workers)
        answer = client.images.PruneImages(request, timeout=options.request_timeout_s)
    for there in answer.there:
        evicted = convert.from_message(Evicted, there.evicted)
        for image in evicted.removed:
            name = _names(image)
            what = "would be removed" if dry_run else "removed"
            click.echo(f"{clean(name)} {_short(image.digest)} {what} ({human_bytes(image.disk_bytes)})")
        for why in evicted.kept:
            click.echo(f"kept {clean(why)}", err=True)
        how = "would be freed" if dry_run else "freed"
        click.echo(f"{','.join(there.workers)}: {human_bytes(evicted.freed_bytes)} {how}", err=True)


# --- import -----------------------------------------------------------------------------------------------------


@images.command("import", short_help="Brings an image to the workers without a registry.")
@click.argument("path", metavar="PATH|-")
@click.option("--name", required=True, help="What it is called from then on, as imported/counter:1; for templates.")
@click.option("--tag", default="", help="Which image of several in the archive.")
@on_workers
@common
def import_(path: str, name: str, tag: str, workers: tuple[str, ...]) -> None:
    """Brings an image to the workers without a registry: from an OCI layout (directory or tar), or what `docker save`
    writes (also gzipped). It is pinned. Workers that come later do not have it.

    \b
    docker save counter:1 | greenroom images import - --name imported/counter:1
    """
    options = settings()
    with options.connect() as client:
        caches = _caches(client, options, workers)
        if path == "-" and len(caches) > 1:
            raise click.UsageError(
                f"there are {len(caches)} image stores, and - can be read once: write it to a file first, or say which "
                "--worker"
            )
        for cache in caches:
            answer = _import(client, options, path, name, tag, cache.workers[0])
            click.echo(f"{name} {_short(answer.digest)} imported on {','.join(cache.workers)}")


def _import(client: Client, options: Settings, path: str, name: str, tag: str, worker: str) -> Any:
    start = pb.ImportStart(name=name, tag=tag, worker=worker)

    def frames() -> Iterator[Any]:
        yield pb.ImportImageRequest(start=start)
        for data in chunks:
            yield pb.ImportImageRequest(data=data)

    try:
        with read_archive(sys.stdin.buffer if path == "-" else Path(path)) as chunks:
            return client.images.ImportImage(frames(), timeout=options.request_timeout_s)
    except OSError as error:
        raise InvalidArgument(f"{path} can't be read: {error.strerror or error}") from error


# --- parts ------------------------------------------------------------------------------------------------------


def _caches(client: Client, options: Settings, workers: tuple[str, ...]) -> list[ImageCache]:
    request = pb.ListImagesRequest(workers=workers)
    answer = client.images.ListImages(request, timeout=options.read_timeout_s)
    return [convert.from_message(ImageCache, message) for message in answer.caches]


def _names(image: CachedImage) -> str:
    """What it is called; the digest that a template holds it to has a column of its own."""
    return ", ".join(dict.fromkeys(reference.partition("@")[0] for reference in image.references))


def _on(caches: Iterable[Any]) -> str:
    return "; ".join(",".join(cache.workers) for cache in caches)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:SHOWN_DIGITS]
