"""The main job, watched: eight actors share two workers, sleep between requests, and lose nothing.

Starts a server with two gVisor workers on a data directory of its own, builds an image from this machine's Python, applies
a template, creates the actors, sends each three requests with a suspend between them, checks every count, and cleans up.
Exit status 0 only if every count is right and nothing is left behind.
"""

from __future__ import annotations

import argparse
import http.client
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
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from greenroom import Actor
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.core.errors import GreenroomError
from greenroom.testing import counter_app
from greenroom.testing.leftovers import leftovers
from greenroom.testing.python_image import build_python_image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".tools" / "demo"
GREENROOM = [sys.executable, "-m", "greenroom"]
#: An idle machine takes two seconds; this bounds a broken one.
START_TIMEOUT_S = 60
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
    wakes: list[list[tuple[str, float]]] = field(default_factory=list)

    def totals(self) -> list[float]:
        return sorted(sum(ms for _, ms in phases) for phases in self.wakes)


def say(text: str) -> None:
    console.print(f"[bold]demo:[/bold] {text}", highlight=False)


@contextmanager
def server(backend: str) -> Iterator[Client]:
    """A server on the demo's data directory; ended, and its directory removed, however the demo ends."""
    if DATA.exists():
        say("an earlier demo was cut short; its server is started once more so that it cleans up after itself")
    (DATA / "data").mkdir(parents=True, exist_ok=True)
    log = (DATA / "server.log").open("w")
    up = [*GREENROOM, "up", f"--data={DATA / 'data'}", "--workers=2", "--slots=4", f"--backend={backend}"]
    # A session of its own: Ctrl-C reaches the demo, which then ends the server in order.
    process = subprocess.Popen([*up, "--listen=127.0.0.1:0"], stderr=log, stdout=log, start_new_session=True)
    try:
        yield connect(process)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the cleaning up is not to be interrupted
        process.send_signal(signal.SIGINT)
        status = process.wait()
        log.close()
        if status:
            say(f"the server ended with status {status}; its log ends:\n{tail()}")
        left = leftovers(DATA)
        for item in left:
            say(f"left behind: {item}")
        if left:
            sys.exit(1)
        shutil.rmtree(DATA)


def connect(process: subprocess.Popen[bytes]) -> Client:
    address = f"unix:{DATA / 'data' / 'run' / 'api.sock'}"
    os.environ["GREENROOM_SERVER"] = address
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            sys.exit(f"demo: the server did not start:\n{tail()}")
        client = Client(address)
        try:
            client.system.GetServerInfo(pb.GetServerInfoRequest())
            return client
        except GreenroomError:
            client.close()
            if time.monotonic() > until:
                sys.exit(f"demo: the server does not answer:\n{tail()}")
            time.sleep(0.05)


def tail() -> str:
    return "\n".join((DATA / "server.log").read_text().splitlines()[-15:])


def request(client: Client, gateway: str, actor: str) -> tuple[dict[str, object], list[tuple[str, float]]]:
    """One request through the gateway: the actor's answer, and the phases of the wake-up in ms."""
    url = urlsplit(gateway)
    assert url.hostname
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    try:
        connection.request("GET", "/inc", headers={"Greenroom-Actor": f"default/{actor}"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(f"demo: {actor} answered {response.status}: {body.decode(errors='replace')}")
        timing = response.headers.get("Server-Timing", "")
    finally:
        connection.close()
    items = [item.strip().partition(";dur=") for item in timing.split(",") if item]
    return json.loads(body), [(name, float(ms)) for name, _, ms in items if name != "total"]


def play(client: Client, actors: int, requests: int) -> list[Result]:
    gateway = client.system.GetServerInfo(pb.GetServerInfoRequest()).gateway_url
    results = [Result(f"counter-{n}") for n in range(1, actors + 1)]
    handles = [Actor.create("counter", result.name) for result in results]
    for turn in range(1, requests + 1):
        for handle, result in zip(handles, results, strict=True):
            answer, phases = request(client, gateway, result.name)
            result.ram, result.file = int(str(answer["ram"])), int(str(answer["file"]))
            result.wakes.append(phases)
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
    names = list(dict.fromkeys([*median, *slowest]))
    table = Table("PHASE", "P50 WAKE MS", "MAX WAKE MS", box=None)
    for name in names:
        table.add_row(name, f"{median.get(name, 0):.1f}", f"{slowest.get(name, 0):.1f}")
    table.add_row("total", f"{sum(median.values()):.1f}", f"{sum(slowest.values()):.1f}")
    console.print(table)
    if not memory:
        say("this backend keeps files only, so the count in RAM starts anew with every wake")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="gvisor", help="gvisor (root), or process (no root, files only)")
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3)
    options = parser.parse_args()
    memory = options.backend != "process"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    with server(options.backend) as client:
        say(f"server is up with 2 {options.backend} workers of 4 slots (log: {DATA / 'server.log'})")
        image = build_python_image(DATA / "image", app=Path(counter_app.__file__))
        say("built an image from this machine's Python; applying the template (image, first boot, golden snapshot)")
        (DATA / "template.yaml").write_text(TEMPLATE.format(image=image))
        subprocess.run([*GREENROOM, "apply", "-f", str(DATA / "template.yaml")], check=True)
        results = play(client, options.actors, options.requests)
        show(results, memory)
    right = all(r.file == options.requests and r.ram == (options.requests if memory else 1) for r in results)
    say(
        f"{'every count is right' if right else 'A COUNT IS WRONG'}; nothing left behind; {time.monotonic() - started:.0f} s"
    )
    return 0 if right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; everything was cleaned up")
        sys.exit(130)
