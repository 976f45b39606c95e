"""The pod of a worker: what it may do, what it is given, and what it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from greenroom.cli.agent import agent
from greenroom.core.assets import Asset
from greenroom.core.ledger.records import Slot
from greenroom.operator import isolation, worker_pod
from greenroom.operator.installation import Installation
from greenroom.operator.objects import Meta
from greenroom.operator.specs import WorkerPodSpec, WorkerPoolSpec

POOL = Meta(name="default", uid="uid-1", namespace="green")
SLOT = Slot(epoch=2, ordinal=7, term=1)
INSTALLED = Installation(snapshots="s3://bucket/x", pull_secrets=("pull",), snapshots_secret="bucket")


def make(installation: Installation = INSTALLED, assets: tuple[Asset, ...] = (), **spec: Any) -> dict[str, Any]:
    return worker_pod.make(POOL, WorkerPoolSpec(**spec), SLOT, "default-abc-2-7", installation, assets)


def environment(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["spec"]["containers"]
    return {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}


def test_the_agent_is_told_all_that_it_must_know_and_nothing_that_it_does_not_read() -> None:
    told = environment(make())
    read = {v for p in agent.params for v in ([p.envvar] if isinstance(p.envvar, str) else p.envvar or ())}
    assert {name for name in told if name.startswith("GREENROOM_")} <= read | {
        "GREENROOM_POD_NAME",
        "GREENROOM_POD_IP",
    }
    needed = {p.envvar for p in agent.params if p.required}
    assert needed <= told.keys()
    assert told["GREENROOM_SERVE"] == "$(GREENROOM_POD_IP):7435"
    assert told["GREENROOM_CONTROL"] == "greenroom:7434"
    assert (told["GREENROOM_EPOCH"], told["GREENROOM_ORDINAL"], told["GREENROOM_POOL_UID"]) == ("2", "7", "uid-1")
    names = list(told)
    assert names.index("GREENROOM_POD_IP") < names.index("GREENROOM_SERVE")  # else it is not put in


@pytest.mark.parametrize("backend", ["gvisor", "process", "sim", "somebody-elses"])
def test_it_can_do_nothing_to_the_node(backend: str) -> None:
    pod = make(backend=backend)
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
    assert spec["automountServiceAccountToken"] is False
    assert {next(iter(v.keys() - {"name"})) for v in spec["volumes"]} == {"emptyDir", "secret"}
    assert all(v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if "emptyDir" in v)
    assert all(m.get("readOnly") for m in container["volumeMounts"] if m["name"] in ("tls", "token"))
    context = container["securityContext"]
    assert context["privileged"] is False and context["readOnlyRootFilesystem"] is True
    assert context["capabilities"]["drop"] == ["ALL"]
    assert "lifecycle" not in container
    rights = isolation.RIGHTS.get(backend, isolation.UNKNOWN)
    assert context["runAsNonRoot"] is not rights.root
    assert ("SYS_ADMIN" in context["capabilities"].get("add", ())) is context["allowPrivilegeEscalation"]


def test_images_keep_well_below_what_the_volume_may_take() -> None:
    """The kubelet ends a pod that takes more at once, and the node's disk has room long after that."""
    told = environment(make(worker=WorkerPodSpec(storage_bytes=20 << 30)))
    command = agent.make_context("agent", [], resilient_parsing=True)
    high, limit = (
        next(p for p in agent.params if p.name == name).type_cast_value(command, told[f"GREENROOM_{name.upper()}"])
        for name in ("images_high", "images_limit")
    )
    assert (high, limit) == (10 << 30, 15 << 30)


def test_of_the_secrets_it_gets_only_what_is_for_it() -> None:
    volumes = {v["name"]: v for v in make()["spec"]["volumes"]}
    assert volumes["tls"]["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert volumes["token"]["secret"]["items"] == [{"key": "agents", "path": "agents"}]
    bare = make(Installation(tls_secret="", token_secret=""))
    assert [v["name"] for v in bare["spec"]["volumes"]] == ["data"]
    assert not environment(bare).keys() & {"GREENROOM_CA", "GREENROOM_TOKEN_FILE"}


def test_its_end_has_the_time_that_the_pool_gives_it() -> None:
    pod = make(grace_s=90.5)
    assert pod["spec"]["terminationGracePeriodSeconds"] == 91 + worker_pod.KILL_AFTER_S
    assert environment(pod)["GREENROOM_DRAIN_TIMEOUT"] == "90.5"


def test_images_are_the_installations_unless_the_pool_names_one() -> None:
    assert make()["spec"]["containers"][0]["image"] == "greenroom-agent:latest"
    assert make()["spec"]["imagePullSecrets"] == [{"name": "pull"}]
    own = make(worker=WorkerPodSpec(image="mine:1", runtime_class="kata"))
    assert own["spec"]["containers"][0]["image"] == "mine:1"
    assert own["spec"]["runtimeClassName"] == "kata"


def test_assets_are_fetched_before_the_agent_starts_and_come_first_on_its_path() -> None:
    asset = Asset(url="https://example.org/runsc", sha256="0" * 64, path="runsc")
    pod = make(assets=(asset,))
    (init,) = pod["spec"]["initContainers"]
    given = {e["name"]: e["value"] for e in init["env"]}
    assert json.loads(given[worker_pod.ASSETS_VARIABLE]) == [
        {"url": asset.url, "sha256": asset.sha256, "path": asset.path}
    ]
    assert "add" not in init["securityContext"]["capabilities"]
    assert environment(pod)["PATH"].startswith(f"{worker_pod.RUNTIME}:")
    assert "initContainers" not in make()["spec"] and "PATH" not in environment(make())
