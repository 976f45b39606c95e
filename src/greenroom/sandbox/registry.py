"""Finds backends by entry point, so that one can be shipped out of tree (group ``greenroom.backends``)."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from greenroom.core.errors import InvalidArgument
from greenroom.sandbox.port import Backend

GROUP = "greenroom.backends"


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The backends that are installed (not: that can run here), sorted."""
    return sorted(_points())


def load(name: str) -> Backend:
    """Makes a backend by name.

    Raises:
        InvalidArgument: there is none of that name; the message lists those there are.
    """
    point = _points().get(name)
    if point is None:
        raise InvalidArgument(
            f"no sandbox backend {name!r}; installed are: {', '.join(names())}", reason="UNKNOWN_BACKEND"
        )
    return cast(Backend, point.load()())
