"""The rights that a worker's container gets are enough: each backend keeps the rules of its port with these
capabilities and no other. What a container runtime takes away besides (system calls, paths below ``/proc``) is not
tried here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom.operator.isolation import RIGHTS

ROOT = Path(__file__).parents[2]
SUITES = {
    "gvisor": "tests/contract/test_backend_gvisor.py::TestGvisorBackend",
    "process": "tests/contract/test_backend_process.py::TestProcessBackend",
}


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.xdist_group("sandboxes")
@pytest.mark.parametrize("backend", ["process", pytest.param("gvisor", marks=pytest.mark.gvisor)])
def test_a_backend_needs_no_more_than_its_container_has(backend: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, of which it takes rights away")
    kept = ",".join(f"+{name.lower()}" for name in RIGHTS[backend].capabilities)
    suite = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "-p", "no:cacheprovider", SUITES[backend]]
    done = subprocess.run(
        ["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--", *suite],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
