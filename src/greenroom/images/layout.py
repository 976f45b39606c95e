"""OCI image layouts: images in a directory of this machine.

Source: OCI image spec v1.1, "Image Layout".
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from greenroom.core.errors import DataLoss, NotFound
from greenroom.images.blobs import CHUNK_BYTES, hex_of
from greenroom.images.config import MAX_JSON_BYTES, Descriptor, Index, check_descriptor, choose, decode, invalid
from greenroom.images.reference import DEFAULT_TAG, LayoutReference

_REF_NAME = "org.opencontainers.image.ref.name"


class LayoutSource:
    """Reads one layout."""

    def __init__(self, reference: LayoutReference) -> None:
        self._reference = reference
        self._directory = reference.directory

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest or index that is meant: (digest, bytes, media type).

        Raises:
            NotFound: no such directory or tag.
            FailedPrecondition: the directory is no layout.
        """
        data = await asyncio.to_thread(self._read_index)
        descriptor = self._select(decode(f"{self._directory}/index.json", data, Index))
        return descriptor.digest, await self.manifest(descriptor), descriptor.media_type

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The bytes of a manifest or index.

        Raises:
            NotFound: the layout lacks it.
        """
        if descriptor.size > MAX_JSON_BYTES:
            raise invalid(
                f"manifest {descriptor.digest} has {descriptor.size} bytes; at most {MAX_JSON_BYTES} are read"
            )
        fd = self._open(descriptor)
        try:
            return await asyncio.to_thread(os.read, fd, MAX_JSON_BYTES)
        finally:
            os.close(fd)

    @asynccontextmanager
    async def open_blob(self, descriptor: Descriptor, offset: int) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        fd = self._open(descriptor)

        async def chunks() -> AsyncIterator[bytes]:
            while chunk := await asyncio.to_thread(os.read, fd, CHUNK_BYTES):
                yield chunk

        try:
            size = os.fstat(fd).st_size
            if size != descriptor.size:  # no retry makes a file longer
                raise DataLoss(
                    f"{self._directory}: blob {descriptor.digest} has {size} of {descriptor.size} bytes",
                    reason="DIGEST_MISMATCH",
                )
            os.lseek(fd, offset, os.SEEK_SET)
            yield offset, chunks()
        finally:
            os.close(fd)

    def _read_index(self) -> bytes:
        path = self._directory / "index.json"
        try:
            with path.open("rb") as file:
                data = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            why = "has no index.json, so it is no OCI image layout" if self._directory.is_dir() else "is no directory"
            raise NotFound(
                f"{self._directory} {why}; name the directory of an OCI image layout on the worker's machine, as "
                "oci:/path:tag",
                reason="IMAGE_NOT_FOUND",
            ) from error
        if len(data) > MAX_JSON_BYTES:
            raise invalid(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        return data

    def _select(self, index: Index) -> Descriptor:
        reference = self._reference
        name = str(self._directory)
        if reference.digest:
            found = [d for d in index.manifests if d.digest == reference.digest]
        elif not reference.tag and len(index.manifests) == 1:
            found = list(index.manifests)
        else:
            tag = reference.tag or DEFAULT_TAG
            # Some tools write the whole reference (docker.io/library/x:tag) where others write the tag.
            found = [d for d in index.manifests if _ref_name(d) == tag or _ref_name(d).endswith(f":{tag}")]
        if not found:
            wanted = reference.digest or reference.tag or DEFAULT_TAG
            has = ", ".join(sorted({_ref_name(d) for d in index.manifests} - {""})) or "no tags"
            raise NotFound(f"{name} has no image {wanted!r}; it has {has}", reason="IMAGE_NOT_FOUND")
        descriptor = found[0] if len(found) == 1 else choose(name, Index(manifests=tuple(found)))
        check_descriptor(name, descriptor)
        return descriptor

    def _open(self, descriptor: Descriptor) -> int:
        path: Path = self._directory / "blobs" / "sha256" / hex_of(descriptor.digest)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{self._directory} lacks blob {descriptor.digest}", reason="IMAGE_NOT_FOUND") from error


def _ref_name(descriptor: Descriptor) -> str:
    return (descriptor.annotations or {}).get(_REF_NAME, "")
