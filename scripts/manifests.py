"""Writes deploy/install.yaml, what `kubectl apply` installs Greenroom with, from the Helm chart. No secret is in it:
its head says which to make. The same chart gives the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "greenroom"
NAMESPACE = "greenroom"
#: Secrets that are there already, so that none is made. (The chart's own would be another one with each rendering.)
VALUES: dict[str, Any] = {
    "store": {"existingSecret": "greenroom-store"},
    "snapshots": {"credentialsSecret": "greenroom-snapshots"},
    "tls": {"existingSecret": "greenroom-tls"},
    "tokens": {"existingSecret": "greenroom-tokens"},
}
#: What says that Helm looks after an object, which here it does not.
HELMS_LABELS = ("app.kubernetes.io/managed-by", "app.kubernetes.io/instance")
HELMS_ANNOTATION = "helm.sh/resource-policy"
#: As they have to come into being.
ORDER = (
    "Namespace",
    "CustomResourceDefinition",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "Service",
    "Deployment",
    "PodDisruptionBudget",
)

HEAD = """\
# Greenroom in namespace greenroom. Made by scripts/manifests.py from deploy/helm/greenroom; don't edit.
#
# It runs when four secrets are there, none of which is in this file (docs/kubernetes.md has the commands):
#   greenroom-store      url: postgresql://..., and snapshots: s3://BUCKET/PREFIX
#   greenroom-snapshots  AWS_ACCESS_KEY_ID, ... of that bucket; empty where the service accounts bring rights along
#   greenroom-tls        tls.crt, tls.key, ca.crt
#   greenroom-tokens     agents, api
#
#   kubectl apply --server-side -f install.yaml
"""


class _Plain(yaml.SafeDumper):
    """Without anchors: what is the same in two places is there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def namespace() -> dict[str, Any]:
    """Worker pods make sandboxes, for which they need rights in the kernel that no lower level allows. Who may make
    pods in this namespace may have those too."""
    labels = {"app.kubernetes.io/name": "greenroom", "pod-security.kubernetes.io/enforce": "privileged"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    """All that the chart makes of these values, by kind and name."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="greenroom", namespace=NAMESPACE)
    found = [
        document
        for path, text in rendered.items()
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return sorted(found, key=lambda o: (o["kind"], o["metadata"]["name"]))


def render() -> str:
    found = [namespace(), *map(_without_helm, objects(VALUES))]
    found.sort(key=lambda o: ORDER.index(o["kind"]))
    return HEAD + yaml.dump_all(
        found, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120, explicit_start=True
    )


def _without_helm(obj: Any) -> Any:
    if isinstance(obj, list):
        return [_without_helm(item) for item in obj]
    if not isinstance(obj, dict):
        return obj
    kept = {name: _without_helm(value) for name, value in obj.items() if name not in (*HELMS_LABELS, HELMS_ANNOTATION)}
    if kept.get("annotations") == {} and obj["annotations"]:
        del kept["annotations"]
    return kept


if __name__ == "__main__":
    target = ROOT / "deploy" / "install.yaml"
    target.write_text(render())
    print(target)
