"""Who of several operators acts: whoever holds a Lease. Source: k8s.io/client-go, tools/leaderelection.

A lease is judged by one's own clock: it is free when nobody has renewed it for as long as it lasts *while one watched*;
it is ours from the moment before the renewal was sent that the server took. So clocks that differ, or jump, make nobody
believe that he leads when another may. Somebody who stands still between a check and the request that follows may send
late; the ledger's fence is for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog

from greenroom.core.errors import AlreadyExists, Conflict, GreenroomError, LeaseLost
from greenroom.operator.client import Kube

LEASE_S = 15.0
#: Renewed this often, so that several renewals may fail.
RENEW_EVERY_S = 3.0
#: One that resigns may meet a renewal of its own that was on its way, and hardly ever more.
RESIGN_TRIES = 3
#: The holder stops this much before its lease ends: for what it sends to arrive.
MARGIN_S = 3.0

_log = structlog.get_logger("greenroom.operator")


@dataclass
class Election:
    """Run `run` as a task; `wait` until we lead, and `holds` or `check` before each thing that is done.

    Args:
        on_answer: called whenever the server has answered about the lease.

    Attributes:
        identity: of this process; new with each.
        term: how often the lease has changed hands, when we took it.
    """

    kube: Kube
    namespace: str
    name: str
    identity: str
    chance: random.Random = field(default_factory=random.Random)
    on_answer: Callable[[], None] = lambda: None
    term: int = 0
    _until: float = 0.0
    _seen: tuple[str, str] = ("", "")
    _seen_at: float = 0.0
    _leads: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def holds(self) -> bool:
        return self._leads.is_set() and asyncio.get_running_loop().time() < self._until - MARGIN_S

    def check(self) -> None:
        """Raises:
        LeaseLost: we may not act any more.
        """
        if not self.holds:
            raise LeaseLost(f"operator {self.identity} does not hold the lease {self.name} any more, and stops acting")

    async def wait(self) -> None:
        await self._leads.wait()

    async def run(self) -> None:
        """Takes the lease when it can, and renews it. Returns when it was lost: what is done then is for a new term."""
        while True:
            try:
                await self._try()
                self.on_answer()
            except GreenroomError as error:
                _log.info("the lease is out of reach", lease=self.name, error=error.message)
            if self._leads.is_set() and not self.holds:
                self._leads.clear()
                return
            await asyncio.sleep(RENEW_EVERY_S * (0.8 + 0.4 * self.chance.random()))

    async def resign(self) -> None:
        """Gives the lease back, so that another need not wait for its end. Only when nothing is under way any more."""
        if not self._leads.is_set():
            return
        self._leads.clear()
        given_back = {"holderIdentity": "", "leaseDurationSeconds": 1}
        with contextlib.suppress(GreenroomError):
            for _ in range(RESIGN_TRIES):
                lease = await self.kube.get_raw(self._path)
                if lease is None or lease["spec"].get("holderIdentity") != self.identity:
                    return
                with contextlib.suppress(Conflict):  # a renewal that was on its way
                    await self.kube.send_raw("PUT", self._path, _with(lease, given_back))
                    return

    @property
    def _path(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{self.name}"

    async def _try(self) -> None:
        now = asyncio.get_running_loop().time()
        lease = await self.kube.get_raw(self._path)
        if lease is None:
            made = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name, "namespace": self.namespace},
                "spec": self._spec(1, _micro()),
            }
            with contextlib.suppress(AlreadyExists):
                await self.kube.send_raw("POST", self._path.rpartition("/")[0], made)
                self._won(now, 1)
            return
        spec = lease.get("spec") or {}
        holder, renewed = str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or "")
        if (holder, renewed) != self._seen:
            self._seen, self._seen_at = (holder, renewed), now
        mine = holder == self.identity and self._leads.is_set()
        lasts = float(spec.get("leaseDurationSeconds") or LEASE_S)
        # One that names us though we don't know of it was taken by a request that nobody answered.
        if holder not in ("", self.identity) and now < self._seen_at + lasts:
            return
        changes = int(spec.get("leaseTransitions") or 0) + (0 if mine else 1)
        acquired = str(spec.get("acquireTime") or "") if mine else _micro()
        with contextlib.suppress(Conflict):  # somebody else was quicker
            await self.kube.send_raw("PUT", self._path, _with(lease, self._spec(changes, acquired)))
            self._won(now, changes)

    def _won(self, sent_at: float, changes: int) -> None:
        self._until = sent_at + LEASE_S
        if not self._leads.is_set():
            self.term = changes
            self._leads.set()
            _log.info("leads", lease=self.name, identity=self.identity, term=changes)

    def _spec(self, changes: int, acquired: str) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(LEASE_S),
            "acquireTime": acquired,
            "renewTime": _micro(),
            "leaseTransitions": changes,
        }


def _with(lease: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {**lease, "spec": {**(lease.get("spec") or {}), **spec}}


def _micro() -> str:
    """For people to read; nobody decides by it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
