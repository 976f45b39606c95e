"""Kinds that the server knows: those built in, and those that CustomResourceDefinitions add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VERBS = ("create", "delete", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. ``path``: as in ``additionalPrinterColumns``, for example ``.status.replicas``."""

    name: str
    type: str
    path: str
    description: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Scale:
    spec_path: str
    status_path: str
    selector_path: str = ""


@dataclass(frozen=True)
class Resource:
    """One kind in one version.

    Attributes:
        status: it has the status subresource: status is written through that alone.
        scale: paths of the scale subresource; None: it has none.
        schema: structural schema (OpenAPI v3) of the whole object; None takes everything.
    """

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    singular: str = ""
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: Scale | None = None
    schema: dict[str, Any] | None = None
    columns: tuple[Column, ...] = ()
    custom: bool = False

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> tuple[str, str]:
        """Objects of all versions of a kind are the same objects."""
        return self.group, self.plural


_POD_COLUMNS = (
    Column("Status", "string", ".status.phase"),
    Column("Node", "string", ".spec.nodeName", priority=1),
)

CRD = Resource(
    "apiextensions.k8s.io",
    "v1",
    "customresourcedefinitions",
    "CustomResourceDefinition",
    namespaced=False,
    short_names=("crd", "crds"),
    status=True,
)

BUILT_IN = (
    Resource("", "v1", "namespaces", "Namespace", namespaced=False, short_names=("ns",), status=True),
    Resource("", "v1", "pods", "Pod", short_names=("po",), status=True, columns=_POD_COLUMNS, categories=("all",)),
    Resource("", "v1", "events", "Event", short_names=("ev",)),
    Resource("", "v1", "configmaps", "ConfigMap", short_names=("cm",)),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "services", "Service", short_names=("svc",), status=True, categories=("all",)),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", short_names=("sa",)),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource("apps", "v1", "deployments", "Deployment", short_names=("deploy",), status=True, categories=("all",)),
    Resource("apps", "v1", "statefulsets", "StatefulSet", short_names=("sts",), status=True, categories=("all",)),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", short_names=("netpol",)),
    Resource("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False),
    Resource("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", short_names=("pdb",), status=True),
    CRD,
)


@dataclass
class Registry:
    """What is served now."""

    found: dict[tuple[str, str, str], Resource] = field(
        default_factory=lambda: {(r.group, r.version, r.plural): r for r in BUILT_IN}
    )

    def get(self, group: str, version: str, plural: str) -> Resource | None:
        return self.found.get((group, version, plural))

    def of_kind(self, api_version: str, kind: str) -> Resource | None:
        return next((r for r in self.found.values() if r.api_version == api_version and r.kind == kind), None)

    def groups(self) -> dict[str, list[str]]:
        """Versions by group."""
        found: dict[str, list[str]] = {}
        for resource in self.found.values():
            versions = found.setdefault(resource.group, [])
            if resource.version not in versions:
                versions.append(resource.version)
        return found

    def of_version(self, group: str, version: str) -> list[Resource]:
        return [r for r in self.found.values() if (r.group, r.version) == (group, version)]

    def define(self, crd: dict[str, Any]) -> None:
        """Serves what a CustomResourceDefinition says."""
        spec = crd["spec"]
        self.undefine(crd)
        for version in spec["versions"]:
            if version.get("served"):
                resource = _custom(spec, version)
                self.found[resource.group, resource.version, resource.plural] = resource

    def undefine(self, crd: dict[str, Any]) -> None:
        spec = crd["spec"]
        group, plural = spec["group"], spec["names"]["plural"]
        self.found = {k: r for k, r in self.found.items() if r.key != (group, plural)}


def _custom(spec: dict[str, Any], version: dict[str, Any]) -> Resource:
    names = spec["names"]
    subresources = version.get("subresources") or {}
    scale = subresources.get("scale")
    return Resource(
        group=spec["group"],
        version=version["name"],
        plural=names["plural"],
        kind=names["kind"],
        namespaced=spec["scope"] == "Namespaced",
        singular=names.get("singular", names["kind"].lower()),
        short_names=tuple(names.get("shortNames", ())),
        categories=tuple(names.get("categories", ())),
        status="status" in subresources,
        scale=None
        if scale is None
        else Scale(scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath", "")),
        schema=(version.get("schema") or {}).get("openAPIV3Schema"),
        columns=tuple(
            Column(c["name"], c["type"], c["jsonPath"], c.get("description", ""), c.get("priority", 0))
            for c in version.get("additionalPrinterColumns", ())
        ),
        custom=True,
    )
