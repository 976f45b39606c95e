"""Who may do what: Roles and ClusterRoles, in front of the API. Notes which of their rights were used.

Source: Kubernetes documentation, "Using RBAC Authorization" (rules, resource names, subresources) and "Authorization
Overview" (verbs of requests).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from greenroom.testing.fake_kube.api import Handler, Request, Response
from greenroom.testing.fake_kube.errors import KubeError

_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]+))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


@dataclass(frozen=True, order=True)
class Right:
    """``resource``: with its subresource, as ``pods/portforward``. ``namespace``: "" for the whole cluster. ``name``:
    the only one that it is for; "" for any."""

    namespace: str
    group: str
    resource: str
    verb: str
    name: str = ""

    def covers(self, asked: Right) -> bool:
        return (
            self.namespace in ("", asked.namespace)
            and (self.group, self.resource, self.verb) == (asked.group, asked.resource, asked.verb)
            and self.name in ("", asked.name)
        )


def rights(roles: Iterable[Mapping[str, Any]]) -> set[Right]:
    """All that the rules of these Roles and ClusterRoles give. Asterisks are refused: nobody needs everything."""
    found = set()
    for role in roles:
        namespace = role["metadata"]["namespace"] if role["kind"] == "Role" else ""
        for rule in role.get("rules") or ():
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    for verb in rule["verbs"]:
                        assert "*" not in (group, resource, verb), (
                            f"{role['metadata']['name']} gives everything: {rule}"
                        )
                        for name in rule.get("resourceNames") or ("",):
                            found.add(Right(namespace, group, resource, verb, name))
    return found


def asked(request: Request) -> Right | None:
    """The right that a request needs; None for what everybody may ask, as which kinds there are."""
    target = _PATH.fullmatch(request.path.rstrip("/"))
    if target is None:
        return None
    verb = _VERBS.get(request.method, "")
    if request.method == "GET":
        watched = request.query.get("watch") in ("1", "true")
        verb = "watch" if watched else "get" if target["name"] else "list"
    elif request.method == "DELETE":
        verb = "delete" if target["name"] else "deletecollection"
    resource = target["resource"] + (f"/{target['sub']}" if target["sub"] else "")
    return Right(target["namespace"] or "", target["group"] or "", resource, verb, target["name"] or "")


@dataclass
class Guard:
    """A `Handler` that lets through what ``given`` covers.

    Args:
        agent: only requests with a User-Agent that begins so are guarded, when others use the same server.

    Attributes:
        used: those of ``given`` that were needed.
        refused: what was asked for and not given.
    """

    inner: Handler
    given: set[Right]
    user: str = "system:serviceaccount:greenroom:greenroom-operator"
    used: set[Right] = field(default_factory=set)
    refused: list[Right] = field(default_factory=list)
    agent: str = ""

    async def handle(self, request: Request) -> Response:
        right = asked(request) if request.client.startswith(self.agent) else None
        if right is not None and (error := self.check(right)) is not None:
            return Response(error.code, msgspec.json.encode(error.status()))
        return await self.inner(request)

    def check(self, right: Right) -> KubeError | None:
        covering = [one for one in self.given if one.covers(right)]
        if covering:
            self.used |= set(covering)
            return None
        self.refused.append(right)
        where = f'in the namespace "{right.namespace}"' if right.namespace else "at the cluster scope"
        named = f' "{right.name}"' if right.name else ""
        plural = right.resource + (f".{right.group}" if right.group else "")
        message = f'{plural}{named} is forbidden: User "{self.user}" cannot {right.verb} resource "{right.resource}" '
        return KubeError(403, "Forbidden", f'{message}in API group "{right.group}" {where}')
