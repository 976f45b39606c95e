"""What an agent holds of its image store: for actors, for warm sandboxes, and no longer than needed."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from greenroom.agent.images import WorkerImages
from greenroom.core import agentapi as api
from greenroom.core.errors import FailedPrecondition, NotFound
from greenroom.core.records import TemplateSpec
from greenroom.images import uses as uses_module
from greenroom.images.store import DiskImageStore
from greenroom.images.uses import WARM, Uses, user_of
from greenroom.testing.contracts.images import make_image


def quiet(phase: str, layers: Any) -> None:
    pass


class Shop:
    """A store with one image, and agents that share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reference = make_image(root / "layout", {"a": b"1" * 100_000})
        self.store = DiskImageStore(root / "store", recent_s=0.0)
        self.digest = ""

    async def agent(self, worker: str = "w0", alive: tuple[str, ...] = ()) -> WorkerImages:
        (self.root / worker).mkdir(exist_ok=True)
        agent = WorkerImages(self.store, worker, self.root / worker)
        await agent.open(alive)
        self.digest = (await agent.prepare(self.reference, quiet)).digest
        return agent

    def start(self, uid: str, digest: str = "") -> api.Start:
        identity = api.Identity(namespace="ns", name=f"n-{uid}", uid=uid, generation=1)
        ids: dict[str, Any] = {"operation_id": "op", "actor_uid": uid, "generation": 1, "identity": identity}
        return api.Start(**ids, spec=TemplateSpec(image=self.reference), image_digest=digest or self.digest)

    async def users(self) -> tuple[str, ...]:
        return (await self.store.cache()).images[0].users


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


async def test_held_from_before_the_first_to_after_the_last(shop: Shop) -> None:
    agent = await shop.agent()
    for uid in ("1", "2"):
        await agent.hold(shop.start(uid), quiet)
    await agent.keep_warm([shop.digest])
    assert await shop.users() == ("ns/n-1 on w0", "ns/n-2 on w0", "warm sandboxes on w0")
    await agent.release("1")
    await agent.release("1")
    await agent.keep_warm([])
    assert await shop.users() == ("ns/n-2 on w0",)
    with pytest.raises(FailedPrecondition, match="ns/n-2 on w0"):
        await agent.handle(api.RemoveImage(digest=shop.digest))
    await agent.release("2")
    await agent.handle(api.RemoveImage(digest=shop.digest))
    await agent.hold(shop.start("1"), quiet)  # it is fetched again, by its digest
    assert await shop.users() == ("ns/n-1 on w0",)
    await agent.close(wipe=True)
    assert await shop.users() == ()


async def test_an_agent_that_comes_back_takes_over_what_lives(shop: Shop) -> None:
    first = await shop.agent()
    await (await shop.agent("w1")).hold(shop.start("9"), quiet)
    for uid in ("1", "2"):
        await first.hold(shop.start(uid), quiet)
    await first.keep_warm([shop.digest])
    # It is killed; one of its sandboxes ended meanwhile, and the warm ones are gone.
    second = await shop.agent(alive=("2",))
    assert await shop.users() == ("ns/n-2 on w0", "ns/n-9 on w1")
    await second.release("2")
    assert await shop.users() == ("ns/n-9 on w1",)


async def test_an_image_that_is_gone_everywhere(shop: Shop) -> None:
    agent = await shop.agent()
    with pytest.raises(FailedPrecondition, match="gone where it came from") as raised:
        await agent.hold(shop.start("1", f"sha256:{'0' * 64}"), quiet)
    assert raised.value.reason == "IMAGE_MOVED"
    with pytest.raises(NotFound):
        await agent.keep_warm([f"sha256:{'0' * 64}"])


async def test_warm_sandboxes_give_way_when_there_is_too_much(shop: Shop) -> None:
    await shop.agent()
    shop.store = DiskImageStore(shop.root / "store", recent_s=0.0, high_bytes=10_000)
    agent = await shop.agent()
    told: list[str] = []
    agent.unwant = told.append
    await agent.hold(shop.start("1"), quiet)
    await agent.keep_warm([shop.digest])
    await agent._look()
    assert agent.over_bytes > 0
    assert told == []  # an actor runs from it
    await agent.release("1")
    await agent._look()
    assert told == [shop.digest]
    await agent.keep_warm([])
    await shop.store.trim()
    await agent._look()
    assert (agent.used_bytes < 10_000, agent.over_bytes) == (True, 0)
    assert WARM in agent._held
    await agent.close(wipe=True)


async def test_a_wake_that_is_cancelled_leaves_no_use(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = await shop.agent()
    writing, go = threading.Event(), threading.Event()
    add = Uses.add

    def held_up(*arguments: Any) -> bool:
        writing.set()
        go.wait(10)
        return add(*arguments)

    monkeypatch.setattr(Uses, "add", held_up)
    wake = asyncio.create_task(agent.hold(shop.start("1"), quiet))
    await asyncio.to_thread(writing.wait)
    wake.cancel()
    asyncio.get_running_loop().call_later(0.1, go.set)
    with pytest.raises(asyncio.CancelledError):
        await wake
    await agent.release("1")  # as whoever wakes actors does when it fails
    assert await asyncio.to_thread(go.wait, 10)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert Uses(shop.root / "store").users(shop.digest) == []


def test_an_agent_that_comes_on_a_full_disk_finds_its_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uses, digest, place = Uses(tmp_path / "store"), "sha256:" + "ab" * 32, tmp_path / "w"
    uses.open(digest)
    uses.add(digest, user_of("w", "a"))

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(uses_module, "write_atomically", full)
        assert uses.keep_only("w", ["a"], place) == {"a": (digest,)}, "it could not be noted, and is another time"
    uses.keep_only("w", ["a"], place)
    (noted,) = (tmp_path / "store" / "holders").iterdir()
    written = noted.stat()
    uses.keep_only("w", ["a"], place)
    assert noted.stat() == written, "it says so already"
