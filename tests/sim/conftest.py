from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from greenroom.store.memory import MemoryStore
from greenroom.store.port import Store
from greenroom.store.postgres import PostgresStore
from greenroom.store.sqlite import SqliteStore
from greenroom.testing.world import SimWorld


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: socket addresses are limited to 107 bytes. In memory where that is possible: nothing here is about
    disks, and syncing them would be most of the time."""
    directory = Path(tempfile.mkdtemp(prefix="gr-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def make_world(place: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[SimWorld]:
        async with SimWorld(place, **options) as world:
            yield world

    return make


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def any_store(request: pytest.FixtureRequest, place: Path) -> Store:
    """An empty store of each kind. The world that it is given to closes it."""
    match request.param:
        case "memory":
            return MemoryStore()
        case "sqlite":
            return await SqliteStore.open(place / "store")
        case _:
            return await PostgresStore.open(request.getfixturevalue("database"))
