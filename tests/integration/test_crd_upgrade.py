"""Objects of the last release under the CustomResourceDefinitions of this one: applied by kubectl, on the server's
side, as docs/kubernetes.md says."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from install_kit import ROOT
from kube_kit import Kubectl

from greenroom.operator.crds import definitions
from greenroom.testing.fake_kube.http import FakeKube

LAST = max((ROOT / "tests" / "data").glob("crds-*.yaml"))
APPLY = ("apply", "--server-side", "-f")

#: As much as an object of that release may say.
OBJECTS: dict[str, dict[str, Any]] = {
    "WorkerPool": {
        "replicas": 3,
        "slots": 8,
        "backend": "process",
        "minReplicas": 1,
        "maxReplicas": 5,
        "minFree": 2,
        "scaleDown": "named",
        "victims": ["a", "b"],
        "maxSurge": 1,
        "grace": "5m",
        "managedBy": "somebody",
        "worker": {
            "image": "x:1",
            "cpu": "500m",
            "memory": "1Gi",
            "nodeSelector": {"a": "b"},
            "annotations": {"c": "d"},
        },
    },
    "ActorTemplate": {
        "image": "registry.example/counter@sha256:" + "0" * 64,
        "command": ["a"],
        "args": ["b"],
        "ports": [8080],
        "readyz": {"path": "/healthz"},
        "idleTimeout": "5m",
        "onCrash": "boot",
    },
    "SandboxConfig": {
        "backend": "gvisor",
        "assets": [{"url": "https://example.org/runsc", "sha256": "0" * 64, "path": "runsc"}],
        "options": {"platform": "systrap"},
    },
}
PLURALS = {"WorkerPool": "workerpools", "ActorTemplate": "actortemplates", "SandboxConfig": "sandboxconfigs"}


@pytest.fixture
async def kubectl(tmp_path: Path) -> AsyncIterator[Kubectl]:
    """At a cluster with the last release's definitions, and an object of each kind with a status."""
    async with FakeKube() as kube:
        found = Kubectl(tmp_path, kube.kubeconfig(tmp_path / "config"))
        await found(*APPLY, str(LAST))
        for kind, spec in OBJECTS.items():
            head = {"apiVersion": "greenroom.dev/v1alpha1", "kind": kind, "metadata": {"name": "one"}}
            await found("create", "-f", "-", stdin=yaml.safe_dump({**head, "spec": spec}))
            status = {"status": {"observedGeneration": 1, "conditions": [{"type": "Ready", "status": "True"}]}}
            await found("patch", kind, "one", "--subresource=status", "--type=merge", "-p", json.dumps(status))
        yield found


async def get(kubectl: Kubectl, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await kubectl("get", kind, "one", "-o", "json"))
    return found


@pytest.mark.parametrize("kind", OBJECTS)
async def test_an_object_is_as_it_was_and_can_be_changed(kubectl: Kubectl, kind: str) -> None:
    before = await get(kubectl, kind)
    await kubectl(*APPLY, str(ROOT / "deploy" / "crds.yaml"))
    after = await get(kubectl, kind)
    assert after["metadata"]["uid"] == before["metadata"]["uid"] and after["status"] == before["status"]
    assert after["spec"] == before["spec"]
    await kubectl("label", kind, "one", "touched=yes")
    written = await get(kubectl, kind)
    # What is new has its default then; what was there stays.
    assert _within(before["spec"], written["spec"]), (before["spec"], written["spec"])
    assert written["status"] == before["status"]
    definition = json.loads(await kubectl("get", "crd", f"{PLURALS[kind]}.greenroom.dev", "-o", "json"))
    served = {v["name"] for v in definition["spec"]["versions"] if v["served"]}
    assert set(definition["status"]["storedVersions"]) <= served


async def test_a_version_that_objects_are_stored_in_cannot_go(kubectl: Kubectl) -> None:
    """From v1alpha1 to v1beta1, as docs/kubernetes.md has it: added, stored, everything written again, and only then
    the old one leaves."""
    old = next(crd for crd in definitions() if crd["spec"]["names"]["kind"] == "WorkerPool")
    both, new = copy.deepcopy(old), copy.deepcopy(old)
    beta = {**copy.deepcopy(old["spec"]["versions"][0]), "name": "v1beta1"}
    both["spec"]["versions"] = [{**old["spec"]["versions"][0], "storage": False}, beta]
    new["spec"]["versions"] = [beta]
    await kubectl(
        *APPLY,
        "-",
        stdin=yaml.safe_dump(both),
    )
    refused = await kubectl(*APPLY, "-", stdin=yaml.safe_dump(new), fails=True)
    assert "storedVersions" in refused and "v1alpha1" in refused
    before = await get(kubectl, "workerpools.v1alpha1.greenroom.dev")
    assert _within(before["spec"], (await get(kubectl, "workerpools.v1beta1.greenroom.dev"))["spec"])

    await kubectl("annotate", "workerpools.v1beta1.greenroom.dev", "--all", "greenroom.dev/stored=v1beta1")
    stored = json.dumps({"status": {"storedVersions": ["v1beta1"]}})
    crd = "crd/workerpools.greenroom.dev"
    await kubectl("patch", crd, "--subresource=status", "--type=merge", "-p", stored)
    await kubectl(*APPLY, "-", stdin=yaml.safe_dump(new))
    assert _within(before["spec"], (await get(kubectl, "workerpools.v1beta1.greenroom.dev"))["spec"])


def _within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and _within(value, whole[name]) for name, value in part.items())
    return bool(part == whole)
