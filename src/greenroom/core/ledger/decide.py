"""What is seen and wanted -> the next ledger.

Each decision stands on facts that stay true when the view is stale: a slot that was reserved counts as a worker until
it is doomed; a pod that has ended, or is being deleted, never comes back; a pod that the server itself does not have is
gone; an ordinal is never used again. The result is to be committed by compare-and-swap on the object that holds spec
and ledger both, so that it holds for the spec that it was decided from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from greenroom.core.ledger import naming
from greenroom.core.ledger.notes import FENCE_S, Notes
from greenroom.core.ledger.records import Ledger, Pod, Reason, Slot, SlotState, Want

#: Doomed pods don't count any more this long after they should have ended: a lost node holds up nobody.
OVERDUE_S = 60.0
#: Slots of one pool: what fits in one object (1.5 MiB) with room to spare, at about a hundred bytes for each.
MAX_SLOTS = 2000


def decide(
    pool: str, ledger: Ledger, want: Want, shown: Iterable[Pod], notes: Notes, now: float, wall: float
) -> Ledger:
    """The ledger as it should be; the same when nothing is to be changed.

    Args:
        pool: its name.
        ledger: the one that this process itself got from the server in this term.
        want: from the spec that came with it.
        shown: the pods in the cache, however old it is; those of other pools don't matter.
        notes: of the same term; what was seen is noted.
        now: the process's clock that only goes forward, in seconds.
        wall: seconds since the epoch, for people to read.
    """
    assert notes.term == ledger.term, f"notes of term {notes.term} can't be used in term {ledger.term}"
    pods, strays = divide(pool, ledger, shown)
    slots = [after for slot in ledger.slots if (after := _observe(slot, pods.get(slot.id), notes, now, wall))]
    for slot in slots:
        if slot.state is SlotState.LIVE:
            notes.live_since.setdefault(slot.id, now)
    slots = [_named(slot, want, pods, wall) for slot in slots]
    suspending = want.suspend or (ledger.suspending and any(not _overdue(slot, want, notes, now) for slot in slots))
    target = 0 if suspending or want.deleting else want.replicas
    surplus = sum(slot.active for slot in slots) - target
    if surplus > 0:
        reason = Reason.POOL_DELETED if want.deleting else Reason.SUSPENDED if suspending else Reason.SURPLUS
        chosen = _choose(slots, surplus, want.named_only and reason is Reason.SURPLUS, pods, notes)
        slots = [_doom(slot, reason, wall) if slot.id in chosen else slot for slot in slots]
    for slot in slots:
        if slot.state is SlotState.DOOMED:
            notes.doomed_since.setdefault(slot.id, now)
    # What was never asked for needs no deletion, and nothing can come of it any more.
    slots = [slot for slot in slots if slot.active or slot.pod_uid or slot.id in notes.sent or not notes.settled(slot)]
    missing = _missing(slots, target, want, notes, now)
    slots += [Slot(epoch=ledger.epoch, ordinal=ledger.next_ordinal + n, term=ledger.term) for n in range(missing)]
    notes.forget({slot.id for slot in slots}, {pod.uid for pod in (*pods.values(), *strays)}, now)
    return replace(ledger, suspending=suspending, slots=tuple(slots), next_ordinal=ledger.next_ordinal + missing)


def begin_term(ledger: Ledger) -> Ledger:
    """A process begins to act: what was decided before it and is not committed yet fails from now on."""
    return replace(ledger, term=ledger.term + 1)


def rebuild(pool: str, pool_uid: str, pods: Iterable[Pod], epoch: int) -> Ledger:
    """A ledger for a pool that has none, or lost it.

    Args:
        pods: of this pool, from a list that the server itself made, after ``epoch`` was chosen.
        epoch: higher than any that this pool ever had, so that no name is used twice.
    """
    slots = []
    for pod in pods:
        at = naming.place(pool, pool_uid, pod.name)
        if at is not None:
            assert at.epoch < epoch, f"{pod.name} is of epoch {at.epoch}, which can't be used again"
            slots.append(Slot(epoch=at.epoch, ordinal=at.ordinal, term=0, state=SlotState.LIVE, pod_uid=pod.uid))
    return Ledger(pool_uid=pool_uid, epoch=epoch, slots=tuple(sorted(slots, key=lambda s: (s.epoch, s.ordinal))))


def divide(pool: str, ledger: Ledger, pods: Iterable[Pod]) -> tuple[dict[str, Pod], list[Pod]]:
    """Pods of this pool (by their owner) by slot id, and those that have no slot, or not the one that the slot means.
    What is not named as this pool names its pods was made by somebody else and is neither."""
    by_slot: dict[str, Pod] = {}
    strays = []
    for pod in pods:
        at = naming.place(pool, ledger.pool_uid, pod.name)
        if at is None:
            continue
        slot = ledger.find(f"{at.epoch}-{at.ordinal}")
        owned = pod.owner_uid == ledger.pool_uid
        if slot is not None and (pod.uid == slot.pod_uid or (owned and not slot.pod_uid)):
            by_slot[slot.id] = pod
        elif owned:
            strays.append(pod)
    return by_slot, strays


# --- what is seen -----------------------------------------------------------------------------------------


def sight(slot: Slot, cached: Pod | None, notes: Notes) -> Pod | None:
    """The slot's pod, by all that is known: what can't be undone counts wherever it was seen. None: not seen, which
    alone says nothing."""
    seen = notes.looked.get(slot.id)
    asked = seen.pod if seen is not None else None
    # Once its pod is known it is told by its uid, whatever somebody does to its labels and owners.
    candidates = [
        pod
        for pod in (cached, asked)
        if pod is not None and (pod.uid == slot.pod_uid if slot.pod_uid else bool(pod.owner_uid))
    ]
    if not candidates:
        return None
    first, last = candidates[0], candidates[-1]
    if first.uid != last.uid:
        return last
    return replace(
        first,
        ended=first.ended or last.ended,
        deleting=first.deleting or last.deleting,
        held=first.held and last.held,
    )


def is_gone(slot: Slot, notes: Notes) -> bool:
    """Whether the server itself has said, after the slot's pod was seen, that it is not there any more."""
    seen = notes.looked.get(slot.id)
    if seen is None or not slot.pod_uid:
        return False
    gone = seen.pod is None or seen.pod.uid != slot.pod_uid
    if gone:
        notes.gone.add(slot.pod_uid)
    return gone


