"""Greenroom on a cluster, all of it but the cluster real: a control plane with TLS and tokens, the operator, agents in
pods that a kubelet runs as processes, actors in sandboxes, and people with kubectl."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import Kit
from kube_kit import self_signed
from operator_kit import OperatorProcess, Setting, setting, until

from greenroom.core.records import ActorState, WorkerState
from greenroom.testing.fake_kube.kubelet import GREENROOM, Kubelet
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer
from greenroom.testing.ports import free_port

pytestmark = pytest.mark.timeout(400)

AGENT_TOKENS = "agent-token-of-tomorrow\nagent-token\n"
API_TOKENS = "api-token\n"


@dataclass
class World:
    setting: Setting
    kit: Kit
    kubelet: Kubelet
    operator: OperatorProcess

    async def workers(self) -> list[str]:
        """Names of those that take actors."""
        found = await asyncio.to_thread(self.kit.workers)
        return [w.name for w in found if w.state is WorkerState.ACTIVE and not w.cordon]

    async def get(self, actor: str) -> dict[str, Any]:
        """One request through the gateway, asked again while the actor's image is still prepared where it wakes."""
        async with asyncio.timeout(120):
            while True:
                answer = await asyncio.to_thread(self.kit.live.request, f"default/{actor}", "/inc")
                if answer.status == 200:
                    return dict(json.loads(answer.body))
                assert answer.status == 503 and b"IMAGE_PREPARING" in answer.body, (answer.status, answer.body)

    def said(self) -> str:
        """For people who look at a failure."""
        return self.operator.log[-3000:] + self.kit.live.log_tail(60)


@pytest.fixture
async def world(tmp_path: Path, counter_image: str) -> AsyncIterator[World]:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    pods = Path(tempfile.mkdtemp(prefix="gk-"))
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    certificate, _ = self_signed(secrets)
    (secrets / "agents").write_text(AGENT_TOKENS)
    (secrets / "api").write_text(API_TOKENS)
    agents, api = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    options = (
        f"--agents={agents}",
        f"--api={api}",
        f"--tls-cert={certificate}",
        f"--tls-key={secrets / 'tls.key'}",
        f"--agent-token-file={secrets / 'agents'}",
        f"--api-token-file={secrets / 'api'}",
        "--rosters",
        # How long a worker whose pod is gone may still come back.
        "--worker-return=5s",
        "--no-workers",
    )
    live = LiveServer(data, backend="process", workers=0, options=options)
    kubelets: list[Kubelet] = []

    def node(api: Any) -> Kubelet:
        kubelets.append(Kubelet(api.objects, directory=pods, images={"greenroom-agent:latest": GREENROOM}))
        return kubelets[0]

    async with setting(tmp_path, live, cluster=node) as made, kubelets[0]:
        await made.kubectl("apply", "-f", "-", stdin=_secrets(certificate))
        operator = OperatorProcess(
            tmp_path,
            "operator",
            made.config,
            api,
            (f"--worker-control={agents}", f"--snapshots={data / 'snapshots'}", "--cool-down=2s"),
            {"GREENROOM_CA": str(certificate), "GREENROOM_TOKEN_FILE": str(secrets / "api")},
        )
        made.operators.append(operator.start())
        world = World(made, Kit(live, counter_image), kubelets[0], operator)
        try:
            yield world
        except BaseException:
            print(world.said())
            raise
    assert list(pods.iterdir()) == []
    assert leftovers(pods) == []
    shutil.rmtree(pods)
    shutil.rmtree(data)


def _secrets(certificate: Path) -> str:
    def secret(name: str, **entries: str) -> dict[str, Any]:
        data = {key.replace("_", "."): base64.b64encode(value.encode()).decode() for key, value in entries.items()}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}

    authority = certificate.read_text()
    return yaml.safe_dump_all(
        [
            secret("greenroom-tls", tls_crt=authority, tls_key="not for workers", ca_crt=authority),
            secret("greenroom-tokens", agents="agent-token\n", api="not for workers"),
        ]
    )


async def test_pools_templates_and_actors_on_a_cluster(world: World) -> None:
    there = world.setting
    await there.apply("WorkerPool", "default", backend="process", slots=2, minReplicas=1, maxReplicas=3, grace="20s")
    await there.apply(
        "ActorTemplate",
        "counter",
        image=world.kit.image,
        readyz={"path": "/healthz"},
        evictable=False,
        idleTimeout="0s",
    )
    await there.kubectl("wait", "--for=condition=Ready", "wp/default", "--timeout=120s")
    await there.kubectl("wait", "--for=condition=Ready", "at/counter", "--timeout=120s")
    assert len(await world.workers()) == 1

    # Actors wake by a request, and more workers come because some wait for a slot.
    names = [f"actor-{n}" for n in range(4)]
    world.kit.create(*names)
    answers = await asyncio.gather(*(world.get(name) for name in names))
    assert [(answer["file"], answer["actor"]) for answer in answers] == [(1, name) for name in names]
    assert all(world.kit.actor(name).state is ActorState.RUNNING for name in names)
    status = (await there.object("workerpool", "default"))["status"]
    assert status["replicas"] >= 2

    # Then nobody is awake any more, and only idle ones go.
    for name in names[1:]:
        await asyncio.to_thread(world.kit.act, "Suspend", name)
    keeper = world.kit.actor(names[0]).worker

    async def has_shrunk() -> bool:
        return [pod["metadata"]["name"] for pod in await there.pods()] == [keeper]

    await until(has_shrunk, 120)
    assert world.kit.actor(names[0]).state is ActorState.RUNNING
    assert (await there.condition("workerpool", "default", "Ready"))["status"] == "True"

    # A pod that is deleted suspends its actors first: what they hold is there on the next worker.
    before = await world.get(names[0])
    await there.kubectl("delete", "pod", keeper, "--wait=false")
    await until(lambda: _is_elsewhere(world, keeper), 120)
    after = await world.get(names[0])
    assert after["file"] == before["file"] + 1

    # All of it goes.
    for name in names:
        await asyncio.to_thread(world.kit.act, "Delete", name)
    await there.kubectl("delete", "at", "counter", "--timeout=120s")
    await there.kubectl("delete", "wp", "default", "--timeout=120s")
    assert await there.pods() == []
    assert not await there.object("pdb", "default")
    assert world.kit.templates() == []
    assert world.kit.pools() == []

    async def nobody_is_left() -> bool:
        return not await asyncio.to_thread(world.kit.workers)

    await until(nobody_is_left, 120)


async def test_a_pod_that_the_ledger_does_not_have_takes_no_actor(world: World) -> None:
    there = world.setting
    await there.apply("WorkerPool", "default", backend="process", slots=1, replicas=1, grace="5s")
    await there.kubectl("wait", "--for=condition=Ready", "wp/default", "--timeout=120s")
    (pod,) = await there.pods()
    mine = pod["metadata"]["name"]
    spec = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
    stranger = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger"}, "spec": spec}
    await there.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(stranger))

    async def is_refused() -> bool:
        return "roster" in world.kubelet.log("stranger")

    await until(is_refused)
    assert await world.workers() == [mine]
    conditions = (await there.object("pod", "stranger"))["status"]["conditions"]
    assert {"type": "Ready", "status": "True"} not in conditions
    await there.kubectl("delete", "pod", "stranger", "--timeout=120s")
    await there.kubectl("delete", "wp", "default", "--timeout=120s")
    assert await there.pods() == []


async def _is_elsewhere(world: World, than: str) -> bool:
    workers = await world.workers()
    return bool(workers) and than not in workers
