"""A process that uses the image store is killed at each of its file operations in turn; the next one finds the store
whole, or makes it so, and loses nothing that was in use."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenroom.core.errors import NotFound
from greenroom.images.repair import repair
from greenroom.images.store import DiskImageStore
from greenroom.images.uses import user_of
from greenroom.testing.contracts.images import contents, make_image

#: Runs each life in a fork: ``argv[1]`` is a template of stores, ``argv[2]`` where the copies go. Life N is killed
#: before the Nth file operation below its store (CPython tells of each by an audit event); prints N as long as there is
#: an Nth.
_LIVES = """
import asyncio, json, os, shutil, signal, sys
from pathlib import Path
from greenroom.images.store import DiskImageStore

scenario, given = sys.argv[1], json.loads(sys.argv[2])
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "os.link", "os.symlink"}

def live(store, number):
    seen = 0
    inside = os.fsencode(store)
    def count(event, args):
        nonlocal seen
        if event not in WATCHED or not args:
            return
        path = os.fsencode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else b""
        # Names below a tree that is being removed come without their directory.
        if event in ("os.remove", "os.rmdir") and not path.startswith(b"/") or path.startswith(inside):
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    asyncio.run(SCENARIOS[scenario](store))

async def prepare(path):
    store = DiskImageStore(Path(path))
    await store.open()
    image = await store.prepare(given["b"])
    await store.hold(image.digest, "w.1", "new")

async def evict(path):
    store = DiskImageStore(Path(path), recent_s=0)
    await store.open()
    await store.prune()

async def remove(path):
    store = DiskImageStore(Path(path))
    await store.open()
    await store.release(given["digest_c"], "w.1", "c")
    await store.remove(given["digest_c"])

SCENARIOS = {"prepare": prepare, "evict": evict, "remove": remove}
number, step = int(given["first"]), int(given["step"])
while True:
    path = f"{given['stores']}/{scenario}-{number}"
    shutil.copytree(given["template"], path, symlinks=True)
    child = os.fork()
    if child == 0:
        try:
            live(path, number)
            os._exit(0)
        except BaseException as error:
            print("failed", repr(error), flush=True)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("life", number, status, flush=True)
    if status != -signal.SIGKILL:
        break
    number += step
"""


@pytest.fixture(scope="module")
def world() -> Iterator[dict[str, str]]:
    """A store with ``a`` (used by an actor), ``c`` (which shares a layer with it, unused) and half of ``d``; and ``b``,
    which shares a layer with ``a`` too and is not there yet."""
    root = Path(tempfile.mkdtemp(prefix="gr-"))
    shared = {"shared": b"s" * 100_000}
    made = {name: make_image(root / name, shared, {name: name.encode() * 5000, "deep/e/f": b"1"}) for name in "abcd"}

    async def prepare() -> dict[str, str]:
        store = DiskImageStore(root / "template")
        await store.open()
        digests = {name: (await store.prepare(made[name])).digest for name in "acd"}
        await store.hold(digests["a"], "w.1", "a")
        await store.hold(digests["c"], "w.1", "c")
        shutil.rmtree((await store.get(digests["d"])).rootfs)
        return digests

    digests = asyncio.run(prepare())
    yield {
        "template": str(root / "template"),
        "stores": str(root / "lives"),
        **made,
        **{f"digest_{name}": digest for name, digest in digests.items()},
    }
    shutil.rmtree(root)


def _lives(scenario: str, world: dict[str, str], *, first: int = 1, step: int = 1) -> Iterator[tuple[int, Path]]:
    """Each life's store, after the life was over."""
    Path(world["stores"]).mkdir(exist_ok=True)
    given = json.dumps(world | {"first": str(first), "step": str(step)})
    process = subprocess.Popen(
        [sys.executable, "-c", _LIVES, scenario, given], stdout=subprocess.PIPE, text=True, cwd=world["stores"]
    )
    assert process.stdout is not None
    status = ""
    for line in process.stdout:
        assert not line.startswith("failed"), line
        if not line.startswith("life "):
            continue  # what the store logs
        _, number, status = line.split()
        store = Path(world["stores"], f"{scenario}-{number}")
        yield int(number), store
        shutil.rmtree(store)
    assert process.wait() == 0
    assert int(status) == 0, "the last life was to live"