def _observe(slot: Slot, cached: Pod | None, notes: Notes, now: float, wall: float) -> Slot | None:
    """The slot after what was seen of it; None when it is retired."""
    if slot.state is SlotState.RESERVED:
        slot = _observe_reserved(slot, sight(slot, cached, notes), notes, wall)
    elif not slot.pod_uid:  # doomed before its pod was seen
        pod = sight(slot, cached, notes)
        if pod is not None:
            slot = _meet(slot, pod, notes)
        elif _never_comes(slot, notes, now):
            return None
    if slot.state is SlotState.LIVE:
        pod = sight(slot, cached, notes)
        if is_gone(slot, notes):
            slot = _doom(slot, Reason.GONE, wall)
        elif pod is not None and pod.ended:
            slot = _doom(slot, Reason.FAILED if pod.ended == "Failed" else Reason.SUCCEEDED, wall)
        elif pod is not None and pod.deleting:
            slot = _doom(slot, Reason.DELETED, wall)
        if slot.reason in (Reason.FAILED, Reason.SUCCEEDED):
            notes.ended_at.setdefault(slot.id, now)
    if slot.state is SlotState.DOOMED and is_gone(slot, notes) and notes.fence_end(slot, now) <= now:
        return None
    return slot


def _observe_reserved(slot: Slot, pod: Pod | None, notes: Notes, wall: float) -> Slot:
    if pod is not None:
        return replace(_meet(slot, pod, notes), state=SlotState.LIVE)
    seen = notes.looked.get(slot.id)
    if seen is not None and seen.pod is not None:  # it is there, and not ours
        return _doom(slot, Reason.NAME_TAKEN, wall)
    return slot


def _meet(slot: Slot, pod: Pod, notes: Notes) -> Slot:
    """The slot's pod is seen for the first time."""
    seen = notes.looked.get(slot.id)
    if seen is not None and (seen.pod is None or seen.pod.uid != pod.uid):
        del notes.looked[slot.id]  # it was asked for before there was this pod: that does not say that it is gone
    return replace(slot, pod_uid=pod.uid, settled=notes.settled(slot))


def _never_comes(slot: Slot, notes: Notes, now: float) -> bool:
    """Whether the pod of a doomed slot, which nobody has seen, can't come any more: every request to create it was
    answered, or is too old, and after that the server itself did not have the pod."""
    seen = notes.looked.get(slot.id)
    if seen is None:
        return False
    if notes.settled(slot):
        return True
    return notes.quiet_since.get(slot.id, now) + FENCE_S <= seen.at


# --- what is wanted ---------------------------------------------------------------------------------------


def _named(slot: Slot, want: Want, pods: Mapping[str, Pod], wall: float) -> Slot:
    if not slot.active or not want.victims:
        return slot
    pod = pods.get(slot.id)
    names = {slot.id, slot.pod_uid, pod.name if pod is not None else ""} - {""}
    return _doom(slot, Reason.NAMED, wall) if names & set(want.victims) else slot


def _choose(slots: list[Slot], count: int, named_only: bool, pods: Mapping[str, Pod], notes: Notes) -> set[str]:
    """Which slots go: what costs least first. Among equals the newest."""

    def cost(slot: Slot) -> tuple[int, int, int, int]:
        pod = sight(slot, pods.get(slot.id), notes)
        if slot.state is SlotState.RESERVED:
            kind, actors = (0 if _unasked(slot, notes) else 1), 0
        elif pod is None or not pod.ready:
            kind, actors = 2, 0
        else:
            kind, actors = (3, 0) if pod.actors == 0 else (4, pod.actors if pod.actors is not None else MAX_SLOTS)
        return kind, actors, -slot.epoch, -slot.ordinal

    able = [slot for slot in slots if slot.active and (not named_only or _unasked(slot, notes))]
    return {slot.id for slot in sorted(able, key=cost)[:count]}


def _unasked(slot: Slot, notes: Notes) -> bool:
    """Nobody was asked to create its pod."""
    return slot.state is SlotState.RESERVED and notes.settled(slot) and slot.id not in notes.sent


def _missing(slots: list[Slot], target: int, want: Want, notes: Notes, now: float) -> int:
    """How many slots are to be reserved."""
    active = sum(slot.active for slot in slots)
    if active >= target or notes.creation_pause(now) > now:
        return 0
    ending = sum(not slot.active and not _overdue(slot, want, notes, now) for slot in slots)
    surge = max(1, want.replicas) if want.max_surge is None else want.max_surge
    room = target + surge - active - ending
    return max(0, min(target - active, room, MAX_SLOTS - len(slots)))


def _overdue(slot: Slot, want: Want, notes: Notes, now: float) -> bool:
    """It should have ended long ago: its node is lost, and nobody waits for it."""
    return not slot.active and notes.doomed_since.get(slot.id, now) + want.grace_s + OVERDUE_S <= now


def _doom(slot: Slot, reason: Reason, wall: float) -> Slot:
    return replace(slot, state=SlotState.DOOMED, reason=str(reason), since=float(int(wall)))
