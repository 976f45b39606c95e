"""Names of pods: ``<pool>-<pool uid>-<epoch>-<ordinal>``, of which no two pods ever have the same."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

#: A pod's name is its host name, which is a DNS label.
MAX_NAME_CHARS = 63
#: Of the pool's name; with uid, epoch and ordinal the limit above holds for a million epochs and a billion ordinals.
MAX_POOL_CHARS = 36
_HASH_CHARS = 6
_UID_CHARS = 6
#: Nobody gets there: an epoch begins when a ledger is lost.
EPOCH_DIGITS = 6
_TAIL = re.compile(rf"-([1-9][0-9]{{0,{EPOCH_DIGITS}}})-(0|[1-9][0-9]{{0,9}})")


class Place(NamedTuple):
    epoch: int
    ordinal: int


def prefix(pool: str, pool_uid: str) -> str:
    """What the names of all pods of this pool begin with. A long pool name is cut, and a hash of it tells it from
    others that are cut to the same."""
    if len(pool) > MAX_POOL_CHARS:
        digest = hashlib.sha256(pool.encode()).hexdigest()[:_HASH_CHARS]
        pool = f"{pool[: MAX_POOL_CHARS - _HASH_CHARS - 1].rstrip('-.')}-{digest}"
    return f"{pool}-{hashlib.sha256(pool_uid.encode()).hexdigest()[:_UID_CHARS]}"


def pod_name(pool: str, pool_uid: str, epoch: int, ordinal: int) -> str:
    return f"{prefix(pool, pool_uid)}-{epoch}-{ordinal}"


def place(pool: str, pool_uid: str, name: str) -> Place | None:
    """Which slot a pod is of; None when it is none of this pool's."""
    start = prefix(pool, pool_uid)
    tail = _TAIL.fullmatch(name[len(start) :]) if name.startswith(start) else None
    return Place(int(tail[1]), int(tail[2])) if tail else None
