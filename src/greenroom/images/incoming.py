"""Images that are brought in an archive: an OCI image layout, or what ``docker save`` writes, as a tar stream.

Below the store's root::

    incoming/<id>.tar    the archive as it came; its lock (flock) is held by who works with it
    incoming/<id>/       the layout that it is or was made into

Only names that an image consists of are taken from an archive; a digest in a name is held to its bytes later, as always
(`greenroom.images.blobs`). Source: OCI image spec v1.1, "Image Layout"; Docker image spec v1.2, "Combined Image JSON +
Filesystem Changeset Format" (``manifest.json``).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from greenroom.core.errors import ResourceExhausted
from greenroom.core.records import Record
from greenroom.images import tar
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, MAX_JSON_BYTES, Descriptor, Index, Manifest, invalid
from greenroom.images.stream import FileSource, Malformed

#: Largest archive that is taken: as much as one image may unpack to.
MAX_ARCHIVE_BYTES = 64 << 30
#: Entries of an archive that are looked at.
_MAX_ENTRIES = 10_000
_BLOB = re.compile(r"blobs/sha256/[0-9a-f]{64}")
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
#: As docker says; how the bytes are packed is told by the bytes.
_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar"
_REF_NAME = "org.opencontainers.image.ref.name"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Saved(Record, frozen=True, kw_only=True, rename="pascal"):
    """An entry of docker's ``manifest.json``."""

    config: str
    layers: tuple[str, ...] = ()
    repo_tags: tuple[str, ...] | None = None


@asynccontextmanager
async def layout_of(root: Path, archive: AsyncIterator[bytes]) -> AsyncIterator[Path]:
    """The archive as a layout directory, which is gone afterwards.

    Raises:
        FailedPrecondition: it is neither kind of archive (reason ``IMAGE_INVALID``).
        ResourceExhausted: the disk is full (reason ``DISK_FULL``).
    """
    incoming = root / "incoming"
    incoming.mkdir(mode=0o700, exist_ok=True)
    path = incoming / f"{uuid.uuid4().hex}.tar"
    layout = path.with_suffix("")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        await _save(fd, archive)
        await asyncio.to_thread(_lay_out, fd, layout)
        os.ftruncate(fd, 0)  # its bytes are twice on the disk now
        yield layout
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise ResourceExhausted(
            f"the disk of {root} is full: the archive does not fit; remove images that nobody needs, or add space",
            reason="DISK_FULL",
            retry_after_s=30.0,
        ) from error
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, layout, ignore_errors=True))
        path.unlink(missing_ok=True)
        os.close(fd)


def clear_incoming(root: Path) -> int:
    """Removes what killed processes left; returns how many archives. Blocks."""
    count = 0
    for path in (root / "incoming").glob("*.tar"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody works with it
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
            count += 1
    return count


async def _save(fd: int, archive: AsyncIterator[bytes]) -> None:
    size = 0
    async for chunk in archive:
        size += len(chunk)
        if size > MAX_ARCHIVE_BYTES:
            raise invalid(f"the archive is larger than {MAX_ARCHIVE_BYTES} bytes")
        await asyncio.to_thread(_write_all, fd, chunk)


def _lay_out(fd: int, layout: Path) -> None:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(mode=0o700, parents=True)
    try:
        names = _read_names(fd)
        if "index.json" in names:
            wanted = {name: layout / name for name in names if _BLOB.fullmatch(name) or name == "index.json"}
            _copy(fd, wanted)
        elif "manifest.json" in names:
            _convert(fd, layout)
        else:
            raise invalid(
                "the archive has neither an index.json (OCI image layout) nor a manifest.json (docker save) at its top"
            )
    except Malformed as error:
        at = f" at entry {error.name!r}" if error.name else ""
        raise invalid(f"the archive can't be read{at}: {error}; a compressed one has to be unpacked first") from error


def _read_names(fd: int) -> set[str]:
    names = set()
    for number, (entry, _) in enumerate(tar.entries(FileSource(fd))):
        if number >= _MAX_ENTRIES:
            raise invalid(f"the archive has more than {_MAX_ENTRIES} entries")
        if entry.kind == tar.REGULAR and entry.fragments is None:
            names.add(entry.name.removeprefix("./"))
    return names


def _copy(fd: int, wanted: dict[str, Path]) -> None:
    """Writes these entries to these files; of two of one name the first counts."""
    for entry, data in tar.entries(FileSource(fd)):
        target = wanted.get(entry.name.removeprefix("./"))
        if target is None or target.exists() or entry.kind != tar.REGULAR or entry.fragments is not None:
            continue
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for piece in data:
                _write_all(out, piece)
        finally:
            os.close(out)


def _convert(fd: int, layout: Path) -> None:
    """What ``docker save`` writes, as a layout: layers keep their bytes and get a name by digest."""
    staged = layout / "staged"
    staged.mkdir(mode=0o700)
    _copy(fd, {"manifest.json": staged / "manifest.json"})
    saved = _decode(staged / "manifest.json", tuple[_Saved, ...], "manifest.json")
    parts = dict.fromkeys(name for one in saved for name in (one.config, *one.layers))
    if len(parts) > _MAX_ENTRIES:
        raise invalid(f"the archive's manifest.json names more than {_MAX_ENTRIES} files")
    files = {name: staged / str(number) for number, name in enumerate(parts)}
    _copy(fd, files)
    made = {name: _take(layout, path, name) for name, path in files.items()}
    entries = []
    for one in saved:
        config = msgspec.structs.replace(made[one.config], media_type=_CONFIG_TYPE)
        layers = tuple(msgspec.structs.replace(made[name], media_type=_LAYER_TYPE) for name in one.layers)
        manifest = Manifest(config=config, layers=layers, media_type=MANIFEST_TYPES[0])
        document = msgspec.json.encode({"schemaVersion": 2, **msgspec.to_builtins(manifest)})
        (staged / "document").write_bytes(document)
        descriptor = _take(layout, staged / "document", "manifest")
        for tag in one.repo_tags or ("",):
            entries.append(
                msgspec.structs.replace(
                    descriptor, media_type=MANIFEST_TYPES[0], annotations={_REF_NAME: tag} if tag else None
                )
            )
    index = {"schemaVersion": 2, **msgspec.to_builtins(Index(manifests=tuple(entries), media_type=INDEX_TYPES[0]))}
    (layout / "index.json").write_bytes(msgspec.json.encode(index))


def _take(layout: Path, path: Path, name: str) -> Descriptor:
    """Moves a file among the blobs."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise invalid(f"the archive's manifest.json names {name!r}, which is not in it") from None
    path.rename(layout / "blobs" / "sha256" / digest)
    return Descriptor(digest=f"sha256:{digest}", size=size)


def _decode(path: Path, kind: Any, name: str) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise invalid(f"the archive's {name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise invalid(f"the archive's {name} can't be read: {error}") from error


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
