"""OCI image layouts: images in a directory of this machine, or in an archive of one.

Source: OCI image spec v1.1, "Image Layout".
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from greenroom.core.errors import DataLoss, NotFound
from greenroom.images.blobs import hex_of
from greenroom.images.config import MAX_JSON_BYTES, Descriptor, Index, check_descriptor, choose, decode, invalid
from greenroom.images.pieces import PIECE_BYTES
from greenroom.images.reference import DEFAULT_TAG, LayoutReference

_REF_NAME = "org.opencontainers.image.ref.name"
#: Of the tags that there are, in an error.
_MAX_LISTED = 300


class Extent(NamedTuple):
    """Where the bytes of a file are: ``size`` of them from ``offset`` on in ``fd``, which whoever asked closes."""

    fd: int
    offset: int
    size: int


class Files(Protocol):
    """Files by their path, which has no leading ``/`` or ``./``. Its methods block."""

    @property
    def name(self) -> str:
        """What to call the whole in errors."""

    def open(self, path: str) -> Extent:
        """Raises:
        FileNotFoundError: there is no such file.
        FailedPrecondition: it can't be read (reason ``IMAGE_INVALID``).
        """


class DirectoryFiles:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def name(self) -> str:
        return str(self._directory)

    def open(self, path: str) -> Extent:
        try:
            # Without blocking: it may be a pipe, which is refused.
            fd = os.open(self._directory / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise invalid(f"{self._directory / path} can't be read: {error.strerror}") from error
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise invalid(f"{self._directory / path} is no plain file")
        return Extent(fd, 0, info.st_size)


def read_small(files: Files, path: str) -> bytes:
    """A file of JSON.

    Raises:
        FileNotFoundError: there is no such file.
        FailedPrecondition: it is larger than any may be.
    """
    fd, offset, size = files.open(path)
    try:
        if size > MAX_JSON_BYTES:
            raise invalid(f"{files.name}: {path} has {size} bytes; at most {MAX_JSON_BYTES} are read")
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


@asynccontextmanager
async def stream(files: Files, path: str, descriptor: Descriptor, offset: int) -> AsyncIterator[AsyncIterator[bytes]]:
    """The bytes of a blob from ``offset`` on.

    Raises:
        NotFound: there is no such file.
        DataLoss: it has another size.
    """
    try:
        fd, start, size = await asyncio.to_thread(files.open, path)
    except FileNotFoundError as error:
        raise lacks(files, descriptor) from error

    async def chunks() -> AsyncIterator[bytes]:
        at = start + offset
        while chunk := await asyncio.to_thread(os.pread, fd, min(PIECE_BYTES, start + size - at), at):
            at += len(chunk)
            yield chunk

    try:
        if size != descriptor.size:  # no retry makes a file longer
            raise DataLoss(
                f"{files.name}: blob {descriptor.digest} has {size} of {descriptor.size} bytes",
                reason="SIZE_MISMATCH",
            )
        yield chunks()
    finally:
        os.close(fd)


class LayoutSource:
    """Reads one image of a layout."""

    def __init__(self, reference: LayoutReference, files: Files) -> None:
        self._reference = reference
        self._files = files

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest or index that is meant: (digest, bytes, media type).

        Raises:
            NotFound: no such directory or tag.
            FailedPrecondition: the directory is no layout.
        """
        data = await asyncio.to_thread(self._read_index)
        descriptor = self._select(decode(f"{self._files.name}: index.json", data, Index))
        return descriptor.digest, await self.manifest(descriptor), descriptor.media_type

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The bytes of a manifest or index.

        Raises:
            NotFound: the layout lacks it.
        """
        try:
            return await asyncio.to_thread(read_small, self._files, _path(descriptor))
        except FileNotFoundError as error:
            raise lacks(self._files, descriptor) from error

    @asynccontextmanager
    async def open_blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async with stream(self._files, _path(descriptor), descriptor, start) as chunks:
            yield start, chunks

    def _read_index(self) -> bytes:
        try:
            return read_small(self._files, "index.json")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            is_there = self._reference.directory.exists()
            why = "has no index.json, so it is no OCI image layout" if is_there else "is no directory"
            raise NotFound(
                f"{self._files.name} {why}; name the directory of an OCI image layout on the worker's machine, as "
                "oci:/path:tag",
                reason="IMAGE_NOT_FOUND",
            ) from error

    def _by_digest(self, digest: str) -> Descriptor | None:
        """A manifest that an index of the layout names, or one that has lost its tag to a newer one."""
        try:
            fd, _, size = self._files.open(_path(Descriptor(digest=digest, size=0)))
        except FileNotFoundError:
            return None
        os.close(fd)
        return Descriptor(digest=digest, size=size)

    def _select(self, index: Index) -> Descriptor:
        reference = self._reference
        name = self._files.name
        if reference.digest:
            found = [d for d in index.manifests if d.digest == reference.digest]
            if not found and (inside := self._by_digest(reference.digest)) is not None:
                return inside
        elif not reference.tag and len(index.manifests) == 1:
            found = list(index.manifests)
        else:
            found = [d for d in index.manifests if is_tagged(_ref_name(d), reference.tag)]
        if not found:
            raise no_such_image(name, reference, (_ref_name(d) for d in index.manifests))
        descriptor = found[0] if len(found) == 1 else choose(name, Index(manifests=tuple(found)))
        check_descriptor(name, descriptor)
        return descriptor


def is_tagged(name: str, tag: str) -> bool:
    """Whether ``name`` is the tag or, as some tools write it, a whole reference with it (docker.io/library/x:tag)."""
    tag = tag or DEFAULT_TAG
    return name == tag or name.endswith(f":{tag}")


def no_such_image(name: str, reference: LayoutReference, tags: Iterable[str]) -> NotFound:
    wanted = reference.digest or reference.tag or DEFAULT_TAG
    has = ", ".join(sorted(set(tags) - {""})) or "no tags"
    has = has if len(has) <= _MAX_LISTED else f"{has[:_MAX_LISTED]}..."
    return NotFound(f"{name} has no image {wanted!r}; it has {has}", reason="IMAGE_NOT_FOUND")


def lacks(files: Files, descriptor: Descriptor) -> NotFound:
    return NotFound(f"{files.name} lacks blob {descriptor.digest}", reason="IMAGE_NOT_FOUND")


def _path(descriptor: Descriptor) -> str:
    return f"blobs/sha256/{hex_of(descriptor.digest)}"


def _ref_name(descriptor: Descriptor) -> str:
    return (descriptor.annotations or {}).get(_REF_NAME, "")
