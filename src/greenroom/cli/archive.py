"""Reads what is to be imported as a tar stream: a file, a pipe, or an OCI layout directory, packed on the fly."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from greenroom.core.errors import InvalidArgument

#: Bytes of one frame to the server. The window of frames that may wait on the way is 64.
CHUNK_BYTES = 256 << 10
_GZIP = b"\x1f\x8b"


@contextmanager
def read_archive(source: Path | IO[bytes]) -> Iterator[Iterator[bytes]]:
    """Chunks of at most `CHUNK_BYTES`.

    Raises:
        InvalidArgument: a directory that is no OCI image layout.
        OSError: it can't be read.
    """
    if isinstance(source, Path) and source.is_dir():
        if not (source / "index.json").is_file():
            raise InvalidArgument(f"{source} has no index.json, so it is no OCI image layout")
        yield _pack(source)
        return
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        assert isinstance(file, io.BufferedReader)
        yield _chunks(stack.enter_context(gzip.GzipFile(fileobj=file)) if file.peek(2)[:2] == _GZIP else file)


def _chunks(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while data := file.read(CHUNK_BYTES):
        yield data


def _pack(layout: Path) -> Iterator[bytes]:
    """A tar of the files that an image consists of."""
    for path in (layout / "oci-layout", layout / "index.json", *sorted((layout / "blobs").glob("*/*"))):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            member = tarfile.TarInfo(path.relative_to(layout).as_posix())
            member.size = path.stat().st_size
            yield member.tobuf(tarfile.USTAR_FORMAT)
            left = member.size
            while left and (data := file.read(min(left, CHUNK_BYTES))):
                left -= len(data)
                yield data
            if left:
                raise InvalidArgument(f"{path} has become shorter while it was read")
            yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
