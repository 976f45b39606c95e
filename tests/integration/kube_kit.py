"""For tests of Kubernetes: kubectl, and an API server for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

_TOOLS = Path(__file__).parents[2] / ".tools" / "bin" / "kubectl"
#: One call of kubectl: it starts in a second on a busy machine.
CALL_TIMEOUT_S = 60.0


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
