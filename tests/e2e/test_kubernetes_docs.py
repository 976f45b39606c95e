"""What docs/kubernetes.md tells a person to type, typed: at a fake cluster whose pods really run, with a PostgreSQL and
an S3 of their own. The manifest's own pods, arguments, secrets and roles; `Deployments` is what a cluster would do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from install_kit import operator_rights
from kube_kit import find_kubectl

from greenroom.testing import postgres, s3
from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.fake_kube.kubelet import GREENROOM, Kubelet
from greenroom.testing.fake_kube.objects import Entry
from greenroom.testing.fake_kube.rbac import Guard
from greenroom.testing.leftovers import leftovers

pytestmark = [pytest.mark.timeout(900), pytest.mark.root]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
#: Of this test's pods alone. The first pod's address is the control plane's, which here stands for its Service.
NETWORK = "127.60"
CONTROL = f"{NETWORK}.0.1"
BLOCK_TIMEOUT_S = 180.0


def blocks(heading: str) -> list[str]:
    part = PAGE[PAGE.index(f"\n## {heading}\n") :].partition("\n## ")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", part, re.DOTALL)


@dataclass
class Deployments:
    """One pod for each Deployment. There is no DNS: the control plane's name becomes its address; a pod listens on its
    own address, so that nothing here listens elsewhere; and who speaks to the API server has a kubeconfig."""

    api: Api
    config: Path

    def __post_init__(self) -> None:
        self._made: set[str] = set()
        self.api.objects.on_change.append(self._heard)
        self._news = asyncio.Event()

    def _heard(self, entry: Entry) -> None:
        if entry.key == ("apps", "deployments"):
            self._news.set()

    async def follow(self) -> None:
        pods = self.api.objects.registry.get("", "v1", "pods")
        assert pods is not None
        while True:
            await self._news.wait()
            self._news.clear()
            for (namespace, name), obj in sorted(self.api.objects.state.get(("apps", "deployments"), {}).items()):
                if name not in self._made:
                    self._made.add(name)
                    template = obj["spec"]["template"]
                    metadata = {**template["metadata"], "name": f"{name}-0"}
                    self.api.objects.create(
                        pods, namespace, {"metadata": metadata, "spec": self._placed(template["spec"])}
                    )

    def _placed(self, spec: dict[str, Any]) -> dict[str, Any]:
        (container,) = spec["containers"]
        environment = [
            {"name": "OWN", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "KUBECONFIG", "value": str(self.config)},
            *container["env"],
        ]
        args = [
            arg.replace("greenroom.greenroom.svc", CONTROL).replace("0.0.0.0", "$(OWN)") for arg in container["args"]
        ]
        return {**spec, "containers": [{**container, "env": environment, "args": args}]}


@dataclass
class Reader:
    """Somebody who follows the page. ``instead``: what differs between his cluster and the page's; ``log``: of its
    pods; ``pods``: their directories."""

    directory: Path
    env: dict[str, str]
    instead: dict[str, str]
    log: Callable[[], str]
    pods: Path

    async def types(self, block: str) -> str:
        for theirs, ours in self.instead.items():
            block = block.replace(theirs, ours)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            "bash", "-euo", "pipefail", "-c", block, env=self.env, cwd=self.directory, stdout=pipe, stderr=pipe
        )
        try:
            async with asyncio.timeout(BLOCK_TIMEOUT_S):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            raise AssertionError(f"{block} takes for ever\n{self.log()}") from None
        assert process.returncode == 0, f"{block}\n{out.decode()}\n{err.decode()}\n{self.log()}"
        return out.decode()


@pytest.fixture
async def reader(tmp_path: Path, counter_image: str) -> AsyncIterator[Reader]:
    if postgres.find_programs() is None or s3.find_program() is None:
        pytest.skip("no PostgreSQL or no SeaweedFS; scripts/setup.sh --test gets them")
    pods = Path(tempfile.mkdtemp(prefix="gk-"))
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    async with contextlib.AsyncExitStack() as stack:
        database = stack.enter_context(postgres.PostgresServer(tcp=True))
        bucket = stack.enter_context(s3.S3Server(tmp_path / "s3"))
        api = Api()
        guard = Guard(api.handle, operator_rights(), agent="greenroom-operator")
        kube = await stack.enter_async_context(FakeKube(api, handler=guard.handle))
        images = {"greenroom:0.1.0": GREENROOM, "greenroom-agent:0.1.0": GREENROOM}
        kubelet = await stack.enter_async_context(Kubelet(api.objects, directory=pods, images=images, network=NETWORK))
        # Not below /tmp, where pods have a volume.
        outside = Path(tempfile.mkdtemp(prefix="gr-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, outside)
        own = kube.kubeconfig(outside / "config", namespace="greenroom")
        for work in (kubelet.follow(), Deployments(api, own).follow()):
            stack.push_async_callback(_end, asyncio.create_task(work))
        config = kube.kubeconfig(tmp_path / "config")
        path = f"{Path(sys.executable).parent}:{Path(find_kubectl()).parent}:{os.environ['PATH']}"
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("GREENROOM_", "KUBE", "AWS_"))}
        given = bucket.environment()
        instead = {
            "postgresql://greenroom:PASSWORD@db.example.org:5432/greenroom?sslmode=require": database.url(
                database.create_database(), tcp=True
            ),
            "s3://my-bucket/greenroom": "s3://tests/greenroom",
            "=KEY ": f"={given['AWS_ACCESS_KEY_ID']} ",
            "=SECRET ": f"={given['AWS_SECRET_ACCESS_KEY']} ",
            "eu-central-1 ": f"{given['AWS_REGION']} ",
            "https://s3.eu-central-1.example.org": f"{given['AWS_ENDPOINT']} --from-literal=AWS_ALLOW_HTTP=true",
            "IP:127.0.0.1": f"IP:127.0.0.1,IP:{CONTROL}",
            "backend: gvisor": "backend: process",
            "registry.example.org/counter:1": counter_image,
        }
        env = {**plain, "PATH": path, "HOME": str(tmp_path), "KUBECONFIG": str(config)}
        yield Reader(tmp_path, env, instead, lambda: _logs(kubelet), pods)
    assert not guard.refused, "the manifest's roles lack what the operator asks for"
    assert list(pods.iterdir()) == [] and leftovers(pods) == []
    shutil.rmtree(pods)


def _logs(kubelet: Kubelet) -> str:
    return "\n".join(
        f"--- {name} {pod['status']}\n{kubelet.log(name)[-2500:]}" for (_, name), pod in kubelet.pods().items()
    )


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_install_in_five_minutes_and_the_first_actor(reader: Reader) -> None:
    said = [await reader.types(block) for block in blocks("Install in five minutes")]
    assert "42\n" in said[-1] and "actor/alice resumed" in said[-1]
    # Who is told that a binding lets him in finds the role there.
    (binding,) = [b for b in blocks("What each part may do") if "rolebinding" in b]
    assert "created" in await reader.types(binding)
    (definitions,) = blocks("Upgrades")
    assert "serverside-applied" in await reader.types(definitions)
    assert "alice" in await reader.types("kubectl greenroom -n greenroom get actors")
    await reader.types("kubectl greenroom -n greenroom delete actor alice")
    await reader.types("kubectl -n greenroom delete at counter --timeout=60s")
    await reader.types("kubectl -n greenroom delete wp default --timeout=60s")
    async with asyncio.timeout(60):
        while len(list(reader.pods.iterdir())) > 2:  # those of the two Deployments
            await asyncio.sleep(0.1)
