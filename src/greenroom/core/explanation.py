"""What there is to say about an actor on a bad night: what happened to it, who holds it, where it could wake. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from greenroom.core import placement
from greenroom.core.records import (
    Actor,
    ActorState,
    Lease,
    OnCrash,
    Operation,
    Record,
    Rejection,
    Snapshot,
    Template,
    Worker,
)

#: States from which a wake-up has to find a worker; in all others the actor is on one.
HOMELESS = frozenset({ActorState.SUSPENDED, ActorState.CRASHED})


class Explanation(Record, frozen=True, kw_only=True):
    """Facts, read together.

    Attributes:
        actor: as it is now.
        read_at: now, by the store's clock.
        template: None when it is gone; then nothing can wake the actor.
        operations: its latest, oldest first; a crash is one too.
        older_operations: how many more of its operations are kept.
        lease: who may change the actor now; None: nobody does.
        snapshot: what a request would wake it from, or None when there is nothing.
        wakes_on: names of the workers that could take it now, the best first; empty unless it is on none.
        rejected: why not the others of its pool; at most `placement.MAX_REJECTIONS`.
        no_worker_fits: its pool has workers, and none of them could ever take it, whatever is freed there.
    """

    actor: Actor
    read_at: float
    template: Template | None = None
    operations: tuple[Operation, ...] = ()
    older_operations: int = 0
    lease: Lease | None = None
    snapshot: Snapshot | None = None
    wakes_on: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    no_worker_fits: bool = False


def explain(
    actor: Actor,
    *,
    now: float,
    template: Template | None,
    own: Snapshot | None,
    golden: Snapshot | None,
    workers: Sequence[Worker],
    lease: Lease | None,
    operations: Sequence[Operation],
    older_operations: int,
) -> Explanation:
    """``own`` and ``golden``: the records of the actor's latest snapshot and of its template's, None when there is
    none. ``workers``: at least those of the template's pool."""
    source = _source(actor, template, own, golden)
    ranking, misfits = placement.Ranking(order=(), rejected=()), [False]
    if actor.state in HOMELESS and template is not None and source is not None:
        demand = _demand(actor, template, source)
        ranking = placement.rank(workers, demand, now)
        misfits = [placement.never(w, demand) is not None for w in workers if w.pool == demand.pool]
    return Explanation(
        actor=actor,
        read_at=now,
        template=template,
        operations=tuple(operations),
        older_operations=older_operations,
        lease=lease,
        snapshot=source,
        wakes_on=tuple(worker.name for worker in ranking.order),
        rejected=ranking.rejected,
        no_worker_fits=bool(misfits) and all(misfits),
    )


def _source(actor: Actor, template: Template | None, own: Snapshot | None, golden: Snapshot | None) -> Snapshot | None:
    """What `lifecycle` would let a request wake it from."""
    begins_anew = template is not None and template.spec.on_crash is OnCrash.BOOT
    if actor.state is ActorState.CRASHED and begins_anew:
        return golden
    return own if actor.snapshot else golden


def _demand(actor: Actor, template: Template, source: Snapshot) -> placement.Demand:
    return placement.Demand(
        pool=template.spec.pool,
        snapshot=source,
        selector=placement.selector(template.spec.worker_selector, actor.worker_selector),
        image_digest=template.image_digest,
        prefer=(actor.last_worker,),
    )
