"""Makes a large image for benchmarks: five layers, 60 000 files, 1.2 GB that pack to about 360 MB. Always the same."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from greenroom.testing.oci_layout import Compression, Layer, Layout

#: Part of the bytes and of the files that each layer has, as in common images: a distribution, a runtime, libraries,
#: an application, and its assets.
LAYERS = (("usr", 0.15), ("opt/runtime", 0.2), ("opt/libraries", 0.35), ("srv/app", 0.2), ("srv/assets", 0.1))
FILES = 60_000
FILES_PER_DIRECTORY = 40
UNPACKED_BYTES = 1_200_000_000
#: Content is cut from a pool of this size, far larger than what gzip (32 KiB) looks back on.
_POOL_BYTES = 64 << 20
#: Words of the pool's text and how unevenly they are used: chosen so that gzip packs it about 1:3.3.
_WORDS = 1_180
_TAG = "latest"


def build(directory: Path, compression: Compression, *, scale: float = 1.0) -> Path:
    """The layout's directory; made once, and found again by later runs.

    Args:
        scale: 0 < scale <= 1: so much of the files, and so of the bytes.
    """
    target = directory / f"image-{compression}-{scale:g}"
    if not target.is_dir():
        staged = target.with_name(f".{target.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        layout = Layout(staged)
        layers = ballast(layout, compression, scale=scale)
        config = {"Entrypoint": ["/srv/app/start"], "Env": ["PATH=/usr/bin"], "ExposedPorts": {"8080/tcp": {}}}
        layout.add_image(layers, config, _TAG)
        staged.rename(target)
    return target


def ballast(layout: Layout, compression: Compression, *, scale: float = 1.0) -> list[Layer]:
    """The five layers alone, added to a layout; for an image with something to run below them."""
    pool = _pool()
    return [_layer(layout, pool, number, compression, scale) for number in range(len(LAYERS))]


def files(scale: float) -> int:
    """Regular files in the five layers."""
    return sum(round(FILES * share * scale) for _, share in LAYERS)


def _pool() -> bytes:
    """Text that packs like the content of an image: words of different length, some much more common than others."""
    dice = random.Random(1)
    words = [dice.randbytes(dice.randint(5, 27)) for _ in range(_WORDS)]
    weights = [1 / (rank + 3) for rank in range(_WORDS)]
    pool = bytearray()
    while len(pool) < _POOL_BYTES:
        pool += b" ".join(dice.choices(words, weights, k=100_000))
    return bytes(pool[:_POOL_BYTES])


def _layer(layout: Layout, pool: bytes, number: int, compression: Compression, scale: float) -> Layer:
    source, sink = os.pipe()

    def write() -> None:
        with os.fdopen(sink, "wb") as out, tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for member, data in _members(pool, number, scale):
                tar.addfile(member, data)
                tar.members.clear()  # or it keeps all of them

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(source, "rb") as read:
        layer = layout.add_layer(read, compression)
    writer.join()
    return layer


def _members(pool: bytes, number: int, scale: float) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    dice = random.Random(1000 + number)
    top, share = LAYERS[number]
    count = round(FILES * share * scale)
    # Many small files and a few large ones, as everywhere.
    sizes = [dice.lognormvariate(0, 1.6) for _ in range(count)]
    factor = UNPACKED_BYTES * share * scale / sum(sizes)
    at = ""
    for index, size in enumerate(sizes):
        if index % FILES_PER_DIRECTORY == 0:
            at = f"{top}/package-{index // FILES_PER_DIRECTORY:04}/{dice.choice(('lib', 'share', 'data/locale'))}"
            yield _member(at, tarfile.DIRTYPE, 0, 0o755), None
        name = f"{at}/{dice.choice(('module', 'resource', 'entry'))}_{index:06}.{dice.choice(('py', 'so', 'json'))}"
        if index % 100 == 99:
            link = _member(f"{name}.link", tarfile.SYMTYPE, 0, 0o777)
            link.linkname = Path(name).name
            yield link, None
        length = round(size * factor)
        start = dice.randrange(len(pool))
        content = pool[start : start + length]
        while len(content) < length:
            content += pool[: length - len(content)]
        yield _member(name, tarfile.REGTYPE, length, 0o644), io.BytesIO(content)


def _member(name: str, kind: bytes, size: int, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mode, member.mtime = kind, size, mode, 1_700_000_000
    return member
