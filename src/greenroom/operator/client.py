"""The calls that the operator makes. Each names what it may be answered with; `Unavailable` always may."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from greenroom.core.errors import NotFound, Unavailable
from greenroom.operator.objects import API_VERSION, Meta, PodObject, PoolObject
from greenroom.operator.transport import MERGE_PATCH, Transport

#: How long one call may take. The server itself gives up after 60 s; then it may have taken effect all the same.
CALL_TIMEOUT_S = 10.0
#: A list of everything takes longer.
LIST_TIMEOUT_S = 60.0
#: Objects in one piece of a list.
PAGE = 500

T = TypeVar("T")


@dataclass(frozen=True)
class Listed(Generic[T]):
    """``version``: of the list as a whole, from which a watch goes on."""

    items: list[T]
    version: str


class _ListMeta(msgspec.Struct, frozen=True):
    resourceVersion: str = ""
    cont: str = msgspec.field(default="", name="continue")


@dataclass(frozen=True)
class Kube:
    """One API server."""

    transport: Transport

    # --- pools ---

    async def get_pool(self, namespace: str, name: str) -> PoolObject | None:
        """The newest one, from the server itself; None: there is none."""
        return await self._get(pool_path(namespace, name), PoolObject)

    async def put_pool_status(self, meta: Meta, status: Mapping[str, Any]) -> PoolObject:
        """Compare-and-swap on the version in ``meta``. Raises `Conflict` when that is not the newest any more, and
        `NotFound`."""
        body = {
            "apiVersion": API_VERSION,
            "kind": "WorkerPool",
            "metadata": _identity(meta),
            "status": status,
        }
        reply = await self.transport.call(
            "PUT", f"{pool_path(meta.namespace, meta.name)}/status", body=body, timeout_s=CALL_TIMEOUT_S
        )
        return _decode(reply.body, PoolObject)

    async def patch_pool(self, meta: Meta, metadata: Mapping[str, Any]) -> PoolObject:
        """Changes metadata of the version in ``meta``. Raises `Conflict`, `NotFound`."""
        return await self._patch(pool_path(meta.namespace, meta.name), meta, metadata, PoolObject)

    # --- pods ---

    async def create_pod(self, namespace: str, pod: Mapping[str, Any]) -> PodObject:
        """Raises `AlreadyExists` when the name is taken, and what the server refuses it with."""
        reply = await self.transport.call("POST", pods_path(namespace), body=pod, timeout_s=CALL_TIMEOUT_S)
        return _decode(reply.body, PodObject)

    async def get_pod(self, namespace: str, name: str) -> PodObject | None:
        """The newest one, from the server itself; None: there is none."""
        return await self._get(f"{pods_path(namespace)}/{name}", PodObject)

    async def list_pods(self, namespace: str, selector: str = "") -> list[PodObject]:
        """All there are, from the server itself. ``selector``: by label."""
        query = {"labelSelector": selector} if selector else {}
        return (await self.list(pods_path(namespace), PodObject, query)).items

    async def delete_pod(self, namespace: str, name: str, uid: str) -> PodObject | None:
        """Deletes this pod and no other of its name. The pod as it is then, if the server says so.

        Raises:
            Conflict: there is another one.
            NotFound: there is none.
        """
        reply = await self.transport.call(
            "DELETE",
            f"{pods_path(namespace)}/{name}",
            body={"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}},
            timeout_s=CALL_TIMEOUT_S,
        )
        told = msgspec.json.decode(reply.body)
        return msgspec.convert(told, PodObject) if isinstance(told, dict) and told.get("kind") == "Pod" else None

    async def patch_pod(self, meta: Meta, metadata: Mapping[str, Any]) -> PodObject:
        """Changes metadata of the version in ``meta``. Raises `Conflict`, `NotFound`."""
        return await self._patch(f"{pods_path(meta.namespace)}/{meta.name}", meta, metadata, PodObject)

    # --- others ---

    async def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        await self.transport.call(
            "POST", f"/api/v1/namespaces/{namespace}/events", body=event, timeout_s=CALL_TIMEOUT_S
        )

    async def get_raw(self, path: str) -> dict[str, Any] | None:
        return await self._get(path, dict[str, Any])

    async def send_raw(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = await self.transport.call(method, path, body=body, timeout_s=CALL_TIMEOUT_S)
        return _decode(reply.body, dict[str, Any])

    async def patch_metadata(self, path: str, meta: Meta, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Changes metadata of the version in ``meta``. Raises `Conflict`, `NotFound`."""
        return await self._patch(path, meta, metadata, dict[str, Any])

    async def list(self, path: str, item: type[T], query: Mapping[str, str]) -> Listed[T]:
        """Everything, as of one version: without ``resourceVersion``, so that the server itself answers and not what it
        has in memory. A list that takes so long that its version is not kept raises `FailedPrecondition` (reason
        ``EXPIRED``)."""
        items: list[T] = []
        asked = {**query, "limit": str(PAGE)}
        while True:
            reply = await self.transport.call("GET", path, query=asked, timeout_s=LIST_TIMEOUT_S)
            page = _decode(reply.body, _page(item))
            items += page.items
            if not page.metadata.cont:
                return Listed(items, page.metadata.resourceVersion)
            asked["continue"] = page.metadata.cont

    @contextlib.asynccontextmanager
    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterable[bytes]]:
        async with self.transport.lines(path, query) as lines:
            yield lines

    # --- inside ---

    async def _get(self, path: str, kind: type[T]) -> T | None:
        try:
            reply = await self.transport.call("GET", path, timeout_s=CALL_TIMEOUT_S)
        except NotFound:
            return None
        return _decode(reply.body, kind)

    async def _patch(self, path: str, meta: Meta, metadata: Mapping[str, Any], kind: type[T]) -> T:
        body = {"metadata": {**metadata, "uid": meta.uid, "resourceVersion": meta.resourceVersion}}
        reply = await self.transport.call("PATCH", path, body=body, content_type=MERGE_PATCH, timeout_s=CALL_TIMEOUT_S)
        return _decode(reply.body, kind)


def pools_path(namespace: str = "") -> str:
    """Of one namespace, or of all."""
    return (
        f"/apis/{API_VERSION}/namespaces/{namespace}/workerpools" if namespace else f"/apis/{API_VERSION}/workerpools"
    )


def pool_path(namespace: str, name: str) -> str:
    return f"{pools_path(namespace)}/{name}"


def pods_path(namespace: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"


def _identity(meta: Meta) -> dict[str, str]:
    return {
        "name": meta.name,
        "namespace": meta.namespace,
        "uid": meta.uid,
        "resourceVersion": meta.resourceVersion,
    }


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Unavailable(f"the API server's answer can't be read: {error}; is it one?") from error


_PAGES: dict[Any, Any] = {}


def _page(item: Any) -> Any:
    if item not in _PAGES:
        fields = [("items", list[item]), ("metadata", _ListMeta)]
        _PAGES[item] = msgspec.defstruct(f"Page{len(_PAGES)}", fields, frozen=True)
    return _PAGES[item]
