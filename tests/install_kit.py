"""The Helm chart and what is made from it, for tests: rendered by Helm's own library."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from greenroom.testing.fake_kube.rbac import Right, rights

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "greenroom"
INSTALL = ROOT / "deploy" / "install.yaml"
NAMESPACE = "greenroom"

#: Each way to install that the values speak of; a name for each.
VALUES: dict[str, dict[str, Any]] = {
    "manifest": {
        "store": {"existingSecret": "greenroom-store"},
        "snapshots": {"credentialsSecret": "greenroom-snapshots"},
        "tls": {"existingSecret": "greenroom-tls"},
        "tokens": {"existingSecret": "greenroom-tokens"},
    },
    "trial": {
        "store": {"bundled": {"enabled": True, "storageClass": "fast"}},
        "snapshots": {"url": "s3://bucket/prefix"},
        "controlPlane": {"replicas": 1},
        "operator": {"replicas": 1},
    },
    "everything": {
        "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": ["pull"],
        "store": {"existingSecret": "db"},
        "snapshots": {"url": "gs://bucket", "credentialsSecret": "bucket"},
        "tls": {"certManager": {"enabled": True, "issuerRef": {"name": "internal", "kind": "ClusterIssuer"}}},
        "controlPlane": {
            "extraArgs": ["--lease-ttl", "20s"],
            "nodeSelector": {"a": "b"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "high",
            "podAnnotations": {"a": "b"},
            "serviceAnnotations": {"a": "b"},
            "serviceAccountAnnotations": {"a": "b"},
        },
        "worker": {"serviceAccountAnnotations": {"a": "b"}},
        "networkPolicies": {
            "gatewayFrom": [{}],
            "apiFrom": [{"namespaceSelector": {}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
            "storeTo": [{"ipBlock": {"cidr": "10.1.0.0/16"}}],
            "insideTo": [{"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 9000}]}],
        },
    },
}


def helm() -> ModuleType:
    """Helm's library, as a module."""
    return pytest.importorskip("helm_python", reason="Helm's library (helm-python-sdk) is there for x86_64 only")  # type: ignore[no-any-return]


def manifests() -> ModuleType:
    """scripts/manifests.py, which is no part of the package."""
    helm()
    spec = importlib.util.spec_from_file_location("manifests", ROOT / "scripts" / "manifests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifests().objects(values)
    return found


def of_kind(found: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    """By name."""
    return {o["metadata"]["name"]: o for o in found if o["kind"] in kinds}


def pod_specs(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: o["spec"]["template"]["spec"] for name, o in of_kind(found, "Deployment", "StatefulSet").items()}


def operator_rights(namespace: str | None = None) -> set[Right]:
    """What the chart's roles give the operator. ``namespace``: as if it were installed there; "" for everywhere."""
    found = objects(VALUES["manifest"])
    bindings = of_kind(found, "RoleBinding", "ClusterRoleBinding").values()
    account = {"kind": "ServiceAccount", "name": "greenroom-operator", "namespace": NAMESPACE}
    names = {(b["roleRef"]["kind"], b["roleRef"]["name"]) for b in bindings if account in b["subjects"]}
    roles = [o for o in found if (o["kind"], o["metadata"]["name"]) in names]
    assert len(roles) == len(names), "a binding names a role that is not there"
    given = rights(roles)
    return {
        replace(right, namespace=namespace) if right.namespace and namespace is not None else right for right in given
    }
