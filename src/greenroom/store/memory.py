"""A store in memory, for tests and simulation: no threads, no I/O, the same answers as the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from greenroom.core.commands import ActorCommand, Change
from greenroom.core.records import Actor, Lease, Operation, OperationState, Snapshot, Worker
from greenroom.store import transaction
from greenroom.store.clock import SteadyClock
from greenroom.store.port import FILTERS, KEPT_OPERATIONS, MAX_PAGE, Free, R, Stored, W, Where, check_list, not_found
from greenroom.store.watch import Broadcast, Watcher, closed


class MemoryStore:
    """Every call is done when it returns, without a switch to another task in between."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or SteadyClock()
        self._rows = _Dicts()
        self._broadcast = Broadcast()
        self._closed = False

    async def apply(self, command: ActorCommand) -> Change:
        self._check_open()
        change, effects = transaction.apply(self._rows, command)
        self._broadcast.publish(effects)
        return change

    async def put(self, record: W) -> W:
        self._check_open()
        stored, effects = transaction.put(self._rows, record)
        self._broadcast.publish(effects)
        return stored

    async def remove(self, record: Free) -> None:
        self._check_open()
        _, effects = transaction.remove(self._rows, record)
        self._broadcast.publish(effects)

    async def get(self, cls: type[R], pk: str) -> R:
        self._check_open()
        record = self._rows.read(cls, pk)
        if record is None:
            raise not_found(cls, pk)
        return record

    async def list(
        self,
        cls: type[R],
        *,
        namespace: str = "",
        where: Where | None = None,
        after: str = "",
        limit: int = MAX_PAGE,
    ) -> list[R]:
        self._check_open()
        check_list(cls, where or {}, limit)
        wanted = {name: value if isinstance(value, tuple) else (value,) for name, value in (where or {}).items()}
        if namespace and "namespace" in cls.__struct_fields__:
            wanted["namespace"] = (namespace,)
        table = self._rows.table(cls)
        found = (table[pk] for pk in sorted(table) if pk > after)
        return [r for r in found if all(getattr(r, f) in v for f, v in wanted.items())][:limit]

    def watch(self, *, capacity: int = 10_000) -> Watcher:
        self._check_open()
        return self._broadcast.watch(capacity)

    def clock(self) -> float:
        return self._clock()

    async def trim(self, keep: int = KEPT_OPERATIONS) -> int:
        self._check_open()
        table = self._rows.table(Operation)
        finished = sorted(pk for pk, op in table.items() if op.state is not OperationState.RUNNING)
        dropped, effects = transaction.drop_operations(self._rows, finished[: max(len(finished) - keep, 0)])
        self._broadcast.publish(effects)
        return dropped

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._broadcast.close()

    def _check_open(self) -> None:
        if self._closed:
            raise closed()


class _Dicts:
    """`transaction.Rows` over one dict a class."""

    def __init__(self) -> None:
        self._tables: dict[type[Stored], dict[str, Stored]] = {cls: {} for cls in FILTERS}
        self._requests: dict[str, str] = {}  # request key -> operation id

    def table(self, cls: type[R]) -> dict[str, R]:
        return self._tables[cls]  # type: ignore[return-value]  # a dict of class to dict of that class

    def read(self, cls: type[R], pk: str) -> R | None:
        return self.table(cls).get(pk)

    def operation_of_request(self, request: str) -> Operation | None:
        return self.table(Operation).get(self._requests.get(request, ""))

    def snapshots_of(self, actor_uid: str) -> Sequence[Snapshot]:
        return [s for _, s in sorted(self.table(Snapshot).items()) if s.actor_uid == actor_uid]

    def workers_of(self, pool: str) -> Sequence[Worker]:
        return [w for _, w in sorted(self.table(Worker).items()) if w.pool == pool]

    def bound_to(self, worker: str) -> int:
        return sum(a.worker == worker for a in self.table(Actor).values())

    def insert(self, record: Stored) -> None:
        assert record.pk not in self._tables[type(record)], f"{record.pk} is inserted twice"
        self._store(record)

    def replace(self, record: Stored) -> None:
        assert isinstance(record, Lease) or record.pk in self._tables[type(record)], f"{record.pk} is not there"
        self._store(record)

    def _store(self, record: Stored) -> None:
        self._tables[type(record)][record.pk] = record
        if isinstance(record, Operation) and record.request_id:
            self._requests[transaction.request_key(record.namespace, record.request_id)] = record.id

    def delete(self, cls: type[Stored], pk: str) -> None:
        record = self._tables[cls].pop(pk, None)
        if isinstance(record, Operation) and record.request_id:
            self._requests.pop(transaction.request_key(record.namespace, record.request_id), None)
