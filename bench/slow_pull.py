"""A large image over a bad link, pulled by one preparation: 360 MB (1.2 GB unpacked) over 10 Mbit/s with 400 ms.

A real registry stands behind a proxy that lets so many bits a second through for all connections together, makes every
request wait for a round trip, and breaks all connections now and then. A process of its own prepares the image as an
agent does; it is killed at random bytes and started again as often as told. Measured: the time over what the link needs
for the bytes alone, bytes that crossed the link more than once, the longest time in which no progress was told, and the
peak of memory of the process and of its unpacker.

    python bench/slow_pull.py [--scale 0.04] [--cuts 5] [--kills 2] [--bits-per-s 10e6] [--latency-s 0.4]

Goals: 1.1 times the link's time, 3 s for the start and for each cut or kill (round trips, pauses, what is fetched
again), and what unpacking takes; 4 MiB again for each cut or kill; 150 MiB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO, Any

from _kit import WORK, conditions, report, say

from greenroom.images.pieces import MAX_IN_FLIGHT_BYTES
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import Layout, push_layout

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "integration"))
from registry_kit import docker_registry

COMPRESSED_BYTES = 360_000_000
UNPACKED_BYTES = 1_200_000_000
LAYERS = 4
FILE_BYTES = 1_000_000
#: What the link has taken and not delivered when it breaks (in the kernel), for each of the connections.
UNDELIVERED_BYTES = 128 << 10
MEMORY_GOAL_MIB = 150
TIME_GOAL = 1.1
BREAK_GOAL_S = 3.0

#: Prepares argv[2] in the store argv[1]; prints a line for each progress, and at the end what memory it took.
AGENT = """
import asyncio, os, sys, time
from pathlib import Path
from greenroom.images.store import DiskImageStore

def peak_mib(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)

unpacker_mib = 0

def heard(phase, layers):
    global unpacker_mib
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        unpacker_mib = max(unpacker_mib, peak_mib(child))
    print(phase, sum(layer.done_bytes for layer in layers), flush=True)

image = asyncio.run(DiskImageStore(Path(sys.argv[1])).prepare(sys.argv[2], heard))
print("done", peak_mib("self"), unpacker_mib, image.size_bytes, flush=True)
"""


class _Files(io.RawIOBase):
    """Files of which a part can't be compressed and the rest can, endlessly."""

    def __init__(self, chance: random.Random, share: float) -> None:
        self._block = chance.randbytes(int(4096 * share)).ljust(4096, b"\0")
        self._chance = chance

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        if not size:
            return b""
        block = self._chance.randbytes(8) + self._block[8:]
        data = self._chance.randbytes(int(size * COMPRESSED_BYTES / UNPACKED_BYTES)) + block
        return data.ljust(size, b"\0")[:size]


def make_image(directory: Path, scale: float) -> None:
    chance = random.Random(1)
    layout = Layout(directory)
    layers = []
    for number in range(LAYERS):
        with tempfile.TemporaryFile(dir=directory) as out:
            _write_tar(out, number, chance, max(1, int(UNPACKED_BYTES * scale / LAYERS / FILE_BYTES)))
            out.seek(0)
            layers.append(layout.add_layer(out, "gzip"))
    layout.add_image(layers, {"Entrypoint": ["/app"]}, "latest")


def _write_tar(out: IO[bytes], layer: int, chance: random.Random, files: int) -> None:
    source = _Files(chance, COMPRESSED_BYTES / UNPACKED_BYTES)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(files):
            member = tarfile.TarInfo(f"layer{layer}/{number % 10}/file{number}")
            member.size = FILE_BYTES
            tar.addfile(member, source)  # type: ignore[arg-type]


class Pull:
    """One pull, started anew after each kill."""

    def __init__(self, proxy: FaultProxy, store: Path, kills: list[int]) -> None:
        self.proxy = proxy
        self.store = store
        self.kills = kills  # at so many bytes, ascending
        self.silence_s = 0.0
        self.silent_in = ""
        self.done: list[int] = []
        self.unpacking_s = 0.0

    async def run(self) -> None:
        while not self.done:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", AGENT, str(self.store), f"{self.proxy.host}/test/slow:1"),
                stdout=asyncio.subprocess.PIPE,
            )
            killing = asyncio.create_task(self._kill(process))
            try:
                await self._follow(process)
            finally:
                killing.cancel()
            status = await process.wait()
            if not self.done and status != -9:
                raise SystemExit(f"the preparation failed with status {status}")

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        heard, last, unpacking = time.monotonic(), "", 0.0
        async for line in process.stdout:
            now = time.monotonic()
            phase, *numbers = line.decode().split()
            if phase == "done":
                self.done = [int(number) for number in numbers]
                self.unpacking_s = now - unpacking
                return
            if last == phase and now - heard > self.silence_s:
                self.silence_s, self.silent_in = now - heard, phase
            if phase == "unpack" and not unpacking:
                unpacking = now
            heard, last = now, phase

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        if not self.kills:
            return
        reached = asyncio.Event()

        async def watch() -> None:
            if self.proxy.blob_bytes >= self.kills[0]:
                reached.set()

        self.proxy.before_chunk = watch
        await reached.wait()
        self.proxy.before_chunk = None
        self.kills.pop(0)
        say(f"killing it after {self.proxy.blob_bytes / 1e6:.0f} MB")
        process.kill()


