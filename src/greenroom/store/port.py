"""The port of the control plane's store.

Two kinds of writes, both atomic and conditional, never read-then-overwrite in a caller:

`apply`
    one lifecycle command: the store reads the `View`, `greenroom.core.lifecycle.decide` decides, the store writes the
    `Change`, all in one transaction. So binding actor, worker slot and operation can't come apart.
`put`, `remove`
    one record that no actor's lifecycle owns (templates, pools, rosters, marks, workers, snapshots, operations on
    templates), conditional on the version that was read.

A write is durable when the call returns. A cancelled call may or may not have happened: read again.

What was written, by this process or by another one that shares the store, is published, after it is durable, to every
`watch`: for each record in the order in which it changed, and what one write changed in that write's order. What
another process wrote comes a little later; a state of a record that was overtaken by then may be left out. That an
actor took or freed a slot need not make an event of its worker: who wants to know how many are taken reads the worker.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping
from typing import Protocol, TypeVar

from greenroom.core.commands import ActorCommand, Change
from greenroom.core.errors import InvalidArgument, NotFound
from greenroom.core.marks import Mark
from greenroom.core.records import Actor, Lease, Operation, Pool, Record, Replica, Snapshot, Template, Worker
from greenroom.core.rosters import Roster

Stored = Actor | Template | Pool | Roster | Mark | Worker | Replica | Snapshot | Operation | Lease
#: What can be read.
R = TypeVar("R", Actor, Template, Pool, Roster, Mark, Worker, Replica, Snapshot, Operation, Lease)
#: What `put` and `remove` write; actors and leases change by `apply` alone.
Free = Template | Pool | Roster | Mark | Worker | Replica | Snapshot | Operation
W = TypeVar("W", Template, Pool, Roster, Mark, Worker, Replica, Snapshot, Operation)

#: What `list` filters by: a field's value, or several of which it may have one (at most `MAX_PAGE`).
Where = Mapping[str, str | tuple[str, ...]]

#: Fields that `list` can filter on, by record class; each is indexed. So is ``pk``, for all of them.
FILTERS: dict[type[Stored], frozenset[str]] = {
    Actor: frozenset({"state", "worker", "template", "uid"}),
    Template: frozenset({"state"}),
    Pool: frozenset(),
    Roster: frozenset(),
    Mark: frozenset(),
    Worker: frozenset({"pool", "state"}),
    Replica: frozenset(),
    Snapshot: frozenset({"actor_uid", "state", "template"}),
    Operation: frozenset({"state", "uid", "kind"}),
    Lease: frozenset({"owner"}),
}

#: The most records one `list` returns; ask again with ``after`` for more.
MAX_PAGE = 1000
#: How many finished operations are kept; older ones are dropped by `trim`.
KEPT_OPERATIONS = 10_000


def check_list(cls: type[Stored], where: Where, limit: int) -> None:
    """For adapters of `Store.list`. Raises `InvalidArgument` as it says."""
    kind = cls.__name__.lower()
    if unknown := sorted(set(where) - FILTERS[cls] - {"pk"}):
        known = ", ".join(sorted(FILTERS[cls] | {"pk"}))
        raise InvalidArgument(f"a list of {kind}s can't be filtered by {unknown[0]!r}, only by: {known}")
    for name, value in where.items():
        if isinstance(value, tuple) and len(value) > MAX_PAGE:
            raise InvalidArgument(f"{len(value)} values of {name} are too many for a list of {kind}s; ask page by page")
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidArgument(f"limit {limit} of a list of {kind}s is not within 1 to {MAX_PAGE}; ask page by page")


def not_found(cls: type[Stored], pk: str) -> NotFound:
    """For adapters of `Store.get`."""
    kind = cls.__name__.lower()
    return NotFound(
        f"{kind} {pk} does not exist; `greenroom get {kind}s` lists those there are", reason=f"{kind.upper()}_NOT_FOUND"
    )


class EventType(enum.StrEnum):
    PUT = "Put"
    DELETED = "Deleted"


class Event(Record, frozen=True, kw_only=True):
    """``sequence`` grows by one with every event of this process; ``foreign``: another process has written it. Leases
    make no events."""

    type: EventType
    record: Stored
    sequence: int = 0
    foreign: bool = False


class Store(Protocol):
    async def apply(self, command: ActorCommand) -> Change:
        """Carries out one lifecycle command; idempotent by operation id and fenced as `decide` says. The `Change`
        that is returned has been written if its outcome is ``CHANGED``.

        Raises:
            GreenroomError: what `decide` raises; nothing was written.
            ResourceExhausted: the disk is full (reason ``DISK_FULL``), or too many writes wait (reason
                ``STORE_OVERLOADED``); nothing was written.
        """

    async def put(self, record: W) -> W:
        """Inserts (``version`` 0) or replaces (``version`` as read); returns the record with its new version.

        A worker's ``used`` is not taken from ``record``: it is the number of actors bound to the worker, which only
        `apply` changes (without raising the worker's version, so that the two never conflict).

        Raises:
            AlreadyExists: version 0 and the key is taken.
            Conflict: the stored version is another (reason ``VERSION_CONFLICT``), or the record is gone.
            ResourceExhausted: as `apply`.
        """

    async def remove(self, record: Free) -> None:
        """Deletes a record if its version is still the one given; an absent record is success.

        Raises:
            Conflict: it was changed meanwhile.
        """

    async def get(self, cls: type[R], pk: str) -> R:
        """Raises `NotFound` naming the kind and the key."""

    async def list(
        self,
        cls: type[R],
        *,
        namespace: str = "",
        where: Where | None = None,
        after: str = "",
        limit: int = MAX_PAGE,
    ) -> list[R]:
        """Records in the order of their keys, those after key ``after``, at most ``limit`` (1 to `MAX_PAGE`).
        ``where`` compares fields of `FILTERS`, and ``pk``, for equality. Operations are ordered by id, and ids are
        time-ordered. ``namespace`` has no meaning for pools, workers and leases, which have none.

        Raises:
            InvalidArgument: a field that is not in `FILTERS`, or a limit out of range.
        """

    def watch(self, *, capacity: int = 10_000) -> AsyncIterator[Event]:
        """Events from the moment of this call on; of what another process wrote also some from just before. A watcher
        that falls more than ``capacity`` events behind, or whose process could not follow the others, gets
        `ResourceExhausted` (reason ``WATCH_TOO_SLOW``) and must list again; when the store is closed it gets
        `Unavailable` after what came before. It is dropped when nobody refers to it any more."""

    def clock(self) -> float:
        """Now, in seconds since the epoch, as all who share the store see it. Within a process it never goes back, and
        it does not jump when somebody sets this machine's clock."""

    async def trim(self, keep: int = KEPT_OPERATIONS) -> int:
        """Drops the oldest finished operations beyond ``keep`` (by id); returns how many. Their request ids are
        forgotten with them."""

    async def close(self) -> None:
        """Waits for what is under way. Afterwards every call raises `Unavailable`."""
