from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenroom.agent import logs as module
from greenroom.agent.logs import LogFiles, tidy


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, fd
    os.close(fd)


async def collect(files: LogFiles, uid: str, tail: int = -1) -> bytes:
    return b"".join([data async for _, data in files.read(uid, tail, follow=False)])


async def until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_what_an_actor_writes_is_kept_by_incarnation(tmp_path: Path, fifo: tuple[Path, int]) -> None:
    files = LogFiles(tmp_path / "logs")
    for generation in (1, 2):
        files.attach("a", generation, fifo[0])
        os.write(fifo[1], b"one %d\ntwo %d\n" % (generation, generation))
        files.detach("a")
    assert await collect(files, "a") == b"one 1\ntwo 1\none 2\ntwo 2\n"
    assert await collect(files, "a", tail=3) == b"two 1\none 2\ntwo 2\n"
    assert files.last_words("a") == "one 2\ntwo 2"
    await files.forget("a")
    assert await collect(files, "a") == b""


async def test_what_was_just_written_is_read(tmp_path: Path, fifo: tuple[Path, int]) -> None:
    """Before the loop has had its turn, as in an agent that was held up."""
    files = LogFiles(tmp_path / "logs")
    files.attach("a", 1, fifo[0])
    os.write(fifo[1], b"one\n")
    assert await collect(files, "a") == b"one\n"
    os.write(fifo[1], b"two\n")
    assert files.last_words("a") == "one\ntwo"
    files.close()


@pytest.mark.parametrize(
    "written, quoted",
    [
        (b"", ""),
        (b"one\r\ntwo\n", "one\ntwo"),
        (b"\n".join(b"%d" % n for n in range(50)), "\n".join(map(str, range(30, 50)))),
        (b"\x1b]0;mine\x07 \xff\tgr\xc3\xbcn\0\n", "\ufffd]0;mine\ufffd \ufffd\tgr\u00fcn\ufffd"),
        (bytes(1_000_000), "..." + "\ufffd" * module.QUOTED_BYTES),
        ("\u20ac".encode() * 100_000, "..." + "\u20ac" * (module.QUOTED_BYTES // 3)),
    ],
    ids=["nothing", "little", "many lines", "no text", "one line", "characters"],
)
def test_what_is_quoted_is_short_and_readable(tmp_path: Path, written: bytes, quoted: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000000000001").write_bytes(written)
    assert LogFiles(tmp_path).last_words("a") == quoted


async def test_a_follower_sees_every_line_once_also_when_the_file_is_shortened(
    tmp_path: Path, fifo: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    files = LogFiles(tmp_path / "logs")
    files.attach("a", 1, fifo[0])
    seen: list[bytes] = []

    async def follow() -> None:
        async for _, data in files.read("a", -1, follow=True):
            seen.append(data)

    follower = asyncio.create_task(follow())
    for n in range(500):
        os.write(fifo[1], b"%06d\n" % n)
        await until(lambda n=n: b"".join(seen).endswith(b"%06d\n" % n))
    files.close()
    await follower
    assert b"".join(seen) == b"".join(b"%06d\n" % n for n in range(500))


async def test_a_flood_is_slowed_down(tmp_path: Path, fifo: tuple[Path, int]) -> None:
    files = LogFiles(tmp_path / "logs")
    files.attach("a", 1, fifo[0])
    taken, began = 0, time.monotonic()
    while time.monotonic() - began < 0.5:
        try:
            taken += os.write(fifo[1], bytes(1 << 16))
        except BlockingIOError:
            await asyncio.sleep(0.001)
    files.close()
    assert taken < 2 * module.MAX_BYTES_PER_S, "half a second's worth and a full pipe; without a bound a hundred times"


def test_all_together_are_bounded(tmp_path: Path) -> None:
    for n in range(10):
        (tmp_path / f"a{n}").mkdir()
        (tmp_path / f"a{n}" / "1").write_bytes(bytes(100))
        os.utime(tmp_path / f"a{n}" / "1", (n, n))
    tidy(tmp_path, 350)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a7", "a8", "a9"]


async def test_what_is_written_to_is_not_tidied_away(tmp_path: Path, fifo: tuple[Path, int]) -> None:
    files = LogFiles(tmp_path / "logs")
    files.attach("a", 1, fifo[0])
    os.write(fifo[1], b"said long ago\n")
    files.attach("b", 1, None)
    await until(lambda: files.last_words("a"))
    (old,) = (tmp_path / "logs" / "a").iterdir()
    os.utime(old, (0, 0))
    gone = tmp_path / "logs" / "gone" / "000000000001"
    gone.parent.mkdir()
    gone.write_bytes(b"x" * 100)
    tidy(tmp_path / "logs", 20, {old})
    assert old.exists() and not gone.exists()
    files.close()


async def test_a_file_that_has_lost_its_name_is_kept_short_all_the_same(
    tmp_path: Path, fifo: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    files = LogFiles(tmp_path / "logs")
    files.attach("a", 1, fifo[0])
    pump = files._pumps["a"]
    pump.path.unlink()
    for n in range(500):
        os.write(fifo[1], b"%06d\n" % n)
        await until(lambda n=n: pump.dropped + os.fstat(pump._file.fileno()).st_size >= 7 * (n + 1))
    assert os.fstat(pump._file.fileno()).st_size <= 1000
    files.close()
