"""kubectl, which nobody here wrote, against the fake API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from kube_kit import Kubectl, self_signed

from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.http import FakeKube

WIDGET_SPEC = {
    "type": "object",
    "required": ["replicas"],
    "properties": {
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10},
        "max": {"type": "integer"},
        "size": {"type": "string", "enum": ["small", "large"], "default": "small"},
    },
    "x-kubernetes-validations": [
        {"rule": "!has(self.max) || self.replicas <= self.max", "message": "more than max", "fieldPath": ".replicas"}
    ],
}
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.example.org"},
    "spec": {
        "group": "example.org",
        "scope": "Namespaced",
        "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {
                    "status": {},
                    "scale": {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"},
                },
                "additionalPrinterColumns": [{"name": "Size", "type": "string", "jsonPath": ".spec.size"}],
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": WIDGET_SPEC,
                            "status": {"type": "object", "properties": {"replicas": {"type": "integer"}}},
                        },
                    }
                },
            }
        ],
    },
}


def widget(**spec: object) -> str:
    metadata = {"name": "one"}
    return yaml.safe_dump({"apiVersion": "example.org/v1", "kind": "Widget", "metadata": metadata, "spec": spec})


@pytest.fixture
async def kube() -> AsyncIterator[FakeKube]:
    async with FakeKube() as server:
        nodes = asyncio.create_task(Cluster(server.api.objects).follow())
        yield server
        nodes.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await nodes


@pytest.fixture
def kubectl(kube: FakeKube, tmp_path: Path) -> Kubectl:
    return Kubectl(tmp_path, kube.kubeconfig(tmp_path / "config"))


async def test_defines_a_kind_and_creates_gets_changes_and_deletes_it(kubectl: Kubectl) -> None:
    await kubectl("apply", "-f", "-", stdin=yaml.safe_dump(CRD))
    await kubectl("wait", "--for=condition=Established", "crd/widgets.example.org", "--timeout=10s")
    assert "created" in await kubectl("apply", "-f", "-", stdin=widget(replicas=2, max=3))
    lines = (await kubectl("get", "wd")).splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "AGE"] and lines[1].split()[:2] == ["one", "small"]

    await kubectl("scale", "wd/one", "--replicas=3")
    await kubectl("patch", "wd", "one", "--type=merge", "-p", '{"spec":{"size":"large"}}')
    await kubectl("patch", "wd", "one", "--type=json", "-p", '[{"op":"remove","path":"/spec/max"}]')
    found = json.loads(await kubectl("get", "wd", "one", "-o", "json"))
    assert found["spec"] == {"replicas": 3, "size": "large"} and found["metadata"]["generation"] == 4
    assert "unchanged" not in await kubectl("apply", "-f", "-", stdin=widget(replicas=1, max=3))
    assert "deleted" in await kubectl("delete", "wd", "one")
    assert "NotFound" in await kubectl("get", "wd", "one", fails=True)


async def test_what_the_schema_refuses_names_the_field(kubectl: Kubectl) -> None:
    await kubectl("create", "-f", "-", stdin=yaml.safe_dump(CRD))
    for spec, message in (
        ({"replicas": 11}, "spec.replicas: Invalid value: 11: should be less than or equal to 10"),
        ({"replicas": "two"}, 'spec.replicas: Invalid value: "string": must be of type integer'),
        ({"replicas": 1, "size": "huge"}, 'spec.size: Unsupported value: "huge": supported values: "small", "large"'),
        ({"replicas": 4, "max": 3}, "spec.replicas: Invalid value: more than max"),
        ({"size": "small"}, "spec.replicas: Required value"),
        ({"replicas": 1, "bogus": 1}, 'unknown field "spec.bogus"'),
    ):
        assert message in await kubectl("create", "-f", "-", stdin=widget(**spec), fails=True)


async def test_watches_a_pod_run_and_end(kubectl: Kubectl) -> None:
    await kubectl("run", "one", "--image=none")
    await kubectl("wait", "--for=condition=Ready", "pod/one", "--timeout=10s")
    watching = await kubectl.start(
        "get", "pods", "-w", "-o", "jsonpath={.metadata.name}{' '}{.metadata.labels.x}{'\\n'}"
    )
    assert watching.stdout is not None
    async with asyncio.timeout(60):
        assert (await watching.stdout.readline()).split() == [b"one"]
        await kubectl("label", "pod", "one", "x=y")
        assert (await watching.stdout.readline()).split() == [b"one", b"y"]
    watching.kill()
    await watching.wait()
    assert "deleted" in await kubectl("delete", "pod", "one")  # which waits until it has ended


async def test_applies_on_the_server_and_is_told_of_conflicts(kubectl: Kubectl) -> None:
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": {"a": "1", "b": "2"}}
    apply = ("apply", "--server-side", "-f", "-")
    await kubectl(*apply, stdin=yaml.safe_dump(config))
    config["data"] = {"a": "3"}
    other = (*apply, "--field-manager=other")
    assert 'conflict with "kubectl"' in await kubectl(*other, stdin=yaml.safe_dump(config), fails=True)
    await kubectl(*other, "--force-conflicts", stdin=yaml.safe_dump(config))
    config["data"] = {"b": "2"}
    await kubectl(*apply, stdin=yaml.safe_dump(config))
    assert json.loads(await kubectl("get", "cm", "one", "-o", "json"))["data"] == {"a": "3", "b": "2"}
    config["data"] = {"c": "4"}
    await kubectl(*apply, stdin=yaml.safe_dump(config))
    assert json.loads(await kubectl("get", "cm", "one", "-o", "json"))["data"] == {"a": "3", "c": "4"}


async def test_explains_and_lists_kinds(kubectl: Kubectl) -> None:
    await kubectl("create", "-f", "-", stdin=yaml.safe_dump(CRD))
    assert "replicas" in await kubectl("explain", "widget.spec")
    assert "widgets" in await kubectl("api-resources", "--api-group=example.org")


async def test_tls_and_a_token(tmp_path: Path) -> None:
    certificate, context = self_signed(tmp_path)
    async with FakeKube(token="secret", tls=context) as server:
        config = server.kubeconfig(tmp_path / "config", certificate=certificate)
        kubectl = Kubectl(tmp_path, config)
        await kubectl("get", "pods")
        config.write_text(config.read_text().replace("token: secret", "token: wrong"))
        assert "must be logged in" in await kubectl("get", "pods", fails=True)
