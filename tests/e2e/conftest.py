"""Real servers with real sandboxes. One test at a time uses them: they share cores, cgroups and namespaces."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Kit

from greenroom.testing import counter_app
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer
from greenroom.testing.python_image import build_python_image


@pytest.fixture(scope="session")
def counter_image() -> Iterator[str]:
    """An OCI layout of this machine's Python with the counter app."""
    directory = Path(tempfile.mkdtemp(prefix="greenroom-image-"))
    yield build_python_image(directory / "counter", app=Path(counter_app.__file__), compression="none")
    shutil.rmtree(directory)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A short path: socket addresses are limited to 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def serve(data_dir: Path, counter_image: str) -> Iterator[Callable[..., Kit]]:
    """Starts servers on one data directory; all are ended, and nothing of them may be left."""
    kits: list[Kit] = []

    def start(**options: object) -> Kit:
        live = LiveServer(data_dir, **options)  # type: ignore[arg-type]
        kit = Kit(live, counter_image)
        kits.append(kit)
        live.start()
        return kit

    yield start
    for kit in kits:
        if kit.live.process is not None and kit.live.process.poll() is None:
            kit.live.stop()
    assert leftovers(data_dir) == []