async def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    make_image(work / "layout", arguments.scale)
    (work / "registry").mkdir()
    async with AsyncExitStack() as stack:
        host = stack.enter_context(docker_registry(work / "registry"))
        await asyncio.to_thread(push_layout, work / "layout", f"{host}/test/slow:1")
        size = sum(path.stat().st_size for path in (work / "layout/blobs/sha256").iterdir())
        say(f"{size / 1e6:.0f} MB over {arguments.bits_per_s / 1e6:g} Mbit/s, {arguments.latency_s:g} s a round trip")
        cut_every = size // (arguments.cuts + 1) if arguments.cuts else None
        proxy = FaultProxy(
            host, bits_per_s=arguments.bits_per_s, latency_s=arguments.latency_s, cut_every_bytes=cut_every
        )
        await stack.enter_async_context(proxy.running())
        chance = random.Random(arguments.seed)
        kills = sorted(chance.randrange(size // 20, size * 19 // 20) for _ in range(arguments.kills))
        pull = Pull(proxy, work / "store", kills)
        began = time.monotonic()
        await pull.run()
        seconds = time.monotonic() - began
        files = sum(1 for path in (work / "store/rootfs").rglob("file*") if path.stat().st_size == FILE_BYTES)
        agent_mib, unpacker_mib, _ = pull.done
        link_s = size * 8 / arguments.bits_per_s
        return {
            "scale": arguments.scale,
            "compressed_mb": round(size / 1e6, 1),
            "files": files,
            "seconds": round(seconds, 1),
            "unpacking_s": round(pull.unpacking_s, 1),
            "link_s": round(link_s, 1),
            "ratio": round((seconds - pull.unpacking_s) / link_s, 3),
            "cuts": proxy.cuts,
            "breaks": arguments.cuts + arguments.kills,
            "fetched_again_bytes": proxy.blob_bytes - size + _manifest_bytes(work),
            "longest_silence_s": round(pull.silence_s, 2),
            "silent_in": pull.silent_in,
            "agent_peak_mib": agent_mib,
            "unpacker_peak_mib": unpacker_mib,
        }


def _manifest_bytes(work: Path) -> int:
    """Of what is in the layout and fetched as no blob."""
    (descriptor,) = Layout(work / "layout").index().manifests
    return descriptor.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the image; 1 is 360 MB")
    parser.add_argument("--cuts", type=int, default=5, help="how often all connections break")
    parser.add_argument("--kills", type=int, default=2, help="how often the process is killed")
    parser.add_argument("--bits-per-s", type=float, default=10e6)
    parser.add_argument("--latency-s", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    before = conditions()
    WORK.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=WORK, prefix="slow-pull-"))
    os.environ["PATH"] = f"{WORK.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    try:
        figures = asyncio.run(measure(arguments, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    allowed = figures["breaks"] * (MAX_IN_FLIGHT_BYTES + 4 * UNDELIVERED_BYTES)
    allowed_s = TIME_GOAL * figures["link_s"] + BREAK_GOAL_S * (figures["breaks"] + 1)
    ok = {
        "time": figures["seconds"] - figures["unpacking_s"] <= allowed_s,
        "fetched_again": figures["fetched_again_bytes"] <= allowed,
        "memory": max(figures["agent_peak_mib"], figures["unpacker_peak_mib"]) <= MEMORY_GOAL_MIB,
        "whole": figures["files"] == LAYERS * max(1, int(UNPACKED_BYTES * arguments.scale / LAYERS / FILE_BYTES)),
    }
    report("slow_pull", {**figures, "goals": ok}, before=before, ok=all(ok.values()))
    if not all(ok.values()):
        raise SystemExit(json.dumps(ok))


if __name__ == "__main__":
    main()
