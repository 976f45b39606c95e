"""The custom resources are what the records say, also to those who read manifests of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from greenroom.cli import manifest
from greenroom.core.errors import InvalidArgument
from greenroom.core.ledger.records import Ledger, Pod, Slot, SlotState, Want
from greenroom.core.records import IMAGE_PORTS, PoolSpec, Record, TemplateSpec
from greenroom.operator import forms, status
from greenroom.operator.crds import definitions, render, schema_of
from greenroom.operator.specs import SandboxConfigSpec, WorkerPoolSpec
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Objects
from greenroom.testing.fake_kube.resources import CRD, Resource

NAMES = {"WorkerPool": "workerpools", "ActorTemplate": "actortemplates", "SandboxConfig": "sandboxconfigs"}


@pytest.fixture(scope="module")
def defined() -> Objects:
    objects = Objects()
    for definition in definitions():
        objects.create(CRD, "", definition)
    return objects


def resource(objects: Objects, kind: str) -> Resource:
    found = objects.registry.of_kind("greenroom.dev/v1alpha1", kind)
    assert found is not None
    return found


def create(objects: Objects, kind: str, spec: Any, name: str = "one") -> dict[str, Any]:
    where = resource(objects, kind)
    namespace = "default" if where.namespaced else ""
    made = objects.create(where, namespace, {"metadata": {"name": name}, "spec": spec})
    objects.delete(where, namespace, name)
    return made


@pytest.mark.parametrize(("cls", "base"), [(PoolSpec, WorkerPoolSpec), (TemplateSpec, TemplateSpec)])
def test_fields_are_called_as_in_a_manifest(cls: type[Record], base: type[Record]) -> None:
    def names(record: type[Record]) -> dict[str, Any]:
        return {
            name: names(column.hint) if isinstance(column.hint, type) and issubclass(column.hint, Record) else None
            for name, column in manifest._schema(record).items()
        }

    def properties(schema: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        found = schema["properties"]
        return {
            n: properties(found[n], inner) if inner is not None else None for n, inner in known.items() if n in found
        }

    assert properties(schema_of(base), names(cls)) == names(cls)


@pytest.mark.parametrize(
    ("kind", "cls", "spec"),
    [
        ("WorkerPool", WorkerPoolSpec, {}),
        ("ActorTemplate", TemplateSpec, {"image": "x"}),
        ("SandboxConfig", SandboxConfigSpec, {"backend": "gvisor"}),
    ],
)
def test_what_is_not_given_is_what_the_record_says(
    defined: Objects, kind: str, cls: type[Record], spec: dict[str, Any]
) -> None:
    shown = create(defined, kind, spec)["spec"]
    assert forms.read(cls, shown) == forms.read(cls, spec)
    scalars = [
        i for i in msgspec.structs.fields(cls) if i.default not in (msgspec.NODEFAULT, None, "", (), {}, IMAGE_PORTS)
    ]
    assert {forms.name_of(i.name, i.type) for i in scalars if not isinstance(i.default, Record)} <= shown.keys()


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        ("WorkerPool", {"replicas": -1}, "spec.replicas"),
        ("WorkerPool", {"replicas": 1001}, "spec.replicas"),
        ("WorkerPool", {"replicas": "3"}, "spec.replicas"),
        ("WorkerPool", {"slots": 0}, "spec.slots"),
        ("WorkerPool", {"backend": "No Name"}, "spec.backend"),
        ("WorkerPool", {"minReplicas": 5, "maxReplicas": 4}, "spec.minReplicas"),
        ("WorkerPool", {"grace": "soon"}, "spec.grace"),
        ("WorkerPool", {"victims": ["a", "a"]}, "spec.victims[1]"),
        ("WorkerPool", {"scaleDown": "random"}, "spec.scaleDown"),
        ("WorkerPool", {"worker": {"memory": "many"}}, "spec.worker.memory"),
        ("ActorTemplate", {}, "spec.image"),
        ("ActorTemplate", {"image": "x", "ports": [0]}, "spec.ports[0]"),
        ("ActorTemplate", {"image": "x", "readyz": {"path": "no slash"}}, "spec.readyz.path"),
        ("ActorTemplate", {"image": "x", "onCrash": "panic"}, "spec.onCrash"),
        ("SandboxConfig", {"backend": "g", "assets": [{"url": "https://x", "sha256": "?", "path": "p"}]}, "sha256"),
        (
            "SandboxConfig",
            {"backend": "g", "assets": [{"url": "https://x", "sha256": "0" * 64, "path": "../p"}]},
            "path",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_field(defined: Objects, kind: str, spec: Any, field: str) -> None:
    with pytest.raises(KubeError, match="Invalid") as refused:
        create(defined, kind, spec)
    assert field in refused.value.details["causes"][0]["field"]


def test_what_is_shipped_is_what_the_records_say() -> None:
    deploy = Path(__file__).parents[2] / "deploy"
    for shipped in (deploy / "crds.yaml", deploy / "helm" / "greenroom" / "files" / "crds.yaml"):
        assert shipped.read_text() == render(), "run make manifests"


def test_a_name_that_makes_no_host_name_is_refused(defined: Objects) -> None:
    with pytest.raises(KubeError, match=r"metadata\.name"):
        create(defined, "WorkerPool", {}, name="a.b")


def test_a_template_and_a_pools_backend_cannot_change(defined: Objects) -> None:
    templates = resource(defined, "ActorTemplate")
    made = defined.create(templates, "default", {"metadata": {"name": "t"}, "spec": {"image": "x"}})
    with pytest.raises(KubeError, match="a template can't change"):
        defined.update(templates, "default", "t", {**made, "spec": {**made["spec"], "image": "y"}})
    labelled = {**made, "metadata": {**made["metadata"], "labels": {"a": "b"}}}
    defined.update(templates, "default", "t", labelled)
    pools = resource(defined, "WorkerPool")
    made = defined.create(pools, "default", {"metadata": {"name": "p"}, "spec": {"replicas": 1}})
    made = defined.update(pools, "default", "p", {**made, "spec": {**made["spec"], "replicas": 2}})
    with pytest.raises(KubeError, match=r"spec\.backend"):
        defined.update(pools, "default", "p", {**made, "spec": {**made["spec"], "backend": "process"}})


def test_no_part_of_a_status_is_dropped_by_its_schema(defined: Objects) -> None:
    """Else it would be written again and again."""
    pools = resource(defined, "WorkerPool")
    made = defined.create(pools, "default", {"metadata": {"name": "s"}, "spec": {}})
    slots = (
        Slot(epoch=1, ordinal=0, term=1, state=SlotState.LIVE, pod_uid="u", settled=True),
        Slot(epoch=1, ordinal=1, term=1, state=SlotState.DOOMED, pod_uid="v", reason="Named", since=5.0),
    )
    ledger = Ledger(pool_uid=made["metadata"]["uid"], term=1, next_ordinal=2, slots=slots)
    shown = [Pod(name="x", uid="u", owner_uid="o", ready=True)]
    body = status.make(
        ledger, Want(replicas=2), shown, {}, generation=1, refusal="no", stale=True, rebuilt="yes", wall=9.0
    )
    written = defined.update(pools, "default", "s", {**made, "status": body}, subresource="status")
    assert written["status"] == body
    again = status.make(
        ledger, Want(replicas=2), shown, body, generation=1, refusal="no", stale=True, rebuilt="", wall=99.0
    )
    assert again == body


def test_a_spec_that_got_past_the_schema_is_refused_with_its_field() -> None:
    for spec, field in (
        ({"grace": 5}, "spec.grace"),
        ({"slots": "many"}, "spec.slots"),
        ({"worker": {"cpu": []}}, "spec.worker.cpu"),
        ({"victims": "a"}, "spec.victims"),
        ([], "spec"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{field}"):
            forms.read(WorkerPoolSpec, spec)
