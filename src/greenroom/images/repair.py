"""What killed processes left in a store: made whole, or removed. Done at the start of every process that uses it.

Others may be at work in the store at the same time; whatever they work on is locked, and left alone. After a process
was killed at any instant the store is, once somebody has repaired it, as if that process had never begun what it was
doing, or had done it, except that what was fetched stays for the next attempt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from greenroom.images.blobs import BlobStore, try_lock
from greenroom.images.cache import Cache
from greenroom.images.catalog import Catalog
from greenroom.images.incoming import clear_incoming
from greenroom.images.uses import Uses

log = structlog.get_logger(__name__)

#: A small file that is being written is renamed into place within milliseconds; one that is older than this never will.
UNFINISHED_S = 60.0


def repair(
    root: Path, catalog: Catalog, blobs: BlobStore, uses: Uses, cache: Cache, *, unfinished_s: float = UNFINISHED_S
) -> int:
    """Returns how many things had to be repaired or removed. Blocks."""
    done = 0

    def with_lock(digest: str, work: Callable[[], bool]) -> None:
        nonlocal done
        fd = try_lock(root, digest)
        if fd is None:
            return  # somebody works on it
        try:
            done += work()
        finally:
            os.close(fd)

    uses.drop_stale()
    done += clear_incoming(root)
    for directory in (catalog.images, catalog.refs, root / "blobs" / "sha256", root / "progress", root / "holders"):
        done += _remove_unfinished(directory, unfinished_s)
    for path in catalog.unpacking.iterdir():
        digest = f"sha256:{path.name}"
        with_lock(digest, lambda digest=digest: _clear_staged(catalog, digest))  # type: ignore[misc]
    there = {f"sha256:{path.stem}" for path in catalog.images.glob("*.json")}
    there |= {f"sha256:{path.name}" for path in catalog.rootfs.iterdir()} | set(uses.digests())
    for digest in sorted(there):
        with_lock(digest, lambda digest=digest: _settle(catalog, uses, cache, digest))  # type: ignore[misc]
    # Records are read once for all blobs; what seems to be nobody's is looked up again under its lock.
    needed = {blob for record in catalog.records() for blob in record.blobs}
    for digest in sorted(blobs.digests() - needed):
        done += cache.remove_unneeded(digest)
    for path in (root / "progress").glob("[0-9a-f]*"):
        with_lock(f"sha256:{path.name}", lambda path=path: _unlink(path))  # type: ignore[misc]
    known = {record.digest for record in catalog.records()}
    for digest in catalog.references():
        if digest not in known:
            catalog.forget_references(digest)
            done += 1
    if done:
        log.info("repaired the image store", root=str(root), things=done)
    return done


def _clear_staged(catalog: Catalog, digest: str) -> bool:
    catalog.clear_staged(digest)
    return True


def _unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def _settle(catalog: Catalog, uses: Uses, cache: Cache, digest: str) -> bool:
    """An image, under its lock. Whether anything had to be done."""
    has_record = catalog.read(digest) is not None
    has_tree = catalog.tree(digest).is_dir()
    if has_record and has_tree:
        if uses.is_open(digest):
            return False
        uses.open(digest)  # its removal was not begun in earnest
        return True
    if has_record:  # not unpacked: what was fetched is there for the next attempt
        return uses.is_open(digest) and uses.close(digest)
    if has_tree and uses.users(digest):
        # Nothing of ours leaves this behind. A damaged disk may; what runs from it is not made to fail as well.
        log.error("an image in use has no record", digest=digest)
        return False
    return cache.remove_locked(digest)


def _remove_unfinished(directory: Path, older_s: float) -> int:
    """Files that a process was writing when it died (`greenroom.images.blobs.write_atomically`)."""
    count = 0
    for path in directory.glob(".*"):
        try:
            if time.time() - path.stat().st_mtime >= older_s:
                path.unlink()
                count += 1
        except FileNotFoundError:
            continue
    return count
