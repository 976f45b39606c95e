"""The snapshot store's objects: content-addressed, shared by the snapshots of one actor, and owned by no worker.

There is no table of objects and none of leases: the rows that a suspend writes anyway say it all.

1. *Generations.* An object's key names the content, and the upload that put it there. An *upload* is one attempt to
   publish one snapshot, named by the snapshot's id and something random, and never used again; so a PUT or a DELETE
   that arrives late touches nothing that anybody has put there since. (With the content alone, a delayed DELETE removes
   what was uploaded again; with the snapshot alone, that of an attempt that failed removes what the next one put.)
2. *Intent first.* The snapshot's id is drawn when the suspend begins and is in its operation's row before the first
   PUT. The RUNNING operation is the lease of the upload: it ends by itself, and is renewed and fenced by the database.
3. *Reuse.* A file that is just as in the snapshot that the actor woke from is not stored again; its key is kept. That
   snapshot stays until the suspend is committed, because its actor needs it.
4. *Commit.* In one transaction that finds every object to be either its own upload's or in a PRESENT snapshot that its
   actor needs (`not_there`).
5. *Mark.* In one transaction a snapshot becomes CONDEMNED, and nothing leaves that state but by removal of its row.
   Nobody reuses from a condemned snapshot.
6. *Sweep.* Of a condemned snapshot those objects go that no snapshot of its actor refers to but condemned ones
   (`doomed`), as often as it takes; then its row. What nothing refers to now nothing can ever refer to again, so it
   does not matter when the deletions arrive.
7. *Scrub.* An object that no row of its actor refers to, and whose snapshot no running operation makes, belongs to
   nobody: the operation's row came first (`strays`). It is deleted when it is old and was found so twice. Operations
   are read before the rows: a suspend that ends in between is seen once at least. After the database was restored rows
   are missing, and then the scrub must not run.

The layout before this one had no uploads: a snapshot's files lay below its own id under their names, and its row still
says so by files whose ``upload`` is empty. They are read, brought to the store by the worker that holds them, and
deleted there; nothing is shared with them. Their keys do not name an actor, so the scrub leaves them alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from greenroom.core.records import FileDigest, Retention, Snapshot, SnapshotState

#: All that is in a snapshot store lies below this.
PREFIX = "snapshots"
#: An object that nobody refers to is left alone until it is older than this (seconds): a day, and an hour, so that one
#: clock that is a day ahead alone destroys nothing. No promise depends on it.
SCRUB_AGE_S = 25 * 3600.0
#: Snapshots that an actor needs at most: what it wakes from, and its way back.
NEEDED = 2

ID = re.compile(r"[0-9a-f]{32}")
_UID = re.compile(r"[0-9a-zA-Z_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ATTEMPT = re.compile(r"[0-9a-f]{8}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: In the layout before.
_OLD_MANIFEST = "manifest.json"


# --- keys -------------------------------------------------------------------------------------------------


def upload_name(snapshot_id: str, random_32_bits: int) -> str:
    """Of one attempt to publish a snapshot."""
    return f"{snapshot_id}.{random_32_bits:08x}"


def directory(actor_uid: str) -> str:
    """What the keys of an actor's objects begin with. The last digits of its uid are random, and spread directories."""
    return f"{PREFIX}/{actor_uid[-2:]}/{actor_uid}"


def blob_name(sha256: str, upload: str) -> str:
    return f"{sha256}.{upload}"


def blob_key(actor_uid: str, file: FileDigest) -> str:
    return f"{directory(actor_uid)}/{blob_name(file.sha256, file.upload)}"


def manifest_key(actor_uid: str, snapshot_id: str) -> str:
    return f"{directory(actor_uid)}/{snapshot_id}.json"


def old_directory(snapshot_id: str) -> str:
    """What the keys of a snapshot's objects began with in the layout before."""
    return f"{PREFIX}/{snapshot_id[:2]}/{snapshot_id}"


def old_manifest_key(snapshot_id: str) -> str:
    return f"{old_directory(snapshot_id)}/{_OLD_MANIFEST}"


def is_old_layout(snapshot: Snapshot) -> bool:
    return bool(snapshot.files) and not any(file.upload for file in snapshot.files)


def file_key(snapshot: Snapshot, file: FileDigest) -> str:
    """Where one of its files lies, in either layout."""
    if is_old_layout(snapshot):
        return f"{old_directory(snapshot.id)}/{file.name}"
    return blob_key(snapshot.actor_uid, file)


def is_file_name(text: str) -> bool:
    return _FILE_NAME.fullmatch(text) is not None


def has_place(snapshot: Snapshot, file: FileDigest) -> bool:
    """Whether what its row or its manifest says of a file leads to a key of its own, whoever wrote that."""
    if not (is_file_name(file.name) and is_sha256(file.sha256)):
        return False
    return file.name != _OLD_MANIFEST if is_old_layout(snapshot) else is_upload(file.upload)


def is_uid(text: str) -> bool:
    """Whether it can be an actor's uid in a key."""
    return _UID.fullmatch(text) is not None


def is_upload(text: str) -> bool:
    snapshot_id, _, attempt = text.partition(".")
    return ID.fullmatch(snapshot_id) is not None and _ATTEMPT.fullmatch(attempt) is not None


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def staged_name(snapshot_id: str, unique: str) -> str:
    """Of what is on its way and has no key yet."""
    return f".{snapshot_id}.{unique}"


