"""For tests of the ``greenroom operator`` command: a control plane, a fake cluster, and operators as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kube_kit import Kubectl, real_apiserver, self_signed

from greenroom.operator.crds import definitions
from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.live import GREENROOM, LiveServer
from greenroom.testing.ports import free_port

END_TIMEOUT_S = 30.0


@dataclass
class OperatorProcess:
    """One ``greenroom operator``: `start`, then `kill` (``kill -9``) or `stop` (in order)."""

    directory: Path
    name: str
    config: Path
    server: str
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text()

    def start(self) -> OperatorProcess:
        command = [
            *GREENROOM,
            "operator",
            f"--kubeconfig={self.config}",
            f"--server={self.server}",
            f"--health=127.0.0.1:{self.port}",
            f"--metrics=127.0.0.1:{self.port}",
            *self.options,
        ]
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.env}
            )
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def stop(self) -> int:
        """Its exit code. Meanwhile the API server, which is in this process, answers it."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, END_TIMEOUT_S)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 when nobody answers."""

        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError as error:
                return 0, str(error)

        return await asyncio.to_thread(ask)

    async def leads(self) -> bool:
        return "greenroom_operator_leads 1.0" in (await self.get("/metrics"))[1]


@dataclass
class Setting:
    """``kube`` and ``cluster``: None where the API server is a real one, and nobody runs pods."""

    directory: Path
    kube: FakeKube | None
    cluster: Cluster | None
    config: Path
    kubectl: Kubectl
    plane: LiveServer
    operators: list[OperatorProcess] = field(default_factory=list)

    def operator(self, name: str, *options: str, start: bool = True) -> OperatorProcess:
        where = ("--snapshots=s3://bucket/prefix", *options)
        made = OperatorProcess(self.directory, name, self.config, self.plane.address, where)
        self.operators.append(made)
        return made.start() if start else made

    async def object(self, kind: str, name: str) -> dict[str, Any]:
        """As kubectl shows it; empty when there is none."""
        found = await self.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
        return dict(json.loads(found)) if found else {}

    async def pods(self) -> list[dict[str, Any]]:
        found = await self.kubectl("get", "pods", "-o", "json", "-l", "greenroom.dev/pool-uid")
        return list(json.loads(found)["items"])

    async def apply(self, kind: str, name: str, **spec: Any) -> None:
        await self.kubectl("apply", "-f", "-", stdin=manifest(kind, name, **spec))

    async def condition(self, kind: str, name: str, which: str) -> dict[str, Any]:
        conditions = ((await self.object(kind, name)).get("status") or {}).get("conditions") or ()
        return next((dict(c) for c in conditions if c["type"] == which), {})


def manifest(kind: str, name: str, **spec: Any) -> str:
    whole = {"apiVersion": "greenroom.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    return yaml.safe_dump(whole)


@contextlib.asynccontextmanager
async def setting(
    tmp_path: Path,
    plane: LiveServer,
    *,
    cluster: Callable[[Api], Cluster] = lambda api: Cluster(api.objects),
    token: str = "",
    real: bool = False,
) -> AsyncIterator[Setting]:
    """``plane``: is started here. ``cluster``: who runs pods. ``token``: that the API server asks for, over TLS.
    ``real``: a real API server, in which nobody runs pods; skips where there is none."""
    async with contextlib.AsyncExitStack() as stack:
        kube = nodes = None
        if real:
            config = await stack.enter_async_context(real_apiserver(tmp_path))
        else:
            certificate, tls = self_signed(tmp_path) if token else (None, None)
            kube = await stack.enter_async_context(FakeKube(token=token, tls=tls))
            config = _with_token_file(kube.kubeconfig(tmp_path / "config", certificate=certificate), token)
            nodes = cluster(kube.api)
            stack.push_async_callback(_ended, asyncio.create_task(nodes.follow()))
        kubectl = Kubectl(tmp_path, config)
        await kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(definitions()))
        await kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        await asyncio.to_thread(plane.start)
        stack.callback(plane.stop)
        made = Setting(tmp_path, kube, nodes, config, kubectl, plane)
        try:
            yield made
        finally:
            for operator in made.operators:
                if operator.process is not None and operator.process.poll() is None:
                    operator.kill()


def _with_token_file(config: Path, token: str) -> Path:
    """Whose token is in a file beside it, as a pod's is."""
    file = config.with_name("token")
    file.write_text(token or "none")
    plain = yaml.safe_load(config.read_text())
    plain["users"] = [{"name": "fake", "user": {"tokenFile": str(file)}}]
    config.write_text(yaml.safe_dump(plain))
    return config


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.2)
