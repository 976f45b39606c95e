"""What a client asks first: which groups, versions and kinds there are, and how they may be patched."""

from __future__ import annotations

from typing import Any

from greenroom.testing.fake_kube.resources import VERBS, Registry, Resource

VERSION = {
    "major": "1",
    "minor": "33",
    "gitVersion": "v1.33.0-greenroom.fake",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2025-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "linux/amd64",
}


def answer(registry: Registry, path: str) -> Any:
    """None: this is not a question about what there is."""
    parts = [part for part in path.split("/") if part]
    match parts:
        case ["version"]:
            return VERSION
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        case ["apis"]:
            groups = [_group(name, versions) for name, versions in registry.groups().items() if name]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        case ["apis", group] if group in registry.groups():
            return {**_group(group, registry.groups()[group]), "kind": "APIGroup", "apiVersion": "v1"}
        case ["api", "v1"]:
            return _resources(registry, "", "v1")
        case ["apis", group, version] if version in registry.groups().get(group, ()):
            return _resources(registry, group, version)
        case ["openapi", "v3"]:
            return {"paths": {_prefix(g, v): _link(g, v) for g, vs in registry.groups().items() for v in vs}}
        case ["openapi", "v3", "api", "v1"]:
            return _openapi(registry, "", "v1")
        case ["openapi", "v3", "apis", group, version]:
            return _openapi(registry, group, version)
    return None


def _prefix(group: str, version: str) -> str:
    return f"apis/{group}/{version}" if group else f"api/{version}"


def _link(group: str, version: str) -> dict[str, str]:
    return {"serverRelativeURL": f"/openapi/v3/{_prefix(group, version)}"}


def _group(name: str, versions: list[str]) -> dict[str, Any]:
    found = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": found, "preferredVersion": found[0]}


def _resources(registry: Registry, group: str, version: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for r in registry.of_version(group, version):
        base = {"kind": r.kind, "namespaced": r.namespaced}
        entry = {**base, "name": r.plural, "singularName": r.singular or r.kind.lower(), "verbs": [*VERBS]}
        found.append({**entry, "shortNames": list(r.short_names), "categories": list(r.categories)})
        if r.status:
            found.append(
                {**base, "name": f"{r.plural}/status", "singularName": "", "verbs": ["get", "patch", "update"]}
            )
        if r.scale is not None:
            scale = {"group": "autoscaling", "version": "v1", "kind": "Scale", "namespaced": r.namespaced}
            found.append(
                {**scale, "name": f"{r.plural}/scale", "singularName": "", "verbs": ["get", "patch", "update"]}
            )
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": found}


def _openapi(registry: Registry, group: str, version: str) -> dict[str, Any]:
    """Enough for kubectl to see that the server validates fields itself, and for ``kubectl explain``."""
    paths, schemas = {}, {}
    for r in registry.of_version(group, version):
        kind = {"group": r.group, "version": r.version, "kind": r.kind}
        where = "/namespaces/{namespace}" if r.namespaced else ""
        parameters = [{"name": n, "in": "query", "schema": {"type": "string"}} for n in ("fieldValidation", "dryRun")]
        verbs = {
            method: {
                "parameters": parameters,
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": kind,
                "responses": {"200": {"description": "OK"}},
            }
            for method, action in (("get", "get"), ("patch", "patch"), ("put", "put"))
        }
        paths[f"/{_prefix(group, version)}{where}/{r.plural}/{{name}}"] = verbs
        schemas[_schema_name(r)] = {**(r.schema or {"type": "object"}), "x-kubernetes-group-version-kind": [kind]}
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _schema_name(resource: Resource) -> str:
    group = ".".join(reversed(resource.group.split("."))) if resource.group else "io.k8s.api.core"
    return f"{group}.{resource.version}.{resource.kind}"
