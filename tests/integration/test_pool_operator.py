"""The operator over HTTP, with people who use kubectl. Against the fake API server; the same against a real one where
there is one (``KUBEBUILDER_ASSETS``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from install_kit import operator_rights
from kube_kit import Kubectl, real_apiserver, self_signed

from greenroom.core.errors import FailedPrecondition, InvalidArgument, Unavailable
from greenroom.operator import kubeconfig, transport
from greenroom.operator.client import Kube
from greenroom.operator.crds import definitions
from greenroom.operator.operator import Operator
from greenroom.operator.transport import HttpTransport
from greenroom.testing.fake_kube.adversary import CALM, Adversary, Odds
from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.fake_kube.rbac import Guard


def pool(name: str = "default", **spec: Any) -> str:
    metadata = {"name": name}
    return yaml.safe_dump(
        {"apiVersion": "greenroom.dev/v1alpha1", "kind": "WorkerPool", "metadata": metadata, "spec": spec}
    )


@dataclass
class Setting:
    """``run_pods``: whether nodes run what is made."""

    kubectl: Kubectl
    config: Path
    run_pods: bool

    async def pods(self) -> list[dict[str, Any]]:
        found = await self.kubectl("get", "pods", "-o", "json", "-l", "greenroom.dev/pool-uid")
        return list(json.loads(found)["items"])

    async def status(self, name: str = "default") -> dict[str, Any]:
        found = json.loads(await self.kubectl("get", "workerpool", name, "-o", "json"))
        return dict(found.get("status") or {})


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kube_apiserver)])
async def setting(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setting]:
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "fake":
            api = Api()
            guard = Guard(api.handle, operator_rights(""), agent="greenroom-operator")
            server = await stack.enter_async_context(FakeKube(api, handler=guard.handle))
            config = server.kubeconfig(tmp_path / "config")
            await stack.enter_async_context(background(Cluster(server.api.objects).follow()))
        else:
            config = await stack.enter_async_context(real_apiserver(tmp_path))
        kubectl = Kubectl(tmp_path, config)
        await kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(definitions()))
        await kubectl("wait", "--for=condition=Established", "crd/workerpools.greenroom.dev", "--timeout=30s")
        transport = await stack.enter_async_context(HttpTransport(lambda: kubeconfig.load(path=str(config))))
        await stack.enter_async_context(background(Operator(transport, "default", "operator-test").run()))
        yield Setting(kubectl, config, request.param == "fake")
        assert request.param == "real" or not guard.refused, "the chart's role lacks what the operator asks for"


@contextlib.asynccontextmanager
async def background(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.2)


async def test_a_pool_lives_and_ends(setting: Setting) -> None:
    kubectl = setting.kubectl
    await kubectl("apply", "-f", "-", stdin=pool(replicas=2, slots=3, worker={"memory": "1Gi"}))

    async def has(count: int) -> bool:
        return (await setting.status()).get("replicas") == count and len(await setting.pods()) == count

    await until(lambda: has(2))
    if setting.run_pods:
        await kubectl("wait", "--for=condition=Ready", "workerpool/default", "--timeout=30s")
        assert (await kubectl("get", "wp")).splitlines()[1].split()[:6] == ["default", "2", "2", "True", "2", "gvisor"]
    container = (await setting.pods())[0]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert {"name": "GREENROOM_SLOTS", "value": "3"} in container["env"]

    await kubectl("scale", "wp/default", "--replicas=4")
    await until(lambda: has(4))
    await kubectl("scale", "wp/default", "--replicas=1")
    await until(lambda: has(1))
    first = (await setting.pods())[0]["metadata"]["name"]
    await kubectl("delete", "pod", first, "--grace-period=1")
    await until(lambda: has(1))
    assert (await setting.pods())[0]["metadata"]["name"] != first

    await kubectl("delete", "wp", "default", "--timeout=60s")
    assert await setting.pods() == []


async def test_what_happened_is_told(setting: Setting) -> None:
    await setting.kubectl("apply", "-f", "-", stdin=pool(replicas=1))

    async def told() -> bool:
        return "WorkerCreated" in await setting.kubectl("get", "events", "-o", "json")

    await until(told)


async def test_a_spec_that_is_wrong_is_refused_with_its_field(setting: Setting) -> None:
    for spec, field in (({"replicas": -1}, "spec.replicas"), ({"minReplicas": 3, "maxReplicas": 2}, "minReplicas")):
        assert field in await setting.kubectl("apply", "-f", "-", stdin=pool(**spec), fails=True)
    assert "bogus" in await setting.kubectl("apply", "-f", "-", stdin=pool(bogus=1), fails=True)


# --- where the server is ----------------------------------------------------------------------------------


async def test_a_token_that_is_replaced_is_used(tmp_path: Path) -> None:
    certificate, tls = self_signed(tmp_path)
    async with FakeKube(token="old", tls=tls) as server:
        config = server.kubeconfig(tmp_path / "config", certificate=certificate)
        async with HttpTransport(lambda: kubeconfig.load(path=str(config))) as transport:
            kube = Kube(transport)
            assert await kube.get_pod("default", "none") is None
            server._token = "new"
            with pytest.raises(FailedPrecondition):
                await kube.get_pod("default", "none")
            config.write_text(config.read_text().replace("token: old", "token: new"))
            assert await kube.get_pod("default", "none") is None


async def test_a_server_that_is_not_vouched_for_is_not_trusted(tmp_path: Path) -> None:
    _, tls = self_signed(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = self_signed(tmp_path / "other")
    async with FakeKube(tls=tls) as server:
        config = server.kubeconfig(tmp_path / "config", certificate=other)
        async with HttpTransport(lambda: kubeconfig.load(path=str(config))) as transport:
            with pytest.raises(Unavailable, match="does its certificate fit"):
                await Kube(transport).get_pod("default", "none")


async def test_a_certificate_that_is_replaced_is_trusted_when_the_configuration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RENEW_EVERY_S", 0.0)
    old, _ = self_signed(tmp_path)
    (tmp_path / "new").mkdir()
    new, tls = self_signed(tmp_path / "new")
    async with FakeKube(tls=tls) as server:
        config = server.kubeconfig(tmp_path / "config", certificate=old)
        async with HttpTransport(lambda: kubeconfig.load(path=str(config))) as connected:
            kube = Kube(connected)
            with pytest.raises(Unavailable):
                await kube.get_pod("default", "none")
            old.write_text(new.read_text())
            with pytest.raises(Unavailable):  # and then the configuration is read again
                await kube.get_pod("default", "none")
            assert await kube.get_pod("default", "none") is None


async def test_an_answer_that_is_lost_says_nothing() -> None:
    api = Api()
    adversary = Adversary(api, random.Random(1), odds=Odds(reply_lost=1.0))
    async with (
        FakeKube(api, handler=adversary.handle) as server,
        HttpTransport(lambda: kubeconfig.Connection(server.url)) as connected,
    ):
        kube = Kube(connected)
        with pytest.raises(Unavailable):
            await kube.create_pod("default", {"metadata": {"name": "one"}, "spec": {"containers": []}})
        adversary.odds = CALM
        assert await kube.get_pod("default", "one") is not None


async def test_nobody_there(tmp_path: Path) -> None:
    async with FakeKube() as server:
        config = server.kubeconfig(tmp_path / "config")
    async with HttpTransport(lambda: kubeconfig.load(path=str(config))) as transport:
        with pytest.raises(Unavailable, match="did not answer GET"):
            await Kube(transport).get_pod("default", "none")


def test_credentials_of_a_program(tmp_path: Path) -> None:
    program = tmp_path / "plugin"
    program.write_text('#!/bin/sh\necho "{\\"status\\": {\\"token\\": \\"from $WHO\\"}}"\n')
    program.chmod(0o755)
    command = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "./plugin",
        "env": [{"name": "WHO", "value": "it"}],
    }
    config = write(tmp_path, {"exec": command})
    assert kubeconfig.from_files([config]).headers == {"Authorization": "Bearer from it"}
    program.write_text("#!/bin/sh\necho no way >&2; exit 3\n")
    with pytest.raises(FailedPrecondition, match="no way"):
        kubeconfig.from_files([config])


def test_contexts_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    config = write(tmp_path, {"username": "a", "password": "b"})
    assert kubeconfig.from_files([config], "one").namespace == "ns"
    with pytest.raises(InvalidArgument, match="no context 'two'; there are: one"):
        kubeconfig.from_files([config], "two")
    config.write_text("[1")
    with pytest.raises(InvalidArgument, match="can't be read"):
        kubeconfig.from_files([config])


def test_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, _ = self_signed(tmp_path)
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("green")
    (tmp_path / "ca.crt").write_text(certificate.read_text())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    found = kubeconfig.in_cluster(tmp_path)
    assert (found.server, found.namespace) == ("https://[fd00::1]:443", "green")
    (tmp_path / "token").unlink()
    with pytest.raises(FailedPrecondition, match="no service account"):
        kubeconfig.in_cluster(tmp_path)


def write(directory: Path, user: dict[str, Any]) -> Path:
    path = directory / "kubeconfig"
    content = {
        "current-context": "one",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "ns"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path
