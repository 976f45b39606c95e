"""Debian's docker-registry on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "bin"
#: A registry is up in about a second; this is for a busy machine.
_START_TIMEOUT_S = 30.0


def find_tool(name: str) -> str | None:
    """A program that scripts/setup.sh brought, or one on PATH."""
    return shutil.which(name, path=f"{_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}")


def find_registry() -> str | None:
    return find_tool("docker-registry")


@contextlib.contextmanager
def docker_registry(directory: Path) -> Iterator[str]:
    """Runs one with its data in ``directory``; yields ``host:port``."""
    program = find_registry()
    assert program is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}/v2/"):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "the registry does not come up"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False
