"""The operator after somebody has forgotten something: a control plane, a cluster, another operator."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from operator_kit import Setting, setting, until

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.snapshots.store import MARK
from greenroom.testing.live import LiveServer


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Setting]:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    async with setting(tmp_path, LiveServer(data, backend="sim", workers=0)) as made:
        yield made
    shutil.rmtree(data)


async def says(there: Setting, kind: str, name: str, which: str, status: str, *words: str) -> bool:
    found = await there.condition(kind, name, which)
    return found.get("status") == status and all(word in found.get("message", "") for word in words)


async def replicas(there: Setting, name: str, count: int) -> bool:
    return ((await there.object("workerpool", name)).get("status") or {}).get("readyReplicas") == count


async def is_known(there: Setting, name: str) -> bool:
    pools = await asyncio.to_thread(there.plane.client.pools.ListPools, pb.ListPoolsRequest())
    return name in {pool.name for pool in pools.pools}


async def test_a_control_plane_that_lost_its_database_is_told_all_again(there: Setting) -> None:
    operator = there.operator("first")
    await there.apply("WorkerPool", "one", replicas=1, backend="sim")
    await there.apply("ActorTemplate", "counter", image="none", pool="one")
    await until(lambda: is_known(there, "one"))
    await asyncio.to_thread(there.plane.kill)
    for path in there.plane.data_dir.iterdir():
        if path.name.startswith("greenroom.db"):
            path.unlink()
    (there.plane.data_dir / "snapshots" / MARK).unlink()  # somebody has agreed that what was there is nobody's now
    assert operator.process is not None
    operator.process.send_signal(signal.SIGSTOP)  # or it might be quicker than the look
    await asyncio.to_thread(there.plane.start)
    assert not await is_known(there, "one")
    operator.process.send_signal(signal.SIGCONT)
    await until(lambda: is_known(there, "one"))


async def test_a_cluster_that_was_restored_says_what_to_do(there: Setting) -> None:
    operator = there.operator("first")
    await there.apply("WorkerPool", "one", replicas=1, backend="sim")
    await until(lambda: replicas(there, "one", 1))
    await until(lambda: is_known(there, "one"))
    # What the control plane was told before the cluster lost it.
    pool = await there.object("workerpool", "one")
    later = pb.AdmitWorkersRequest(
        pool="one", pool_uid=pool["metadata"]["uid"], namespace="default", epoch=1, ledger_version=1_000_000_000
    )
    there.plane.client.pools.AdmitWorkers(later)
    await there.kubectl("scale", "wp/one", "--replicas=2")
    await until(lambda: says(there, "workerpool", "one", "Registered", "False", "restored from a backup"))
    message = (await there.condition("workerpool", "one", "Registered"))["message"]
    command = message.partition("kubectl ")[2].replace("'", "").split()
    await there.kubectl(*command)
    await until(lambda: says(there, "workerpool", "one", "Registered", "True"))
    await until(lambda: replicas(there, "one", 2))
    assert operator.process is not None and operator.process.poll() is None


async def test_a_pool_that_can_not_go_says_why(there: Setting) -> None:
    there.operator("first")
    await there.apply("WorkerPool", "one", replicas=1, backend="sim")
    await until(lambda: replicas(there, "one", 1))
    await asyncio.to_thread(there.plane.kill)
    await there.kubectl("delete", "wp", "one", "--wait=false")
    await until(lambda: says(there, "workerpool", "one", "Registered", "False", "it goes when the control plane"))
    await asyncio.to_thread(there.plane.start)
    await there.kubectl("wait", "--for=delete", "wp/one", "--timeout=60s")


async def test_a_new_leader_unsays_nothing_that_is_so(there: Setting) -> None:
    assert there.kube is not None
    first = there.operator("first")
    await there.apply("SandboxConfig", "pinned", backend="sim")
    names = [f"pool-{n}" for n in range(6)]
    for name in names:
        await there.apply("WorkerPool", name, replicas=0, backend="sim")

    async def pools() -> list[str]:
        return list(((await there.object("sandboxconfig", "pinned")).get("status") or {}).get("pools") or ())

    async def says_all() -> bool:
        return await pools() == [f"default/{name}" for name in names]

    await until(says_all)
    assert await first.stop() == 0
    # While nobody operates one goes for good, and its finalizer with it.
    await there.kubectl("patch", "wp", names[0], "--type=merge", "-p", '{"metadata": {"finalizers": []}}')
    await there.kubectl("delete", "wp", names[0])
    said: list[Any] = []
    there.kube.api.objects.on_change.append(
        lambda entry: said.append(entry.object["status"]["pools"]) if entry.key[1] == "sandboxconfigs" else None
    )
    there.operator("second")

    async def says_the_rest() -> bool:
        return await pools() == [f"default/{name}" for name in names[1:]]

    await until(says_the_rest)
    await asyncio.sleep(3)  # whatever else it would say
    assert said == [[f"default/{name}" for name in names[1:]]]
