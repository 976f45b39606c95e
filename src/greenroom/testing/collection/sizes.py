"""The models that are searched: those of the tests, and larger ones on request."""

from __future__ import annotations

from typing import Any

from greenroom.testing.collection.blobs import Store
from greenroom.testing.collection.search import Model
from greenroom.testing.collection.worker import Worker

#: Together under a minute of one core.
SMALL: dict[str, Model[Any]] = {
    "one resource, two reports, a new process": Worker(handles=1, reports=2),
    "numbers that are shared": Worker(handles=1, reports=2, shared=1),
    "two resources with the same number": Worker(handles=2, reports=1, processes=0, shared=1),
    "one in the other": Worker(handles=2, reports=1, processes=0, nested=True),
    "two resources, a new process": Worker(handles=2, reports=1, losses=0),
    "a restored database": Worker(handles=2, reports=1, processes=0, losses=0, restores=True),
    "a restored database and a new process": Worker(handles=1, reports=2, losses=0, restores=True),
    "two suspends of a file or two": Store(suspends=2, tries=1, contents=(("x",), ("x", "y"))),
    "three suspends of a file": Store(suspends=3, tries=1),
    "a suspend that is tried twice, and a scrub": Store(suspends=1, tries=2, scrubs=1),
    "two suspends and a scrub": Store(suspends=2, tries=1, scrubs=1),
}

FULL: dict[str, Model[Any]] = {
    "two resources, two reports, no new process": Worker(handles=2, reports=2, processes=0),
    "two resources, a loss and a new process": Worker(handles=2, reports=1),
    "two resources with shared numbers": Worker(handles=2, reports=2, processes=0, shared=1),
    "two new processes": Worker(handles=1, reports=2, processes=2),
    "three reports": Worker(handles=1, reports=3),
    "a restored database and all that": Worker(handles=1, reports=2, processes=2, restores=True),
    "two suspends that are tried twice": Store(suspends=2, tries=2),
    "a worker that remembers": Store(suspends=3, tries=1, contents=(("x",), ("y",)), remembers=True),
    "two resources, two reports, a new process": Worker(handles=2, reports=2),
}
