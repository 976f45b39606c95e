"""For tests of Kubernetes: kubectl, and an API server for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.ports import free_port

_TOOLS = Path(__file__).parents[1] / ".tools" / "bin" / "kubectl"
#: One call of kubectl, longer than any that waits for something.
CALL_TIMEOUT_S = 150.0


def find_kubectl() -> str:
    found = str(_TOOLS) if _TOOLS.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("no kubectl; scripts/setup.sh --test gets one")
    return found


def self_signed(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate of 127.0.0.1 that is its own authority, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH, which makes the certificate")
    certificate, key = directory / "tls.crt", directory / "tls.key"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(["openssl", "req", "-x509", "-days", "1", *names, *made], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def rsa_key(directory: Path) -> Path:
    """For the tokens of service accounts: an API server reads no EC key as openssl writes it."""
    key = directory / "sa.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    return key


class Kubectl:
    """Runs kubectl with its own home and configuration."""

    def __init__(self, home: Path, config: Path) -> None:
        self._program = find_kubectl()
        self._env = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(config)}

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            self._program, *args, env=self._env, stdin=pipe, stdout=pipe, stderr=pipe
        )

    async def __call__(self, *args: str, stdin: str = "", fails: bool = False) -> str:
        """What it prints; with ``fails`` what it prints as the error that it must end with."""
        process = await self.start(*args)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            out, err = await process.communicate(stdin.encode())
        assert (process.returncode != 0) is fails, (args, out.decode(), err.decode())
        return (err if fails else out).decode()


@contextlib.asynccontextmanager
async def real_apiserver(directory: Path) -> AsyncIterator[Path]:
    """etcd and kube-apiserver of the folder that ``KUBEBUILDER_ASSETS`` names (as for controller-runtime's envtest), on
    loopback; the path of a kubeconfig for them. Nothing else of a cluster: no nodes, no garbage collector."""
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    programs = [Path(assets) / name for name in ("etcd", "kube-apiserver")]
    if not assets or not all(p.exists() for p in programs):
        pytest.skip("no real API server: KUBEBUILDER_ASSETS names no folder with etcd and kube-apiserver")
    client, peer, port = (free_port() for _ in range(3))
    certificate, _ = self_signed(directory)
    key, tickets = directory / "tls.key", rsa_key(directory)
    (directory / "tokens.csv").write_text("secret,admin,admin,system:masters\n")
    etcd = [
        str(programs[0]),
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
    ]
    apiserver = [
        str(programs[1]),
        f"--etcd-servers=http://127.0.0.1:{client}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://127.0.0.1",
        f"--service-account-key-file={tickets}",
        f"--service-account-signing-key-file={tickets}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--disable-admission-plugins=ServiceAccount",
    ]
    config = directory / "config"
    FakeKube.write_kubeconfig(config, f"https://127.0.0.1:{port}", "secret", certificate=certificate)
    with contextlib.ExitStack() as running:
        for command in (etcd, apiserver):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
            running.callback(process.wait)
            running.callback(process.terminate)
        kubectl = Kubectl(directory, config)
        async with asyncio.timeout(120):
            while True:
                try:
                    await kubectl("get", "--raw=/readyz")
                    await kubectl("get", "namespace", "default")
                    break
                except AssertionError:
                    await asyncio.sleep(0.5)
        yield config
