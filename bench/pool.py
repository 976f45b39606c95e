"""What the operator costs: many worker pools against an API server over HTTP.

The API server is the fake one of `greenroom.testing`, in a process of its own together with nodes that start each pod
at once; the operator is this process, so its CPU time and memory are this process's. Measured: from nothing to all
workers ready; then at rest; then after every watch has ended with 410, so that everything is listed again.

Goals: at most 3 writes for each worker (ledger, pod, ledger); none at rest, but for the lease.

    python bench/pool.py [--pools 500] [--workers 10] [--idle 600]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import uvloop
from _kit import conditions, report, say

from greenroom.operator.crds import definitions
from greenroom.operator.kubeconfig import Connection
from greenroom.operator.operator import Operator
from greenroom.operator.transport import HttpTransport
from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.http import FakeKube
from greenroom.testing.fake_kube.objects import Caller
from greenroom.testing.fake_kube.resources import CRD

GOAL_WRITES = 3.0
LIMIT_S = 900.0


# --- the API server's process -----------------------------------------------------------------------------


async def serve() -> None:
    """Answers a line of JSON to each line with a command on stdin."""
    async with FakeKube() as kube:
        objects = kube.api.objects
        for definition in definitions():
            objects.create(CRD, "", definition)
        pools = objects.registry.of_kind("greenroom.dev/v1alpha1", "WorkerPool")
        assert pools is not None

        def command(words: list[str]) -> Any:
            match words:
                case ["pools", count, workers]:
                    for n in range(int(count)):
                        made = {"metadata": {"name": f"pool-{n:04}"}, "spec": {"replicas": int(workers)}}
                        objects.create(pools, "default", made, Caller("person"))
                case ["scale", workers]:
                    pool = objects.get(pools, "default", "pool-0000")
                    changed = {**pool, "spec": {**pool["spec"], "replicas": int(workers)}}
                    objects.update(pools, "default", "pool-0000", changed, Caller("person"))
                case ["expire"]:
                    kube.api.view.compact()
                    kube.api.view.drop_watches(KubeError(410, "Expired", "too old resource version"))
                case ["state"]:
                    found = objects.state.get(pools.key, {}).values()
                    status = [p.get("status", {}) for p in found]
                    return {
                        "ready": sum(s.get("readyReplicas", 0) for s in status),
                        "pods": len(objects.state.get(("", "pods"), {})),
                        "requests": kube.requests,
                        "writes": Counter(
                            f"{e.verb} {e.key[1]}{'/' + e.subresource if e.subresource else ''}"
                            for e in objects.log
                            if e.client.startswith("greenroom-operator")
                        ),
                    }
            return {}

        nodes = asyncio.create_task(Cluster(objects).follow(pause_s=0.01))
        print(json.dumps({"url": kube.url}), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for line in reader:
            print(json.dumps(command(line.decode().split())), flush=True)
        nodes.cancel()


class Server:
    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process = process
        self.url = url

    @staticmethod
    async def start() -> Server:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__).resolve()), "--serve", stdin=pipe, stdout=pipe
        )
        assert process.stdout is not None
        return Server(process, json.loads(await process.stdout.readline())["url"])

    async def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command.encode() + b"\n")
        return dict(json.loads(await self._process.stdout.readline()))

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


# --- the operator's -----------------------------------------------------------------------------------------


async def until(holds: Callable[[], Awaitable[bool]]) -> float:
    began = time.perf_counter()
    async with asyncio.timeout(LIMIT_S):
        while not await holds():  # noqa: ASYNC110 - it is asked over a pipe
            await asyncio.sleep(0.25)
    return time.perf_counter() - began


def memory_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(fields["VmRSS"].split()[0]) / 1024, 1)


def writes(state: dict[str, Any]) -> dict[str, int]:
    return {what: count for what, count in state["writes"].items() if "leases" not in what}


async def run(pools: int, workers: int, idle_s: float) -> None:
    before = conditions()
    server = await Server.start()
    total = pools * workers

    async def ready(count: int) -> bool:
        state = await server.ask("state")
        return bool(state["ready"] == count and state["pods"] == count)

    async with HttpTransport(lambda: Connection(server.url)) as transport:
        empty_mib = memory_mib()
        await server.ask(f"pools {pools} {workers}")
        operator = asyncio.create_task(Operator(transport, "default", "operator-bench").run())
        try:
            cpu = time.process_time()
            create_s = await until(lambda: ready(total))
            create_cpu_s = time.process_time() - cpu
            await asyncio.sleep(5)  # what is still written about the last of them
            made = await server.ask("state")
            say(f"{total} workers ready in {create_s:.1f} s, {create_cpu_s:.1f} s of CPU")

            cpu, began = time.process_time(), time.perf_counter()
            await asyncio.sleep(idle_s)
            idle_cpu = (time.process_time() - cpu) / (time.perf_counter() - began)
            rested = await server.ask("state")
            idle_writes = sum(writes(rested).values()) - sum(writes(made).values())
            say(f"at rest for {idle_s:g} s: {idle_writes} writes, {100 * idle_cpu:.2f} % of a core")

            cpu = time.process_time()
            await server.ask("expire")
            await server.ask(f"scale {workers + 1}")
            relist_s = await until(lambda: ready(total + 1))
            relist_cpu_s = time.process_time() - cpu
            after = await server.ask("state")
            relist_writes = sum(writes(after).values()) - sum(writes(rested).values())
            say(f"listed again and followed a change in {relist_s:.1f} s, {relist_cpu_s:.2f} s of CPU")
        finally:
            operator.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await operator
    await server.stop()
    by_kind = writes(made)
    per_worker = sum(by_kind.values()) / total
    figures = {
        "pools": pools,
        "workers": total,
        "create_s": round(create_s, 2),
        "create_cpu_s": round(create_cpu_s, 2),
        "cpu_ms_per_worker": round(1000 * create_cpu_s / total, 2),
        "writes": by_kind,
        "writes_per_worker": round(per_worker, 3),
        "memory_mib": memory_mib(),
        "memory_empty_mib": empty_mib,
        "idle_s": idle_s,
        "idle_writes": idle_writes,
        "idle_cpu_share": round(idle_cpu, 5),
        "relist_s": round(relist_s, 2),
        "relist_cpu_s": round(relist_cpu_s, 2),
        "relist_writes": relist_writes,
    }
    report("pool", figures, before=before, ok=per_worker <= GOAL_WRITES and idle_writes == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=500)
    parser.add_argument("--workers", type=int, default=10, help="of each pool")
    parser.add_argument("--idle", type=float, default=600, help="seconds at rest")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    uvloop.run(serve() if args.serve else run(args.pools, args.workers, args.idle))


if __name__ == "__main__":
    main()
