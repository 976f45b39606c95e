"""Requests: which verb on which object, and how the answer looks. No sockets here (see `http`).

Source: Kubernetes documentation, "Kubernetes API Concepts" (verbs, resource versions, watches, tables) and "Server-Side
Apply".
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import yaml

from greenroom.testing.fake_kube import discovery, patches, protobuf, selectors, tables
from greenroom.testing.fake_kube.errors import KubeError, bad_request, not_found
from greenroom.testing.fake_kube.objects import Caller, Object, Objects, scale_object
from greenroom.testing.fake_kube.resources import Resource
from greenroom.testing.fake_kube.schema import prune
from greenroom.testing.fake_kube.views import View

#: As a real server: a watch without ``timeoutSeconds`` ends after this long, and bookmarks come about every minute.
WATCH_S = 1800.0
#: Lists whose rest is kept for those that read them in pieces; that of an older one has expired.
KEPT_PAGES = 16
BOOKMARK_EVERY_S = 60.0


@dataclass(frozen=True)
class Request:
    """``client``: who sent it, as the log has it; ``sent_at``: by the server's clock, when it was not just now."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client: str = "test"
    sent_at: float | None = None


@dataclass(frozen=True)
class Response:
    """Either a body, or a stream of pieces of one (a watch)."""

    status: int
    body: bytes = b""
    stream: AsyncIterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


#: What answers requests: the API, or an adversary in front of it.
Handler = Callable[[Request], Awaitable[Response]]

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|scale|eviction|finalize|portforward))?"
)


