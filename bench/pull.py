"""Pulling a large image: 360 MB that unpack to 1.2 GB in 60 000 files, from a registry on loopback.

- time: from nothing to an unpacked tree that has reached the disk, against `skopeo copy` and `umoci unpack` of the same
  image (which sync nothing), in alternating rounds of one run. Goal: the median ratio is at most 0.8
- memory: the largest sum of the resident sizes of the agent's process and its children, looked at every few
  milliseconds, among the rounds. Goal: at most 150 MB
- killed: the agent is killed (SIGKILL) five times while it pulls, at random places, and started again; the bytes that
  the registry's side sends beyond the image's size. Goal: at most 20 MiB in all. A proxy counts them, and keeps hardly
  any in its own buffers
- image phase: what the agent does for the image of an actor that is woken, when the image is there: in an agent that
  was just started (once), of a template that is new to it, and of one that it knows. Goal: 99 % of the new ones take at
  most 5 ms, and nothing is unpacked

The agent is a process with all of the agent's modules that pulls as the agent does.

    python bench/pull.py [--rounds 3] [--kills 5] [--scale 1.0] [--directory .tools/bench/pull]

Trees are removed at the end only: ext4 is slow to create files for minutes after many were deleted. For the same reason
a second run in the same place tells little until then; ``--directory /dev/shm/pull`` leaves the disk out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _image
import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.agent.agent import Agent
from greenroom.agent.classes import Classes
from greenroom.agent.images import WorkerImages
from greenroom.agent.progress import Reports
from greenroom.core import agentapi as api
from greenroom.core.records import TemplateSpec
from greenroom.images.store import DiskImageStore
from greenroom.testing.oci_layout import push_layout
from greenroom.testing.ports import free_port

GOAL_RATIO = 0.8
GOAL_MEMORY_BYTES = 150_000_000
GOAL_AGAIN_BYTES = 20 << 20
GOAL_IMAGE_PHASE_MS = 5.0
SAMPLE_PERIOD_S = 0.005
WAKES = 200
REPOSITORY = "bench/large:1"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


# --- the agent ----------------------------------------------------------------------------------------------------


def child(directory: Path, reference: str, *, wake: str) -> None:
    """Pulls, or, given a digest to ``wake``, does what a wake-up does for its image."""
    assert Agent is not None  # imported for its size
    store = DiskImageStore(directory)

    async def pull() -> dict[str, Any]:
        image = await store.prepare(reference)
        return {"digest": image.digest}

    async def measure() -> dict[str, Any]:
        spec = TemplateSpec(image=reference)
        images = WorkerImages(store, "w0", directory)
        await images.open(())

        async def phase(classes: Classes, uid: str) -> float:
            identity = api.Identity(namespace="default", name=uid, uid=uid, generation=1)
            call = api.Start(
                operation_id=uid, actor_uid=uid, generation=1, identity=identity, spec=spec, image_digest=wake
            )
            began = time.perf_counter()
            with Reports(lambda progress: None) as reports:
                await classes.held(call, reports)
            return (time.perf_counter() - began) * 1e3

        def classes() -> Classes:
            return Classes(images, needs_image=True)

        first = await phase(classes(), "first")
        new = [await phase(classes(), f"new{n}") for n in range(WAKES)]
        same = classes()
        known = [await phase(same, f"known{n}") for n in range(WAKES)][1:]
        for uid in ("first", *(f"{kind}{n}" for kind in ("new", "known") for n in range(WAKES))):
            await images.release(uid)
        await images.close(wipe=True)
        return {"just_started_ms": first, "new_p99_ms": percentile(new, 0.99), "known_p99_ms": percentile(known, 0.99)}

    print(json.dumps(uvloop.run(measure() if wake else pull())), flush=True)


def start(directory: Path, reference: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", str(directory), reference, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def tree_bytes(pid: int) -> int:
    """The resident sizes of a process and its children, pages that they share counted for each."""
    total = 0
    with contextlib.suppress(OSError, IndexError):
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_bytes(int(one)) for one in (task / "children").read_text().split())
    return total


def run_agent(directory: Path, reference: str, *options: str) -> tuple[dict[str, Any], float, int]:
    """What it says at the end, the seconds that it took, and its peak memory in bytes."""
    process = start(directory, reference, *options)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(SAMPLE_PERIOD_S)

    began = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    said = process.stdout.read()
    watcher.join()
    if process.returncode != 0:
        sys.exit(f"the agent ended with {process.returncode}")
    return json.loads(said), time.perf_counter() - began, peak


# --- the others ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on loopback; yields ``host:port``."""
    port = free_port()
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    process = subprocess.Popen([tool("docker-registry"), "serve", str(config)], stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit("docker-registry does not start")
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def tool(name: str) -> str:
    place = Path(__file__).resolve().parents[1] / ".tools" / "bin"
    found = shutil.which(name, path=f"{place}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        sys.exit(f"no {name}: run scripts/setup.sh --test")
    return found


def run_others(directory: Path, host: str) -> float:
    """Seconds of skopeo and umoci."""
    began = time.perf_counter()
    source, layout = f"docker://{host}/{REPOSITORY}", f"oci:{directory}/layout:latest"
    subprocess.run(
        [tool("skopeo"), "--insecure-policy", "copy", "-q", "--src-tls-verify=false", source, layout], check=True
    )
    subprocess.run(
        [tool("umoci"), "unpack", "--image", f"{directory}/layout:latest", str(directory / "bundle")], check=True
    )
    return time.perf_counter() - began


class Proxy:
    """Passes connections on to the registry and counts what comes back; runs in a thread."""

    #: Sent but not received yet does not count as fetched, so there is to be little of it.
    BUFFER_BYTES = 16 << 10
    CHUNK_BYTES = 16 << 10

    def __init__(self, upstream: str) -> None:
        self._host, _, port = upstream.partition(":")
        self._port = int(port)
        self.sent_bytes = 0
        self.limits: list[tuple[int, threading.Event]] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.host = ""

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        async def listen() -> None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.BUFFER_BYTES)
            listener.bind(("127.0.0.1", 0))
            server = await asyncio.start_server(self._serve, sock=listener, limit=self.CHUNK_BYTES)
            self.host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self._ready.set()

        self._loop.create_task(listen())
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=self.BUFFER_BYTES)
        with contextlib.suppress(OSError):
            upstream, back = await asyncio.open_connection(self._host, self._port, limit=self.CHUNK_BYTES)
            try:
                async with asyncio.TaskGroup() as group:
                    asking = group.create_task(self._pass_on(reader, back, count=False))
                    await group.create_task(self._pass_on(upstream, writer, count=True))
                    asking.cancel()
            except* OSError:
                pass
            finally:
                back.close()
                writer.close()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool) -> None:
        while data := await source.read(self.CHUNK_BYTES):
            sink.write(data)
            await sink.drain()
            if count:
                self.sent_bytes += len(data)
                for limit, reached in self.limits:
                    if self.sent_bytes >= limit:
                        reached.set()
        if not count:
            sink.write_eof()


