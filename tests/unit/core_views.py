"""Views and commands of one actor, for the tests of the pure core."""

from __future__ import annotations

import typing

from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.records import Actor, ActorState, Key, Lease, OperationKind
from greenroom.testing.contracts.store_world import operation, snapshot, template, worker

KEY = Key("ns", "a")
S = ActorState
GOLDEN = snapshot("golden", golden=True, version=1)


def actor(state: ActorState, **fields: object) -> Actor:
    made: dict[str, typing.Any] = {"namespace": "ns", "name": "a", "uid": "u", "template": "t", "state": state}
    made |= {"created_at": 1.0, "state_since": 1.0, "generation": 4, "version": 7}
    return Actor(**made | fields)


def under_way(kind: OperationKind, state: ActorState, origin: ActorState, **fields: object) -> lc.View:
    """A view of an actor in ``state``, on worker w1, with an operation from ``origin``."""
    op = operation("op", kind=kind, name="a", uid="u", generation=4, from_state=origin, worker="w1", version=1)
    lease = Lease(uid="u", owner="one", operation="op", generation=4, expires_at=30.0)
    workers = (worker("w1", used=1), worker("w2"))
    view = lc.View(actor=actor(state, worker="w1", operation="op"), operation=op, lease=lease, workers=workers)
    return replace(view, template=template(), source=GOLDEN, golden=GOLDEN, **fields)


RESUMING = under_way(OperationKind.RESUME, S.RESUMING, S.SUSPENDED)


def begin(cls: type[lc.Begin], **fields: object) -> typing.Any:
    extra = {"snapshot_id": "new"} if cls is lc.BeginSuspend else {}
    return cls(key=KEY, now=9.0, operation_id="op2", owner="two", **extra, **fields)


def step(cls: type[lc.OperationCommand], **fields: object) -> typing.Any:
    return cls(key=KEY, now=9.0, operation_id="op", generation=4, **fields)
