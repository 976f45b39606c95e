"""What the slot ledger is made of. Immutable; see the package."""

from __future__ import annotations

import enum

from greenroom.core.records import Record


class SlotState(enum.StrEnum):
    """A slot is reserved, then live, then doomed, then dropped from the ledger; it may skip steps, and never goes back.

    RESERVED: its pod may be created. LIVE: its pod was seen. DOOMED: its pod is to go, or is going, or has gone, and
    none is created for it any more."""

    RESERVED = "R"
    LIVE = "L"
    DOOMED = "D"


class Reason(enum.StrEnum):
    """Why a slot is doomed."""

    SURPLUS = "Surplus"  # more workers than wanted
    NAMED = "Named"  # `victims` names it
    SUSPENDED = "Suspended"  # the pool is suspended
    POOL_DELETED = "PoolDeleted"
    FAILED = "Failed"  # its pod has ended by itself
    SUCCEEDED = "Succeeded"
    DELETED = "Deleted"  # somebody else deletes its pod, or evicts it
    GONE = "Gone"  # its pod is not there any more
    NAME_TAKEN = "NameTaken"  # an object of somebody else has the name of its pod


class Slot(Record, frozen=True, kw_only=True):
    """One worker that there is, was, or is to be.

    Attributes:
        epoch, ordinal: which slot; together never used twice by one pool.
        term: in which it was reserved (see `Ledger.term`).
        pod_uid: of its pod, once that was seen; never changes then.
        settled: no request that creates its pod can be under way any more. Until that is so, the pod's name stays
            occupied (by its finalizer) or the slot stays, so that a late request makes no second pod.
        reason, since: why and when (epoch seconds) it was doomed.
    """

    epoch: int
    ordinal: int
    term: int
    state: SlotState = SlotState.RESERVED
    pod_uid: str = ""
    settled: bool = False
    reason: str = ""
    since: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.epoch}-{self.ordinal}"

    @property
    def active(self) -> bool:
        """Counts as a worker of the pool."""
        return self.state is not SlotState.DOOMED


class Ledger(Record, frozen=True, kw_only=True):
    """All slots of one pool.

    Attributes:
        pool_uid: whose it is; namesakes over time have different ones.
        epoch: grows when a ledger was lost and made anew.
        term: grows whenever a process begins to act for the pool.
        next_ordinal: of the next slot of this epoch; only grows.
        suspending: the pool is being emptied because it was suspended; holds until it is empty.
    """

    pool_uid: str
    epoch: int = 1
    term: int = 0
    next_ordinal: int = 0
    suspending: bool = False
    slots: tuple[Slot, ...] = ()

    def find(self, slot_id: str) -> Slot | None:
        return next((slot for slot in self.slots if slot.id == slot_id), None)

    @property
    def active(self) -> int:
        return sum(slot.active for slot in self.slots)

    def retired(self, epoch: int, ordinal: int) -> bool:
        """Whether that slot was there once and is no more. True in one copy of a ledger, true in all later ones."""
        used = epoch < self.epoch or (epoch == self.epoch and ordinal < self.next_ordinal)
        return used and self.find(f"{epoch}-{ordinal}") is None

    def admits(self, epoch: int, ordinal: int, pod_uid: str) -> bool:
        """Whether a worker that says that it is this pod of this slot may take actors. A pod that is not the slot's, or
        whose slot is doomed or retired, may not."""
        slot = self.find(f"{epoch}-{ordinal}")
        return slot is not None and slot.active and bool(pod_uid) and slot.pod_uid in ("", pod_uid)


class Want(Record, frozen=True, kw_only=True):
    """What a pool's spec asks for.

    Attributes:
        replicas: workers, already between the pool's limits.
        suspend, deleting: none, until that is over.
        max_surge: how many pods there may be above ``replicas`` while doomed ones still end; None: as many as
            ``replicas`` (at least one).
        victims: slots (id), pods (name or uid) that go first, whoever else would.
        named_only: somebody else decides which workers go (an autoscaler that names victims): none is chosen here but
            those for which no pod was asked yet.
        grace_s: how long a worker may take to end.
    """

    replicas: int
    suspend: bool = False
    deleting: bool = False
    max_surge: int | None = None
    victims: tuple[str, ...] = ()
    named_only: bool = False
    grace_s: float = 30.0


class Pod(Record, frozen=True, kw_only=True):
    """A pod as it was seen.

    Attributes:
        owner_uid: the pool that its labels or owner references name; "" when neither does.
        ended: ``Failed`` or ``Succeeded``, or "". Can't be undone.
        deleting: it has a deletion time. Can't be undone.
        held: it has our finalizer, so that its name stays occupied.
        intact: labels, owner reference and finalizer are as they were made.
        actors: how many are awake on it; None when nobody knows.
        stuck: why it does not come up, for people to read; "" when that is not known.
    """

    name: str
    uid: str
    owner_uid: str
    ready: bool = False
    ended: str = ""
    deleting: bool = False
    held: bool = True
    intact: bool = True
    actors: int | None = None
    stuck: str = ""


# --- effects ----------------------------------------------------------------------------------------------


class Post(Record, frozen=True, kw_only=True):
    """Create the pod of a reserved slot. May be sent again and again: its name makes it one pod."""

    slot_id: str
    name: str


class Look(Record, frozen=True, kw_only=True):
    """Ask the server itself (no cache) which pod has this name."""

    slot_id: str
    name: str


class Delete(Record, frozen=True, kw_only=True):
    """Delete the pod of this name if it still is this one. ``slot_id``: "" of a pod that has none."""

    slot_id: str
    name: str
    uid: str


class Release(Record, frozen=True, kw_only=True):
    """Take our finalizer from the pod, so that its name becomes free when it has ended."""

    slot_id: str
    name: str
    uid: str


class Repair(Record, frozen=True, kw_only=True):
    """Put labels, owner reference and finalizer of the pod right."""

    slot_id: str
    name: str
    uid: str


class Finish(Record, frozen=True, kw_only=True):
    """The pool is being deleted and has no slot any more: let it go."""


Effect = Post | Look | Delete | Release | Repair | Finish
