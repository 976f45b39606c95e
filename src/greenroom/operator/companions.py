"""What goes along with a pool beside its workers: the control plane's view of it, its disruption budget, its size by
demand, what its sandboxes are run with; and templates.

None of it decides which pods there are but the scaler, by what it writes into the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from greenroom.core.assets import Asset
from greenroom.core.errors import FailedPrecondition, GreenroomError, InvalidArgument, LeaseLost
from greenroom.core.ledger.records import Ledger
from greenroom.operator import budgets, forms
from greenroom.operator.objects import Key, PoolObject
from greenroom.operator.rosters import POSTERS, Rosters
from greenroom.operator.sandboxes import Uses
from greenroom.operator.scaler import Scaler
from greenroom.operator.specs import WorkerPoolSpec
from greenroom.operator.templates import Templates

if TYPE_CHECKING:
    from greenroom.operator.operator import Operator, Term

_log = structlog.get_logger("greenroom.operator")


class Companions:
    """Of one term. ``may_act``: raises `LeaseLost` when this process may not act any more."""

    def __init__(self, term: Term, operator: Operator, may_act: Callable[[], None]) -> None:
        self._term = term
        self._kube = operator.kube
        self._may_act = may_act
        self._uses = Uses(
            operator.kube, may_act, lambda: term.configs.found, term.pools, operator.namespace, operator.wall
        )
        self.rosters: Rosters | None = None
        self.scaler: Scaler | None = None
        self.templates: Templates | None = None
        if (plane := operator.plane) is not None:
            self.rosters = Rosters(plane, may_act, term.queue.add, operator.chance)
            self.scaler = Scaler(operator.kube, plane, may_act, operator.wall, cool_down_s=operator.cool_down_s)
            self.templates = Templates(
                operator.kube,
                plane,
                may_act,
                operator.namespace,
                operator.wall,
                operator.chance,
                on_return=self.rosters.again,
            )
        #: What is wrong with the configuration of sandboxes that a pool names.
        self._unfit: dict[Key, str] = {}

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        found: list[Coroutine[Any, Any, None]] = [self._uses.run()]
        if self.rosters is not None:
            found += [self.rosters.work() for _ in range(POSTERS)]
        if self.scaler is not None:
            found.append(self.scaler.run())
        if self.templates is not None:
            found.append(self.templates.run())
        return found

    def told(self, pool: PoolObject, ledger: Ledger) -> None:
        """A ledger was committed, or a term was begun with it. Its workers are told of beside the creation of their
        pods; one that is quicker waits, connected, until its roster has come."""
        if self.rosters is None:
            return
        try:
            self.rosters.tell(pool, forms.read(WorkerPoolSpec, pool.spec), ledger)
        except InvalidArgument as error:
            _log.warning("pool has a spec that can't be read", pool=pool.metadata.key, error=error.message)

    async def held(self, pool: PoolObject, spec: WorkerPoolSpec, ledger: Ledger) -> None:
        """Nothing of the ledger is left to be done. Raises what the API server refuses."""
        key = pool.metadata.key
        if pool.metadata.deletionTimestamp is not None:
            if self.scaler is not None:
                self.scaler.forget(key)
            return
        if self.rosters is not None:
            self.rosters.tell(pool, spec, ledger)
        if self.scaler is not None:
            self.scaler.note(pool, spec, ledger)
        self._may_act()
        # As many as there are when more than decided: what was decided may be lost, or not be there yet.
        stay = max(int(pool.status.get("desiredReplicas") or 0), ledger.active)
        await budgets.ensure(
            self._kube, pool, spec, stay, self._term.budgets.found.get((key[0], budgets.name_of(pool)))
        )
        self._use(key, spec)

    def configs_changed(self) -> None:
        self._uses.look_again()

    def _use(self, key: Key, spec: WorkerPoolSpec) -> None:
        was = self._unfit.pop(key, "")
        try:
            self._uses.note(key, spec)
        except (FailedPrecondition, InvalidArgument) as error:
            self._unfit[key] = error.message
        if was != self._unfit.get(key, ""):
            self._term.queue.add(key)

    async def leave(self, pool: PoolObject, ledger: Ledger) -> None:
        """Before a pool without workers is let go. Raises when the control plane does not answer, which the pool's
        condition then says; it is tried again."""
        key = pool.metadata.key
        if self.rosters is not None:
            try:
                await self.rosters.leave(pool, ledger)
            except FailedPrecondition as error:
                _log.warning("the control plane keeps a pool", pool=key, error=error.message)
            except LeaseLost:
                raise
            except GreenroomError as error:
                self.rosters.trouble[key] = f"it goes when the control plane has been told: {error.message}"
                raise
        self.forget(key)

    def forget(self, key: Key) -> None:
        self._uses.forget(key)
        self._unfit.pop(key, None)
        if self.scaler is not None:
            self.scaler.forget(key)
        if self.rosters is not None:
            self.rosters.forget(key)

    def trouble(self, key: Key) -> str:
        """For the pool's condition ``Registered``."""
        return self._unfit.get(key, "") or (self.rosters.trouble.get(key, "") if self.rosters is not None else "")

    def assets(self, spec: WorkerPoolSpec) -> Sequence[Asset]:
        """Raises `GreenroomError`."""
        return self._uses.assets(spec)

    async def ask(self, key: Key) -> bool:
        return await self.scaler.ask(key) if self.scaler is not None else True

    def actors(self, key: Key, pod: str) -> int | None:
        return self.scaler.actors(key, pod) if self.scaler is not None else None
