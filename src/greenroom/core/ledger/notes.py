"""What one process remembers about one pool while it acts for it.

Nothing here has to be right for the ledger to be right, and all of it may be lost at any time: then slots are waited
for longer, and things are tried again earlier. Notes belong to one term: a process that begins anew begins a new term,
in which it knows of no request of earlier ones.

All times are the process's own clock that only goes forward (seconds), never the wall clock: a jump of that ends no
wait early.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from greenroom.core.ledger.records import Delete, Effect, Finish, Look, Pod, Post, Release, Repair, Slot

#: How long a request that creates a pod may still take effect after its sender has given it up: as long as the API
#: server works on a request (``--request-timeout``, 60 s), and as long as somebody who was paused may take to see that
#: the lease is another's, with as much again for clocks that differ.
FENCE_S = 60.0 + 15.0 + 15.0
#: A pod that was seen is asked for by name when the cache does not show it for this long: the cache may only lag.
LOOK_AFTER_S = 10.0
#: Pauses between tries of the same thing double from the first to the second of these.
PAUSES_S: dict[type[Effect], tuple[float, float]] = {
    Post: (1.0, 60.0),
    Look: (5.0, 60.0),
    Delete: (5.0, 60.0),
    Release: (5.0, 60.0),
    Repair: (10.0, 300.0),
    Finish: (1.0, 60.0),
}
#: Workers that end by themselves within this time are replaced at a slower pace from the second one on.
FAILURE_WINDOW_S = 600.0
FIRST_FAILURE_PAUSE_S = 10.0
LAST_FAILURE_PAUSE_S = 300.0


class Seen(NamedTuple):
    """An answer of the server itself: which pod had the name, at some time after ``at``."""

    pod: Pod | None
    at: float


class _Try(NamedTuple):
    times: int
    again_at: float


@dataclass
class Notes:
    """See the module. ``term``: of the ledger that they belong to."""

    term: int
    #: Slots for which a request to create the pod was sent, and those of which one was answered by nobody.
    sent: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    #: Since when no request to create the pod of an unsettled slot was sent by this process.
    quiet_since: dict[str, float] = field(default_factory=dict)
    #: What the server itself said last, by slot.
    looked: dict[str, Seen] = field(default_factory=dict)
    #: The pod (uid) that the cache has shown, by slot, since the server itself was asked last.
    cached: dict[str, str] = field(default_factory=dict)
    #: Pods (uid) that are known to be gone, though a cache may still show them.
    gone: set[str] = field(default_factory=set)
    #: Since when pods (uid) are known to have no slot.
    stray_since: dict[str, float] = field(default_factory=dict)
    live_since: dict[str, float] = field(default_factory=dict)
    doomed_since: dict[str, float] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    #: No pod is asked for before this time, because the server refuses them (quota, admission, too many requests).
    posts_from: float = 0.0
    refusals: int = 0
    _tries: dict[tuple[type[Effect], str], _Try] = field(default_factory=dict)

    def settled(self, slot: Slot) -> bool:
        """Whether each request to create its pod was answered: it was reserved in this term, so all were ours."""
        return slot.settled or (slot.term == self.term and slot.id not in self.unknown)

    def fence_end(self, slot: Slot, now: float) -> float:
        """When a request to create its pod can't take effect any more; not after ``now`` when that is so already."""
        return now if slot.settled else self.quiet_since.setdefault(slot.id, now) + FENCE_S

    def due(self, kind: type[Effect], key: str, now: float) -> float:
        """When the next try may be; not after ``now`` when it may be now."""
        last = self._tries.get((kind, key))
        return now if last is None else last.again_at

    def tried(self, effect: Effect, now: float) -> None:
        """To be called before the effect is carried out."""
        key = key_of(effect)
        last = self._tries.get((type(effect), key))
        times = 0 if last is None else last.times + 1
        first, most = PAUSES_S[type(effect)]
        self._tries[type(effect), key] = _Try(times, now + min(first * 2.0 ** min(times, 16), most))
        if isinstance(effect, Post):
            self.sent.add(effect.slot_id)
            self.looked.pop(effect.slot_id, None)

    def unanswered(self, slot_id: str, now: float) -> None:
        """A request to create its pod may or may not take effect, now or later."""
        self.unknown.add(slot_id)
        self.quiet_since[slot_id] = now

    def refused(self, now: float, retry_after_s: float = 0.0) -> None:
        """The server creates no pod now: the whole pool waits, and then tries with one."""
        first, most = PAUSES_S[Post]
        self.posts_from = now + max(retry_after_s, min(first * 2.0 ** min(self.refusals, 16), most))
        self.refusals += 1

    def created(self, slot_id: str, pod: Pod, at: float) -> None:
        self.refusals = 0
        self.saw(slot_id, pod, at)

    def saw(self, slot_id: str, pod: Pod | None, at: float) -> None:
        """The server itself said so; ``at``: before it was asked."""
        self.looked[slot_id] = Seen(pod, at)
        self.cached.pop(slot_id, None)

    def creation_pause(self, now: float) -> float:
        """Until when no slot is reserved, because workers end by themselves again and again."""
        recent = [at for at in self.ended_at.values() if at > now - FAILURE_WINDOW_S]
        if len(recent) < 2:
            return now
        return max(recent) + min(FIRST_FAILURE_PAUSE_S * 2.0 ** min(len(recent) - 2, 16), LAST_FAILURE_PAUSE_S)

    def forget(self, kept: set[str], shown: set[str], now: float) -> None:
        """Drops what is of no use any more. ``kept``: slots that there are; ``shown``: pods (uid) in the cache."""
        self.sent &= kept
        self.unknown &= kept
        self.gone &= shown
        abouts: list[dict[str, Any]] = [self.quiet_since, self.looked, self.cached, self.live_since, self.doomed_since]
        for about in abouts:
            for slot_id in [s for s in about if s not in kept]:
                del about[slot_id]
        for uid in [uid for uid in self.stray_since if uid not in shown]:
            del self.stray_since[uid]
        for slot_id in [s for s, at in self.ended_at.items() if at <= now - FAILURE_WINDOW_S]:
            del self.ended_at[slot_id]
        for key in [k for k, t in self._tries.items() if t.again_at <= now - FAILURE_WINDOW_S and k[1] not in kept]:
            del self._tries[key]


def key_of(effect: Effect) -> str:
    """What tries are counted by."""
    match effect:
        case Finish():
            return ""
        case Delete() | Release() | Repair():
            return effect.uid
        case _:
            return effect.slot_id
