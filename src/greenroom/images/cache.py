"""How much a store keeps: sizes, and who goes when there is too much.

What has been unused longest goes first. An image that is used, pinned or being prepared stays, and so does one that was
used a moment ago: whoever prepared it is about to start something from it. When there is too much nevertheless, that is
said (`Evicted.over_bytes`), and not tried again before something changes.

Every step of a removal leaves a store that `greenroom.images.repair` makes whole or clean again: nobody may use the
image any more (`Uses.close`), its tree is moved away, its record goes, then the blobs that no other image needs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import structlog

from greenroom.core.records import CachedImage, Evicted, Record
from greenroom.images import space
from greenroom.images.blobs import BlobStore, try_lock
from greenroom.images.catalog import Catalog, ImageRecord, disk_bytes
from greenroom.images.uses import PIN, Uses, is_warm

log = structlog.get_logger(__name__)

#: What was used this recently is not evicted: between the end of a preparation and the start of the first sandbox lie
#: seconds, on a busy machine.
RECENT_S = 60.0
#: Without being told otherwise, eviction goes down to this part of the high mark, so that it is not begun anew by the
#: next small image.
LOW_PART = 0.8
#: Users that a reason names.
MAX_NAMED = 3


class Marks(Record, frozen=True, kw_only=True):
    """Bytes: above ``high`` images are evicted, until there are ``low`` or less. ``high`` 0: never. An image that would
    make it more than ``limit`` is refused, where the disk has more room than this store may take. 0: there is none."""

    high: int = 0
    low: int = 0
    limit: int = 0


class Cache:
    """Sizes and evictions of the store below ``root``. All methods block: for thread pools."""

    def __init__(
        self, root: Path, catalog: Catalog, blobs: BlobStore, uses: Uses, marks: Marks, *, recent_s: float = RECENT_S
    ) -> None:
        self._root = root
        self._catalog = catalog
        self._blobs = blobs
        self._uses = uses
        self._recent_s = recent_s
        self._trees: dict[str, int] = {}  # bytes of trees whose records do not say; they never change
        self.marks = marks

    # --- looking -----------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Of all that is here: trees, blobs, what is half fetched or half removed."""
        trees = sum(self._tree_bytes(record) for record in self._catalog.records())
        return trees + self._blobs.disk_bytes() + disk_bytes(self._catalog.unpacking)

    def free_bytes(self) -> int:
        """What the file system still has for us, as far as the limit lets us."""
        free, room = space.free_bytes(self._root), self.room_bytes()
        return free if room is None else min(free, room)

    def room_bytes(self) -> int | None:
        """What the limit leaves; None without one."""
        return max(0, self.marks.limit - self.used_bytes()) if self.marks.limit else None

    def listed(self) -> list[CachedImage]:
        """Whole and half images, the one that was unused longest first."""
        records = self._catalog.records()
        needed = Counter(blob for record in records for blob in record.blobs)
        references = self._catalog.references()
        found = [self._cached(record, needed, references.get(record.digest, ())) for record in records]
        return sorted(found, key=lambda image: image.last_used_at)

    def described(self, digest: str) -> CachedImage | None:
        return next((image for image in self.listed() if image.digest == digest), None)

    def _cached(self, record: ImageRecord, needed: Counter[str], references: tuple[str, ...]) -> CachedImage:
        """``needed``: by how many images each blob is."""
        digest = record.digest
        own = sum(self._blobs.disk_bytes_of(blob) for blob in record.blobs if needed[blob] == 1)
        return CachedImage(
            digest=digest,
            references=references or (record.reference,),
            ready=self._catalog.tree(digest).is_dir(),
            size_bytes=record.size_bytes,
            disk_bytes=own + self._tree_bytes(record),
            last_used_at=self._last_used_at(digest),
            users=self._uses.described(digest),
            pinned=PIN in self._uses.users(digest),
        )

    def _last_used_at(self, digest: str) -> float:
        return self._uses.last_used_at(digest) or self._catalog.written_at(digest)

    def _tree_bytes(self, record: ImageRecord) -> int:
        tree = self._catalog.tree(record.digest)
        if not tree.is_dir():
            return 0
        if record.tree_bytes:
            return record.tree_bytes
        if record.digest not in self._trees:
            self._trees[record.digest] = disk_bytes(tree)
        return self._trees[record.digest]

    # --- removing ----------------------------------------------------------------------------------------

    def trim(self, coming_bytes: int = 0) -> Evicted:
        """Keeps to the marks, when ``coming_bytes`` more are about to come."""
        high, low = self.marks.high, self.marks.low
        used = self.used_bytes() + coming_bytes
        if not high or used <= high:
            return Evicted()
        evicted = self.evict(used - low, recent_s=self._recent_s)
        over = max(0, used - coming_bytes - evicted.freed_bytes - high)
        return Evicted(removed=evicted.removed, kept=evicted.kept, freed_bytes=evicted.freed_bytes, over_bytes=over)

    def evict(
        self, wanted_bytes: int | None, *, recent_s: float = 0.0, spare: Collection[str] = (), dry_run: bool = False
    ) -> Evicted:
        """Removes images until ``wanted_bytes`` are free again (None: all that may go).

        Args:
            recent_s: what was used in the last so many seconds stays.
            spare: digests that stay whatever they are.
            dry_run: only says what would go. Warm sandboxes do not count: who evicts all ends them first.
        """
        removed: list[CachedImage] = []
        kept: list[str] = []
        freed = 0
        with self._alone() as alone:
            if not alone:
                return Evicted(kept=("another process is evicting just now",))
            self._uses.drop_stale()
            records = sorted(self._catalog.records(), key=lambda record: self._last_used_at(record.digest))
            needed = Counter(blob for record in records for blob in record.blobs)
            references = self._catalog.references()
            for record in records:
                if wanted_bytes is not None and freed >= wanted_bytes:
                    break
                image = self._cached(record, needed, references.get(record.digest, ()))
                if (why := _why_kept(image, recent_s, spare, warm_too=dry_run)) or (why := self._take(image, dry_run)):
                    kept.append(f"{image.references[0] if image.references else image.digest}: {why}")
                    continue
                removed.append(image)
                freed += image.disk_bytes
                needed.subtract(record.blobs)
        for image in () if dry_run else removed:
            log.info("image evicted", digest=image.digest, references=image.references, bytes=image.disk_bytes)
        return Evicted(removed=tuple(removed), kept=tuple(kept), freed_bytes=freed)

    def _take(self, image: CachedImage, dry_run: bool) -> str:
        """Removes it; the reason if that can't be, else ""."""
        fd = try_lock(self._root, image.digest)
        if fd is None:
            return "it is being prepared"
        try:
            used_since = self._last_used_at(image.digest) != image.last_used_at
            if not used_since and (dry_run or self.remove_locked(image.digest)):
                return ""
            return "it has just been taken into use"
        finally:
            os.close(fd)

    def remove_locked(self, digest: str) -> bool:
        """Removes an image whose lock the caller holds; False, and nothing is removed, when it has users."""
        if not self._uses.close(digest):
            return False
        record = self._catalog.read(digest)
        self._catalog.remove_tree(digest)
        self._catalog.forget_references(digest)
        self._catalog.forget(digest)
        self._trees.pop(digest, None)
        for blob in record.blobs if record else ():
            self.remove_unneeded(blob, mine=digest)
        return True

    def remove_unneeded(self, blob: str, *, mine: str = "") -> bool:
        """Removes a blob, and what is half fetched of it, unless an image needs it or somebody works on it. ``mine``:
        the digest whose lock the caller holds."""
        fd = None if blob == mine else try_lock(self._root, blob)
        if fd is None and blob != mine:
            return False
        try:
            # Looked up under the blob's lock: a preparation writes its record first and then locks the blob, so either
            # its record is seen here or it finds the blob gone and fetches it.
            if self._catalog.needs(blob):
                return False
            self._blobs.remove(blob)
            return True
        finally:
            if fd is not None:
                os.close(fd)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """One process at a time evicts: two would each remove enough."""
        fd = try_lock(self._root, "evicting")
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)


def _why_kept(image: CachedImage, recent_s: float, spare: Collection[str], *, warm_too: bool) -> str:
    """ "" when nothing speaks against removing it."""
    if image.pinned:
        return "it is pinned"
    users = [user for user in image.users if not (warm_too and is_warm(user))]
    if users:
        more = len(users) - MAX_NAMED
        return f"it is used by {', '.join(users[:MAX_NAMED])}" + (f" and {more} more" if more > 0 else "")
    if image.digest in spare or time.time() - image.last_used_at < recent_s:
        return "it was used just now"
    return ""
