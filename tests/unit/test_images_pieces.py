"""The file of a blob on its way: any order of pieces, any interruption."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenroom.images import pieces
from greenroom.images.blobs import BlobStore, hex_of
from greenroom.images.config import Descriptor
from greenroom.images.download import BlobSource, new_budget
from greenroom.images.pieces import TOLD_PIECES, Partial, done_bytes

PIECE = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)


def describe(data: bytes) -> Descriptor:
    return Descriptor(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))


class Killed(BaseException):
    pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(size=st.integers(0, 10 * PIECE), seed=st.integers(0, 1 << 32))
def test_killed_at_any_step(tmp_path: Path, size: int, seed: int) -> None:
    """The process dies before its n-th system call, again and again; nothing that was marked is lost or wrong."""
    chance = random.Random(seed)
    data = chance.randbytes(size)
    path, target = tmp_path / "partial", tmp_path / "blob"
    for old in (path, target):
        old.unlink(missing_ok=True)
    calls = ("pwrite", "ftruncate", "fsync")
    real = {name: getattr(os, name) for name in calls}
    written: list[int] = []
    left = 0

    def dying(name: str) -> object:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*arguments)

        return call

    fruitless = 0
    while not target.exists():
        left = chance.randrange(12)
        partial = Partial(path, describe(data))
        with pytest.MonkeyPatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, dying(name))
            try:
                partial.open()
                missing = partial.missing()
                assert done_bytes(path, partial.descriptor) <= size
                chance.shuffle(missing)
                for number in missing:
                    start, end = partial.bounds(number)
                    written.append(number)
                    partial.write(number, data[start:end])
                assert partial.wrong_digest() is None
                partial.commit(target)
            except Killed:
                fruitless += 1
            finally:
                partial.close()
        assert fruitless < 1000
    assert target.read_bytes() == data
    assert not path.exists()
    # A piece is written again only where the process died between the piece and its mark.
    assert len(written) <= -(-size // PIECE) + fruitless


def test_digest_is_of_the_whole(tmp_path: Path) -> None:
    data = os.urandom(5 * PIECE + 7)
    partial = Partial(tmp_path / "partial", describe(data))
    partial.open()
    for number in (4, 0, 2, 5, 1, 3):
        start, end = partial.bounds(number)
        part = data[start:end] if number != 2 else bytes(PIECE)
        partial.write(number, part)
    assert partial.missing() == []
    assert partial.wrong_digest() is not None
    partial.restart()
    assert partial.missing() == [0, 1, 2, 3, 4, 5]
    for number in range(6):
        start, end = partial.bounds(number)
        partial.write(number, data[start:end])
    assert partial.wrong_digest() is None
    partial.close()


@pytest.mark.parametrize("length", [0, 1, 5 * PIECE, 5 * PIECE + 3, 6 * PIECE])
def test_what_is_no_partial_of_this_blob_is_thrown_away(tmp_path: Path, length: int) -> None:
    (tmp_path / "partial").write_bytes(b"\1" * length)
    partial = Partial(tmp_path / "partial", describe(os.urandom(5 * PIECE + 10)))
    assert done_bytes(tmp_path / "partial", partial.descriptor) == 0
    partial.open()
    assert (partial.done_bytes, len(partial.missing())) == (0, 6)
    partial.close()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "partial").symlink_to("elsewhere")
    with pytest.raises(OSError):
        Partial(tmp_path / "partial", describe(b"data")).open()
    assert (tmp_path / "elsewhere").read_text() == "untouched"


def test_what_is_read_again_for_the_digest_is_told(tmp_path: Path) -> None:
    """Of gigabytes that takes minutes: who hears of nothing that moves gives the download up, each time anew."""
    data = os.urandom(5 * TOLD_PIECES * PIECE + 7)
    told: list[int] = []
    partial = Partial(tmp_path / "partial", describe(data), told.append)
    partial.open()
    last = 5 * TOLD_PIECES
    for number in [*range(3), *range(4, last), 3]:  # one piece comes much later than those behind it
        start, end = partial.bounds(number)
        partial.write(number, data[start:end])
    step = TOLD_PIECES * PIECE
    assert told == [3 * PIECE + n * step for n in range(1, 5)]
    partial.close()
    told.clear()
    partial = Partial(tmp_path / "partial", describe(data), told.append)
    partial.open()
    assert told == [n * step for n in range(1, 6)]
    partial.write(last, data[last * PIECE :])
    assert partial.wrong_digest() is None
    partial.close()


async def test_a_fetch_that_goes_on_tells_what_is_read_again(tmp_path: Path) -> None:
    data = os.urandom(3 * TOLD_PIECES * PIECE)
    store, descriptor = BlobStore(tmp_path / "store"), describe(data)
    (tmp_path / "store/partial" / hex_of(descriptor.digest)).write_bytes(data)
    told: list[int] = []
    source = cast("BlobSource", None)  # nothing is missing
    await store.fetch(descriptor, [source], new_budget(), told.append)
    assert told == [n * TOLD_PIECES * PIECE for n in (1, 2, 3)]
    assert store.has(descriptor)
