"""Downloads that are cut, killed, lied to: what is here stays, what is lost is bounded, what is wrong is found."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web
from registry_kit import docker_registry, find_registry

from greenroom.core.errors import DataLoss, Unavailable
from greenroom.core.records import LayerProgress
from greenroom.images import download, progress
from greenroom.images.pieces import MAX_IN_FLIGHT_BYTES, PIECE_BYTES
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import push_layout

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")

#: Not compressible, so that a layer is as large as this: many pieces, the last one not a whole one.
DATA = os.urandom((24 << 20) + 12345)
SIZE = len(DATA)
#: What a proxy has sent and the kernel has not delivered when a connection breaks, for each of them.
UNDELIVERED = 512 << 10


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def pushed(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``repository:tag`` of an image with one large and one small layer."""
    layout = tmp_path_factory.mktemp("layout")
    make_image(layout, {"large": DATA}, {"small": b"small"}, compression="zstd")
    push_layout(layout, f"{upstream}/test/image:1")
    return "test/image:1"


@pytest.fixture
def store(tmp_path: Path) -> DiskImageStore:
    return DiskImageStore(tmp_path / "store")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(download, "RETRY_BASE_S", 0.001)


def check(image_root: Path) -> None:
    assert contents(image_root) == {"large": DATA, "small": b"small"}


async def test_pieces_come_side_by_side_within_the_budget(upstream: str, pushed: str, store: DiskImageStore) -> None:
    pieces = MAX_IN_FLIGHT_BYTES // PIECE_BYTES
    waiting, most, to_come = 0, 0, SIZE // PIECE_BYTES + 1
    gate = asyncio.Event()

    async with FaultProxy(upstream).running() as proxy:
        passed_on = proxy._pass_on

        async def gather(request: web.Request, transport: asyncio.Transport) -> web.StreamResponse:
            """Pieces wait for each other until as many are asked for as may be."""
            nonlocal waiting, most, to_come, gate
            if "Range" in request.headers:
                mine = gate
                waiting, to_come = waiting + 1, to_come - 1
                most = max(most, waiting)
                if waiting < pieces and to_come:
                    await mine.wait()
                else:
                    await asyncio.sleep(0.2)  # in which one too many would come
                    waiting, gate = 0, asyncio.Event()
                    mine.set()
            return await passed_on(request, transport)

        proxy._pass_on = gather  # type: ignore[method-assign]
        async with asyncio.timeout(60):
            check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)
        assert most == pieces
        # Each piece once; one request for each of the blobs that have only one.
        assert proxy.blob_bytes < SIZE + 10_000
        large = [r for r in proxy.ranges if r]
        assert len(large) == len(set(large)) == SIZE // PIECE_BYTES + 1


async def test_goes_on_where_connections_break(upstream: str, pushed: str, store: DiskImageStore, soon: None) -> None:
    """Each answer breaks off before the end of a piece: what came of it stays."""
    async with FaultProxy(upstream).running() as proxy:
        proxy.cut_after_bytes = PIECE_BYTES // 3
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)
        assert proxy.cuts > 2 * SIZE // PIECE_BYTES
        assert proxy.blob_bytes < SIZE + MAX_IN_FLIGHT_BYTES


async def test_a_cut_link_loses_little(upstream: str, pushed: str, store: DiskImageStore, soon: None) -> None:
    """Every connection breaks at once, again and again."""
    async with FaultProxy(upstream).running() as proxy:
        proxy.cut_every_bytes = 5 << 20
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)
        assert proxy.cuts >= 4
        assert proxy.blob_bytes - SIZE < MAX_IN_FLIGHT_BYTES


async def test_ranges_that_are_ignored(upstream: str, pushed: str, store: DiskImageStore, soon: None) -> None:
    """A registry that always starts from the beginning: no byte is taken twice or in the wrong place."""
    async with FaultProxy(upstream).running() as proxy:
        proxy.cut_after_bytes, proxy.ignore_ranges = SIZE // 2, True

        async def heal() -> None:
            if proxy.cuts > 3:
                proxy.cut_after_bytes = None

        proxy.before_chunk = heal
        with pytest.raises(Unavailable):  # half is not enough, and there is no way to get the rest
            proxy.before_chunk = None
            await store.prepare(f"{proxy.host}/{pushed}")
        proxy.before_chunk = heal
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)


