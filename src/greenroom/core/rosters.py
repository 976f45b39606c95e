"""Which workers may register: the roster of a pool whose workers somebody else keeps (an operator on Kubernetes).

A roster says what the pool's slot ledger (`greenroom.core.ledger`) says: these pods, of these slots. It is replaced as
a whole, never edited, so it is as right as the ledger that it was made from; and an older one never replaces a newer
one, however late it comes. A pool without a roster takes whoever comes.
"""

from __future__ import annotations

from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition
from greenroom.core.records import Record

#: Earlier pools of the same name that are remembered, so that what their operator still sends is known as old.
MAX_FORMER = 16


class RosterEntry(Record, frozen=True, kw_only=True):
    """One slot of the ledger that counts as a worker. ``name``: the worker's, which is its pod's. ``epoch``: of the
    slot; a ledger that was made anew has some of earlier epochs. ``pod_uid``: "" while nobody has seen the pod, which
    then is whoever has the slot's name."""

    name: str
    ordinal: int
    epoch: int = 0
    pod_uid: str = ""


class Roster(Record, frozen=True, kw_only=True):
    """The workers that a pool may have.

    Attributes:
        pool_uid: of the object that the roster was made from; namesakes over time have different ones.
        pool_namespace: where that object is.
        epoch: of its ledger.
        ledger_version: grows with each change of the ledger within an epoch.
        former_uids: of earlier pools of this name in that namespace, the latest last.
    """

    pool: str
    pool_uid: str
    pool_namespace: str = ""
    epoch: int = 1
    ledger_version: int = 0
    workers: tuple[RosterEntry, ...] = ()
    former_uids: tuple[str, ...] = ()
    version: int = 0

    @property
    def pk(self) -> str:
        return self.pool

    def find(self, worker: str) -> RosterEntry | None:
        return next((entry for entry in self.workers if entry.name == worker), None)


class Berth(Record, frozen=True, kw_only=True):
    """Which slot of which pool a worker says that it is the pod of; all "" and 0 where no operator keeps it."""

    pool_uid: str = ""
    epoch: int = 0
    ordinal: int = 0
    pod_uid: str = ""


def admits(roster: Roster, worker: str, berth: Berth) -> bool:
    """Whether this worker may register; as `greenroom.core.ledger.records.Ledger.admits`."""
    entry = roster.find(worker)
    if entry is None or not berth.pod_uid or roster.pool_uid != berth.pool_uid:
        return False
    return (entry.epoch, entry.ordinal) == (berth.epoch, berth.ordinal) and entry.pod_uid in ("", berth.pod_uid)


def replaced(known: Roster | None, new: Roster) -> Roster:
    """What is to be stored; ``known`` itself when that says the same.

    Raises:
        Conflict: it is older than what is known (reason ``STALE_ROSTER``), or of a pool that another has followed under
            this name (reason ``FORMER_POOL``): whatever else it says, it never counts again.
        FailedPrecondition: a pool of that name in another namespace has workers (reason ``POOL_NAME_TAKEN``).
    """
    if known is None:
        return replace(new, version=0, former_uids=())
    if new.pool_uid == known.pool_uid:
        if (new.epoch, new.ledger_version) < (known.epoch, known.ledger_version):
            raise _stale(new, f"epoch {known.epoch}, version {known.ledger_version} was sent before")
        merged = replace(new, former_uids=known.former_uids, version=known.version)
        return known if merged == known else merged
    if new.pool_namespace == known.pool_namespace:
        if new.pool_uid in known.former_uids:
            raise _stale(new, f"the pool of that name is {known.pool_uid} by now", "FORMER_POOL")
        former = (*known.former_uids, known.pool_uid)[-MAX_FORMER:]
        return replace(new, former_uids=former, version=known.version)
    if known.workers:
        raise FailedPrecondition(
            f"pool {new.pool} is that of namespace {known.pool_namespace!r}, which has {len(known.workers)} workers: "
            f"pools share one list of names; call the one in {new.pool_namespace!r} otherwise, or delete the other",
            reason="POOL_NAME_TAKEN",
        )
    return replace(new, former_uids=(), version=known.version)  # each may have the name while the other has no workers


def _stale(new: Roster, why: str, reason: str = "STALE_ROSTER") -> Conflict:
    return Conflict(
        f"the roster of pool {new.pool} (uid {new.pool_uid}, epoch {new.epoch}, version {new.ledger_version}) is an "
        f"old one: {why}; read the pool's ledger again",
        reason=reason,
    )
