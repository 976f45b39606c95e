"""The demo: right, and gone without a trace also when it is interrupted or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom.testing.leftovers import look
from greenroom.testing.live import descendants

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]

DEMO = Path(__file__).parents[2] / "demo" / "run.py"


def start(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(DEMO), f"--place={place}", "--actors=3"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(demo: subprocess.Popen[str], text: str) -> str:
    assert demo.stdout is not None
    seen = ""
    while text not in seen:
        line = demo.stdout.readline()
        assert line, f"{text!r} was not said, but:\n{seen}"
        seen += line
    return seen


def test_interrupted_it_cleans_up(data_dir: Path) -> None:
    place = data_dir / "demo"
    for moment in ("server is up", "request 1 of 3"):
        demo = start(place)
        read_until(demo, moment)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
        assert demo.returncode == 130, output
        assert "left behind" not in output
        assert not place.exists()


@pytest.mark.parametrize("alone", [False, True])
def test_killed_it_is_cleaned_up_by_the_next_one(data_dir: Path, alone: bool) -> None:
    """``alone``: nothing but the demo itself was killed, and its server with it."""
    place = data_dir / "demo"
    demo = start(place)
    read_until(demo, "request 1 of 3")
    for pid in [demo.pid, *([] if alone else descendants(demo.pid))]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself meanwhile
            if b"runsc" not in Path(f"/proc/{pid}/comm").read_bytes():
                os.kill(pid, signal.SIGKILL)
    demo.communicate(timeout=60)
    assert look(place / "data") != [], "the sandboxes of a server that was killed go on"
    again = start(place)
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0, output
    assert "an earlier demo was cut short" in output
    assert "every count is right; nothing left behind" in output
    assert not place.exists()
