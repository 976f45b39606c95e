"""A large image over a bad link, as a person meets it, scaled down; in full it is `make slow-pull`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "integration"))
from registry_kit import find_registry

BENCH = Path(__file__).resolve().parents[2] / "bench" / "slow_pull.py"

pytestmark = [
    pytest.mark.xdist_group("sandboxes"),
    pytest.mark.gvisor,
    pytest.mark.timeout(400),
    pytest.mark.root,
    pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test"),
]


def test_one_apply_leads_to_ready_and_an_actor_waits_meanwhile() -> None:
    """32 MB over 40 Mbit/s with 400 ms, cut once, and all agents killed once."""
    command = [sys.executable, str(BENCH), "--scale", "0.02", "--bits-per-s", "40e6", "--cuts", "1", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=330)
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    # How long things take is measured where nothing else runs, by `make slow-pull`.
    assert {goal for goal, met in figures["goals"].items() if not met} <= {"time", "silence"}, (figures, done.stderr)
    print(json.dumps(figures))
