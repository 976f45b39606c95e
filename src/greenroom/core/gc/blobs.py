"""The snapshot store's objects: content-addressed, shared by manifests, and owned by no worker.

The rules:

1. *Generations.* An object's key is the digest of its content and the upload that put it there (``blobs/<digest>.
   <upload>``). No key is used by two uploads, so a PUT or a DELETE that arrives late touches nothing that anybody has
   put there since. (With the digest alone a delayed DELETE removes what was uploaded again.)
2. *Upload leases.* An upload begins with a lease that covers every blob that it is going to put or to reuse; what it
   puts is written down, UPLOADING, before the PUT is sent. The lease runs by the database's clock.
3. *Commit.* A manifest is written in one transaction that finds the lease still running and every blob of it PRESENT.
4. *Mark.* In one transaction: what no manifest refers to and no running lease covers becomes CONDEMNED. Nothing leaves
   that state, and nobody reuses it.
5. *Sweep.* The object of a condemned blob is deleted, as often as it takes; then its row.
6. *Readers* take a lease too: what they read stays, also when its manifest is deleted meanwhile.
7. *Scrub.* An object without a row belongs to nobody, because the row comes first and goes last. It is deleted when it
   is old and was found twice; not at all after the database was restored, because then rows are missing.

Either the lease or the commit's look at every blob is enough for safety; the lease is what lets an upload ever end
while others collect.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec.structs import replace

from greenroom.core.errors import LeaseLost
from greenroom.core.records import Record

#: How long an upload's lease lasts without being renewed, at most.
MAX_LEASE_S = 3600.0
#: An object without a row is left alone until it is older than this: longer than any upload lasts, and a day for clocks
#: that are wrong (the bucket's and the database's).
SCRUB_AGE_S = MAX_LEASE_S + 24 * 3600.0


class BlobState(enum.StrEnum):
    UPLOADING = "Uploading"
    PRESENT = "Present"
    CONDEMNED = "Condemned"


class Blob(Record, frozen=True, kw_only=True):
    """``digest``: SHA-256 of its content in hex; ``upload``: which upload put it there, its generation."""

    digest: str
    upload: str
    state: BlobState
    size_bytes: int = 0

    @property
    def key(self) -> str:
        return object_key(self.digest, self.upload)


class BlobLease(Record, frozen=True, kw_only=True):
    """``id``: random and never used twice. ``covers``: keys of blobs."""

    id: str
    covers: frozenset[str]
    expires_at: float


class Manifest(Record, frozen=True, kw_only=True):
    """``blobs``: keys."""

    id: str
    blobs: frozenset[str]


class Upload(Record, frozen=True, kw_only=True):
    """What is to be written before the first PUT. ``new``: blobs to be put; ``keys``: of all, by digest."""

    lease: BlobLease
    new: tuple[Blob, ...]
    keys: Mapping[str, str]


def object_key(digest: str, upload: str) -> str:
    return f"blobs/{digest}.{upload}"


# --- uploads ----------------------------------------------------------------------------------------------


def begin(blobs: Iterable[Blob], digests: Mapping[str, int], lease_id: str, expires_at: float) -> Upload:
    """``blobs``: the rows of these digests; ``digests``: what is to be there, with its size in bytes."""
    found = {blob.digest: blob for blob in blobs if blob.state is BlobState.PRESENT and blob.digest in digests}
    new = tuple(
        Blob(digest=digest, upload=lease_id, state=BlobState.UPLOADING, size_bytes=size)
        for digest, size in digests.items()
        if digest not in found
    )
    keys = {digest: blob.key for digest, blob in found.items()} | {blob.digest: blob.key for blob in new}
    lease = BlobLease(id=lease_id, covers=frozenset(keys.values()), expires_at=expires_at)
    return Upload(lease=lease, new=new, keys=keys)


def stored(blob: Blob) -> Blob:
    """The bucket has answered that the object is there. What was condemned meanwhile stays so."""
    return replace(blob, state=BlobState.PRESENT) if blob.state is BlobState.UPLOADING else blob


def renew(lease: BlobLease, now: float, ttl_s: float) -> BlobLease:
    """Raises `LeaseLost` when it has run out: what it covered may be gone."""
    if not is_running(lease, now):
        raise _lost(lease.id)
    return replace(lease, expires_at=now + min(ttl_s, MAX_LEASE_S))


def commit(lease: BlobLease | None, lease_id: str, manifest: Manifest, blobs: Iterable[Blob], now: float) -> Manifest:
    """The manifest that is to be written; its lease is removed with it. ``blobs``: the rows that it refers to.

    Raises:
        LeaseLost: the lease has run out, or a blob is not there; upload it again.
    """
    if lease is None or not is_running(lease, now):
        raise _lost(lease_id)
    if missing := manifest.blobs - are_present(blobs):
        raise LeaseLost(
            f"{len(missing)} blobs of snapshot {manifest.id} are not in the snapshot store, for example "
            f"{min(missing)}; upload them again",
            reason="BLOBS_MISSING",
        )
    return manifest


def is_running(lease: BlobLease, now: float) -> bool:
    return now < lease.expires_at


def are_present(blobs: Iterable[Blob]) -> frozenset[str]:
    return frozenset(blob.key for blob in blobs if blob.state is BlobState.PRESENT)


def _lost(lease_id: str) -> LeaseLost:
    return LeaseLost(f"upload {lease_id} took longer than its lease and may have lost parts; begin it again")


def read(manifest: Manifest, lease_id: str, expires_at: float) -> BlobLease:
    """A lease of a reader: what it is going to read stays."""
    return BlobLease(id=lease_id, covers=manifest.blobs, expires_at=expires_at)


# --- collection -------------------------------------------------------------------------------------------


def mark(blobs: Iterable[Blob], manifests: Iterable[Manifest], leases: Iterable[BlobLease], now: float) -> list[Blob]:
    """The rows to be written as CONDEMNED."""
    kept: set[str] = set()
    for manifest in manifests:
        kept |= manifest.blobs
    for lease in leases:
        if is_running(lease, now):
            kept |= lease.covers
    found = (blob for blob in blobs if blob.state is not BlobState.CONDEMNED and blob.key not in kept)
    return [replace(blob, state=BlobState.CONDEMNED) for blob in found]


def condemned(blobs: Iterable[Blob]) -> list[Blob]:
    """Those whose object may be deleted now, and whose row is removed when the bucket has answered that it is gone."""
    return [blob for blob in blobs if blob.state is BlobState.CONDEMNED]


def strays(listed: Mapping[str, float], before: Collection[str], rows: Collection[str], *, restored: bool) -> list[str]:
    """Keys of objects to be deleted that nobody owns.

    Args:
        listed: objects in the bucket now, with their age in seconds.
        before: those that the pass before this one found without a row.
        rows: keys of all blobs, read after the bucket was listed.
        restored: the database was restored since the bucket was last known to agree with it.
    """
    if restored:
        return []
    return sorted(key for key, age_s in listed.items() if key in before and key not in rows and age_s > SCRUB_AGE_S)


def without_row(listed: Iterable[str], rows: Collection[str]) -> frozenset[str]:
    """What one pass of the scrub leaves for the next to look at again."""
    return frozenset(key for key in listed if key not in rows)


# --- retention --------------------------------------------------------------------------------------------


class Kept(Record, frozen=True, kw_only=True):
    """One snapshot of one actor. ``needed``: what the actor wakes from, or its way back; ``tags``: names that people
    gave it, each of which keeps it."""

    id: str
    created_at: float
    needed: bool = False
    tags: tuple[str, ...] = ()


def expired(snapshots: Sequence[Kept], *, keep_last: int, keep_for_s: float, now: float) -> list[str]:
    """Ids of snapshots of one actor that its template keeps no longer: neither among the ``keep_last`` newest, nor
    younger than ``keep_for_s`` seconds, nor tagged, nor needed by the actor."""
    newest = {s.id for s in sorted(snapshots, key=lambda s: (s.created_at, s.id), reverse=True)[: max(keep_last, 0)]}
    return [s.id for s in snapshots if not (s.needed or s.tags or s.id in newest or now - s.created_at < keep_for_s)]