async def test_what_has_to_come_again_is_seen_to_move(
    upstream: str, pushed: str, store: DiskImageStore, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow link it takes longer than anything may that does not move."""
    monkeypatch.setattr(progress, "PROGRESS_PERIOD_S", 0.0)
    seen: list[int] = []

    def heard(phase: str, layers: tuple[LayerProgress, ...]) -> None:
        if phase == "download":
            seen.append(max(layer.done_bytes for layer in layers))

    async with FaultProxy(upstream).running() as proxy:
        proxy.cut_after_bytes, proxy.ignore_ranges = SIZE // 2, True
        with pytest.raises(Unavailable):
            await store.prepare(f"{proxy.host}/{pushed}")
        proxy.cut_after_bytes = None
        check((await store.prepare(f"{proxy.host}/{pushed}", heard)).rootfs)
    steps = sorted({0, SIZE, *seen})
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 4 * PIECE_BYTES


async def test_gives_up_when_nothing_comes(upstream: str, pushed: str, store: DiskImageStore, soon: None) -> None:
    async with FaultProxy(upstream).running() as proxy:
        proxy.cut_after_bytes = 0
        with pytest.raises(Unavailable) as raised:
            await store.prepare(f"{proxy.host}/{pushed}")
        assert raised.value.reason == "REGISTRY_UNAVAILABLE"
        proxy.cut_after_bytes = None
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)


async def test_damaged_on_the_way(upstream: str, pushed: str, store: DiskImageStore) -> None:
    async with FaultProxy(upstream).running() as proxy:
        proxy.corrupt_at = SIZE // 2
        with pytest.raises(DataLoss) as raised:
            await store.prepare(f"{proxy.host}/{pushed}")
        assert raised.value.reason == "DIGEST_MISMATCH"
        proxy.corrupt_at = None
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)


_PULL = """
import asyncio, sys
from pathlib import Path
from greenroom.images.store import DiskImageStore
asyncio.run(DiskImageStore(Path(sys.argv[1])).prepare(sys.argv[2]))
"""


@pytest.mark.parametrize("seed", range(3))
async def test_killed_again_and_again(upstream: str, pushed: str, tmp_path: Path, seed: int) -> None:
    """A process is killed at some byte, five times; each time at most the budget is fetched again."""
    chance = random.Random(seed)
    async with FaultProxy(upstream).running() as proxy:
        for kill_at in sorted(chance.randrange(1 << 20, SIZE) for _ in range(5)):
            pulling = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _PULL, str(tmp_path / "store"), f"{proxy.host}/{pushed}"
            )
            before, reached = proxy.blob_bytes, asyncio.Event()

            async def watch(limit: int = kill_at, reached: asyncio.Event = reached) -> None:
                if proxy.blob_bytes >= limit:
                    reached.set()

            proxy.before_chunk = watch
            await reached.wait()
            pulling.send_signal(signal.SIGKILL)
            await pulling.wait()
            proxy.before_chunk = None
            assert proxy.blob_bytes >= before
        check((await DiskImageStore(tmp_path / "store").prepare(f"{proxy.host}/{pushed}")).rootfs)
        again = proxy.blob_bytes - SIZE
        assert again < 5 * (MAX_IN_FLIGHT_BYTES + UNDELIVERED)
        print(f"seed {seed}: {again / (1 << 20):.1f} MiB fetched again after 5 kills")
        assert not list((tmp_path / "store/partial").iterdir())


async def test_cancelled_half_way_goes_on(upstream: str, pushed: str, store: DiskImageStore) -> None:
    async with FaultProxy(upstream).running() as proxy:
        half_way = asyncio.Event()

        async def watch() -> None:
            if proxy.blob_bytes > SIZE // 2:
                half_way.set()
                await asyncio.Event().wait()

        proxy.before_chunk = watch
        pulling = asyncio.create_task(store.prepare(f"{proxy.host}/{pushed}"))
        await half_way.wait()
        pulling.cancel()
        await asyncio.wait([pulling])
        proxy.before_chunk = None
        check((await store.prepare(f"{proxy.host}/{pushed}")).rootfs)
        assert proxy.blob_bytes - SIZE < MAX_IN_FLIGHT_BYTES + UNDELIVERED


async def test_progress_never_falls(upstream: str, pushed: str, store: DiskImageStore, soon: None) -> None:
    seen: list[int] = []
    async with FaultProxy(upstream, bits_per_s=200e6).running() as proxy:
        proxy.cut_every_bytes = 5 << 20
        await store.prepare(
            f"{proxy.host}/{pushed}",
            lambda phase, layers: seen.append(sum(x.done_bytes for x in layers)) if phase == "download" else None,
        )
    assert len(seen) > 2
    assert seen == sorted(seen)


async def test_another_process_sees_the_progress(upstream: str, pushed: str, tmp_path: Path) -> None:
    """Two agents on one store: the second waits for what the first does, and can tell how far it is."""
    first, second = DiskImageStore(tmp_path / "store"), DiskImageStore(tmp_path / "store")
    seen: list[int] = []

    def looks() -> int:
        """How often it saw another part of it."""
        return len({done for done in seen if 0 < done < SIZE})

    async with FaultProxy(upstream).running() as proxy:

        async def wait_for_looks() -> None:
            # Of what was sent 4 MiB may not be whole pieces yet.
            while looks() < min(4, (proxy.blob_bytes - (3 << 20)) // (5 << 20)):
                await asyncio.sleep(0.01)

        proxy.before_chunk = wait_for_looks
        begun = asyncio.Event()

        def tell(phase: str, layers: Sequence[LayerProgress]) -> None:
            if any(layer.done_bytes for layer in layers):  # so it is the first that has the image's lock
                begun.set()

        one = asyncio.create_task(first.prepare(f"{proxy.host}/{pushed}", tell))
        await begun.wait()
        two = asyncio.create_task(
            second.prepare(
                f"{proxy.host}/{pushed}", lambda phase, layers: seen.append(sum(x.done_bytes for x in layers))
            )
        )
        async with asyncio.timeout(60):
            assert (await one).digest == (await two).digest
        assert proxy.blob_bytes < SIZE + 10_000
    assert looks() > 3


async def test_a_shared_layer_is_fetched_once(upstream: str, store: DiskImageStore, tmp_path: Path) -> None:
    """Two images with the same base, prepared at the same time."""
    for number in range(2):
        make_image(tmp_path / str(number), {"large": DATA}, {"own": b"%d" % number}, compression="zstd")
        push_layout(tmp_path / str(number), f"{upstream}/test/shares:{number}")
    async with FaultProxy(upstream).running() as proxy:
        images = await asyncio.gather(*(store.prepare(f"{proxy.host}/test/shares:{number}") for number in range(2)))
        assert images[0].layers[0] == images[1].layers[0]
        assert [contents(image.rootfs)["own"] for image in images] == [b"0", b"1"]
        assert proxy.blob_bytes < SIZE + 10_000


async def test_ten_at_once_pull_once(upstream: str, pushed: str, store: DiskImageStore) -> None:
    async with FaultProxy(upstream).running() as proxy:
        images = await asyncio.gather(*(store.prepare(f"{proxy.host}/{pushed}") for _ in range(10)))
        assert len({image.digest for image in images}) == 1
        assert proxy.blob_bytes < SIZE + 10_000
        assert sum("/manifests/" in request for request in proxy.requests) == 1


async def test_a_silent_registry_takes_nothing_from_others(upstream: str, pushed: str, store: DiskImageStore) -> None:
    async with FaultProxy(upstream).running() as silent:
        stuck = asyncio.Event()

        async def say_nothing() -> None:
            stuck.set()
            await asyncio.Event().wait()

        make_image(tmp := store._root / "other", {"other": os.urandom(5 << 20)}, compression="none")
        push_layout(tmp, f"{upstream}/test/other:1")
        silent.before_chunk = say_nothing
        waiting = asyncio.create_task(store.prepare(f"{silent.host}/test/other:1"))
        await stuck.wait()
        async with asyncio.timeout(60):
            check((await store.prepare(f"{upstream}/{pushed}")).rootfs)
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_partial_that_went_bad_is_fetched_anew(
    upstream: str, pushed: str, store: DiskImageStore, tmp_path: Path
) -> None:
    """After a power cut a partial file may say that it has what it does not have, or be something else."""
    image = await store.prepare(f"{upstream}/{pushed}")
    name = image.layers[0].removeprefix("sha256:")
    size = (tmp_path / "store/blobs/sha256" / name).stat().st_size
    count = -(-size // PIECE_BYTES)
    for damaged in (
        b"",
        bytes(2 << 20),
        bytes(size),  # about to be renamed
        bytes(size) + b"\1" * count,  # all there
        os.urandom(size) + b"\1" * (count - 1) + b"\0",
    ):
        await store.remove(image.digest)
        (tmp_path / "store/partial" / name).write_bytes(damaged)
        check((await store.prepare(f"{upstream}/{pushed}")).rootfs)
