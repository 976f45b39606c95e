"""A committed ledger -> what is to be done in the cluster, and when to look again.

Everything may be done twice, and late: a creation is told from another by the pod's name, a deletion says which pod it
means by its uid, and what a ledger says about a slot never gets untrue in a way that matters (`Slot`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from greenroom.core.ledger import naming
from greenroom.core.ledger.decide import OVERDUE_S, divide, is_gone, sight
from greenroom.core.ledger.notes import FENCE_S, LOOK_AFTER_S, Notes, key_of
from greenroom.core.ledger.records import (
    Delete,
    Effect,
    Finish,
    Ledger,
    Look,
    Pod,
    Post,
    Release,
    Repair,
    Slot,
    SlotState,
    Want,
)


class Plan(NamedTuple):
    """``effects``: what is due now. ``again_at``: when something will be due by itself (infinity: only when something
    happens)."""

    effects: tuple[Effect, ...]
    again_at: float


def plan(pool: str, ledger: Ledger, want: Want, pods: Iterable[Pod], notes: Notes, now: float) -> Plan:
    """What is to be done for a ledger that is committed; arguments as those of `decide`."""
    assert notes.term == ledger.term, f"notes of term {notes.term} can't be used in term {ledger.term}"
    by_slot, strays = divide(pool, ledger, pods)
    wanted: list[tuple[Effect, float]] = []
    for slot in ledger.slots:
        name = naming.pod_name(pool, ledger.pool_uid, slot.epoch, slot.ordinal)
        wanted += _for_slot(slot, name, by_slot.get(slot.id), notes, now)
    for pod in strays:
        wanted += _for_stray(pool, pod, ledger, notes, now)
    if want.deleting and not ledger.slots:
        wanted.append((Finish(), now))
    due, later = [], [_surge_at(ledger, want, notes, now), _pause_at(ledger, want, notes, now)]
    for effect, earliest in wanted:
        when = max(earliest, notes.due(type(effect), key_of(effect), now))
        if when <= now:
            due.append(effect)
        else:
            later.append(when)
    return Plan(tuple(due), min(later))


def _for_slot(slot: Slot, name: str, cached: Pod | None, notes: Notes, now: float) -> list[tuple[Effect, float]]:
    pod = sight(slot, cached, notes)
    if cached is not None:
        notes.cached[slot.id] = cached.uid
    lost = cached is None and bool(slot.pod_uid) and notes.cached.get(slot.id) == slot.pod_uid
    if slot.state is SlotState.RESERVED:
        return [(Post(slot_id=slot.id, name=name), notes.posts_from)] if pod is None else []
    if slot.state is SlotState.LIVE:
        return _for_live(slot, name, pod, lost, cached is not None, notes, now)
    if not slot.pod_uid:
        if notes.settled(slot):
            return [(Look(slot_id=slot.id, name=name), now)]
        return [(Look(slot_id=slot.id, name=name), notes.quiet_since.setdefault(slot.id, now) + FENCE_S)]
    if is_gone(slot, notes):  # only the fence keeps the slot
        return [(Look(slot_id=slot.id, name=name), notes.fence_end(slot, now))]
    if pod is None or lost:
        return [(Look(slot_id=slot.id, name=name), now)]
    return _ending(slot, pod, notes, now)


def _for_live(
    slot: Slot, name: str, pod: Pod | None, lost: bool, shown: bool, notes: Notes, now: float
) -> list[tuple[Effect, float]]:
    """``lost``: the cache has shown it and does not any more: it is gone, or its labels are. ``shown``: it does; else
    the cache may only lag."""
    wanted: list[tuple[Effect, float]] = []
    if not shown:
        since = now if lost else notes.live_since.setdefault(slot.id, now) + LOOK_AFTER_S
        wanted.append((Look(slot_id=slot.id, name=name), since))
    if pod is not None and not pod.intact and not pod.deleting and not pod.ended:
        wanted.append((Repair(slot_id=slot.id, name=pod.name, uid=pod.uid), now))
    return wanted


def _ending(slot: Slot, pod: Pod, notes: Notes, now: float) -> list[tuple[Effect, float]]:
    if not pod.deleting:
        return [(Delete(slot_id=slot.id, name=pod.name, uid=pod.uid), now)]
    if pod.held:
        return [(Release(slot_id=slot.id, name=pod.name, uid=pod.uid), notes.fence_end(slot, now))]
    return []


def _for_stray(pool: str, pod: Pod, ledger: Ledger, notes: Notes, now: float) -> list[tuple[Effect, float]]:
    """A pod whose ordinal is retired, or whose slot is another pod's: it came of a late request. One that a newer
    ledger may know is left alone."""
    at = naming.place(pool, ledger.pool_uid, pod.name)
    assert at is not None
    slot = ledger.find(f"{at.epoch}-{at.ordinal}")
    if pod.uid in notes.gone or (slot is None and not ledger.retired(*at)):
        return []
    if not pod.deleting:
        return [(Delete(slot_id="", name=pod.name, uid=pod.uid), now)]
    # There may be another late request for the same name.
    since = notes.stray_since.setdefault(pod.uid, now)
    return [(Release(slot_id="", name=pod.name, uid=pod.uid), since + FENCE_S)] if pod.held else []


def _surge_at(ledger: Ledger, want: Want, notes: Notes, now: float) -> float:
    """When the next doomed pod stops counting against the surge."""
    if ledger.active >= want.replicas:
        return math.inf
    limit = want.grace_s + OVERDUE_S
    ends = (notes.doomed_since.get(s.id, now) + limit for s in ledger.slots if not s.active)
    return min((end for end in ends if end > now), default=math.inf)


def _pause_at(ledger: Ledger, want: Want, notes: Notes, now: float) -> float:
    pause = notes.creation_pause(now)
    return pause if pause > now and ledger.active < want.replicas else math.inf
