"""Reads what `greenroom.core.explanation` says about an actor."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from greenroom.core.errors import NotFound
from greenroom.core.explanation import Explanation, explain
from greenroom.core.records import Actor, Lease, Operation, Snapshot, Template, Worker
from greenroom.store.port import MAX_PAGE, Store

#: Its parts are read one after the other; when the actor has moved on meanwhile they are read again, so often. An actor
#: that changes faster than that is not stuck.
READ_TRIES = 3

R = TypeVar("R", Template, Snapshot, Lease)


async def read(store: Store, pk: str, latest: int) -> Explanation:
    """Explains the actor with its ``latest`` operations. Raises `NotFound`."""
    tries = 0
    while True:
        explanation = await _read(store, pk, latest)
        tries += 1
        if tries == READ_TRIES or (await store.get(Actor, pk)).version == explanation.actor.version:
            return explanation


async def _read(store: Store, pk: str, latest: int) -> Explanation:
    actor = await store.get(Actor, pk)
    template = await _there(store, Template, f"{actor.namespace}/{actor.template}")
    operations, older = await _operations(store, actor.uid, latest)
    return explain(
        actor,
        now=store.clock(),
        template=template,
        own=await _there(store, Snapshot, actor.snapshot),
        golden=await _there(store, Snapshot, template.golden_snapshot if template else ""),
        workers=await _workers(store, template.spec.pool) if template else [],
        lease=await _there(store, Lease, actor.uid),
        operations=operations,
        older_operations=older,
    )


async def _there(store: Store, cls: type[R], pk: str) -> R | None:
    if not pk:
        return None
    try:
        return await store.get(cls, pk)
    except NotFound:
        return None


async def _operations(store: Store, uid: str, latest: int) -> tuple[list[Operation], int]:
    """The latest ones, oldest first, and how many there are before. A store lists the oldest first, so all are read:
    at most `KEPT_OPERATIONS`, some ten pages."""
    kept: deque[Operation] = deque(maxlen=latest)
    count, after = 0, ""
    while page := await store.list(Operation, where={"uid": uid}, after=after):
        kept.extend(page)
        count += len(page)
        if len(page) < MAX_PAGE:
            break
        after = page[-1].pk
    return list(kept), count - len(kept)


async def _workers(store: Store, pool: str) -> list[Worker]:
    workers: list[Worker] = []
    after = ""
    while page := await store.list(Worker, where={"pool": pool}, after=after):
        workers += page
        if len(page) < MAX_PAGE:
            break
        after = page[-1].pk
    return workers