class Place(NamedTuple):
    """Whose an object is. ``actor_uid``: "" in the layout before, whose keys do not say it. ``snapshot_id``: "" for
    what has a dot before its name, and no `staged_name`."""

    actor_uid: str
    snapshot_id: str
    is_manifest: bool = False


def place_of(key: str) -> Place | None:
    """None for what is no object of ours."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] != PREFIX:
        return None
    return _place(*parts[1:]) or _old_place(*parts[1:])


def _place(group: str, uid: str, name: str) -> Place | None:
    if not is_uid(uid) or group != uid[-2:]:
        return None
    if name.startswith("."):
        staged = name[1:].partition(".")[0]
        return Place(uid, staged if ID.fullmatch(staged) else "")
    first, _, rest = name.partition(".")
    if rest == "json" and ID.fullmatch(first):
        return Place(uid, first, is_manifest=True)
    if is_sha256(first) and is_upload(rest):
        return Place(uid, rest.partition(".")[0])
    return None


def _old_place(group: str, snapshot_id: str, name: str) -> Place | None:
    if not ID.fullmatch(snapshot_id) or group != snapshot_id[:2]:
        return None
    if is_file_name(name) or name.startswith(f".{snapshot_id}."):
        return Place("", snapshot_id, is_manifest=name == _OLD_MANIFEST)
    return None


def keys_of(snapshot: Snapshot) -> tuple[str, ...]:
    """All that it refers to, the manifest first."""
    old = is_old_layout(snapshot)
    manifest = old_manifest_key(snapshot.id) if old else manifest_key(snapshot.actor_uid, snapshot.id)
    return manifest, *(file_key(snapshot, file) for file in snapshot.files)


# --- uploads ----------------------------------------------------------------------------------------------


def reusable(base: Iterable[FileDigest], size_bytes: int, sha256: str) -> FileDigest | None:
    """The one of ``base`` with this content."""
    return next((f for f in base if (f.sha256, f.size_bytes) == (sha256, size_bytes) and f.upload), None)


def not_there(made: Snapshot, needed: Iterable[Snapshot]) -> list[FileDigest]:
    """Files of a snapshot that is to be committed, which may not be in the store any more.

    Args:
        made: the new snapshot.
        needed: snapshots that its actor needs, as the transaction reads them.
    """
    present = {
        (f.sha256, f.upload)
        for s in needed
        if s.state is SnapshotState.PRESENT and s.actor_uid == made.actor_uid
        for f in s.files
    }
    if is_old_layout(made):  # a worker of the version before; nothing of it is shared
        return []
    return [f for f in made.files if f.upload.partition(".")[0] != made.id and (f.sha256, f.upload) not in present]


# --- collection -------------------------------------------------------------------------------------------


def doomed(condemned: Snapshot, others: Iterable[Snapshot]) -> list[str]:
    """Keys of what goes with a condemned snapshot, its manifest first. ``others``: all snapshots of its actor, read
    after it was seen condemned."""
    kept = {key for s in others if s.state is not SnapshotState.CONDEMNED for key in keys_of(s)}
    return list(dict.fromkeys(key for key in keys_of(condemned) if key not in kept))


def is_old(age_s: float, scrub_age_s: float = SCRUB_AGE_S) -> bool:
    """Whether an object of this age (seconds, by the store's own clock) may be looked at by the scrub."""
    return age_s > scrub_age_s


def strays(keys: Iterable[str], snapshots: Iterable[Snapshot], uploading: Collection[str]) -> list[str]:
    """Which objects of one actor belong to nobody.

    Args:
        keys: of old objects of the actor.
        snapshots: all rows of the actor, whatever their state, read after ``uploading``.
        uploading: ids of snapshots that running operations make.
    """
    snapshots = [*snapshots]
    owned = {key for snapshot in snapshots for key in keys_of(snapshot)}
    # One that its worker holds may be on its way, with no operation.
    held = {snapshot.id for snapshot in snapshots if snapshot.state is SnapshotState.LOCAL}
    found = ((key, place_of(key)) for key in keys if key not in owned)
    return [key for key, place in found if place is not None and place.snapshot_id not in {*uploading, *held}]


# --- retention --------------------------------------------------------------------------------------------


def expired(snapshots: Iterable[Snapshot], needed: Collection[str], retention: Retention, now: float) -> list[Snapshot]:
    """Snapshots of one actor that its template keeps no longer: it does not need them (``needed``: ids), nobody has
    tagged them, and they are neither among the ``keep_last`` newest nor younger than ``keep_for_s`` seconds.

    What an actor needs are up to two: with ``keep_last`` 2 nothing else stays for being new. A corrupt one stays as
    long as its actor, for whoever wants to know what has happened to it.
    """
    good = (SnapshotState.PRESENT, SnapshotState.LOCAL)
    free = [s for s in snapshots if s.state in good and not (s.golden or s.tags or s.id in needed)]
    free.sort(key=lambda s: (s.created_at, s.id), reverse=True)
    # No clock has a say where none is asked.
    young_s = retention.keep_for_s if retention.keep_for_s > 0 else float("-inf")
    return [s for s in free[max(0, retention.keep_last - NEEDED) :] if now - s.created_at >= young_s]
