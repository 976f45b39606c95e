"""What is known of the images of a store: the records beside the blobs and trees.

Below the store's root::

    images/<hex>.json    what the image of this manifest digest is made of; written before its blobs are fetched, so
                         that nobody takes a blob away that somebody is about to use
    rootfs/<hex>/        its unpacked tree; there only when it is whole
    unpacking/<hex>/     a tree under construction, or on its way out, or what a killed process left of one
    refs/<hex>.json      what a reference was resolved to, and when

An image is there when its record and its tree are, and may be used when its directory of uses is there too
(`greenroom.images.uses`). Whoever changes something of a digest holds its lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from greenroom.core.records import Record
from greenroom.images.blobs import hex_of, sync_directory, write_atomically
from greenroom.images.port import MAX_DIGESTS, Image, ImageConfig

#: A directory that was changed this recently may change once more without its time showing it (the kernel's clock for
#: files ticks every 4 to 10 ms), so what was read of it is not kept.
_SETTLED_S = 0.1


class ImageRecord(Record, frozen=True, kw_only=True):
    """``tree_bytes``: what its tree takes on disk; 0: not unpacked yet, or by an older version."""

    reference: str
    digest: str
    config_digest: str
    config: ImageConfig
    layers: tuple[str, ...]
    size_bytes: int
    tree_bytes: int = 0

    @property
    def blobs(self) -> tuple[str, ...]:
        """Digests of all blobs that it is made of, each once."""
        return tuple(dict.fromkeys((self.digest, self.config_digest, *self.layers)))


class RefRecord(Record, frozen=True, kw_only=True):
    """``imported``: it was given to the image here, and no registry is to be asked what it means."""

    reference: str
    digest: str
    resolved_at: float
    imported: bool = False


class Catalog:
    """The records and trees below ``root``; the directories are made if they are not there. All methods block."""

    def __init__(self, root: Path) -> None:
        self.images = root / "images"
        self.rootfs = root / "rootfs"
        self.unpacking = root / "unpacking"
        self.refs = root / "refs"
        # Sandboxes of other users may have to reach the trees; what else is here is nobody's business.
        self.rootfs.mkdir(mode=0o755, parents=True, exist_ok=True)
        for directory in (self.images, self.unpacking, self.refs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._digests: tuple[str, ...] = ()
        self._digests_of = -1  # the time of the directory that they were read from (ns); -1: to be read anew

    # --- images ------------------------------------------------------------------------------------------

    def write(self, record: ImageRecord) -> None:
        write_atomically(self._record_path(record.digest), msgspec.json.encode(record))

    def read(self, digest: str) -> ImageRecord | None:
        """None: there is none, or what is there is damaged (a repair removes it)."""
        try:
            record = msgspec.json.decode(self._record_path(digest).read_bytes(), type=ImageRecord)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return record if record.digest == digest else None

    def written_at(self, digest: str) -> float:
        """When its record was written (seconds since the epoch); 0: there is none."""
        try:
            return self._record_path(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def forget(self, digest: str) -> None:
        self._record_path(digest).unlink(missing_ok=True)

    def records(self) -> Sequence[ImageRecord]:
        found = (self.read(f"sha256:{path.stem}") for path in sorted(self.images.glob("[0-9a-f]*.json")))
        return [record for record in found if record is not None]

    def load(self, digest: str) -> Image | None:
        """The image if it is whole."""
        rootfs = self.tree(digest)
        record = self.read(digest)
        if record is None or not rootfs.is_dir():
            return None
        return Image(
            reference=record.reference,
            digest=digest,
            rootfs=rootfs,
            config=record.config,
            size_bytes=record.size_bytes,
            layers=record.layers,
        )

    def load_all(self) -> Sequence[Image]:
        found = (self.load(record.digest) for record in self.records())
        return [image for image in found if image is not None]

    def needs(self, blob: str) -> bool:
        """Whether an image is made of this blob."""
        return any(blob in record.blobs for record in self.records())

    def digests(self) -> tuple[str, ...]:
        """As `greenroom.images.port.ImageStore.digests`."""
        changed = self.rootfs.stat().st_mtime_ns
        if changed != self._digests_of:
            self._digests_of = changed if time.time() - changed / 1e9 > _SETTLED_S else -1
            trees = sorted(path.name for path in self.rootfs.iterdir())[:MAX_DIGESTS]
            self._digests = tuple(f"sha256:{name}" for name in trees)
        return self._digests

    # --- trees -------------------------------------------------------------------------------------------

    def tree(self, digest: str) -> Path:
        return self.rootfs / hex_of(digest)

    def staged(self, digest: str) -> Path:
        return self.unpacking / hex_of(digest)

    def commit_tree(self, digest: str) -> None:
        """What was staged is whole."""
        self.staged(digest).rename(self.tree(digest))
        sync_directory(self.rootfs)

    def remove_tree(self, digest: str) -> None:
        """Moved away first: a tree that is only half there must never be found."""
        self.clear_staged(digest)
        with contextlib.suppress(FileNotFoundError):
            self.tree(digest).rename(self.staged(digest))
            sync_directory(self.rootfs)
        self.clear_staged(digest)

    def clear_staged(self, digest: str) -> None:
        staged = self.staged(digest)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(staged)

    # --- references --------------------------------------------------------------------------------------

    def note(self, reference: str, digest: str, *, imported: bool = False) -> None:
        """``reference`` means this image now."""
        record = RefRecord(reference=reference, digest=digest, resolved_at=time.time(), imported=imported)
        write_atomically(self._ref_path(reference), msgspec.json.encode(record))

    def meaning(self, reference: str) -> RefRecord | None:
        """What it meant when it was resolved last."""
        return self._read_ref(self._ref_path(reference))

    def references(self) -> dict[str, tuple[str, ...]]:
        """All that are known, by digest."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.refs.glob("[0-9a-f]*.json")):
            if (record := self._read_ref(path)) is not None:
                found.setdefault(record.digest, []).append(record.reference)
        return {digest: tuple(sorted(names)) for digest, names in found.items()}

    def forget_references(self, digest: str) -> None:
        for path in self.refs.glob("[0-9a-f]*.json"):
            record = self._read_ref(path)
            if record is None or record.digest == digest:
                path.unlink(missing_ok=True)

    @staticmethod
    def _read_ref(path: Path) -> RefRecord | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=RefRecord)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def _ref_path(self, reference: str) -> Path:
        return self.refs / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"

    def _record_path(self, digest: str) -> Path:
        return self.images / f"{hex_of(digest)}.json"


def disk_bytes(path: Path) -> int:
    """What a tree or file takes on disk, each file once however many names it has; 0 when it is not there. Blocks:
    about 4 us a file. By descriptors, because paths in a tree may be longer than the kernel takes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        info = os.fstat(fd)
        return info.st_blocks * 512 + (_below(fd, set()) if path.is_dir() else 0)
    finally:
        os.close(fd)


def _below(directory: int, seen: set[int]) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
                if info.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if info.st_ino in seen:
                        continue
                    seen.add(info.st_ino)
                total += info.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    fd = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
                    try:
                        total += _below(fd, seen)
                    finally:
                        os.close(fd)
            except FileNotFoundError:
                continue  # it is being removed
    return total
