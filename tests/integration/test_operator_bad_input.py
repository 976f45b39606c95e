"""What people, clusters and control planes do to the operator, and what it says of it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from operator_kit import Setting, setting, until

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.testing.fake_kube.adversary import Quota
from greenroom.testing.fake_kube.kubelet import Kubelet
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


async def test_a_quota_is_said_and_then_obeyed(there: Setting) -> None:
    assert there.kube is not None and there.cluster is not None
    cluster = there.cluster
    quota = Quota(lambda: len(cluster.pods()), most=1)
    there.kube.api.objects.admit.append(quota)
    there.operator("first")
    await there.apply("WorkerPool", "default", replicas=3, backend="sim")
    await until(lambda: says(there, "workerpool", "default", "ReplicaFailure", "True", "exceeded quota"))
    assert len(await there.pods()) == 1
    quota.most = None
    await until(lambda: says(there, "workerpool", "default", "ReplicaFailure", "False"))
    await until(lambda: replicas(there, "default", 3))


async def test_an_image_that_can_not_be_pulled_is_said(tmp_path: Path) -> None:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    pods = Path(tempfile.mkdtemp(prefix="gk-"))
    plane = LiveServer(data, backend="sim", workers=0)
    async with setting(tmp_path, plane, cluster=lambda api: Kubelet(api.objects, directory=pods, images={})) as there:
        there.operator("first", "--worker-image=nowhere/nothing:1")
        await there.apply("WorkerPool", "default", replicas=1, backend="sim")
        words = ("0 of 1", "ImagePullBackOff", "nowhere/nothing:1")
        await until(lambda: says(there, "workerpool", "default", "Ready", "False", *words))
        await there.kubectl("delete", "wp", "default", "--timeout=60s")
        assert await there.pods() == []
    shutil.rmtree(pods)
    shutil.rmtree(data)


async def test_a_pool_that_is_deleted_and_made_again(there: Setting) -> None:
    there.operator("first")
    await there.apply("WorkerPool", "default", replicas=2, backend="sim")
    await until(lambda: replicas(there, "default", 2))
    old = {pod["metadata"]["name"] for pod in await there.pods()}
    await there.kubectl("delete", "wp", "default", "--timeout=60s")
    await there.apply("WorkerPool", "default", replicas=2, backend="sim", slots=7)
    await until(lambda: replicas(there, "default", 2))
    assert not old & {pod["metadata"]["name"] for pod in await there.pods()}

    async def knows_it() -> bool:
        pools = there.plane.client.pools.ListPools(pb.ListPoolsRequest()).pools
        return [pool.spec.slots for pool in pools if pool.name == "default"] == [7]

    await until(knows_it)


async def test_a_pool_that_the_control_plane_has_with_another_backend(there: Setting) -> None:
    request = pb.ApplyPoolRequest(name="mine", spec={"replicas": 0, "slots": 1, "backend": "process"})
    there.plane.client.pools.ApplyPool(request)
    there.operator("first")
    await there.apply("WorkerPool", "mine", replicas=1, backend="sim")
    await until(lambda: says(there, "workerpool", "mine", "Registered", "False", "can't change", "make another pool"))
    there.plane.client.pools.DeletePool(pb.DeletePoolRequest(name="mine"))
    await until(lambda: says(there, "workerpool", "mine", "Registered", "True"))


async def test_a_control_plane_that_is_away(there: Setting) -> None:
    """Pods are kept all the same, and it is told when it is back."""
    operator = there.operator("first")
    await until(operator.leads)
    await asyncio.to_thread(there.plane.kill)
    await there.apply("WorkerPool", "late", replicas=2, backend="sim")
    await until(lambda: replicas(there, "late", 2))
    await until(lambda: says(there, "workerpool", "late", "Registered", "False"))
    await there.apply("ActorTemplate", "counter", image="none", pool="late")
    await asyncio.to_thread(there.plane.start)
    await until(lambda: says(there, "workerpool", "late", "Registered", "True"))
    await until(lambda: says(there, "actortemplate", "counter", "Accepted", "True"))
    assert operator.process is not None and operator.process.poll() is None


async def test_a_template_that_the_schema_takes_and_the_control_plane_does_not(there: Setting) -> None:
    there.operator("first")
    await there.apply("ActorTemplate", "odd", image=" none ")
    await until(lambda: says(there, "actortemplate", "odd", "Accepted", "False", "image"))
    await there.kubectl("delete", "at", "odd", "--timeout=60s")


async def test_what_the_schema_takes_and_nobody_can_send_holds_up_nothing_else(there: Setting) -> None:
    operator = there.operator("first")
    await there.apply("ActorTemplate", "huge", image="none", resources={"memory": "10E"})
    await there.apply("ActorTemplate", "slow", image="none", idleTimeout="99999999999999h")
    await until(lambda: says(there, "actortemplate", "huge", "Accepted", "False", "resources.memory"))
    await until(lambda: says(there, "actortemplate", "slow", "Accepted", "False", "idle_timeout"))
    await there.apply("WorkerPool", "default", replicas=1, backend="sim")
    await until(lambda: replicas(there, "default", 1))
    # Digits, for one function of Python's; no number, for the other.
    await there.kubectl("annotate", "wp", "default", "greenroom.dev/epoch=\u00b2", "--overwrite")
    await there.apply("WorkerPool", "other", replicas=1, backend="sim")
    await until(lambda: replicas(there, "other", 1))
    await there.kubectl("scale", "wp", "default", "--replicas=2")
    await until(lambda: replicas(there, "default", 2))
    assert operator.process is not None and operator.process.poll() is None


async def test_a_pool_is_handed_over_to_nobody(there: Setting) -> None:
    operator = there.operator("first")
    await there.apply("WorkerPool", "default", replicas=1, backend="sim")
    await until(lambda: replicas(there, "default", 1))
    patch = '{"spec": {"managedBy": "somebody/else"}}'
    said = await there.kubectl("patch", "wp", "default", "--type=merge", "-p", patch, fails=True)
    assert "spec.managedBy" in said and "can't change" in said
    assert operator.process is not None and operator.process.poll() is None


async def test_what_is_edited_by_hand_is_put_right_or_not_believed(there: Setting) -> None:
    there.operator("first")
    await there.apply("WorkerPool", "default", replicas=2, backend="sim")
    await until(lambda: replicas(there, "default", 2))
    names = sorted(pod["metadata"]["name"] for pod in await there.pods())
    await there.kubectl("label", "pod", names[0], "greenroom.dev/pool-uid=other", "--overwrite")
    await there.kubectl("label", "pod", names[0], "greenroom.dev/pool=other", "--overwrite")
    await there.kubectl("patch", "pod", names[1], "--type=merge", "-p", '{"metadata": {"ownerReferences": []}}')
    await there.kubectl("label", "pod", names[1], "greenroom.dev/pool=other", "--overwrite")
    cut = '{"status": {"ledger": {"nextOrdinal": 0, "slots": {}}}}'
    await there.kubectl("patch", "wp", "default", "--subresource=status", "--type=merge", "-p", cut)
    await until(lambda: says(there, "workerpool", "default", "LedgerRebuilt", "True", "from 2 pods"))
    # What the autoscaler would write is not believed of one that says how many it wants.
    odd = 'greenroom.dev/scaled={"replicas": 9, "victims": ["x"]}'
    await there.kubectl("annotate", "wp", "default", odd)

    async def is_right() -> bool:
        found = [pod["metadata"] for pod in await there.pods()]
        return sorted(meta["name"] for meta in found) == names and all(
            (meta.get("ownerReferences") or [{}])[0].get("uid") == meta["labels"]["greenroom.dev/pool-uid"]
            for meta in found
        )

    await until(is_right)
