"""A large image over a bad link, as a person meets it: 360 MB (1.2 GB unpacked) over 10 Mbit/s with 400 ms.

A registry stands behind a proxy that lets so many bits a second through for all connections together, makes every
request wait for a round trip, and breaks all connections now and then. `greenroom up` runs two workers; one `greenroom
apply` on a terminal is to lead to a Ready template, by itself, while the agents of all workers are killed now and then.

Meanwhile an actor is woken, by a request and by `greenroom resume`, whose image is the same and not here any more (its
template was made over a good link, and the image was removed since).

Measured: how long the download takes over what the link needs for the bytes alone; bytes that crossed the link more
than once; the longest time in which the template's status said nothing new; the peak of memory of an agent with its
unpacker, over all and at the beginning and end of the download; and what happened to the actor, of which every request
is to be refused with 503 and a time to come back until it is served, and whose one operation is to end DONE.

    python bench/slow_pull.py [--scale 0.04] [--cuts 5] [--kills 2] [--bits-per-s 10e6] [--latency-s 0.4]

Goals: see `GOALS`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _image
from _kit import WORK, conditions, report, say
from _slow_watch import Course, Link, Memory

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.cli.kinds import bytes_of, layer_bytes
from greenroom.cli.look import record_of
from greenroom.core.records import Operation, OperationKind, Probe, Template, TemplateSpec, TemplateState
from greenroom.images.pieces import MAX_IN_FLIGHT_BYTES
from greenroom.testing import counter_app
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.live import GREENROOM, LiveServer
from greenroom.testing.oci_layout import Layout, push_layout
from greenroom.testing.python_image import build_python_image

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "integration"))
from registry_kit import docker_registry

#: What the link has taken and not delivered when it breaks (in the kernel), for each of the connections.
UNDELIVERED_BYTES = 128 << 10
MEMORY_GOAL_MIB = 150
#: What an agent may grow by between the first and the last tenth of the download.
GROWTH_GOAL_MIB = 16
TIME_GOAL = 1.1
#: Round trips, pauses and what is fetched again: for the start and each cut.
CUT_GOAL_S = 3.0
#: The same, and an agent that starts and tests its sandboxes.
KILL_GOAL_S = 8.0
#: Between two changes of what is told of an image that is on its way.
SILENCE_GOAL_S = 5.0
GOALS = f"""time: {TIME_GOAL:g} times the link's own, {CUT_GOAL_S:g} s for the start and each cut, {KILL_GOAL_S:g} s for
each kill; fetched again: {MAX_IN_FLIGHT_BYTES >> 20} MiB for each; memory: {MEMORY_GOAL_MIB} MiB, {GROWTH_GOAL_MIB} MiB
more at the end than at the beginning; silence: {SILENCE_GOAL_S:g} s, and {KILL_GOAL_S:g} s across a kill"""
OF_IMAGE = ("resolve", "download", "unpack")


def make_image(scale: float) -> Path:
    """The layout of a counter with ballast; made once, and found again by later runs."""
    target = WORK / f"slow-image-{scale:g}"
    if not target.is_dir():
        staged = target.with_name(f".{target.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        ballast = _image.ballast(Layout(staged), "gzip", scale=scale)
        build_python_image(staged, app=Path(counter_app.__file__), ballast=ballast)
        staged.rename(target)
    return target


async def watch(address: str, template: Course, waking: Course, operations: dict[str, Operation]) -> None:
    """Follows the template ``slow``, and operations (by id) that wake the actor ``sleeper`` from now on."""
    is_new = False
    async with AioClient(address) as client:
        request = pb.WatchRequest(kinds=["template", "operation"], namespace="default")
        async for event in client.system.Watch(request):
            is_new |= event.type == pb.WatchEvent.TYPE_SYNCED
            match record_of(event) if is_new else None:
                case Template(name="slow") as record:
                    phase = record.phase or record.state
                    template.add(phase, layer_bytes(record.layers)[0])
                case Operation(name="sleeper", kind=OperationKind.RESUME) as record:
                    operations[record.id] = record
                    waking.add(record.phase or record.state, bytes_of(record)[0])


# --- what people do -----------------------------------------------------------------------------------------------


def make_sleeper(live: LiveServer, reference: str) -> None:
    """An actor that has been awake, and whose image has been removed since."""
    spec = TemplateSpec(image=reference, readyz=Probe(path="/healthz"))
    template = live.apply("earlier", spec, timeout_s=300)
    assert template.state is TemplateState.READY, template.message
    live.client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name="sleeper", template="earlier"))
    assert live.request("default/sleeper").status == 200
    live.client.actors.SuspendActor(pb.ActorRequest(namespace="default", name="sleeper"))
    live.client.images.RemoveImage(pb.ImageRequest(image=reference))


def environment(live: LiveServer) -> dict[str, str]:
    return {**os.environ, "GREENROOM_HOME": str(live.data_dir), "TERM": "xterm", "COLUMNS": "120"}


@dataclass
class Seen:
    """What a command did: its exit status, seconds, and all that it wrote to its terminal."""

    status: int
    seconds: float
    screen: str


async def on_terminal(live: LiveServer, *arguments: str) -> Seen:
    """Runs a command of ``greenroom`` on a terminal."""
    ours, its = pty.openpty()
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(*GREENROOM, *arguments), stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment(live)
    )
    os.close(its)
    screen = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                screen.extend(data)
        except OSError:  # nobody has the other end any more (EIO)
            os.close(ours)

    await asyncio.to_thread(read)
    return Seen(await process.wait(), time.monotonic() - began, screen.decode(errors="replace"))


async def visit(live: LiveServer) -> tuple[list[str], dict[str, Any]]:
    """Requests to the actor as a good client sends them, until one is served: what the refusals said, and the answer.
    The first waits until it is refused, the others come when they were told to."""
    said = []
    while True:
        answer = await asyncio.to_thread(live.request, "default/sleeper")
        if answer.status == 200:
            return said, json.loads(answer.body)
        retry_after = answer.headers.get("Retry-After", "")
        said.append(f"{answer.status} {answer.headers.get('Greenroom-Error', '')} {retry_after} {answer.body.decode()}")
        await asyncio.sleep(float(retry_after or 1))


async def kill_agents(live: LiveServer, link: Link, at_bytes: list[int], killed: list[float]) -> None:
    for at in at_bytes:
        await link.reached(at)
        say(f"killing the agents after {link.blob_bytes / 1e6:.0f} MB")
        killed.append(time.monotonic())
        for agent in live.pids()[1:]:
            os.kill(agent, signal.SIGKILL)


# --- the whole ----------------------------------------------------------------------------------------------------


async def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    layout = await asyncio.to_thread(make_image, arguments.scale)
    (work / "registry").mkdir()
    live = LiveServer(work / "up", backend=arguments.backend, workers=2, slots=4)
    async with AsyncExitStack() as stack:
        registry = stack.enter_context(docker_registry(work / "registry"))
        await asyncio.to_thread(push_layout, layout, f"{registry}/test/slow:1")
        proxy = await stack.enter_async_context(FaultProxy(registry).running())
        reference = f"{proxy.host}/test/slow:1"
        await asyncio.to_thread(live.start)
        stack.push_async_callback(asyncio.to_thread, live.stop)
        await asyncio.to_thread(make_sleeper, live, reference)
        size = sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir()) - _manifest_bytes(layout)
        say(f"{size / 1e6:.0f} MB over {arguments.bits_per_s / 1e6:g} Mbit/s, {arguments.latency_s:g} s a round trip")
        link = Link(proxy, size, bits_per_s=arguments.bits_per_s, latency_s=arguments.latency_s, cuts=arguments.cuts)
        cuts = proxy.cuts
        figures = await people(arguments, live, link, reference, work)
        figures["cuts"] = proxy.cuts - cuts
        figures["files"] = _ballast_files(work / "up" / "images")
    return figures


async def people(
    arguments: argparse.Namespace, live: LiveServer, link: Link, reference: str, work: Path
) -> dict[str, Any]:
    """One applies the template, others want the actor that sleeps."""
    manifest = work / "slow.yaml"
    spec = {"image": reference, "ports": [8080], "readyz": {"path": "/healthz"}}
    head = {"apiVersion": "greenroom.dev/v1alpha1", "kind": "Template", "metadata": {"name": "slow"}}
    manifest.write_text(json.dumps({**head, "spec": spec}))
    template, waking, operations = Course(), Course(), dict[str, Operation]()
    memory, killed = Memory(live, link), list[float]()
    chance = random.Random(arguments.seed)
    kills = sorted(chance.randrange(link.size // 20, link.size * 19 // 20) for _ in range(arguments.kills))
    beside = [
        asyncio.create_task(watch(live.address, template, waking, operations)),
        asyncio.create_task(memory.sample()),
        asyncio.create_task(kill_agents(live, link, kills, killed)),
    ]
    try:
        applying = asyncio.create_task(on_terminal(live, "apply", "-f", str(manifest)))
        await link.reached(link.size // 20)
        visiting = asyncio.create_task(visit(live))
        resuming = asyncio.create_task(on_terminal(live, "resume", "sleeper"))
        applied, resumed, (refusals, answer) = await applying, await resuming, await visiting
        await asyncio.to_thread(_first_actor, live)
    finally:
        for task in beside:
            task.cancel()
        ended = await asyncio.gather(*beside, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    silences = template.silences(OF_IMAGE)
    across = [(until - since, phase) for since, until, phase in silences if any(since < k < until for k in killed)]
    others = [(until - since, phase) for since, until, phase in silences if not any(since < k < until for k in killed)]
    waits = tuple(f"prepare/{phase}" for phase in OF_IMAGE)
    download_s, link_s = template.seconds("download"), link.size * 8 / arguments.bits_per_s
    return {
        "scale": arguments.scale,
        "compressed_mb": round(link.size / 1e6, 1),
        "applied": applied.status == 0 and "template/slow ready" in applied.screen,
        "seconds": round(applied.seconds, 1),
        "phases_s": {name: round(template.seconds(name), 1) for name in (*OF_IMAGE, "boot", "snapshot")},
        "link_s": round(link_s, 1),
        "ratio": round(download_s / link_s, 3),
        "kills": len(killed),
        "fetched_again_bytes": link.blob_bytes - link.size,
        "longest_silence_s": round(max(others)[0], 2),
        "silent_in": max(others)[1],
        "longest_silence_across_a_kill_s": round(max(across, default=(0.0, ""))[0], 2),
        "progress_changes": len(template.told),
        "bars_drawn": len(set(re.findall(r"[\d.]+ [KMG]?i?B of [\d.]+ [KMG]?i?B", applied.screen))),
        "agent_mib": round(memory.agent_mib, 1),
        "unpacker_mib": round(memory.unpacker_mib, 1),
        "agent_and_unpacker_mib": round(memory.tree_mib, 1),
        "agent_early_mib": round(memory.early_mib, 1),
        "agent_late_mib": round(memory.late_mib, 1),
        "actor": {
            "resume_status": resumed.status,
            "resume_said": re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", resumed.screen).strip().splitlines()[-1:],
            "operations": [f"{one.state}, attempt {one.attempts}" for one in operations.values()],
            "phases": list(dict.fromkeys(phase for _, phase, _ in waking.told)),
            "longest_silence_s": round(max((u - s for s, u, _ in waking.silences(waits)), default=0.0), 2),
            "progress_changes": len(waking.told),
            "refusals": len(refusals),
            "refused_with": sorted({" ".join(text.split(" ", 3)[:3]) for text in refusals}),
            "first_refusal": refusals[0] if refusals else "",
            "answer": answer,
        },
    }


def _first_actor(live: LiveServer) -> None:
    live.client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name="first", template="slow"))
    answer = live.request("default/first")
    assert answer.status == 200, answer


def _manifest_bytes(layout: Path) -> int:
    """Of what is in the layout and fetched as no blob."""
    (descriptor,) = Layout(layout).index().manifests
    return descriptor.size


def _ballast_files(images: Path) -> int:
    found = (path for path in (images / "rootfs").rglob("*_[0-9][0-9][0-9][0-9][0-9][0-9].*"))
    return sum(1 for path in found if not path.is_symlink())


def judge(figures: dict[str, Any], arguments: argparse.Namespace) -> dict[str, bool]:
    breaks, actor = arguments.cuts + arguments.kills, figures["actor"]
    allowed_s = TIME_GOAL * figures["link_s"] + CUT_GOAL_S * (arguments.cuts + 1) + KILL_GOAL_S * arguments.kills
    return {
        "ready": figures["applied"] and figures["kills"] == arguments.kills,
        "whole": figures["files"] == _image.files(arguments.scale),
        "time": figures["phases_s"]["download"] <= allowed_s,
        "fetched_again": figures["fetched_again_bytes"] <= breaks * (MAX_IN_FLIGHT_BYTES + 4 * UNDELIVERED_BYTES),
        "memory": figures["agent_and_unpacker_mib"] <= MEMORY_GOAL_MIB,
        "memory_flat": figures["agent_late_mib"] <= figures["agent_early_mib"] + GROWTH_GOAL_MIB,
        "silence": figures["longest_silence_s"] <= SILENCE_GOAL_S
        and figures["longest_silence_across_a_kill_s"] <= KILL_GOAL_S,
        "bars": figures["bars_drawn"] > 5,
        "actor": actor["resume_status"] == 0
        and [one.partition(",")[0] for one in actor["operations"]] == ["Done"]
        and "prepare/download" in actor["phases"]
        and all(text.startswith("503 IMAGE_PREPARING ") for text in actor["refused_with"])
        and actor["refusals"] > 0
        and actor["answer"]["file"] > 1,  # it went on where it was
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the ballast; 1 is 360 MB, beside 25 MB of Python")
    parser.add_argument("--cuts", type=int, default=5, help="how often all connections break")
    parser.add_argument("--kills", type=int, default=2, help="how often the agents are killed")
    parser.add_argument("--bits-per-s", type=float, default=10e6)
    parser.add_argument("--latency-s", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="gvisor" if os.geteuid() == 0 else "process")
    arguments = parser.parse_args()
    before = conditions()
    WORK.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gr-"))  # a short path: socket addresses are limited to 107 bytes
    os.environ["PATH"] = f"{WORK.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    try:
        figures = asyncio.run(measure(arguments, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    ok = judge(figures, arguments)
    report("slow_pull", {**figures, "goals": ok}, before=before, ok=all(ok.values()))
    if not all(ok.values()):
        raise SystemExit(f"{GOALS}\n{json.dumps(ok)}")


if __name__ == "__main__":
    main()
