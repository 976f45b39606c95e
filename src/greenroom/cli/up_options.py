"""Options of ``up`` that are more than a number: read, checked, and refused with the way out. Pure, apart from the
machine's host name."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import click

from greenroom.cli.app import duration
from greenroom.core.errors import InvalidArgument
from greenroom.core.names import check_label
from greenroom.core.records import OperationKind

F = TypeVar("F", bound=Callable[..., object])

#: As psycopg takes them.
STORE_SCHEMES = ("postgresql", "postgres")
#: As `greenroom.snapshots.store` takes them.
SNAPSHOT_SCHEMES = ("file", "s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https")
#: What this one server is called in a store that it has for itself.
ONLY_NAME = "server"
#: Of an operation on an actor, when nothing else is asked for.
DEFAULT_DEADLINE_S = 300.0
#: Shorter than the shortest operation, and longer than anybody waits.
MIN_DEADLINE_S = 1.0
MAX_DEADLINE_S = 86400.0
#: Kinds that take a time of their own.
TIMED = (
    OperationKind.RESUME,
    OperationKind.SUSPEND,
    OperationKind.PAUSE,
    OperationKind.DELETE,
    OperationKind.PREPARE,
)


def store_url(value: str) -> str:
    """``postgresql://USER@HOST:PORT/NAME``, or "". Nothing of what is refused is repeated but its scheme: there may be
    a password in it."""
    if not value:
        return ""
    scheme, separator, _ = value.partition("://")
    good = "postgresql://USER@HOST:PORT/DATABASE, or leave it out for SQLite in the data directory"
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise click.BadParameter(f"is not a URL; write {good}")
    if scheme not in STORE_SCHEMES:
        raise click.BadParameter(f"there is no store for {scheme!r} URLs; write {good}")
    try:
        _ = urlsplit(value).port
    except ValueError:
        raise click.BadParameter(f"its port is not a number up to 65535; write {good}") from None
    return value


def snapshot_place(value: str) -> str:
    """A directory, made absolute because agents are given it too, a bucket's URL, or ""."""
    if not value:
        return ""
    scheme, separator, _ = value.partition("://")
    if separator and scheme not in SNAPSHOT_SCHEMES:
        raise click.BadParameter(
            f"there are no snapshots at {scheme!r} URLs; use a directory, or a URL that begins with "
            + ", ".join(f"{known}://" for known in SNAPSHOT_SCHEMES)
        )
    return value if separator else str(Path(value).expanduser().absolute())


def size_bytes(value: str | int) -> int:
    """The type of options like ``--images-high``: ``20Gi``, in bytes."""
    from greenroom.core.quantity import parse_bytes

    if isinstance(value, int):
        return value
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if size < 0:
        raise click.BadParameter(f"{value} is less than nothing; write for example 20Gi, or 0 for no limit")
    return size


def check_marks(high: int, low: int, limit: int = 0) -> None:
    """Raises `click.UsageError` when the low mark is not below the high one, or that not below the limit."""
    if limit and high > limit:
        raise click.UsageError(
            f"--images-high ({high} bytes) has to be at most --images-limit ({limit} bytes): what is above the limit "
            "never comes"
        )
    if low and low >= high:
        raise click.UsageError(
            f"--images-low ({low} bytes) has to be less than --images-high ({high} bytes): images are evicted from the "
            "one down to the other"
        )


def listen_address(value: str | tuple[str, int]) -> tuple[str, int] | None:
    """``host:port`` where others are to come to, port 0 for any; "" for None."""
    if not value:
        return None
    if isinstance(value, tuple):  # what was returned before is asked about again
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is not host:port, for example 10.0.0.5:0 for any port")
    host = host.strip("[]")
    if host in ("0.0.0.0", "::"):
        raise click.BadParameter(
            f"{value!r} is no address that others can ask: each would ask itself; write one of this machine's own"
        )
    return host, int(port)


def metrics_address(value: str | tuple[str, int]) -> tuple[str, int] | None:
    """``host:port``; "" for None. Any address: a scraper in a cluster comes from another machine."""
    if not value or isinstance(value, tuple):
        return value or None
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{value!r} is not host:port, for example 127.0.0.1:9464")
    return host.strip("[]"), int(port)


def image_options(command: F) -> F:
    """What ``up`` and ``agent`` let one say of the images of a worker."""
    high = click.option(
        "--images-high",
        envvar="GREENROOM_IMAGES_HIGH",
        show_envvar=True,
        type=size_bytes,
        metavar="SIZE",
        default=0,
        help="When images take more than this, as 20Gi, those that nobody uses go, the longest unused first  [default: "
        "no limit].",
    )
    low = click.option(
        "--images-low",
        envvar="GREENROOM_IMAGES_LOW",
        show_envvar=True,
        type=size_bytes,
        metavar="SIZE",
        default=0,
        help="Until they take this much  [default: 4/5 of --images-high].",
    )
    peers = click.option(
        "--peers",
        type=listen_address,
        metavar="HOST:PORT",
        default="",
        help="Where each worker gives other workers the image layers that it has, so that these cross the link to the "
        "registry once; port 0 for any. GREENROOM_PEER_TOKEN, the same for all, keeps others out  [default: nowhere].",
    )
    return high(low(peers(command)))


def replica_name(value: str) -> str:
    try:
        return check_label("replica", value)
    except InvalidArgument as error:
        raise click.BadParameter(error.message) from None


def name_for(store: str, given: str | None) -> str:
    """What this replica is called: as asked for; without, the host's name where there may be others."""
    if given is not None or not store:
        return given or ONLY_NAME
    host = socket.gethostname()
    label = re.sub(r"[^a-z0-9]+", "-", host.lower().partition(".")[0])[:63].strip("-")
    if not label:
        raise click.UsageError(
            f"this machine is called {host!r}, which makes no name for this replica; give it one with --name"
        )
    return label


def seconds(least: float, most: float) -> Callable[[str | float], float]:
    """A type of options: ``90``, ``30s`` or ``5m``, within bounds in seconds."""

    def convert(value: str | float) -> float:
        found = duration(value)
        if not least <= found <= most:
            raise click.BadParameter(f"must be between {least:g} and {most:g} seconds, not {found:g}")
        return found

    return convert


def deadline(value: str | tuple[OperationKind | None, float]) -> tuple[OperationKind | None, float]:
    """``60`` for all kinds of operations, ``resume=60`` for one: (kind or None, seconds)."""
    if isinstance(value, tuple):
        return value
    name, equals, text = value.rpartition("=")
    kind = next((kind for kind in TIMED if kind.lower() == name.lower()), None)
    if equals and kind is None:
        known = ", ".join(kind.lower() for kind in TIMED)
        raise click.BadParameter(f"there is no operation {name!r} that takes time; use one of {known}, or none for all")
    return kind, seconds(MIN_DEADLINE_S, MAX_DEADLINE_S)(text)


def deadlines(given: Sequence[tuple[OperationKind | None, float]]) -> tuple[float, dict[OperationKind, float]]:
    """That for all, and those for single kinds. What is given later counts."""
    for_all = DEFAULT_DEADLINE_S
    single: dict[OperationKind, float] = {}
    for kind, value in given:
        if kind is None:
            for_all = value
        else:
            single[kind] = value
    return for_all, single


def worker_labels(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    from greenroom.api import validate

    try:
        return validate.labels(dict(given))
    except InvalidArgument as error:
        raise click.UsageError(f"--label: {error.message}") from None
