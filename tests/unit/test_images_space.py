"""How much a layer unpacks to is known before it is unpacked, where it says so, and never said too high."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
import zstandard

from greenroom.images.space import disk_full, free_bytes, unpacked_bytes

DATA = b"text " * 10_000


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (DATA, len(DATA)),
        (gzip.compress(DATA), len(DATA)),
        (zstandard.compress(DATA), len(DATA)),
        (b"", 0),
        (b"\x1f\x8b", 2),
        (b"\x28\xb5\x2f\xfd", 4),
        (b"\x28\xb5\x2f\xfd\xff\xff", 6),
    ],
    ids=["plain", "gzip", "zstd", "empty", "cut gzip", "cut zstd", "bad zstd"],
)
def test_known_sizes(tmp_path: Path, blob: bytes, expected: int) -> None:
    (tmp_path / "blob").write_bytes(blob)
    assert unpacked_bytes(tmp_path / "blob") == expected


def test_what_does_not_say_it_takes_at_least_its_own_size(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    compressor = zstandard.ZstdCompressor().compressobj()  # does not know the size when it writes the header
    packed = compressor.compress(DATA) + compressor.flush()
    blob.write_bytes(packed)
    assert unpacked_bytes(blob) == len(packed)
    blob.write_bytes(gzip.compress(DATA) + gzip.compress(b"short"))  # only the last piece's size is at the end
    assert 0 < unpacked_bytes(blob) <= len(DATA) + 5
    random = os.urandom(100_000)
    blob.write_bytes(gzip.compress(random))
    assert unpacked_bytes(blob) == len(random)


def test_gzip_of_more_than_four_gibibytes(tmp_path: Path) -> None:
    """Its size is there modulo 4 GiB only."""
    blob = tmp_path / "blob"
    with blob.open("wb") as out:
        out.write(b"\x1f\x8b\x08")
        out.truncate(5 << 30)
        out.seek((5 << 30) - 4)
        out.write(struct.pack("<I", 2 << 30))
    assert unpacked_bytes(blob) == pytest.approx(5 << 30, rel=0.01)


def test_error_has_both_figures(tmp_path: Path) -> None:
    error = disk_full("unpacking 'x'", tmp_path, 123_456_789)
    assert error.reason == "DISK_FULL"
    assert f"no room on the disk of {tmp_path} for unpacking 'x': at least 123.5 MB are still to be" in error.message
    assert error.facts()["needed_bytes"] == "123456789"
    assert int(error.facts()["free_bytes"]) == pytest.approx(free_bytes(tmp_path), rel=0.2)