@dataclass
class Api:
    """The server's insides. ``view``: from where clients are served that are not given another one (`view_of`)."""

    objects: Objects = field(default_factory=Objects)
    view: View = None  # type: ignore[assignment]
    view_of: Callable[[str], View] | None = None
    bookmark_every_s: float = BOOKMARK_EVERY_S
    #: What is left of lists that are read in pieces, by token, and of which version it is.
    _pages: OrderedDict[str, tuple[list[Object], int]] = field(default_factory=OrderedDict)
    _kept: int = 0

    def __post_init__(self) -> None:
        if self.view is None:
            self.view = View(self.objects)

    async def handle(self, request: Request) -> Response:
        try:
            return await self._handle(request)
        except KubeError as error:
            headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
            return Response(error.code, msgspec.json.encode(error.status()), headers=headers)

    async def _handle(self, request: Request) -> Response:
        found = discovery.answer(self.objects.registry, request.path)
        if found is not None:
            return _json(200, found)
        if request.path in ("/healthz", "/readyz", "/livez"):
            return Response(200, b"ok")
        target = self._target(request.path)
        match request.method, bool(target.name):
            case "GET", True if target.sub != "scale" and request.query.get("watch") not in ("1", "true"):
                return self._shown(request, target, self._get(request, target))
            case "GET", True if target.sub == "scale":
                obj = self.objects.get(target.resource, target.namespace, target.name)
                return _json(200, self.objects.scale_of(target.resource, obj))
            case "GET", _:
                return await self._collection(request, target)
            case "POST", _:
                return self._post(request, target)
            case "PUT", True:
                body = _body(request)
                return self._written(request, target, body)
            case "PATCH", True:
                return self._patch(request, target)
            case "DELETE", True:
                return self._delete(request, target)
            case "DELETE", False:
                return self._delete_collection(request, target)
        raise KubeError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _target(self, path: str) -> _Target:
        found = _PATH.fullmatch(path.rstrip("/"))
        if found is None:
            raise KubeError(404, "NotFound", "the server could not find the requested resource")
        group, version = found["group"] or "", found["version"] or found["core"]
        resource = self.objects.registry.get(group, version, found["plural"])
        if resource is None:
            raise KubeError(404, "NotFound", "the server could not find the requested resource")
        sub = found["sub"] or ""
        if (sub == "status" and not resource.status) or (sub == "scale" and resource.scale is None):
            raise KubeError(404, "NotFound", "the server could not find the requested resource")
        return _Target(resource, found["namespace"] or "", found["name"] or "", sub)

    def _view(self, request: Request) -> View:
        return self.view_of(request.client) if self.view_of is not None else self.view

    # --- reading ---

    def _get(self, request: Request, target: _Target) -> Object:
        if not request.query.get("resourceVersion"):
            return self.objects.get(target.resource, target.namespace, target.name)  # the newest, from the log itself
        found = self._view(request).state.get(target.resource.key, {}).get((target.namespace, target.name))
        if found is None:
            raise not_found(target.resource.plural, target.resource.group, target.name)
        return found

    async def _collection(self, request: Request, target: _Target) -> Response:
        matches = _selection(request, target.name)
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request, target, matches)
        wanted = request.query.get("resourceVersion", "")
        if wanted in ("",):  # the newest
            state, rv = self.objects.state, self.objects.rv
        else:
            view = self._view(request)
            await view.reach(_version(wanted))
            state, rv = view.state, view.rv
        if token := request.query.get("continue"):
            found, rv = self._rest(token)
        else:
            found = [
                obj
                for (namespace, _), obj in sorted(state.get(target.resource.key, {}).items())
                if (not target.namespace or namespace == target.namespace) and matches(obj)
            ]
        metadata: dict[str, Any] = {"resourceVersion": str(rv)}
        limit = _version(request.query.get("limit") or "0")
        if limit and len(found) > limit:
            metadata |= {"continue": self._keep(found[limit:], rv), "remainingItemCount": len(found) - limit}
            found = found[:limit]
        if tables.wanted(request.headers):
            return _json(200, tables.table(target.resource, found, metadata, self.objects.clock()))
        kind = f"{target.resource.kind}List"
        return _json(
            200, {"kind": kind, "apiVersion": target.resource.api_version, "metadata": metadata, "items": found}
        )

    def _keep(self, rest: list[Object], rv: int) -> str:
        """The token that the rest of a list is asked for with."""
        self._pages[f"page-{rv}-{len(rest)}-{self._kept}"] = rest, rv
        self._kept += 1
        while len(self._pages) > KEPT_PAGES:
            self._pages.popitem(last=False)
        return next(reversed(self._pages))

    def _rest(self, token: str) -> tuple[list[Object], int]:
        if token not in self._pages:
            message = "The provided continue parameter is too old to display a consistent list result."
            raise KubeError(410, "Expired", message)
        return self._pages[token]

    async def _watch(self, request: Request, target: _Target, matches: selectors.Test) -> Response:
        view = self._view(request)
        wanted = request.query.get("resourceVersion", "")
        initial = request.query.get("sendInitialEvents") == "true"
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        since = None if wanted in ("", "0") else _version(wanted)
        if initial:
            # Consistent, as a list without a version is: it waits for the view.
            await view.reach(self.objects.rv if since is None and not wanted else since or 0)
        watch = view.watch(target.resource, target.namespace, matches, since, initial=initial)
        if initial and bookmarks:
            watch.bookmark(initial_end=True)
        timeout_s = float(request.query.get("timeoutSeconds") or WATCH_S)
        as_table = tables.wanted(request.headers)

        async def pieces() -> AsyncIterator[bytes]:
            try:
                async for events in watch.events(timeout_s, self.bookmark_every_s if bookmarks else 0.0):
                    for event in events:
                        if as_table and event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                            rows = tables.table(target.resource, [event["object"]], {}, self.objects.clock())
                            event = {**event, "object": rows}
                        yield msgspec.json.encode(event) + b"\n"
            finally:
                watch.close()

        return Response(200, stream=pieces())

    # --- writing ---

    def _post(self, request: Request, target: _Target) -> Response:
        body = _body(request)
        if target.sub == "eviction":
            options = body.get("deleteOptions") or {}
            uid = (options.get("preconditions") or {}).get("uid", "")
            self.objects.delete(target.resource, target.namespace, target.name, _caller(request), uid=uid)
            return _json(201, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
        if target.name:
            raise KubeError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        self._strict(request, target, body)
        if _dry(request):
            return _json(201, body)
        made = self.objects.create(target.resource, target.namespace, body, _caller(request))
        return self._shown(request, target, made, 201)

    def _written(self, request: Request, target: _Target, body: Object) -> Response:
        self._strict(request, target, body)
        if _dry(request):
            return _json(200, body)
        after = self.objects.update(
            target.resource, target.namespace, target.name, body, _caller(request), subresource=target.sub
        )
        return self._shown(request, target, after)

    def _patch(self, request: Request, target: _Target) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0]
        body = _body(request)
        caller = _caller(request)
        if kind == "application/apply-patch+yaml":
            return self._apply(request, target, body, caller)
        live = self.objects.get(target.resource, target.namespace, target.name)
        if target.sub == "scale":
            live = self.objects.scale_of(target.resource, live)
        match kind:
            case "application/merge-patch+json":
                after = patches.merge(live, body)
            case "application/json-patch+json":
                after = patches.json_patch(live, body)
            case "application/strategic-merge-patch+json" if not target.resource.custom:
                after = patches.strategic(live, body)
            case _:
                message = "the body of the request was in an unknown format - accepted media types include: "
                message += "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
                raise KubeError(415, "UnsupportedMediaType", message)
        given = body.get("metadata", {}).get("resourceVersion") if isinstance(body, dict) else None
        if not given:  # a patch without a version is for whichever version there is
            after = {**after, "metadata": {**after["metadata"], "resourceVersion": ""}}
        self._strict(request, target, after)
        if _dry(request):
            return _json(200, after)
        after = self.objects.update(
            target.resource, target.namespace, target.name, after, caller, subresource=target.sub, verb="patch"
        )
        return self._shown(request, target, after)

    def _apply(self, request: Request, target: _Target, body: Object, caller: Caller) -> Response:
        if not request.query.get("fieldManager"):
            raise bad_request("PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
        force = request.query.get("force") == "true"
        live = self.objects.find(target.resource, target.namespace, target.name)
        if live is None:
            uid = (body.get("metadata") or {}).get("uid")
            if uid:
                raise KubeError(409, "Conflict", f"uid mismatch: the provided object specified uid {uid}, none found")
            # What an applied object owns is known from its birth on.
            body = {**body, "metadata": {**body["metadata"], "name": target.name}}
            made = self.objects.create(target.resource, target.namespace, body, caller)
            live = made
            status = 201
        else:
            status = 200
        after = patches.apply(live, body, caller.manager, force=force)
        after = {**after, "metadata": {**after["metadata"], "resourceVersion": ""}}
        after = self.objects.update(
            target.resource, target.namespace, target.name, after, caller, subresource=target.sub, verb="apply"
        )
        return self._shown(request, target, after, status)

    def _delete(self, request: Request, target: _Target) -> Response:
        options = _body(request) if request.body else {}
        preconditions = options.get("preconditions") or {}
        grace = options.get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
        before = self.objects.get(target.resource, target.namespace, target.name)
        if _dry(request):
            return _json(200, before)
        after = self.objects.delete(
            target.resource,
            target.namespace,
            target.name,
            _caller(request),
            uid=preconditions.get("uid", ""),
            resource_version=preconditions.get("resourceVersion", ""),
            grace_s=None if grace is None else int(grace),
        )
        if self.objects.find(target.resource, target.namespace, target.name) is not None or not target.resource.custom:
            return _json(200, after)
        details = {
            "name": target.name,
            "group": target.resource.group,
            "kind": target.resource.plural,
            "uid": before["metadata"]["uid"],
        }
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return _json(200, status)

    def _delete_collection(self, request: Request, target: _Target) -> Response:
        matches = _selection(request, "")
        for (namespace, name), obj in list(self.objects.state.get(target.resource.key, {}).items()):
            if (not target.namespace or namespace == target.namespace) and matches(obj):
                self.objects.delete(target.resource, namespace, name, _caller(request))
        return _json(200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _strict(self, request: Request, target: _Target, body: Object) -> None:
        """Unknown fields are refused when the client asks for that (``fieldValidation``), and dropped otherwise."""
        if request.query.get("fieldValidation") != "Strict" or target.resource.schema is None or target.sub:
            return
        dropped: list[str] = []
        prune(body, target.resource.schema, "", dropped, root=True)
        if dropped:
            shown = ", ".join(f'unknown field "{name}"' for name in dropped)
            raise bad_request(
                f"{target.resource.kind} in version {target.resource.version!r} cannot be handled: {shown}"
            )

    def _shown(self, request: Request, target: _Target, obj: Object, status: int = 200) -> Response:
        if target.sub == "scale":
            assert target.resource.scale is not None
            obj = scale_object(target.resource.scale, obj)
        elif tables.wanted(request.headers) and request.method == "GET":
            return _json(200, tables.table(target.resource, [obj], {}, self.objects.clock()))
        return _json(status, obj)


@dataclass(frozen=True)
class _Target:
    resource: Resource
    namespace: str
    name: str
    sub: str


def _json(status: int, body: Any) -> Response:
    return Response(status, msgspec.json.encode(body))


def _body(request: Request) -> Any:
    if "protobuf" in request.headers.get("content-type", ""):
        return protobuf.decode(request.body)
    try:
        if "yaml" in request.headers.get("content-type", ""):
            return yaml.safe_load(request.body)
        return msgspec.json.decode(request.body) if request.body else {}
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise bad_request(f"the body can't be read: {error}") from None


def _caller(request: Request) -> Caller:
    agent = request.headers.get("user-agent", "unknown").partition("/")[0]
    return Caller(request.client, request.query.get("fieldManager") or agent, request.sent_at)


def _dry(request: Request) -> bool:
    return "All" in request.query.get("dryRun", "")


def _version(text: str) -> int:
    if not text.isdigit():
        raise bad_request(f"invalid resource version: {text!r}")
    return int(text)


def _selection(request: Request, name: str) -> selectors.Test:
    labels = selectors.labels(request.query.get("labelSelector", ""))
    fields = selectors.fields(request.query.get("fieldSelector", ""))
    return lambda obj: labels(obj) and fields(obj) and (not name or obj["metadata"]["name"] == name)
