"""The CustomResourceDefinitions of each release are still what objects made under them need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_changes import breaking

from greenroom.operator.crds import definitions

RELEASES = sorted((Path(__file__).parents[1] / "data").glob("crds-*.yaml"))


def by_name(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {crd["metadata"]["name"]: crd for crd in found if crd}


@pytest.mark.parametrize("release", RELEASES, ids=[path.stem for path in RELEASES])
def test_what_a_release_took_is_taken(release: Path) -> None:
    old, new = by_name(list(yaml.safe_load_all(release.read_text()))), by_name(definitions())
    assert old.keys() <= new.keys(), "a kind is gone"
    for name, crd in old.items():
        assert breaking(crd, new[name]) == [], name


def test_there_is_a_release_to_compare_with() -> None:
    assert RELEASES


def _spec(crd: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def _require(crd: dict[str, Any]) -> None:
    _spec(crd).setdefault("required", []).append("zone")
    _spec(crd)["properties"]["zone"] = {"type": "string"}


def _drop(crd: dict[str, Any]) -> None:
    del _spec(crd)["properties"]["minFree"]


def _retype(crd: dict[str, Any]) -> None:
    _spec(crd)["properties"]["slots"]["type"] = "string"


def _narrow(crd: dict[str, Any]) -> None:
    _spec(crd)["properties"]["slots"]["maximum"] = 100


def _forbid(crd: dict[str, Any]) -> None:
    _spec(crd)["properties"]["scaleDown"]["enum"] = ["cheapest"]


def _rule(crd: dict[str, Any]) -> None:
    _spec(crd)["x-kubernetes-validations"].append({"rule": "self.slots > 1"})


def _version(crd: dict[str, Any]) -> None:
    crd["spec"]["versions"][0]["name"] = "v1beta1"


def _subresource(crd: dict[str, Any]) -> None:
    del crd["spec"]["versions"][0]["subresources"]["scale"]


def _scope(crd: dict[str, Any]) -> None:
    crd["spec"]["scope"] = "Cluster"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_require, "spec.zone is required now, and has no default"),
        (_drop, "spec.minFree is gone"),
        (_retype, "spec.slots: type was 'integer' and is 'string'"),
        (_narrow, "spec.slots: maximum is lower"),
        (_forbid, "spec.scaleDown: named is not allowed any more"),
        (_rule, "there is a new rule: self.slots > 1"),
        (_version, "version v1alpha1 is not served any more"),
        (_subresource, "subresource scale is gone"),
        (_scope, "spec.scope has changed"),
    ],
)
def test_a_change_that_breaks_objects_is_found(change: Callable[[dict[str, Any]], None], says: str) -> None:
    old = by_name(definitions())["workerpools.greenroom.dev"]
    new = copy.deepcopy(old)
    change(new)
    assert any(says in line for line in breaking(old, new)), breaking(old, new)


def test_a_change_that_breaks_nothing_is_let_through() -> None:
    old = by_name(definitions())["workerpools.greenroom.dev"]
    new = copy.deepcopy(old)
    _spec(new)["properties"]["zone"] = {"type": "string"}
    _spec(new)["properties"]["tier"] = {"type": "string", "default": "plain"}
    _spec(new).setdefault("required", []).append("tier")
    _spec(new)["properties"]["slots"]["maximum"] = 20_000
    _spec(new)["properties"]["scaleDown"]["enum"].append("oldest")
    new["spec"]["versions"].append({**copy.deepcopy(new["spec"]["versions"][0]), "name": "v1beta1", "storage": False})
    assert breaking(old, new) == []
