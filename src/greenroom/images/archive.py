"""Images in one file: an OCI image layout as a tar archive, and what ``docker save`` writes.

Nothing is unpacked for it: blobs are read where they lie in the archive. A docker archive has no manifest in our sense;
one is made up from what it says, always the same for the same archive.

Source: OCI image spec v1.1, "Image Layout" (an archive of one); Docker image specification v1.2, "Combined Image JSON +
Filesystem Changeset Format" (``manifest.json``).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record
from greenroom.images import tar
from greenroom.images.config import MANIFEST_TYPES, Descriptor, check_descriptor, decode, diff_ids, invalid
from greenroom.images.layout import (
    DirectoryFiles,
    Extent,
    Files,
    LayoutSource,
    is_tagged,
    lacks,
    no_such_image,
    read_small,
    stream,
)
from greenroom.images.pieces import PIECE_BYTES
from greenroom.images.reference import LayoutReference
from greenroom.images.stream import FileSource, Malformed

#: Files in an archive: three for each layer and a few more for each image.
MAX_MEMBERS = 100_000
#: Names of all of them together, in characters: the agent keeps them in memory, and one may be a MiB long.
MAX_NAMES = 16 << 20
#: Links followed from one name; Docker links a layer that is there twice, once.
_MAX_LINKS = 8
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.docker.container.image.v1+json"
#: How compressed data begin, and what to do with a whole archive of them.
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d"}


class _DockerImage(Record, frozen=True, kw_only=True, rename="pascal"):
    config: str
    layers: tuple[str, ...] = ()
    repo_tags: tuple[str, ...] | None = None


class TarFiles:
    """The files in a tar archive, found once and read where they are."""

    def __init__(self, path: Path) -> None:
        """Raises:
        FailedPrecondition: it is no tar archive that can be read in place.
        """
        self._path = path
        self._found: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        fd = self._open()
        try:
            self._index(fd)
        except Malformed as error:
            raise invalid(f"{path} can't be read as an archive: {error}") from error
        finally:
            os.close(fd)

    @property
    def name(self) -> str:
        return str(self._path)

    def __contains__(self, path: str) -> bool:
        return path in self._found

    def open(self, path: str) -> Extent:
        name = posixpath.normpath(path)
        for _ in range(_MAX_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        if name not in self._found:
            raise FileNotFoundError(path)
        return Extent(self._open(), *self._found[name])

    def _open(self) -> int:
        # Without blocking: it may be a pipe, which is refused.
        fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise invalid(f"{self._path} is neither a directory nor a plain file")
        return fd

    def _index(self, fd: int) -> None:
        magic = os.pread(fd, 8, 0)
        for begins, command in _COMPRESSED.items():
            if magic.startswith(begins):
                raise invalid(f"{self._path} is compressed as a whole: unpack it first ({command})")
        source = FileSource(fd)
        names = 0
        for number, (entry, data) in enumerate(tar.entries(source)):
            if number >= MAX_MEMBERS:
                raise invalid(f"{self._path} has more than {MAX_MEMBERS} files, so it is no archive of images")
            names += len(entry.name) + len(entry.linkname)
            if names > MAX_NAMES:
                raise invalid(
                    f"{self._path} has names of more than {MAX_NAMES >> 20} MiB, so it is no archive of images"
                )
            name = posixpath.normpath(entry.name)
            self._found.pop(name, None)
            self._links.pop(name, None)
            if entry.kind == tar.REGULAR and entry.fragments is None:
                self._found[name] = (source.position(), data.left)
            elif entry.kind == tar.SYMLINK:
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
            elif entry.kind == tar.LINK:
                self._links[name] = posixpath.normpath(entry.linkname)


class DockerArchiveSource:
    """Reads one image of a docker archive."""

    def __init__(self, reference: LayoutReference, files: Files) -> None:
        self._reference = reference
        self._files = files
        self._blobs: dict[str, str] = {}
        self._manifest: tuple[str, bytes] | None = None

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest that is made up for the image that is meant: (digest, bytes, media type).

        Raises:
            NotFound: no such image, or a file of it is missing.
            FailedPrecondition: the archive contradicts itself.
        """
        digest, data = await asyncio.to_thread(self._describe)
        return digest, data, MANIFEST_TYPES[0]

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """Raises:
        NotFound: always; there are no indexes here that could name one.
        """
        raise lacks(self._files, descriptor)

    @asynccontextmanager
    async def open_blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        await asyncio.to_thread(self._describe)
        path = self._blobs.get(descriptor.digest)
        if path is None:
            raise lacks(self._files, descriptor)
        async with stream(self._files, path, descriptor, start) as chunks:
            yield start, chunks

    def _describe(self) -> tuple[str, bytes]:
        if self._manifest is not None:
            return self._manifest
        try:
            images = decode(
                f"{self._files.name}: manifest.json", read_small(self._files, "manifest.json"), list[_DockerImage]
            )
            for image in self._chosen(images):
                digest, data, blobs = self._describe_image(image)
                if self._reference.digest in ("", digest):
                    self._manifest, self._blobs = (digest, data), blobs
                    return self._manifest
        except FileNotFoundError as error:
            raise invalid(f"{self._files.name} names a file that it does not have: {error.args[0]}") from error
        raise no_such_image(self._files.name, self._reference, (t for image in images for t in image.repo_tags or ()))

    def _chosen(self, images: list[_DockerImage]) -> list[_DockerImage]:
        tag = self._reference.tag
        if self._reference.digest or (len(images) == 1 and not tag):
            return images
        return [image for image in images if any(is_tagged(known, tag) for known in image.repo_tags or ())]

    def _describe_image(self, image: _DockerImage) -> tuple[str, bytes, dict[str, str]]:
        config = read_small(self._files, image.config)
        config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        expected = diff_ids(f"{self._files.name}: {image.config}", config)
        if len(expected) != len(image.layers):
            raise invalid(
                f"{self._files.name}: {image.config} speaks of {len(expected)} layers, not {len(image.layers)}"
            )
        blobs = {config_digest: image.config}
        layers = []
        for path, diff_id in zip(image.layers, expected, strict=True):
            layer = self._describe_layer(path, diff_id)
            check_descriptor(self._files.name, layer)
            layers.append(layer)
            blobs[layer.digest] = path
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPES[0],
            "config": Descriptor(media_type=_CONFIG, digest=config_digest, size=len(config)),
            "layers": layers,
        }
        data = msgspec.json.encode(manifest)
        return f"sha256:{hashlib.sha256(data).hexdigest()}", data, blobs

    def _describe_layer(self, path: str, diff_id: str) -> Descriptor:
        """Docker's own layers are not compressed, so the config says their digest; others' are read for it."""
        fd, offset, size = self._files.open(path)
        try:
            magic = os.pread(fd, 8, offset)
            if not magic.startswith(tuple(_COMPRESSED)):
                return Descriptor(media_type=_LAYER, digest=diff_id, size=size)
            found = hashlib.sha256()
            for at in range(offset, offset + size, PIECE_BYTES):
                found.update(os.pread(fd, min(PIECE_BYTES, offset + size - at), at))
        finally:
            os.close(fd)
        packing = "gzip" if magic.startswith(b"\x1f\x8b") else "zstd"
        return Descriptor(media_type=f"{_LAYER}+{packing}", digest=f"sha256:{found.hexdigest()}", size=size)


LocalSource = LayoutSource | DockerArchiveSource


@asynccontextmanager
async def local_source(reference: LayoutReference) -> AsyncIterator[LocalSource]:
    """The image in a directory or an archive, whichever is there.

    Raises:
        FailedPrecondition: it is a file that is neither kind of archive (reason ``IMAGE_INVALID``).
    """
    yield await asyncio.to_thread(_open, reference)


def _open(reference: LayoutReference) -> LocalSource:
    path = reference.directory
    if path.is_dir() or not path.exists():  # what is not there, the layout says best
        return LayoutSource(reference, DirectoryFiles(path))
    try:
        files = TarFiles(path)
    except OSError as error:
        raise FailedPrecondition(f"{path} can't be read: {error.strerror}", reason="IMAGE_INVALID") from error
    if "index.json" in files:  # Docker writes both since its version 25; the layout says more
        return LayoutSource(reference, files)
    if "manifest.json" in files:
        return DockerArchiveSource(reference, files)
    raise invalid(f"{path} is neither an OCI image layout (no index.json) nor a docker archive (no manifest.json)")
