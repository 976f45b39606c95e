"""What must hold of worker pools, checked on the API server's log.

The names of the checks are those of the design: N names, C creations, D deletions, S status. Nothing that an operator
keeps in memory is looked at. `check` is for the ledger; `overshoot` also for others (see `losers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from greenroom.core.ledger import naming, wire
from greenroom.core.ledger.records import Ledger, Slot
from greenroom.operator.objects import POOL_FINALIZER, POOL_UID_LABEL, PoolObject
from greenroom.operator.scaled import Scaled, read_scaled
from greenroom.testing.fake_kube.objects import Entry, Object

PODS, POOLS = ("", "pods"), ("greenroom.dev", "workerpools")
OPERATOR = "operator"


class Wrong(AssertionError):
    """``law``: which of them does not hold; ``rv``: from which change on."""

    def __init__(self, law: str, entry: Entry, what: str) -> None:
        super().__init__(f"{law} does not hold from version {entry.rv} (at {entry.at:.3f} s, {entry.client}): {what}")
        self.law = law
        self.rv = entry.rv


@dataclass
class _Pool:
    """What is known of one pool (by uid) up to some version."""

    name: str
    object: Object
    ledger: Ledger | None = None
    #: (when, ledger), as committed.
    history: list[tuple[float, Ledger]] = field(default_factory=list)
    epoch: int = 0
    term: int = 0
    next_ordinal: dict[int, int] = field(default_factory=dict)
    observed: int = 0
    made: dict[str, str] = field(default_factory=dict)

    @property
    def desired(self) -> int:
        return desired(self.object)


@dataclass
class Oracle:
    """Feed it the log in order (`see`). Raises `Wrong`."""

    pools: dict[str, _Pool] = field(default_factory=dict)
    pods: dict[tuple[str, str], Object] = field(default_factory=dict)
    names: set[tuple[str, str]] = field(default_factory=set)
    #: What was ever seen of a pod (uid): ``ended``, ``deleting``, ``gone``.
    facts: dict[str, set[str]] = field(default_factory=dict)
    #: Foreign pods that had a name.
    foreign: set[tuple[str, str]] = field(default_factory=set)
    creations: int = 0
    deletions: int = 0
    strays: set[str] = field(default_factory=set)

    def check(self, log: Iterable[Entry]) -> None:
        for entry in log:
            self.see(entry)

    def see(self, entry: Entry) -> None:
        if entry.key == POOLS:
            self._see_pool(entry)
        elif entry.key == PODS:
            self._see_pod(entry)

    # --- pools ---

    def _see_pool(self, entry: Entry) -> None:
        uid = entry.object["metadata"]["uid"]
        pool = self.pools.get(uid)
        if pool is None:
            pool = self.pools[uid] = _Pool(entry.name[1], entry.object)
        before, pool.object = pool.ledger, entry.object
        if not entry.client.startswith(OPERATOR):
            # What people do to a ledger is not its fault; what counts as lost is.
            pool.ledger = wire.from_plain(_status(entry.object).get("ledger"), uid)
            return
        if entry.subresource != "status":
            return
        status = _status(entry.object)
        if status.get("observedGeneration", 0) < pool.observed:
            raise Wrong("S1", entry, "observedGeneration went back")
        pool.observed = status.get("observedGeneration", 0)
        pool.ledger = wire.from_plain(status.get("ledger"), uid)
        if pool.ledger is None or pool.ledger == before:
            return
        pool.history.append((entry.at, pool.ledger))
        self._n3(entry, pool, pool.ledger)
        if before is not None and before.epoch == pool.ledger.epoch:
            self._changed(entry, pool, before, pool.ledger)

    def _n3(self, entry: Entry, pool: _Pool, ledger: Ledger) -> None:
        known = pool.next_ordinal.get(ledger.epoch, 0)
        if ledger.epoch < pool.epoch or ledger.next_ordinal < known:
            raise Wrong("N3", entry, f"epoch {pool.epoch} -> {ledger.epoch}, ordinal {known} -> {ledger.next_ordinal}")
        if ledger.epoch == pool.epoch and ledger.term < pool.term:
            raise Wrong("N3", entry, f"term {pool.term} -> {ledger.term}")
        pool.epoch, pool.term = ledger.epoch, ledger.term
        pool.next_ordinal[ledger.epoch] = ledger.next_ordinal

    def _changed(self, entry: Entry, pool: _Pool, before: Ledger, after: Ledger) -> None:
        old = {slot.id: slot for slot in before.slots}
        new = {slot.id: slot for slot in after.slots}
        target = 0 if after.suspending else pool.desired
        if new.keys() - old.keys() and after.active > target:
            raise Wrong("C1", entry, f"{after.active} active slots of {target} wanted, after slots were added")
        for slot_id, slot in new.items():
            was = old.get(slot_id)
            if not slot.active and (was is None or was.active):
                self._d2(entry, pool, slot, before, after, target)
        for slot_id, slot in old.items():
            if slot_id not in new:
                self._d4(entry, pool, slot)

    def _d2(self, entry: Entry, pool: _Pool, slot: Slot, before: Ledger, after: Ledger, target: int) -> None:
        facts = self.facts.get(slot.pod_uid, set())
        spec = pool.object.get("spec", {})
        name = (entry.name[0], naming.pod_name(pool.name, after.pool_uid, slot.epoch, slot.ordinal))
        holds = {
            "Failed": "ended" in facts,
            "Succeeded": "ended" in facts,
            "Deleted": "deleting" in facts,
            "Gone": "gone" in facts,
            "Named": bool({slot.id, slot.pod_uid, name[1]} & self._victims(pool)),
            "Suspended": after.suspending,
            "PoolDeleted": "deletionTimestamp" in pool.object["metadata"],
            "NameTaken": name in self.foreign,
            # Of one that the autoscaler sizes nobody goes who is not named.
            "Surplus": before.active > target and after.active >= target and spec.get("replicas") is not None,
        }
        if not holds.get(slot.reason, False):
            law = "D3" if slot.reason == "Surplus" else "D2"
            raise Wrong(law, entry, f"slot {slot.id} was condemned as {slot.reason!r}: {before.active} of {target}")

    @staticmethod
    def _victims(pool: _Pool) -> set[str]:
        spec = pool.object.get("spec", {})
        scaled = _scaled(pool.object).victims if spec.get("replicas") is None else ()
        return {*spec.get("victims", ()), *scaled}

    def _d4(self, entry: Entry, pool: _Pool, slot: Slot) -> None:
        assert pool.ledger is not None
        name = naming.pod_name(pool.name, pool.ledger.pool_uid, slot.epoch, slot.ordinal)
        pod = self.pods.get((entry.name[0], name))
        if pod is None:
            return
        if pod["metadata"]["uid"] == slot.pod_uid or (not slot.pod_uid and owner(pod) == pool.ledger.pool_uid):
            raise Wrong("D4", entry, f"slot {slot.id} was dropped while its pod {name} is there")

    # --- pods ---

    def _see_pod(self, entry: Entry) -> None:
        pod, uid = entry.object, entry.object["metadata"]["uid"]
        facts = self.facts.setdefault(uid, set())
        if _phase(pod) in ("Failed", "Succeeded"):
            facts.add("ended")
        if "deletionTimestamp" in pod["metadata"]:
            facts.add("deleting")
        if entry.kind == "ADDED":
            self._added(entry)
        elif entry.client.startswith(OPERATOR) and entry.verb == "delete":
            self._d1(entry)
        if entry.kind == "DELETED":
            facts.add("gone")
            self.pods.pop(entry.name, None)
        else:
            self.pods[entry.name] = pod

    def _added(self, entry: Entry) -> None:
        if not entry.client.startswith(OPERATOR):
            self.foreign.add(entry.name)
            return
        self.creations += 1
        if entry.name in self.names:
            raise Wrong("N1", entry, f"the name {entry.name[1]} was there before")
        self.names.add(entry.name)
        pool = self.pools.get(owner(entry.object))
        if pool is None:
            raise Wrong("C2", entry, f"{entry.name[1]} is of no pool")
        place = naming.place(pool.name, owner(entry.object), entry.name[1])
        assert place is not None
        slot_id = f"{place.epoch}-{place.ordinal}"
        if slot_id in pool.made:
            raise Wrong("N2", entry, f"slot {slot_id} has had a pod")
        pool.made[slot_id] = entry.object["metadata"]["uid"]
        if not any(_reserved(ledger, slot_id) for ledger in _as_of(pool.history, entry.sent_at)):
            raise Wrong("C2", entry, f"slot {slot_id} was not reserved when its creation was sent, {entry.sent_at:.3f}")
        if pool.ledger is None or pool.ledger.find(slot_id) is None:
            self.strays.add(entry.object["metadata"]["uid"])

    def _d1(self, entry: Entry) -> None:
        if entry.before is not None and "deletionTimestamp" in entry.before["metadata"]:
            return
        self.deletions += 1
        pod, pool = entry.object, self.pools.get(owner(entry.object))
        if entry.precondition_uid != pod["metadata"]["uid"]:
            raise Wrong("D1", entry, f"{entry.name[1]} was not deleted by its uid")
        if pool is None or pool.ledger is None:
            return
        place = naming.place(pool.name, pool.ledger.pool_uid, entry.name[1])
        slot = pool.ledger.find(f"{place.epoch}-{place.ordinal}") if place else None
        if slot is None or not slot.active or slot.pod_uid not in ("", pod["metadata"]["uid"]):
            return
        # A ledger that was lost and made anew forgets who was condemned; what was sent before stays sent.
        sent = [ledger.find(slot.id) for ledger in _as_of(pool.history, entry.sent_at)]
        if not any(was is None or not was.active for was in sent):
            raise Wrong("D1", entry, f"{entry.name[1]} was deleted while its slot {slot.id} is {slot.state}")


def overshoot(log: Iterable[Entry]) -> tuple[int, int]:
    """For whatever algorithm: how many pods too many there were at most, and how many healthy pods were deleted by the
    controller while there were not more than wanted. Only of a pool whose size does not change."""
    alive: dict[tuple[str, str], Object] = {}
    wanted, most, unjust = 0, 0, 0
    for entry in log:
        if entry.key == POOLS and entry.kind != "DELETED":
            wanted = desired(entry.object)
        if entry.key != PODS or not owner(entry.object):
            continue
        healthy = entry.name in alive
        if (
            healthy
            and entry.verb == "delete"
            and entry.client.startswith(OPERATOR)
            and len(alive) <= wanted
            and _phase(entry.object) not in ("Failed", "Succeeded")
        ):
            unjust += 1
        gone = entry.kind == "DELETED" or "deletionTimestamp" in entry.object["metadata"]
        if gone or _phase(entry.object) in ("Failed", "Succeeded"):
            alive.pop(entry.name, None)
        else:
            alive[entry.name] = entry.object
            most = max(most, len(alive) - wanted)
    return most, unjust


def desired(pool: Object) -> int:
    """As many workers as the spec asks for or, when it leaves that out, as the autoscaler has decided."""
    spec = pool.get("spec", {})
    if spec.get("suspend") or "deletionTimestamp" in pool["metadata"]:
        return 0
    replicas = spec.get("replicas")
    if replicas is None:
        replicas = _scaled(pool).replicas
    return int(max(min(replicas, spec.get("maxReplicas", 1000)), spec.get("minReplicas", 0)))


def _scaled(pool: Object) -> Scaled:
    return read_scaled(msgspec.convert(pool, PoolObject))


def owner(pod: Object) -> str:
    """The uid of the pool that a pod's label or owner names; "" for none."""
    metadata = pod["metadata"]
    label = (metadata.get("labels") or {}).get(POOL_UID_LABEL, "")
    references = [o["uid"] for o in metadata.get("ownerReferences") or () if o["kind"] == "WorkerPool"]
    return str(references[0]) if references else str(label)


def adopted(pool: Object) -> bool:
    return POOL_FINALIZER in (pool["metadata"].get("finalizers") or ())


def _status(obj: Object) -> dict[str, Any]:
    found = obj.get("status")
    return found if isinstance(found, dict) else {}


def _phase(pod: Object) -> str:
    return str(_status(pod).get("phase", ""))


def _reserved(ledger: Ledger, slot_id: str) -> bool:
    slot = ledger.find(slot_id)
    return slot is not None and slot.state == "R"


def _as_of(history: list[tuple[float, Ledger]], when: float) -> list[Ledger]:
    """Ledgers that were the newest at that moment; several when more than one was committed then."""
    before = [ledger for at, ledger in history if at < when][-1:]
    return before + [ledger for at, ledger in history if at == when]
