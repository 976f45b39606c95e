"""The services of templates, pools, workers and snapshots; see `greenroom.api.service`."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty
from msgspec.structs import replace

from greenroom.api import convert, validate
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.service import Service, key_of, member, pk_of, rpc, wait_s_of
from greenroom.core.errors import InvalidArgument
from greenroom.core.names import check_label
from greenroom.core.records import (
    Pool,
    PoolSpec,
    Snapshot,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.core.rosters import Roster, RosterEntry


class Templates(Service, pb_grpc.TemplatesServicer):
    @rpc
    async def GetTemplate(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Template, pk_of(request)))

    @rpc
    async def ListTemplates(self, request: Any, context: Any) -> Any:
        answer = pb.ListTemplatesResponse()
        await self._page(Template, request, "templates", answer, state=member(TemplateState, request.state))
        return answer

    @rpc
    async def ApplyTemplate(self, request: Any, context: Any) -> Any:
        key = key_of(request)
        check_label("namespace", key.namespace)
        check_label("template", key.name)
        spec = convert.from_message(TemplateSpec, request.spec)
        validate.refuse("template", str(key), validate.template_spec(spec))
        wait_s = wait_s_of(request, context)
        template, operation = await self._control.apply_template(
            key, spec, request_id=validate.request_id(request.request_id)
        )
        if operation is not None and wait_s > 0:
            async with self._streams.open():
                operation = await self._control.wait_operation(operation.id, wait_s)
            template = await self._store.get(Template, template.pk)
        answer = pb.ApplyTemplateResponse(template=convert.to_message(template))
        if operation is not None:
            answer.operation.CopyFrom(convert.to_message(operation))
        return answer

    @rpc
    async def DeleteTemplate(self, request: Any, context: Any) -> Any:
        await self._control.delete_template(key_of(request))
        return Empty()


class Pools(Service, pb_grpc.PoolsServicer):
    @rpc
    async def GetPool(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Pool, request.name))

    @rpc
    async def ListPools(self, request: Any, context: Any) -> Any:
        answer = pb.ListPoolsResponse()
        await self._page(Pool, request, "pools", answer)
        return answer

    @rpc
    async def ApplyPool(self, request: Any, context: Any) -> Any:
        name = check_label("pool", request.name)
        spec = convert.from_message(PoolSpec, request.spec)
        validate.refuse("pool", name, validate.pool_spec(spec))
        if spec.backend not in self._info.backends:
            raise InvalidArgument(
                f"pool {name}: spec.backend: there is no sandbox backend {spec.backend!r}; installed are: "
                f"{', '.join(self._info.backends)}",
                reason="UNKNOWN_BACKEND",
            )
        return convert.to_message(await self._control.apply_pool(name, spec))

    @rpc
    async def AdmitWorkers(self, request: Any, context: Any) -> Any:
        entries = (convert.from_message(RosterEntry, entry) for entry in request.workers)
        roster = Roster(
            pool=request.pool,
            pool_uid=request.pool_uid,
            pool_namespace=request.namespace,
            epoch=request.epoch,
            ledger_version=request.ledger_version,
            workers=tuple(replace(entry, epoch=entry.epoch or request.epoch) for entry in entries),
        )
        written, retiring = await self._control.admit_workers(roster)
        return pb.AdmitWorkersResponse(roster=convert.to_message(written), retiring=retiring)

    @rpc
    async def GetDemand(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.demand(request.pool))

    @rpc
    async def DeletePool(self, request: Any, context: Any) -> Any:
        await self._control.delete_pool(request.name)
        return Empty()


class Workers(Service, pb_grpc.WorkersServicer):
    @rpc
    async def GetWorker(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Worker, request.name))

    @rpc
    async def ListWorkers(self, request: Any, context: Any) -> Any:
        answer = pb.ListWorkersResponse()
        state = member(WorkerState, request.state)
        await self._page(Worker, request, "workers", answer, pool=request.pool, state=state)
        return answer

    @rpc
    async def DrainWorker(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.drain_worker(request.name, undo=request.undo))

    @rpc
    async def RetireWorker(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.retire_worker(request.name))

    @rpc
    async def ForgetWorker(self, request: Any, context: Any) -> Any:
        said = await self._control.forget_worker(request.name, accept_loss=request.accept_loss)
        return pb.ForgetWorkerResponse(
            worker=convert.to_message(said.worker),
            removed=said.removed,
            lost_actors=said.losses.actors,
            lost_snapshots=said.losses.snapshots,
        )

    @rpc
    async def AcknowledgeWorker(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._control.acknowledge_worker(request.name))


class Snapshots(Service, pb_grpc.SnapshotsServicer):
    @rpc
    async def GetSnapshot(self, request: Any, context: Any) -> Any:
        return convert.to_message(await self._store.get(Snapshot, request.id))

    @rpc
    async def ListSnapshots(self, request: Any, context: Any) -> Any:
        answer = pb.ListSnapshotsResponse()
        await self._page(
            Snapshot,
            request,
            "snapshots",
            answer,
            actor_uid=request.actor_uid,
            template=request.template,
            state=member(SnapshotState, request.state),
        )
        return answer

    @rpc
    async def TagSnapshot(self, request: Any, context: Any) -> Any:
        tag = validate.tag(request.tag)
        return convert.to_message(await self._control.tag_snapshot(request.id, tag, undo=request.undo))