async def _check(world: dict[str, str], path: Path) -> DiskImageStore:
    """What holds after any death, once the next process has begun."""
    for lock in (path / "locks").iterdir():  # an unpacker sees that nobody listens any more, and ends a moment later
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    store = DiskImageStore(path, recent_s=0)
    repair(path, store._catalog, store._blobs, store._uses, store._cache, unfinished_s=0)
    assert list((path / "unpacking").iterdir()) == []
    assert [p for p in path.rglob(".*") if path / "rootfs" not in p.parents] == []
    listed = {image.digest: image for image in (await store.cache()).images}
    for image in await store.list():  # all that is there is whole, and may be used
        assert set(contents(image.rootfs)) >= {"shared", "deep/e/f"}
        assert listed[image.digest].disk_bytes > 0
        await store.hold(image.digest, "w.2", "x")
        await store.release(image.digest, "w.2", "x")
    needed = {blob for record in store._catalog.records() for blob in record.blobs}
    assert store._blobs.digests() <= needed  # no blob is left behind
    used = await store.get(world["digest_a"])
    assert contents(used.rootfs)["a"] == b"a" * 5000
    assert listed[world["digest_a"]].users == ("actor a on w",)
    assert repair(path, store._catalog, store._blobs, store._uses, store._cache, unfinished_s=0) == 0
    return store


async def _check_usable(world: dict[str, str], store: DiskImageStore) -> None:
    for name in "bcd":
        image = await store.prepare(world[name])
        assert contents(image.rootfs)[name] == name.encode() * 5000


def test_killed_while_it_prepares(world: dict[str, str]) -> None:
    steps = 0
    for number, path in _lives("prepare", world):
        steps = number

        async def check(path: Path = path) -> None:
            store = await _check(world, path)
            await store.keep_only("w.1", {"a"})  # as the next agent does: what the killed one held is nobody's
            assert [len(image.users) for image in (await store.cache()).images if image.users] == [1]
            await _check_usable(world, store)

        asyncio.run(check())
    print(f"killed at {steps - 1} steps")
    assert steps > 30


@pytest.mark.parametrize("scenario", ["evict", "remove"])
def test_killed_while_it_removes(world: dict[str, str], scenario: str) -> None:
    steps = 0
    for number, path in _lives(scenario, world):
        steps = number

        async def check(path: Path = path) -> None:
            store = await _check(world, path)
            if scenario == "evict":
                assert (await store.get(world["digest_c"])).digest == world["digest_c"]  # it is used as well
            elif store._uses.users(world["digest_c"]) == []:
                await store.remove(world["digest_c"])
                with pytest.raises(NotFound):
                    await store.hold(world["digest_c"], "w.1", "c")

        asyncio.run(check())
    print(f"killed at {steps - 1} steps")
    assert steps > 10


def test_a_use_of_an_earlier_boot_is_none(world: dict[str, str]) -> None:
    path = Path(world["stores"], "boot")
    shutil.copytree(world["template"], path, symlinks=True)
    digest = world["digest_a"]
    use = path / "uses" / digest.removeprefix("sha256:") / user_of("w.1", "a")
    use.write_bytes(b'{"boot":"another"}')
    before = use.parent.stat().st_mtime

    async def check() -> None:
        store = DiskImageStore(path)
        await store.pin(world["digest_c"])
        await store.open()
        listed = {image.digest: image for image in (await store.cache()).images}
        assert listed[digest].users == ()
        assert listed[digest].last_used_at == pytest.approx(before, abs=0.01)
        assert listed[world["digest_c"]].pinned

    asyncio.run(check())
    shutil.rmtree(path)
