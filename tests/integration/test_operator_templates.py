"""ActorTemplates and SandboxConfigs: custom resources on one side, a real control plane and pods on the other."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from operator_kit import Setting, setting, until

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.errors import NotFound
from greenroom.testing.live import LiveServer


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kube_apiserver)])
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setting]:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    plane = LiveServer(data, backend="sim", workers=1)
    async with setting(tmp_path, plane, real=request.param == "real") as made:
        yield made
    shutil.rmtree(data)


async def conditions(there: Setting, name: str) -> dict[str, str]:
    status = (await there.object("actortemplate", name)).get("status") or {}
    return {c["type"]: c["status"] for c in status.get("conditions") or ()}


async def test_a_template_is_prepared_and_goes_when_its_actors_have(there: Setting) -> None:
    operator = there.operator("first")
    await there.apply("ActorTemplate", "counter", image="none")
    await there.kubectl("wait", "--for=condition=Ready", "actortemplate/counter", "--timeout=60s")
    assert await conditions(there, "counter") == {
        "Accepted": "True",
        "GoldenReady": "True",
        "Ready": "True",
        "Failed": "False",
    }
    found = await there.object("actortemplate", "counter")
    snapshot = there.plane.client.templates.GetTemplate(
        pb.GetTemplateRequest(namespace="default", name="counter")
    ).golden_snapshot
    assert found["status"]["goldenSnapshot"] == snapshot
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 1
    assert "can't change" in await there.kubectl(
        "patch", "at", "counter", "--type=merge", "-p", '{"spec": {"image": "other"}}', fails=True
    )

    # Deleted behind its back, it is made again.
    there.plane.client.templates.DeleteTemplate(pb.DeleteTemplateRequest(namespace="default", name="counter"))

    async def is_anew() -> bool:
        status = (await there.object("actortemplate", "counter"))["status"]
        return (
            status.get("goldenSnapshot") not in ("", None, snapshot)
            and (await conditions(there, "counter"))["Ready"] == "True"
        )

    await until(is_anew)

    there.plane.client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name="one", template="counter"))
    await there.kubectl("delete", "at", "counter", "--wait=false")

    async def is_held() -> bool:
        held = await there.condition("actortemplate", "counter", "Deletable")
        return (held.get("status"), held.get("reason")) == ("False", "ActorsExist") and "one" in held["message"]

    await until(is_held)
    there.plane.client.actors.DeleteActor(pb.ActorRequest(namespace="default", name="one"))
    await there.kubectl("wait", "--for=delete", "actortemplate/counter", "--timeout=60s")
    with pytest.raises(NotFound):
        there.plane.client.templates.GetTemplate(pb.GetTemplateRequest(namespace="default", name="counter"))
    assert operator.process is not None and operator.process.poll() is None


async def test_a_template_that_another_has_the_name_of(there: Setting) -> None:
    there.plane.client.templates.ApplyTemplate(
        pb.ApplyTemplateRequest(namespace="default", name="counter", spec={"image": "mine", "pool": "default"})
    )
    there.operator("first")
    await there.apply("ActorTemplate", "counter", image="other")

    async def is_refused() -> bool:
        accepted = await there.condition("actortemplate", "counter", "Accepted")
        return accepted.get("reason") == "OtherSpec" and "another name" in accepted["message"]

    await until(is_refused)
    # What was not made from it does not go with it.
    await there.kubectl("delete", "at", "counter", "--timeout=60s")
    kept = there.plane.client.templates.GetTemplate(pb.GetTemplateRequest(namespace="default", name="counter"))
    assert kept.spec.image == "mine"


async def test_pods_fetch_what_their_sandboxes_are_run_with(there: Setting) -> None:
    there.operator("first")
    digest = "0" * 64
    assets = [{"url": "https://example.org/runsc", "sha256": digest, "path": "runsc"}]
    await there.apply("SandboxConfig", "pinned", backend="gvisor", assets=assets)
    await there.apply("WorkerPool", "one", replicas=1, backend="gvisor")
    await there.apply("WorkerPool", "two", replicas=1, backend="process")

    async def pod(pool: str) -> dict[str, Any]:
        found = [p for p in await there.pods() if p["metadata"]["labels"]["greenroom.dev/pool"] == pool]
        return dict(found[0]) if found else {}

    async def are_there() -> bool:
        return bool(await pod("one") and await pod("two"))

    await until(are_there)
    (init,) = (await pod("one"))["spec"]["initContainers"]
    told = {entry["name"]: entry.get("value", "") for entry in init["env"]}
    assert json.loads(told["GREENROOM_ASSETS"]) == assets
    path = next(e["value"] for e in (await pod("one"))["spec"]["containers"][0]["env"] if e["name"] == "PATH")
    assert path.startswith(init["args"][-1] + ":")
    assert "initContainers" not in (await pod("two"))["spec"]

    async def pools() -> list[str]:
        return list(((await there.object("sandboxconfig", "pinned")).get("status") or {}).get("pools") or ())

    async def says_which() -> bool:
        return await pools() == ["default/one"]

    await until(says_which)
    assert (await there.condition("sandboxconfig", "pinned", "InUse"))["status"] == "True"

    # Two of a backend, and nobody says which: no pod is made by chance.
    await there.apply("SandboxConfig", "other", backend="gvisor")
    await there.kubectl("scale", "wp/one", "--replicas=2")

    async def is_refused() -> bool:
        failure = await there.condition("workerpool", "one", "ReplicaFailure")
        return failure.get("status") == "True" and "spec.sandboxConfig" in failure["message"]

    await until(is_refused)
    await there.kubectl("patch", "wp", "one", "--type=merge", "-p", '{"spec": {"sandboxConfig": "pinned"}}')

    async def goes_on() -> bool:
        return (await there.object("workerpool", "one"))["status"]["replicas"] == 2 and len(await there.pods()) == 3

    await until(goes_on)
    await there.kubectl("delete", "wp", "one", "two", "--timeout=60s")

    async def is_unused() -> bool:
        return await pools() == []

    await until(is_unused)


async def test_a_pool_without_workers_gets_one_for_its_first_template(there: Setting) -> None:
    """Nobody can make an actor before there is a template, and that is made by a worker."""
    there.operator("first", "--cool-down=0s")
    await there.apply("WorkerPool", "auto", backend="sim")
    await there.apply("ActorTemplate", "counter", image="none", pool="auto")

    async def has_pod() -> bool:
        return len(await there.pods()) == 1

    await until(has_pod)
    await there.kubectl("delete", "at", "counter", "--timeout=60s")

    async def wants_none() -> bool:
        demand = there.plane.client.pools.GetDemand(pb.GetDemandRequest(pool="auto"))
        return demand.waiting == 0

    await until(wants_none)
