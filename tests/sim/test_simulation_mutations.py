"""What the simulation is worth: what makes the control plane safe is taken out, one thing at a time, and it must
notice.

Each mutation says within how many seeds it is noticed, and by what.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from greenroom.agent.fence import Fence
from greenroom.core import lifecycle
from greenroom.core.agentapi import Heartbeat
from greenroom.core.commands import ActorCommand, BeginSuspend, Change, FinishSuspend, Outcome, TakeOver, View
from greenroom.core.gc import blobs
from greenroom.core.gc.records import ResourceState
from greenroom.core.lifecycle import fence, moves
from greenroom.core.records import Actor, ActorState, Operation, OperationState, Snapshot, Template, Worker
from greenroom.engine.census import Census
from greenroom.engine.drivers import Drivers
from greenroom.engine.engine import Engine
from greenroom.engine.follower import Follower
from greenroom.engine.inventories import Inventories
from greenroom.engine.phases import Phases
from greenroom.engine.reconciler import Reconciler
from greenroom.engine.recovery import Recovery
from greenroom.store import transaction
from greenroom.testing.simulation.calls import Calls
from greenroom.testing.simulation.clients import User
from greenroom.testing.simulation.faults import Fault
from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.run import Broken, run_all

Patch = pytest.MonkeyPatch


def no_fence_on_workers(patch: Patch) -> None:
    """Agents carry out calls of any generation."""
    patch.setattr(Fence, "_check", lambda self, call: None)


def no_fence_in_the_store(patch: Patch) -> None:
    """Whoever has the id of an operation can go on with it."""

    def current(view: View, c: Any, kind: Any = None) -> tuple[Actor, Operation]:
        if view.actor is None or view.operation is None:
            raise fence.lost(view.actor, c)
        return view.actor, view.operation

    patch.setattr(fence, "current", current)


def no_conditional_writes(patch: Patch) -> None:
    """A record is replaced whatever has become of it since it was read."""
    put = transaction.put

    def unconditional(rows: transaction.Rows, record: Any) -> Any:
        stored = rows.read(type(record), record.pk)
        if stored is not None and record.version:
            record = msgspec.structs.replace(record, version=stored.version)
        return put(rows, record)

    patch.setattr(transaction, "put", unconditional)


def slot_freed_too_early(patch: Patch) -> None:
    """At the beginning of a suspend instead of its end."""
    decide = lifecycle.decide

    def early(view: View, command: ActorCommand) -> Change:
        change = decide(view, command)
        if change.outcome is Outcome.CHANGED and isinstance(command, BeginSuspend):
            assert change.actor is not None
            return msgspec.structs.replace(change, slots=((change.actor.worker, -1),))
        if change.outcome is Outcome.CHANGED and isinstance(command, FinishSuspend):
            return msgspec.structs.replace(change, slots=())
        return change

    patch.setattr(transaction, "decide", early)


def takeover_without_a_new_generation(patch: Patch) -> None:
    """And without waiting for the end of the lease."""
    take_over = moves.take_over

    def take(view: View, command: TakeOver) -> Change:
        change = take_over(view, msgspec.structs.replace(command, force=True))
        assert view.actor is not None and change.actor is not None and change.operation is not None
        assert change.lease is not None
        same = view.actor.generation
        return msgspec.structs.replace(
            change,
            actor=msgspec.structs.replace(change.actor, generation=same),
            operation=msgspec.structs.replace(change.operation, generation=same),
            lease=msgspec.structs.replace(change.lease, generation=same),
        )

    async def may_take(self: Recovery, operation: Operation) -> bool:
        return True

    patch.setattr(moves, "take_over", take)
    patch.setattr(Recovery, "_may_take", may_take)


def discarded_before_the_commit(patch: Patch) -> None:
    finish = Drivers._finish_suspend

    async def discard_first(
        self: Drivers, actor: Actor, op: Operation, template: Template | None, snapshot: Snapshot, phases: Phases
    ) -> Operation:
        await self._calls.discard(actor, op)
        return await finish(self, actor, op, template, snapshot, phases)

    patch.setattr(Drivers, "_finish_suspend", discard_first)


def nothing_is_frozen_that_is_alone(patch: Patch) -> None:
    """And requests go wherever a binding leads."""

    async def leave_it(self: Calls, uid: str) -> None:
        pass

    patch.setattr(Calls, "_stop_stale", leave_it)
    patch.setattr(Census, "is_trusted", lambda self, worker: True)


def heartbeats_are_always_answered(patch: Patch) -> None:
    """Also by a replica that can't write down that it heard the worker."""

    def answer(self: Census, worker: str, heartbeat: Heartbeat) -> bool:
        return True

    patch.setattr(Census, "worker_heard", answer)


def workers_of_others_count_as_lost(patch: Patch) -> None:
    """A replica asks nobody else whether a worker lives that it does not hear itself."""

    def never(self: Census, record: Worker) -> bool:
        return False

    patch.setattr(Census, "_is_fresh", never)


def nothing_is_revoked(patch: Patch) -> None:
    """What another replica has put to sleep stays bound: the feed does not tell, and the census does not see it."""
    follow = Follower._follow_actor

    async def only_bind(self: Follower, actor: Actor, event: Any) -> None:
        if actor.state is ActorState.RUNNING:
            await follow(self, actor, event)

    async def leave_it(self: Reconciler, binding: Any) -> None:
        pass

    patch.setattr(Follower, "_follow_actor", only_bind)
    patch.setattr(Reconciler, "_drop_stale", leave_it)


