"""The main job, watched: eight actors share two workers, sleep between requests, and lose nothing.

Starts a server with two gVisor workers on a data directory of its own, builds an image from this machine's Python,
applies a template, creates the actors, sends each three requests with a suspend between them, checks every count, and
cleans up. Exit status 0 only if every count is right and nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from greenroom import Actor
from greenroom.core.errors import GreenroomError
from greenroom.testing import counter_app
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import GREENROOM, LiveServer
from greenroom.testing.python_image import build_python_image

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".tools" / "demo"
TEMPLATE = """\
apiVersion: greenroom.dev/v1alpha1
kind: Template
metadata:
  name: counter
spec:
  image: {image}
  readyz:
    path: /healthz
  resources:
    memory: 256Mi
"""

console = Console()


@dataclass
class Result:
    """One actor's answers. ``wakes``: for each request, the phases in ms as the gateway measured them."""

    name: str
    ram: int = 0
    file: int = 0
    wakes: list[tuple[tuple[str, float], ...]] = field(default_factory=list)

    def totals(self) -> list[float]:
        return sorted(sum(ms for _, ms in phases) for phases in self.wakes)


def say(text: str) -> None:
    console.print("[bold]demo:[/bold]", text, highlight=False, markup=True, soft_wrap=True)


@contextmanager
def server(place: Path, backend: str) -> Iterator[LiveServer]:
    """A server on the demo's data directory; ended, and ``place`` removed, however the demo ends."""
    live = LiveServer(place / "data", backend=backend, dies_with_us=True)
    if place.exists():
        say("an earlier demo was cut short; cleaning up what it left")
        with contextlib.suppress(GreenroomError):
            live.start()  # takes over what is still running ...
        end(place, live)  # ... and ends it in order
    try:
        live.start()
        yield live
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the cleaning up is not to be interrupted
        end(place, live)


def end(place: Path, live: LiveServer) -> None:
    """Ends the server and removes its directory, unless it leaves something behind: then the demo has failed."""
    if status := live.stop():
        say(f"the server ended with status {status}; its log ends:\n{live.log_tail()}")
    left = leftovers(live.data_dir)
    for item in left:
        say(f"left behind: {item}")
    if left:
        sys.exit(1)
    shutil.rmtree(place)


def play(live: LiveServer, actors: int, requests: int) -> list[Result]:
    results = [Result(f"counter-{n}") for n in range(1, actors + 1)]
    handles = [Actor.create("counter", result.name, server=live.address) for result in results]
    for turn in range(1, requests + 1):
        for handle, result in zip(handles, results, strict=True):
            response = live.request(f"default/{result.name}")
            if response.status != 200:
                raise SystemExit(
                    f"demo: {result.name} answered {response.status}: {response.body.decode(errors='replace')}"
                )
            answer = json.loads(response.body)
            result.ram, result.file = answer["ram"], answer["file"]
            result.wakes.append(response.phases)
            if answer["actor"] != result.name:
                raise SystemExit(f"demo: asked {result.name}, but {answer['actor']} answered")
            if turn < requests:
                handle.suspend()
        say(f"request {turn} of {requests}: every actor woke and answered" + ("; suspended" if turn < requests else ""))
    for handle in handles:
        handle.close()
    return results


def show(results: list[Result], memory: bool) -> None:
    table = Table("ACTOR", "COUNT IN RAM", "COUNT IN FILE", "WAKES", "WAKE P50 MS", "WAKE MAX MS", box=None)
    for result in results:
        totals = result.totals()
        row = [result.ram, result.file, len(totals), f"{totals[len(totals) // 2]:.1f}", f"{totals[-1]:.1f}"]
        table.add_row(result.name, *map(str, row))
    console.print(table)
    wakes = sorted((phases for r in results for phases in r.wakes), key=lambda phases: sum(ms for _, ms in phases))
    median, slowest = dict(wakes[len(wakes) // 2]), dict(wakes[-1])
    names = list(dict.fromkeys([*slowest, *median]))
    say("where the time went: the phases of the median wake and of the slowest one, each summing to its total")
    table = Table("PHASE", "MEDIAN WAKE MS", "SLOWEST WAKE MS", box=None)
    for name in names:
        table.add_row(name, f"{median.get(name, 0):.1f}", f"{slowest.get(name, 0):.1f}")
    table.add_row("total", f"{sum(median.values()):.1f}", f"{sum(slowest.values()):.1f}")
    console.print(table)
    if not memory:
        say("this backend keeps files only, so the count in RAM starts anew with every wake")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", help="gvisor (default as root), or process (no root needed, files only)")
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--place", type=Path, default=PLACE, help="directory for everything; removed at the end")
    options = parser.parse_args()
    place: Path = options.place
    if options.backend is None:
        options.backend = "gvisor" if os.geteuid() == 0 else "process"
        if options.backend == "process":
            say("without root this runs on the process backend: actors keep their files only, and are not isolated")
    memory = options.backend != "process"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    with server(place, options.backend) as live:
        say(f"server is up with 2 {options.backend} workers of 4 slots (log: {live.log_path})")
        image = build_python_image(place / "image", app=Path(counter_app.__file__))
        say("built an image from this machine's Python; applying the template (image, first boot, golden snapshot)")
        (place / "template.yaml").write_text(TEMPLATE.format(image=image))
        apply = [*GREENROOM, f"--server={live.address}", "apply", "-f", str(place / "template.yaml")]
        subprocess.run(apply, check=True)
        results = play(live, options.actors, options.requests)
        show(results, memory)
    right = all(r.file == options.requests and r.ram == (options.requests if memory else 1) for r in results)
    verdict = "every count is right" if right else "A COUNT IS WRONG"
    say(f"{verdict}; nothing left behind; {time.monotonic() - started:.0f} s")
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; everything was cleaned up")
        sys.exit(130)
    except GreenroomError as error:
        say(error.message)
        sys.exit(error.exit_code)
