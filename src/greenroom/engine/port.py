"""What the doors (API, gateway) may ask of the control plane.

Waiting: a mutation starts an operation (or joins the one under way) and waits for it at most ``wait_s``. When that
passes, the operation is returned still RUNNING: giving up never cancels it. A FAILED operation is returned, not raised;
what is refused before an operation exists is raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from greenroom.core.agentapi import ActorStats, Entrance
from greenroom.core.demand import Demand
from greenroom.core.records import Actor, Key, Operation, Pool, PoolSpec, Snapshot, Template, TemplateSpec, Worker
from greenroom.core.rosters import Roster
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.engine.decommission import Farewell
from greenroom.engine.garbage import Garbage
from greenroom.engine.images import Images
from greenroom.engine.removals import Removals
from greenroom.store.port import Store

#: How long a mutation waits for its operation unless the caller says otherwise.
DEFAULT_WAIT_S = 300.0


class Waker(Protocol):
    """What the gateway needs."""

    bindings: BindingTable

    async def wake(self, key: Key) -> Wake:
        """The actor's binding, after waking it if it sleeps; any number of callers share one wake-up. Waits for an
        operation of another kind that is under way. A caller that is cancelled does not cancel the wake-up.

        Raises:
            NotFound: no such actor.
            ResourceExhausted: no capacity, with ``retry_after_s``.
            FailedPrecondition: it can't be woken (template failed; crashed and held, reason ``ACTOR_CRASHED``).
            GreenroomError: what the wake-up failed with.
        """

    async def is_over(self, binding: Binding) -> bool:
        """Whether a binding is no good any more: for who finds nobody behind it. Another replica may have put the
        actor to sleep a moment ago; then the binding is revoked when this returns.

        Raises:
            Unavailable: the store, which would know, does not answer.
        """

    async def entrance(self, binding: Binding) -> Entrance | None:
        """Where to be let in to a running actor on another machine; None: its endpoint can be connected to directly.
        A worker whose link is broken is where it was.

        Raises:
            Unavailable: its worker has not registered with this process, not even after a moment, or lets nobody in
                (reason ``NO_ENTRANCE``).
        """


class ExecStream(Protocol):
    """A command in a running actor; as `greenroom.sandbox.port.ExecSession`, from afar."""

    async def write(self, data: bytes) -> None: ...
    def output(self) -> AsyncIterator[tuple[int, bytes]]: ...
    async def wait(self) -> int: ...
    async def kill(self) -> None: ...


class ControlPlane(Waker, Protocol):
    """What the API needs. Reads go to ``store`` directly."""

    store: Store

    @property
    def images(self) -> Images: ...
    @property
    def garbage(self) -> Garbage: ...
    @property
    def removals(self) -> Removals: ...

    async def create_actor(
        self,
        key: Key,
        template: str,
        *,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> tuple[Actor, Operation]:
        """``worker_selector``: labels that its worker must have, beside those that the template asks for."""

    async def resume(
        self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S, snapshot_id: str = ""
    ) -> Operation:
        """Also from CRASHED, on purpose: back to the last good snapshot, or to that one of the actor's own. What it
        would have woken from is its way back then.

        Raises:
            NotFound: it has no such snapshot (reason ``SNAPSHOT_NOT_FOUND``).
            FailedPrecondition: the snapshot is not good, or the actor is awake (reason ``ACTOR_AWAKE``).
        """

    async def suspend(self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S) -> Operation: ...

    async def pause(self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S) -> Operation: ...

    async def delete(self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S) -> Operation: ...

    async def apply_template(
        self, key: Key, spec: TemplateSpec, *, request_id: str = ""
    ) -> tuple[Template, Operation | None]:
        """Creates the template and starts its preparation, which the caller may watch (`store.watch`). The same spec
        again changes nothing, but prepares again when it FAILED.

        Raises:
            FailedPrecondition: it exists with another spec (reason ``TEMPLATE_IMMUTABLE``).
        """

    async def delete_template(self, key: Key) -> None:
        """Raises `FailedPrecondition` (reason ``TEMPLATE_IN_USE``) while actors are made from it."""

    async def tag_snapshot(self, snapshot_id: str, tag: str, *, undo: bool = False) -> Snapshot:
        """Gives a snapshot a name, which keeps it whatever its template's retention says; ``undo`` takes one away, and
        the snapshot goes when nothing else keeps it. Doing either twice changes nothing.

        Raises:
            NotFound: no such snapshot, or its actor is gone.
            FailedPrecondition: it is being deleted (reason ``SNAPSHOT_CONDEMNED``).
            ResourceExhausted: it has too many (reason ``TOO_MANY_TAGS``).
        """

    async def apply_pool(self, name: str, spec: PoolSpec) -> Pool:
        """Creates or resizes a pool; the backend of a pool can't change."""

    async def delete_pool(self, name: str) -> None:
        """Raises `FailedPrecondition` (reason ``POOL_IN_USE``) while a template names it."""

    async def admit_workers(self, roster: Roster) -> tuple[Roster, list[str]]:
        """Replaces a pool's roster; who is on none can't register. Returns it, and the pool's workers that are not on
        it, which are retired.

        Raises:
            Conflict: a newer one is known (reason ``STALE_ROSTER``), or a pool that followed (``FORMER_POOL``).
            FailedPrecondition: it is of another namespace than the pool's present one, which has workers (reason
                ``POOL_NAME_TAKEN``).
        """

    async def demand(self, pool: str) -> Demand:
        """How much is asked of it just now, over all replicas. Raises `NotFound`."""

    async def demands(self) -> list[Demand]:
        """Of every pool."""

    def wakes_here(self) -> Mapping[str, int]:
        """Wake-ups that this process has brought to a good end since it started, by pool."""

    async def wait_operation(self, operation_id: str, wait_s: float = DEFAULT_WAIT_S) -> Operation:
        """Returns it when it has ended, or as it is after ``wait_s``. Raises `NotFound`."""

    async def cancel_operation(self, operation_id: str) -> Operation:
        """Asks the driver of an operation, on whichever replica it runs, to back it out. Returns at once, with the
        operation as it is; one that has ended, or was asked before, is an answer too. When it is backed out it is
        FAILED with code ``CANCELLED`` (`Cancelled`); it may also be done before anybody looks.

        Raises:
            NotFound: no such operation.
            FailedPrecondition: it is a delete, which can't be taken back (reason ``NOT_CANCELLABLE``).
        """

    async def drain_worker(self, name: str, *, undo: bool = False) -> Worker:
        """No actor is woken on the worker any more, and those that are awake there are suspended, behind this call;
        it is empty when ``used`` is 0. With ``undo`` it takes actors again. Doing either twice changes nothing.

        Raises:
            NotFound: no such worker.
        """

    async def retire_worker(self, name: str) -> Worker:
        """As `drain_worker`; and when it is empty its agent erases its state disk and ends, and it is recorded no more.
        Answers at once. ``drain_worker(undo=True)`` takes it back until then.

        Raises:
            NotFound: no such worker.
            FailedPrecondition: it is gone (reason ``WORKER_GONE``).
        """

    async def forget_worker(self, name: str, *, accept_loss: bool = False) -> Farewell:
        """Says that a worker that nobody hears will not come back: what was awake there is CRASHED and may wake
        elsewhere, what only its disk had is lost, and a tombstone stays. Of one that is gone already the tombstone is
        removed; should its disk come back then, it counts as one that this database knows too little of.

        Raises:
            NotFound: no such worker.
            FailedPrecondition: it may be heard (reason ``WORKER_HEARD``); something would be lost, and ``accept_loss``
                does not say that it may (``WORKER_HOLDS_STATE``); operations are bound to it (``WORKER_IN_USE``).
        """

    async def acknowledge_worker(self, name: str) -> Worker:
        """What the database says of a worker is right as it is, though it was restored: what it does not know there may
        go (`Worker.distrust`). Nothing to do is success.

        Raises:
            NotFound: no such worker.
        """

    async def exec(
        self,
        key: Key,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float = 0,
    ) -> ExecStream:
        """Runs a command in the actor, waking it first."""

    def logs(self, key: Key, *, tail_lines: int = -1, follow: bool = False) -> AsyncIterator[bytes]:
        """Chunks of whole lines of stdout and stderr that are kept, oldest first; sleeping actors have logs too."""

    async def stats(self, key: Key) -> ActorStats:
        """Raises `FailedPrecondition` when the actor does not run."""
