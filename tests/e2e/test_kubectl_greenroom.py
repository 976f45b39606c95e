"""``kubectl greenroom`` at a real server that only a fake cluster's API server leads to: found by kubectl as its
plugin, with contexts, and with what each missing thing is told as."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import Kit
from shell import Result, template

from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.fake_kube.rbac import Guard, Right
from greenroom.testing.live import LiveServer
from greenroom.testing.ports import free_port

#: Far above what a command takes on a busy machine.
TIMEOUT_S = 60.0
NAMESPACE = "greenroom"
#: What the chart's role greenroom-client gives.
RIGHTS = {
    Right(NAMESPACE, "", "services", "get", "greenroom"),
    Right(NAMESPACE, "", "pods", "list"),
    Right(NAMESPACE, "", "pods/portforward", "get"),
    Right(NAMESPACE, "", "secrets", "get", "greenroom-tokens"),
    Right(NAMESPACE, "", "secrets", "get", "greenroom-tls"),
}


@pytest.fixture(scope="module")
def live(counter_image: str) -> Iterator[Kit]:
    """With the listener of a cluster: TLS, and a token."""
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    self_signed(directory)
    (directory / "tokens").write_text("the-new-one\nthe-old-one\n")
    options = (
        f"--api=127.0.0.1:{free_port()}",
        f"--tls-cert={directory}/tls.crt",
        f"--tls-key={directory}/tls.key",
        f"--api-token-file={directory}/tokens",
    )
    kit = Kit(LiveServer(directory, backend="process", workers=1, slots=2, options=options), counter_image)
    kit.live.start()
    yield kit
    kit.live.stop()
    shutil.rmtree(directory)


def self_signed(directory: Path) -> Path:
    """A certificate for the name that clients know, which is its own authority; the key is beside it."""
    directory.mkdir(exist_ok=True)
    names = "subjectAltName=DNS:greenroom"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=greenroom"]
    files = ["-keyout", str(directory / "tls.key"), "-out", str(directory / "tls.crt")]
    subprocess.run(["openssl", "req", "-x509", "-addext", names, *made, *files], check=True, capture_output=True)
    return directory / "tls.crt"


@dataclass
class Installed:
    """A Greenroom in a cluster, as far as a client sees it."""

    kube: FakeKube
    guard: Guard
    config: Path
    home: Path
    address: tuple[str, int]

    def add(self, plural: str, obj: dict[str, Any], api: str = "v1") -> None:
        resource = self.kube.api.objects.registry.get("", api, plural)
        assert resource is not None
        self.kube.api.objects.create(resource, NAMESPACE if resource.namespaced else "", obj)

    def add_secret(self, name: str, key: str, value: bytes) -> None:
        data = {key: base64.b64encode(value).decode()}
        self.add("secrets", {"metadata": {"name": name}, "data": data})

    def add_pod(self, name: str = "greenroom-0", ready: bool = True) -> None:
        container = {"name": "greenroom", "ports": [{"name": "api", "containerPort": 7433}]}
        labels = {"app.kubernetes.io/component": "control-plane"}
        self.add("pods", {"metadata": {"name": name, "labels": labels}, "spec": {"containers": [container]}})
        objects = self.kube.api.objects
        pods = objects.registry.get("", "v1", "pods")
        assert pods is not None
        pod = objects.get(pods, NAMESPACE, name)
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        waiting = {"state": {"waiting": {"reason": "ImagePullBackOff"}}}
        status = {"phase": "Running" if ready else "Pending", "conditions": conditions}
        status |= {} if ready else {"containerStatuses": [waiting]}
        objects.update(pods, NAMESPACE, name, {**pod, "status": status}, subresource="status")
        self.kube.ports.found[NAMESPACE, name, 7433] = self.address

    async def start(self, *args: str, kubectl: bool = True) -> asyncio.subprocess.Process:
        bin_ = Path(sys.executable).parent
        env = {k: v for k, v in os.environ.items() if not k.startswith(("GREENROOM_", "KUBE"))}
        env |= {"PATH": f"{bin_}:{env['PATH']}", "HOME": str(self.home), "KUBECONFIG": str(self.config)}
        program = ["kubectl", "greenroom"] if kubectl else [str(bin_ / "greenroom")]
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*program, *args, env=env, stdin=pipe, stdout=pipe, stderr=pipe)

    async def __call__(self, *args: str, stdin: str = "", kubectl: bool = True) -> Result:
        process = await self.start(*args, kubectl=kubectl)
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def installed(live: Kit, tmp_path: Path) -> AsyncIterator[Installed]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on PATH")
    api = Api()
    guard = Guard(api.handle, set(RIGHTS), user="somebody")
    async with FakeKube(api, handler=guard.handle, token="secret") as kube:
        config = kube.kubeconfig(tmp_path / "config", namespace="default")
        (listener,) = (option for option in live.live.options if option.startswith("--api="))
        address = ("127.0.0.1", int(listener.rpartition(":")[2]))
        found = Installed(kube, guard, config, tmp_path, address)
        found.add("namespaces", {"metadata": {"name": NAMESPACE}})
        selector = {"app.kubernetes.io/component": "control-plane"}
        ports = [{"name": "api", "port": 7433, "targetPort": "api"}]
        found.add("services", {"metadata": {"name": "greenroom"}, "spec": {"selector": selector, "ports": ports}})
        found.add_secret("greenroom-tokens", "api", (live.live.data_dir / "tokens").read_bytes())
        found.add_secret("greenroom-tls", "ca.crt", (live.live.data_dir / "tls.crt").read_bytes())
        found.add_pod()
        yield found


async def test_kubectl_finds_it_and_every_command_goes_through(installed: Installed, live: Kit) -> None:
    applied = await installed("apply", "-f", "-", stdin=template("counter", live.image))
    assert "template/counter ready" in applied.ok()
    assert (await installed("create", "actor", "a", "-t", "counter")).ok() == "actor/a created\n"
    (await installed("resume", "a")).ok()
    assert live.get("a")["ram"] == 1
    echo = ["python3", "-c", "import sys; sys.stdout.write(sys.stdin.read() * 1000)"]
    text = "x" * 5000
    assert (await installed("exec", "-i", "a", "--", *echo, stdin=text)).ok() == text * 1000
    assert (await installed("exec", "a", "--", "python3", "-c", "raise SystemExit(3)")).code == 3
    assert "a" in (await installed("get", "actors")).ok()
    assert not installed.guard.refused and installed.guard.used == RIGHTS, "the rights that the role gives"

    following = await installed.start("logs", "-f", "a")
    assert following.stdout is not None
    live.get("a", "/inc")
    async with asyncio.timeout(TIMEOUT_S):
        assert await following.stdout.readline()
    assert following.returncode is None, "it goes on"
    following.terminate()
    await following.wait()
    (await installed("delete", "actor", "a")).ok()


async def test_a_way_that_is_long(installed: Installed) -> None:
    """A handshake through it takes longer than one on this machine may."""
    installed.kube.ports.delay_s = 0.4
    (await installed("get", "actors")).ok()


async def test_contexts_and_namespaces(installed: Installed) -> None:
    config = yaml.safe_load(installed.config.read_text())
    config["contexts"].append({"name": "team", "context": {"cluster": "fake", "user": "fake", "namespace": "red"}})
    installed.config.write_text(yaml.safe_dump(config))
    missing = await installed("get", "actor", "nobody", "--context", "team")
    missing.failed(missing.code, "red/nobody")
    missing = await installed("get", "actor", "nobody", "--context", "team", "-n", "blue")
    missing.failed(missing.code, "blue/nobody")
    wrong = await installed("get", "actors", "--context", "other")
    wrong.failed(wrong.code, "no context 'other'", "fake, team")
    # The same without kubectl, when a cluster is named.
    (await installed("get", "actors", "--context", "team", kubectl=False)).ok()
    both = await installed("get", "actors", "--context", "team", "--server", "127.0.0.1:1")
    both.failed(both.code, "--server", "contradict")


async def test_what_is_missing_is_said_with_the_way_out(installed: Installed) -> None:
    elsewhere = await installed("get", "actors", "--system-namespace", "other")
    elsewhere.failed(
        elsewhere.code, "you may not read secrets/greenroom-tokens in namespace other", "--role=greenroom-client"
    )

    installed.guard.given -= {Right(NAMESPACE, "", "secrets", "get", "greenroom-tokens")}
    refused = await installed("get", "actors")
    refused.failed(refused.code, "you may not read secrets/greenroom-tokens", "cannot get", "create rolebinding")
    installed.guard.given = set(RIGHTS)

    installed.guard.given -= {Right(NAMESPACE, "", "pods/portforward", "get")}
    refused = await installed("get", "actors")
    refused.failed(refused.code, "you may not forward ports", "403", "get and create of pods/portforward")
    installed.guard.given = set(RIGHTS)

    objects = installed.kube.api.objects
    pods, secrets, services = (objects.registry.get("", "v1", plural) for plural in ("pods", "secrets", "services"))
    assert pods is not None and secrets is not None and services is not None
    objects.delete(pods, NAMESPACE, "greenroom-0", grace_s=0)
    nothing = await installed("get", "actors")
    nothing.failed(nothing.code, "no pod of the control plane is ready", "it has none")
    installed.add_pod("greenroom-1", ready=False)
    unready = await installed("get", "actors")
    unready.failed(unready.code, "greenroom-1 is ImagePullBackOff", "describe pods")
    objects.delete(secrets, NAMESPACE, "greenroom-tls")
    no_secret = await installed("get", "actors")
    no_secret.failed(no_secret.code, "secret greenroom/greenroom-tls does not exist", "docs/kubernetes.md")
    installed.add_secret("greenroom-tls", "ca.crt", b"-----BEGIN CERTIFICATE-----")
    objects.delete(services, NAMESPACE, "greenroom")
    no_service = await installed("get", "actors")
    no_service.failed(no_service.code, "no Service greenroom/greenroom", "--system-namespace", "--context")


async def test_a_pod_that_dies_is_named_and_the_next_command_takes_another(installed: Installed) -> None:
    watching = await installed.start("get", "actors", "-w")
    async with asyncio.timeout(TIMEOUT_S):
        while not installed.kube.ports.open(NAMESPACE, "greenroom-0"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0)
    installed.add_pod("greenroom-9")
    await installed.kube.ports.kill(NAMESPACE, "greenroom-0")
    async with asyncio.timeout(TIMEOUT_S):
        _, err = await watching.communicate()
    assert watching.returncode != 0
    assert (
        "the connection through pod greenroom/greenroom-0 ended" in err.decode()
        and "run the command again" in err.decode()
    )
    with contextlib.suppress(KeyError):
        objects = installed.kube.api.objects
        pods = objects.registry.get("", "v1", "pods")
        assert pods is not None
        objects.delete(pods, NAMESPACE, "greenroom-0", grace_s=0)
    (await installed("get", "actors")).ok()


async def test_a_token_or_an_authority_that_is_not_the_servers_is_refused(installed: Installed, tmp_path: Path) -> None:
    objects = installed.kube.api.objects
    secrets = objects.registry.get("", "v1", "secrets")
    assert secrets is not None
    objects.delete(secrets, NAMESPACE, "greenroom-tokens")
    installed.add_secret("greenroom-tokens", "api", b"the-old-one")
    (await installed("get", "actors")).ok()
    objects.delete(secrets, NAMESPACE, "greenroom-tokens")
    installed.add_secret("greenroom-tokens", "api", b"another")
    refused = await installed("get", "actors")
    refused.failed(refused.code, "asks for a token")
    objects.delete(secrets, NAMESPACE, "greenroom-tls")
    installed.add_secret("greenroom-tls", "ca.crt", self_signed(tmp_path / "other").read_bytes())
    refused = await installed("get", "actors", "--request-timeout", "5s")
    refused.failed(refused.code, "certificate")


async def test_a_port_that_nobody_listens_at_is_said(installed: Installed) -> None:
    installed.kube.ports.found[NAMESPACE, "greenroom-0", 7433] = ("127.0.0.1", 1)
    refused = await installed("get", "actors", "--request-timeout", "5s")
    refused.failed(refused.code, "failed to connect to localhost:7433", "greenroom-0")
