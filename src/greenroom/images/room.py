"""Room for an image that is to be prepared: made beforehand as far as it is known, and anew when the disk is full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog

from greenroom.core.errors import ResourceExhausted
from greenroom.images import space
from greenroom.images.blobs import BlobStore
from greenroom.images.cache import Cache
from greenroom.images.config import Descriptor
from greenroom.images.progress import Progress

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Guest(NamedTuple):
    """The image: its reference, digest and layers."""

    reference: str
    digest: str
    layers: Sequence[Descriptor]


class Room:
    """In the store below ``root``. ``recent_s``: what was used in the last so many seconds makes room for nobody."""

    def __init__(self, root: Path, cache: Cache, blobs: BlobStore, recent_s: float) -> None:
        self._root = root
        self._cache = cache
        self._blobs = blobs
        self._recent_s = recent_s

    async def given(self, guest: Guest, progress: Progress, make: Callable[[], Awaitable[T]]) -> T:
        """What ``make`` returns. When the disk is full all the same, what nobody uses goes, and it is done again.

        Raises:
            ResourceExhausted: the disk is full (reason ``DISK_FULL``), and nothing may go; says how much is missing.
        """
        await asyncio.to_thread(self._make_room, guest)
        while True:
            free = await asyncio.to_thread(self._cache.free_bytes)
            try:
                return await make()
            except ResourceExhausted as full:
                if full.reason != "DISK_FULL":
                    raise
                evicted = await asyncio.to_thread(self._evict_for, guest, full)
                if not evicted:
                    raise self._estimated(guest, progress, free, full) from full
                log.warning("the disk is full; images were evicted", freed_bytes=evicted)

    def _make_room(self, guest: Guest) -> None:
        """For the layers that are not here yet; what they unpack to is not known."""
        layers = {layer.digest: layer for layer in guest.layers}.values()
        coming = sum(layer.size - self._blobs.done_bytes(layer) for layer in layers)
        missing = coming - self._cache.free_bytes()
        if missing > 0 and self._could_evict(guest, missing) < missing:  # nor is anything removed for what can't fit
            raise self._full(guest, f"its layers need {_mib(missing)} more", missing, 0)
        self._cache.trim(coming)
        missing = coming - self._cache.free_bytes()
        if missing > 0:
            freed = self._evict(guest, missing)
            missing = coming - self._cache.free_bytes()
            if missing > 0:
                raise self._full(guest, f"its layers need {_mib(missing)} more", missing, freed)

    def _evict_for(self, guest: Guest, full: ResourceExhausted) -> int:
        """What is needed is what the layers say of themselves, so nothing is removed if it could not be had anyway."""
        wanted = int(full.metadata.get("needed_bytes", "0")) - self._cache.free_bytes()
        if wanted <= 0:  # not known; or it is files that there are too many of
            return self._evict(guest, None)
        return self._evict(guest, wanted) if self._could_evict(guest, wanted) >= wanted else 0

    def _could_evict(self, guest: Guest, wanted_bytes: int) -> int:
        recent_s, spare = self._recent_s, [guest.digest]
        return self._cache.evict(wanted_bytes, recent_s=recent_s, spare=spare, dry_run=True).freed_bytes

    def _evict(self, guest: Guest, wanted_bytes: int | None) -> int:
        return self._cache.evict(wanted_bytes, recent_s=self._recent_s, spare=[guest.digest]).freed_bytes

    def _estimated(self, guest: Guest, progress: Progress, free: int, full: ResourceExhausted) -> ResourceExhausted:
        """The disk was full in the middle: what is missing can be told from how far it came with what was ``free``,
        unless the unpacker knows of more."""
        part = progress.unpacked_part()
        has_room = int(full.metadata.get("free_bytes", "0")) >= int(full.metadata.get("needed_bytes", "1"))
        if not part or has_room:  # a download met it before the unpacker had said anything; or it is no matter of bytes
            return ResourceExhausted(
                f"image {guest.reference} does not fit: {full.message}; or remove what nobody needs (`greenroom images "
                "list`, `greenroom images rm`), or add space",
                reason=full.reason,
                metadata=full.metadata,
                retry_after_s=full.retry_after_s,
            )
        missing = max(int(free / part) - free, int(full.metadata.get("missing_bytes", "1")))
        return self._full(guest, f"to unpack it takes about {_mib(missing)} more", missing, 0)

    def _full(self, guest: Guest, why: str, missing: int, freed: int) -> ResourceExhausted:
        already = f"{_mib(freed)} of unused images were removed already; " if freed else ""
        limit, free = self._cache.marks.limit, self._cache.free_bytes()
        where = f"the disk of {self._root} is full"
        if limit and free < space.free_bytes(self._root):
            where = f"images may take {_mib(limit)} in {self._root} (--images-limit)"
        return ResourceExhausted(
            f"{where}: image {guest.reference} does not fit, {why}. {already}Remove what "
            "nobody needs (`greenroom images list`, `greenroom images rm`), or add space",
            reason="DISK_FULL",
            metadata={"missing_bytes": str(missing)},
            retry_after_s=30.0,
        )


def _mib(size_bytes: int) -> str:
    return f"{max(1, round(size_bytes / (1 << 20)))} MiB"
