"""What the README tells a person to type, typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import Kit

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str, after: str) -> list[str]:
    text = README.read_text()
    return re.findall(rf"```{language}\n(.*?)```", text[text.index(after) :], re.DOTALL)


@pytest.mark.timeout(600)
def test_the_first_session(serve: Callable[..., Kit], tmp_path: Path) -> None:
    kit = serve()
    setup, *session = blocks("sh", "## A first session")
    assert setup.splitlines()[-1] == "greenroom up", "what this test does in its own way"
    port = kit.live.gateway[1]
    script = "\n".join(session).replace(":8080/ ", f":{port}/ ").replace("/tmp/counter", f"{tmp_path}/counter")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GREENROOM_SERVER": kit.live.address,
    }
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=270
    )
    assert run.returncode == 0, run.stderr
    assert '"ram": 1' in run.stdout
    assert '"ram": 2' in run.stdout, "awake again, as it was"
    assert "server-timing:" in run.stdout.lower()
    assert "\n42\n" in run.stdout

    (program,) = blocks("python", "## A first session")
    python = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=180, check=True
    )
    assert python.stdout.splitlines() == ["42", "", f"http://carol.default.localhost:{port}"]
    assert kit.actor("carol").state == "Suspended"
