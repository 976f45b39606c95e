"""A ledger as plain data in a pool's status, and back.

What comes back is hostile: people edit status by hand, restore it from a backup of another pool, or wipe it. A digest
says whether a ledger is as it was written. One that is not counts as lost and is made anew from the pods that there
are (`decide.rebuild`), in which no worker is harmed; to believe it could delete some.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from greenroom.core.ledger.records import Ledger, Slot, SlotState

_DIGEST_CHARS = 16


def to_plain(ledger: Ledger) -> dict[str, Any]:
    slots = {slot.id: _slot(slot) for slot in ledger.slots}
    plain = {
        "poolUID": ledger.pool_uid,
        "epoch": ledger.epoch,
        "term": ledger.term,
        "nextOrdinal": ledger.next_ordinal,
        "suspending": ledger.suspending,
        "slots": slots,
    }
    return {**plain, "digest": _digest(plain)}


def from_plain(plain: object, pool_uid: str) -> Ledger | None:
    """None: there is none, it is another pool's, or it is not what was written."""
    if not isinstance(plain, dict) or plain.get("poolUID") != pool_uid:
        return None
    content = {name: value for name, value in plain.items() if name != "digest"}
    if plain.get("digest") != _digest(content):
        return None
    try:
        wire = msgspec.convert(content, _Wire)
        slots = tuple(_read(slot_id, slot) for slot_id, slot in wire.slots.items())
    except (msgspec.ValidationError, ValueError):
        return None
    return Ledger(
        pool_uid=pool_uid,
        epoch=wire.epoch,
        term=wire.term,
        next_ordinal=wire.nextOrdinal,
        suspending=wire.suspending,
        slots=tuple(sorted(slots, key=lambda s: (s.epoch, s.ordinal))),
    )


class _WireSlot(msgspec.Struct, forbid_unknown_fields=True):
    state: SlotState
    term: int
    podUID: str = ""
    settled: bool = False
    reason: str = ""
    since: float = 0.0


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    poolUID: str
    epoch: int
    term: int
    nextOrdinal: int
    suspending: bool
    slots: dict[str, _WireSlot]


def _slot(slot: Slot) -> dict[str, Any]:
    """Without what has its default: a ledger of a thousand slots is about a hundred bytes for each."""
    plain: dict[str, Any] = {"state": str(slot.state), "term": slot.term}
    if slot.pod_uid:
        plain["podUID"] = slot.pod_uid
    if slot.settled:
        plain["settled"] = True
    if slot.reason:
        plain |= {"reason": slot.reason, "since": int(slot.since)}
    return plain


def _read(slot_id: str, wire: _WireSlot) -> Slot:
    epoch, _, ordinal = slot_id.partition("-")
    slot = Slot(
        epoch=int(epoch),
        ordinal=int(ordinal),
        term=wire.term,
        state=wire.state,
        pod_uid=wire.podUID,
        settled=wire.settled,
        reason=wire.reason,
        since=wire.since,
    )
    if slot.id != slot_id:
        raise ValueError(slot_id)
    return slot


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:_DIGEST_CHARS]
