"""What the benchmarks share: conditions, percentiles, and the one JSON object that each ends with."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WORK = Path(__file__).resolve().parent.parent / ".tools" / "bench"


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the values are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def conditions() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(name: str, figures: dict[str, Any], *, before: dict[str, Any], ok: bool) -> None:
    """Prints the result as the last line and keeps it. ``before``: `conditions` from before the run."""
    result = {"benchmark": name, "ok": ok, **figures, "conditions": before}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