def new_sandboxes_are_nobodys(patch: Patch) -> None:
    """What was placed on a worker after its rows were read is taken for what nobody has a record of."""

    async def nobody(self: Inventories, entries: Any) -> dict[str, Actor]:
        return {}

    patch.setattr(Inventories, "_owners_of", nobody)


def what_is_being_made_is_nobodys(patch: Patch) -> None:
    """A snapshot that a worker holds counts only once its record is written."""
    of_snapshots = Inventories._of_snapshots

    async def without(self: Inventories, worker: str, handles: Any) -> Any:
        return [row for row in await of_snapshots(self, worker, handles) if row.state is not ResourceState.CREATING]

    patch.setattr(Inventories, "_of_snapshots", without)


def suspends_are_answered_when_they_begin(patch: Patch) -> None:
    """Before the snapshot is committed."""
    transition = Engine.transition

    async def at_once(self: Engine, kind: Any, key: Any, request_id: str, cause: str) -> Operation:
        if kind is not BeginSuspend or cause != "api":
            return await transition(self, kind, key, request_id, cause)
        self.spawn(transition(self, kind, key, request_id, cause), "later")
        now = self.now()
        said = {"id": "", "kind": kind.kind, "namespace": key.namespace, "name": key.name, "uid": ""}
        times = {"created_at": now, "updated_at": now, "deadline_at": now}
        return Operation(**said, **times, state=OperationState.DONE)

    patch.setattr(Engine, "transition", at_once)


def given_up_while_they_may_be_heard(patch: Patch) -> None:
    """People say of any worker that it will not come back, and are believed."""

    async def any_worker(self: User, replica: Replica) -> None:
        worker = self._random.choice(sorted(self._world.machines))
        await replica.ask("forget", lambda: replica.engine.forget_worker(worker, accept_loss=True))

    patch.setattr(Census, "may_be_heard", lambda self, record: False)
    patch.setattr(User, "_forget", any_worker)


def what_others_refer_to_is_swept(patch: Patch) -> None:
    patch.setattr(blobs, "doomed", lambda condemned, others: [*blobs.keys_of(condemned)])


def nothing_is_scrubbed(patch: Patch) -> None:
    patch.setattr(blobs, "strays", lambda keys, snapshots, uploading: [])


@dataclass(frozen=True)
class Mutation:
    """``within``: seeds in which it is noticed; ``by``: what is said of it (one of these); ``world``: what is other
    than drawn."""

    take_out: Callable[[Patch], None]
    within: int
    by: str
    world: dict[str, Any]


DRAWN: dict[str, Any] = {}
#: Many messages are late, lost and repeated.
BAD_NETWORK: dict[str, Any] = {"step_rate": 0.03}
APART: dict[str, Any] = {
    "replicas": 2,
    "step_rate": 0.0,
    "parts": 8,
    "kinds": (Fault.PARTITION, Fault.ISOLATION, Fault.STORE_CUT, Fault.REPLICA_PAUSE),
}
CUT: dict[str, Any] = APART | {"kinds": (Fault.PARTITION, Fault.STORE_CUT)}

MUTATIONS = [
    Mutation(no_fence_on_workers, 40, "a stale owner changes a sandbox", BAD_NETWORK),
    Mutation(no_fence_in_the_store, 100, "has changed it all the same|its operation is not under way", BAD_NETWORK),
    Mutation(no_conditional_writes, 20, "a write was lost", DRAWN),
    Mutation(slot_freed_too_early, 2, "slots of worker w. are taken", DRAWN),
    Mutation(takeover_without_a_new_generation, 5, "somebody took it without a new generation", DRAWN),
    Mutation(discarded_before_the_commit, 2, "destroyed before its snapshot was committed", DRAWN),
    Mutation(nothing_is_frozen_that_is_alone, 30, "somebody routes there|two incarnations", APART),
    Mutation(heartbeats_are_always_answered, 200, "does not know that it is alone|two incarnations", CUT),
    Mutation(workers_of_others_count_as_lost, 30, "counts as lost, and was heard", APART),
    Mutation(given_up_while_they_may_be_heard, 60, "counts as lost, and was heard|followed it|routes there", APART),
    Mutation(nothing_is_revoked, 10, "routes to|answered by", DRAWN),
    Mutation(new_sandboxes_are_nobodys, 40, "it is swept, and is its actor's", DRAWN),
    Mutation(what_is_being_made_is_nobodys, 200, "drops what somebody needs", DRAWN),
    Mutation(suspends_are_answered_when_they_begin, 20, "as was said, with", DRAWN),
    Mutation(what_others_refer_to_is_swept, 300, "recorded, but not stored|SNAPSHOT_CORRUPT|corrupt", DRAWN),
    Mutation(nothing_is_scrubbed, 40, "stored, but not recorded", BAD_NETWORK),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.take_out.__name__)
def test_it_is_noticed(monkeypatch: Patch, mutation: Mutation) -> None:
    mutation.take_out(monkeypatch)
    for came in run_all(range(mutation.within), lambda seed: replace(Plan.draw(seed), **mutation.world)):
        if isinstance(came, Broken):
            print(came)
            assert re.search(mutation.by, str(came)), came
            return
    raise AssertionError(f"not noticed within {mutation.within} seeds")
