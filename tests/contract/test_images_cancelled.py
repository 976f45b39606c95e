"""Whoever is cancelled in the middle lets go of the lock when nothing of theirs works on the image any more, not
before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenroom.core.errors import NotFound
from greenroom.images import incoming, store
from greenroom.images.blobs import try_lock
from greenroom.images.catalog import Catalog
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image

#: So that a test that fails ends.
_GIVES_UP_S = 10.0
#: Enough for whoever does not wait.
_MOMENT_S = 0.1


class Gate:
    """A piece of work that is held up in its thread."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def held_up(*arguments: Any, **more: Any) -> Any:
            self.reached.set()
            self._go.wait(_GIVES_UP_S)
            return work(*arguments, **more)

        return held_up

    def open(self) -> None:
        self._go.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


async def cancelled(task: asyncio.Task[Any], gate: Gate) -> None:
    """More than once, as when a worker ends while a call is being cancelled."""
    await asyncio.to_thread(gate.reached.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=_MOMENT_S)


async def test_while_a_tree_is_moved_into_place(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_image(tmp_path / "layout", {"file": b"content"})
    images = DiskImageStore(tmp_path / "store")
    monkeypatch.setattr(store, "disk_bytes", gate.around(store.disk_bytes))
    task = asyncio.create_task(images.prepare(reference))
    await cancelled(task, gate)
    (digest,) = (f"sha256:{path.name}" for path in (tmp_path / "store/unpacking").iterdir())
    assert try_lock(tmp_path / "store", digest) is None
    assert contents(tmp_path / "store/unpacking" / digest.removeprefix("sha256:")) == {"file": b"content"}
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contents((await images.prepare(reference)).rootfs) == {"file": b"content"}
    assert [*(tmp_path / "store/unpacking").iterdir()] == []


async def test_while_an_image_is_removed(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    images = DiskImageStore(tmp_path / "store")
    image = await images.prepare(make_image(tmp_path / "layout", {"file": b"content"}))
    monkeypatch.setattr(Catalog, "remove_tree", gate.around(Catalog.remove_tree))
    task = asyncio.create_task(images.remove(image.digest))
    await cancelled(task, gate)
    assert try_lock(tmp_path / "store", image.digest) is None
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(NotFound):
        await images.get(image.digest)


async def test_while_an_archive_is_written(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor might be another file's by then."""
    images = DiskImageStore(tmp_path / "store")
    monkeypatch.setattr(incoming, "_write_all", gate.around(lambda fd, data: None))

    async def archive() -> AsyncIterator[bytes]:
        yield b"data"

    task = asyncio.create_task(images.take_in("imported/x:1", "", archive()))
    await cancelled(task, gate)
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [*(tmp_path / "store/incoming").iterdir()] == []


def test_archives_that_somebody_else_clears_away(tmp_path: Path) -> None:
    """Agents that start at the same time all look; what is gone when it is opened is no error."""
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming/left").write_bytes(b"")
    (tmp_path / "incoming/gone").symlink_to("nowhere")
    assert incoming.clear_incoming(tmp_path) == 1
