"""The services of operations and of the control plane itself; see `greenroom.api.service`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import msgspec

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.service import Service, closing, member, rpc, wait_s_of
from greenroom.core.errors import InvalidArgument
from greenroom.core.marks import Mark
from greenroom.core.records import (
    Actor,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    Replica,
    Snapshot,
    Template,
    Worker,
)
from greenroom.core.rosters import Roster
from greenroom.engine.removals import MAX_REMEMBERED
from greenroom.store.port import MAX_PAGE, EventType

#: What the API shows; leases stay inside.
Shown = Actor | Template | Pool | Worker | Snapshot | Operation

KINDS: dict[str, type[Shown]] = {
    "actor": Actor,
    "template": Template,
    "pool": Pool,
    "worker": Worker,
    "snapshot": Snapshot,
    "operation": Operation,
}
_KIND_NAMES = {cls: name for name, cls in KINDS.items()}


# --- operations -------------------------------------------------------------------------------------------------


class Operations(Service, pb_grpc.OperationsServicer):
    @rpc
    async def GetOperation(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Operation, request.id))

    @rpc
    async def ListOperations(self, request: Any, context: Any) -> Any:
        answer = pb.ListOperationsResponse()
        await self._page(
            Operation,
            request,
            "operations",
            answer,
            uid=request.uid,
            state=member(OperationState, request.state),
            kind=member(OperationKind, request.kind),
        )
        return answer

    @rpc
    async def WaitOperation(self, request: Any, context: Any) -> Any:
        async with self._streams.open():
            return convert.to_message(await self._control.wait_operation(request.id, wait_s_of(request, context)))

    @rpc
    async def CancelOperation(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.cancel_operation(request.id))

    @rpc
    async def WatchOperation(self, request: Any, context: Any) -> None:
        async with self._streams.open(), closing(self._store.watch()) as events:
            operation = await self._store.get(Operation, request.id)
            await context.write(convert.to_message(operation))
            if operation.state is not OperationState.RUNNING:
                return
            async for event in events:
                record = event.record
                if not isinstance(record, Operation) or record.id != operation.id:
                    continue
                if event.type is EventType.DELETED:
                    return
                if record.version > operation.version:
                    operation = record
                    await context.write(convert.to_message(operation))
                if operation.state is not OperationState.RUNNING:
                    return


# --- the server itself ------------------------------------------------------------------------------------------


class System(Service, pb_grpc.SystemServicer):
    @rpc
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = self._info
        return pb.ServerInfo(
            version=info.version,
            backends=info.backends,
            gateway_url=info.gateway_url,
            domain=info.domain,
            started_at=convert.timestamp(info.started_at),
        )

    @rpc
    async def ListReplicas(self, request: Any, context: Any) -> Any:
        answer = pb.ListReplicasResponse()
        # Which actors are in use through a replica is for the other replicas; it can be thousands.
        replicas = await self._page(Replica, request, "", answer)
        answer.replicas.extend(convert.to_message(msgspec.structs.replace(r, uses={})) for r in replicas)
        return answer

    @rpc
    async def Collect(self, request: Any, context: Any) -> Any:
        async with self._streams.open():
            report = await self._control.garbage.collect(dry_run=request.dry_run, images=request.images)
        return pb.CollectResponse(
            would_go=map(convert.to_message, report.would_go),
            removed=map(convert.to_message, report.removed),
            failures=report.failures,
        )

    @rpc
    async def ExplainObject(self, request: Any, context: Any) -> Any:
        found = await self._control.garbage.explain(request.object, request.namespace)
        return pb.ExplainObjectResponse(found=map(convert.to_message, found))

    @rpc
    async def ListRemovals(self, request: Any, context: Any) -> Any:
        if request.limit < 0:
            raise InvalidArgument(f"limit must be 0 or more, not {request.limit}")
        latest = self._control.removals.latest(request.limit or MAX_REMEMBERED)
        return pb.ListRemovalsResponse(removals=map(convert.to_message, latest))

    @rpc
    async def Watch(self, request: Any, context: Any) -> None:
        classes = _classes(request.kinds)
        # Subscribed before listing, so that no change falls between. What the list already showed is not shown again.
        async with self._streams.open(), closing(self._store.watch()) as events:
            listed: dict[tuple[str, str], int] = {}
            for cls in classes:
                async for there in self._all(cls, request.namespace):
                    listed[_KIND_NAMES[cls], there.pk] = there.version
                    if _shown(there, request):
                        await context.write(_event(pb.WatchEvent.TYPE_PUT, there))
            await context.write(pb.WatchEvent(type=pb.WatchEvent.TYPE_SYNCED))
            async for event in events:
                record = event.record
                if (
                    isinstance(record, Lease | Replica | Roster | Mark)
                    or type(record) not in classes
                    or not _shown(record, request)
                ):
                    continue
                deleted = event.type is EventType.DELETED
                if _is_news(deleted, record, listed):
                    kind = pb.WatchEvent.TYPE_DELETED if deleted else pb.WatchEvent.TYPE_PUT
                    await context.write(_event(kind, record))

    async def _all(self, cls: type[Shown], namespace: str) -> AsyncIterator[Shown]:
        after = ""
        namespace = namespace if "namespace" in cls.__struct_fields__ else ""
        while True:
            page = cast(list[Shown], await self._store.list(cls, namespace=namespace, after=after))
            for record in page:
                yield record
            if len(page) < MAX_PAGE:
                return
            after = page[-1].pk


def _is_news(deleted: bool, record: Shown, listed: dict[tuple[str, str], int]) -> bool:
    key = (_KIND_NAMES[type(record)], record.pk)
    version = listed.get(key)
    if version is None:
        return True
    # A worker's slots are taken and freed without a new version: of those, what is as new may be news.
    shown = record.version < version or (record.version == version and not isinstance(record, Worker))
    if shown and not deleted:
        return False
    del listed[key]  # from here on events are newer anyhow
    return True


def _classes(kinds: Any) -> list[type[Shown]]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InvalidArgument(f"there is no kind {unknown[0]!r}; use: {', '.join(KINDS)}", reason="UNKNOWN_KIND")
    return [cls for name, cls in KINDS.items() if not kinds or name in kinds]


def _shown(record: Shown, request: Any) -> bool:
    if isinstance(record, Actor) and record.golden and not request.show_golden:
        return False
    namespace = getattr(record, "namespace", "")
    return not request.namespace or not namespace or namespace == request.namespace


def _event(kind: Any, record: Shown) -> Any:
    message: Mapping[str, Any] = {_KIND_NAMES[type(record)]: convert.to_message(record)}
    return pb.WatchEvent(type=kind, **message)