# --- the figures --------------------------------------------------------------------------------------------------


def measure_rounds(place: Path, host: str, rounds: int) -> tuple[dict[str, Any], Path, str]:
    """Time and memory; and the store of the last round with the image's digest."""
    ours: list[float] = []
    others: list[float] = []
    peaks: list[int] = []
    last, digest = place, ""
    for number in range(rounds):
        for who in ("ours", "others") if number % 2 == 0 else ("others", "ours"):
            directory = place / f"{who}-{number}"
            directory.mkdir()
            os.sync()  # what the round before left to be written is not this one's
            if who == "others":
                others.append(run_others(directory, host))
            else:
                said, seconds, peak = run_agent(directory, f"{host}/{REPOSITORY}")
                ours.append(seconds)
                peaks.append(peak)
                last, digest = directory, said["digest"]
        say(f"round {number}: {ours[-1]:.2f} s, skopeo and umoci {others[-1]:.2f} s, peak {peaks[-1] / 1e6:.0f} MB")
    figures = {
        "seconds": round(statistics.median(ours), 2),
        "skopeo_umoci_seconds": round(statistics.median(others), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, others, strict=True)), 3),
        "peak_bytes": max(peaks),
    }
    return figures, last, digest


def measure_kills(place: Path, host: str, kills: int, seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    directory = place / "killed"
    with Proxy(host) as proxy:
        reference = f"{proxy.host}/{REPOSITORY}"
        size = image_bytes(host)
        for limit in sorted(dice.uniform(0.02, 0.98) for _ in range(kills)):
            reached = threading.Event()
            proxy.limits = [(int(limit * size), reached)]
            process = start(directory, reference)
            while not reached.wait(0.02):
                if process.poll() is not None:
                    sys.exit("the agent ended before it was killed")
            process.send_signal(signal.SIGKILL)
            process.wait()
            say(f"killed at {proxy.sent_bytes / 1e6:.0f} MB")
        proxy.limits = []
        run_agent(directory, reference)
        again = proxy.sent_bytes - size
    return {"kills": kills, "again_bytes": again, "seed": seed}


def image_bytes(host: str) -> int:
    """Of the image's layers and config, as the registry has them."""
    name, _, tag = REPOSITORY.partition(":")
    request = urllib.request.Request(
        f"http://{host}/v2/{name}/manifests/{tag}", headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        manifest = json.load(answer)
    return sum(part["size"] for part in (manifest["config"], *manifest["layers"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="so much of the image (0 to 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compression", choices=("gzip", "zstd"), default="gzip", help="umoci can't unpack zstd")
    parser.add_argument("--directory", type=Path, default=WORK / "pull")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--wake", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), args.child[1], wake=args.wake)
        return
    before = conditions()
    say("making the image (once)")
    args.directory.mkdir(parents=True, exist_ok=True)
    layout = _image.build(args.directory, args.compression, scale=args.scale)
    place = Path(tempfile.mkdtemp(dir=args.directory, prefix="run-"))
    try:
        with registry(args.directory / f"registry-{args.compression}-{args.scale:g}") as host:
            push_layout(layout, f"{host}/{REPOSITORY}")
            figures, store, digest = measure_rounds(place, host, args.rounds)
            figures |= measure_kills(place, host, args.kills, args.seed)
            reference = f"{host}/{REPOSITORY}"
            unpacked = (store / "rootfs").stat().st_mtime_ns
            woken, _, _ = run_agent(store, reference, "--wake", digest)
            assert (store / "rootfs").stat().st_mtime_ns == unpacked, "a wake-up unpacked something"
        figures |= {f"image_phase_{name}": round(value, 3) for name, value in woken.items()}
    finally:
        shutil.rmtree(place)
    goals = {
        "ratio": GOAL_RATIO,
        "peak_bytes": GOAL_MEMORY_BYTES,
        "again_bytes": GOAL_AGAIN_BYTES,
        "image_phase_new_p99_ms": GOAL_IMAGE_PHASE_MS,
    }
    missed = [name for name, goal in goals.items() if figures[name] > goal]
    if missed:
        say(f"missed: {', '.join(missed)}")
    setup = {"rounds": args.rounds, "scale": args.scale, "compression": args.compression}
    report("pull", {**setup, **figures, "goals": goals}, before=before, ok=not missed)


if __name__ == "__main__":
    main()
