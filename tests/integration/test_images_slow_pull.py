"""The large image over the bad link, scaled down; in full it is `make slow-pull`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from registry_kit import find_registry

BENCH = Path(__file__).resolve().parents[2] / "bench" / "slow_pull.py"

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")


def test_one_preparation_brings_it_all() -> None:
    """12 MB over 10 Mbit/s with 400 ms, cut twice and killed once: it is whole, little is fetched again, memory is
    flat."""
    command = [sys.executable, str(BENCH), "--scale", "0.03", "--cuts", "2", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    # How long it takes is measured where nothing else runs, by `make slow-pull`.
    assert [goal for goal, met in figures["goals"].items() if not met] in ([], ["time"]), figures
    print(json.dumps(figures))
