"""`Plane` by the API of the control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator

from greenroom.api import convert, validate
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.core.demand import Demand
from greenroom.core.errors import NotFound, Unavailable
from greenroom.core.records import Key, PoolSpec, Template, TemplateSpec
from greenroom.core.rosters import Roster
from greenroom.operator.plane import Change

#: How long one call may take; all are short, a template is prepared behind its call.
CALL_TIMEOUT_S = 15.0


class ApiPlane:
    """``client``: belongs to this event loop."""

    def __init__(self, client: AioClient) -> None:
        self._client = client

    async def apply_pool(self, name: str, spec: PoolSpec) -> None:
        request = pb.ApplyPoolRequest(name=name, spec=convert.to_message(spec))
        await self._client.pools.ApplyPool(request, timeout=CALL_TIMEOUT_S)

    async def delete_pool(self, name: str) -> None:
        try:
            await self._client.pools.DeletePool(pb.DeletePoolRequest(name=name), timeout=CALL_TIMEOUT_S)
        except NotFound:
            return

    async def admit(self, roster: Roster) -> None:
        request = pb.AdmitWorkersRequest(
            pool=roster.pool,
            pool_uid=roster.pool_uid,
            namespace=roster.pool_namespace,
            epoch=roster.epoch,
            ledger_version=roster.ledger_version,
            workers=map(convert.to_message, roster.workers),
        )
        await self._client.pools.AdmitWorkers(request, timeout=CALL_TIMEOUT_S)

    async def demand(self, pool: str) -> Demand:
        answer = await self._client.pools.GetDemand(pb.GetDemandRequest(pool=pool), timeout=CALL_TIMEOUT_S)
        return convert.from_message(Demand, answer)

    async def apply_template(self, key: Key, spec: TemplateSpec) -> Template:
        # As the server refuses it: what is far out of range can't even be sent.
        validate.refuse("template", str(key), validate.template_spec(spec))
        request = pb.ApplyTemplateRequest(
            namespace=key.namespace, name=key.name, spec=convert.to_message(spec), wait=convert.duration(0)
        )
        answer = await self._client.templates.ApplyTemplate(request, timeout=CALL_TIMEOUT_S)
        return convert.from_message(Template, answer.template)

    async def delete_template(self, key: Key) -> None:
        request = pb.DeleteTemplateRequest(namespace=key.namespace, name=key.name)
        try:
            await self._client.templates.DeleteTemplate(request, timeout=CALL_TIMEOUT_S)
        except NotFound:
            return

    async def templates(self) -> AsyncIterator[Change]:
        stream = self._client.system.Watch(pb.WatchRequest(kinds=["template"]))
        try:
            async for event in stream:
                if event.type == pb.WatchEvent.TYPE_SYNCED:
                    yield Change()
                    continue
                template = convert.from_message(Template, event.template)
                gone = event.type == pb.WatchEvent.TYPE_DELETED
                yield Change(key=template.key, template=None if gone else template)
        finally:
            stream.cancel()
        raise Unavailable("the control plane has ended the watch of templates; it is begun anew")
