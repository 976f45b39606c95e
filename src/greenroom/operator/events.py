"""What happened to a pool's workers, for ``kubectl describe``: one Event per commit and kind of change, not per worker.

Events are told when there is time, and lost when there is none: nothing depends on them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog

from greenroom.core.ledger import naming
from greenroom.core.ledger.records import Ledger, Slot, SlotState
from greenroom.operator.client import Kube
from greenroom.operator.failures import message_of
from greenroom.operator.objects import API_VERSION, PoolObject

#: Events that wait; the newest are left out when there are more.
MAX_WAITING = 256
#: Names that one event tells.
MAX_NAMES = 5
#: Reasons that somebody should look at.
_WARNINGS = {"WorkerFailed", "WorkerGone", "WorkerNameTaken", "LedgerRebuilt"}

_log = structlog.get_logger("greenroom.operator")


class Events:
    def __init__(self, kube: Kube, identity: str, wall: Callable[[], float]) -> None:
        self._kube = kube
        self._identity = identity
        self._wall = wall
        self._waiting: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(MAX_WAITING)

    def tell(self, pool: PoolObject, before: Ledger | None, after: Ledger) -> None:
        """Tells how a committed ledger differs from the one before (None: a term was begun with it)."""
        if before is None:
            if after.epoch > 1 and after.term == 1:
                self._add(
                    pool, "LedgerRebuilt", f"the ledger was lost and made anew as epoch {after.epoch}", after.term
                )
            return
        changes: dict[tuple[str, str], list[Slot]] = defaultdict(list)
        old = {slot.id: slot for slot in before.slots}
        new = {slot.id: slot for slot in after.slots}
        for slot in after.slots:
            was = old.get(slot.id)
            if slot.state is SlotState.LIVE and (was is None or was.state is SlotState.RESERVED):
                changes["WorkerCreated", "created"].append(slot)
            if slot.state is SlotState.DOOMED and (was is None or was.active):
                changes[f"Worker{slot.reason}", f"condemned ({slot.reason})"].append(slot)
        changes["WorkerEnded", "ended"] = [s for s in before.slots if s.id not in new and s.pod_uid]
        for (reason, what), slots in changes.items():
            if slots:
                names = [naming.pod_name(pool.metadata.name, after.pool_uid, s.epoch, s.ordinal) for s in slots]
                more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
                self._add(pool, reason, f"{what}: {', '.join(names[:MAX_NAMES])}{more}", after.next_ordinal)

    def _add(self, pool: PoolObject, reason: str, message: str, number: int) -> None:
        meta = pool.metadata
        when = datetime.fromtimestamp(self._wall(), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # The same change, told again after a lost answer, is the same event.
        digest = hashlib.sha256(f"{meta.uid} {meta.resourceVersion} {reason} {number}".encode()).hexdigest()[:16]
        involved = {"apiVersion": API_VERSION, "kind": "WorkerPool", "name": meta.name, "namespace": meta.namespace}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{meta.name[:200]}.{digest}", "namespace": meta.namespace},
            "involvedObject": {**involved, "uid": meta.uid},
            "reason": reason,
            "message": message,
            "type": "Warning" if reason in _WARNINGS else "Normal",
            "source": {"component": "greenroom-operator"},
            "reportingComponent": "greenroom-operator",
            "reportingInstance": self._identity,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "count": 1,
        }
        try:
            self._waiting.put_nowait((meta.namespace, event))
        except asyncio.QueueFull:
            _log.info("an event is left out", pool=meta.name, reason=reason)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            namespace, event = await self._waiting.get()
            try:
                await self._kube.create_event(namespace, event)
            except Exception as error:
                _log.info("an event is lost", reason=event["reason"], error=message_of(error))
