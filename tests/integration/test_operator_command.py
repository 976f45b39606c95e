"""``greenroom operator`` as real processes beside a real control plane, in a fake cluster over HTTP."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from operator_kit import Setting, setting, until

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.operator.election import LEASE_S
from greenroom.testing.live import LiveServer


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.kube_apiserver)])
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setting]:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    plane = LiveServer(data, backend="sim", workers=0)
    async with setting(tmp_path, plane, token="first", real=request.param == "real") as made:
        yield made
    shutil.rmtree(data)


async def has_pods(there: Setting, count: int, *, only: str = "") -> bool:
    pods = await there.pods()
    return len(pods) == count and all(only in p["spec"]["containers"][0]["image"] for p in pods)


async def test_the_standby_goes_on_when_the_leader_is_killed(there: Setting) -> None:
    first = there.operator("first")
    await until(first.leads)
    second = there.operator("second", "--worker-image=second:1")
    await there.apply("WorkerPool", "default", replicas=2, backend="sim")
    await until(lambda: has_pods(there, 2))
    assert (await first.get("/readyz"), await first.get("/livez")) == ((200, "leads\n"), (200, "ok\n"))

    async def stands_by() -> bool:
        return await second.get("/readyz") == (200, "stands by\n")

    await until(stands_by)
    names = {pod["metadata"]["name"] for pod in await there.pods()}
    first.kill()
    await there.kubectl("scale", "wp/default", "--replicas=3")
    await until(lambda: has_pods(there, 3), LEASE_S + 30)
    pods = {pod["metadata"]["name"]: pod for pod in await there.pods()}
    assert names < pods.keys()
    (new,) = pods.keys() - names
    assert pods[new]["spec"]["containers"][0]["image"] == "second:1"

    # The control plane knows them all, by its own roster: none of these pods runs an agent, so nobody has registered.
    async def is_known() -> bool:
        pools = await asyncio.to_thread(there.plane.client.pools.ListPools, pb.ListPoolsRequest())
        return "default" in {pool.name for pool in pools.pools}

    await until(is_known)


async def test_one_that_ends_gives_its_lease_back(there: Setting) -> None:
    first = there.operator("first")
    await until(first.leads)
    assert await first.stop() == 0
    lease = await there.object("lease", "greenroom-operator")
    assert lease["spec"]["holderIdentity"] == ""
    second = there.operator("second")

    async def lives() -> bool:
        return (await second.get("/livez"))[0] == 200

    await until(lives)
    await until(second.leads, LEASE_S - 5)


async def test_a_token_that_is_renewed_in_its_file_is_taken_up(there: Setting) -> None:
    first = there.operator("first")
    await until(first.leads)
    await there.apply("WorkerPool", "default", replicas=1, backend="sim")
    await until(lambda: has_pods(there, 1))
    if there.kube is None:
        pytest.skip("a real API server reads its tokens once")
    there.kube._token = "second"
    there.kube.api.view.drop_watches()
    (there.directory / "token").write_text("second\n")
    await there.kubectl("scale", "wp/default", "--replicas=2")
    await until(lambda: has_pods(there, 2))
    assert await first.leads()


async def test_a_disruption_budget_goes_along_and_is_put_right(there: Setting) -> None:
    there.operator("first")
    await there.apply("WorkerPool", "default", replicas=2, backend="sim")

    async def spec() -> dict[str, object]:
        return dict((await there.object("pdb", "default-workers")).get("spec") or {})

    async def is_right() -> bool:
        return (await spec()).get("maxUnavailable") == 1

    await until(is_right)
    await there.kubectl("patch", "pdb", "default-workers", "--type=merge", "-p", '{"spec": {"maxUnavailable": 2}}')
    await until(is_right)
    await there.kubectl("delete", "pdb", "default-workers")
    await until(is_right)
    await there.kubectl(
        "patch", "wp", "default", "--type=merge", "-p", '{"spec": {"replicas": null, "minReplicas": 2}}'
    )

    async def counts_who_stays() -> bool:
        return (await spec()).get("minAvailable") == 1

    await until(counts_who_stays)
    await there.kubectl("delete", "wp", "default", "--timeout=60s")

    async def is_gone() -> bool:
        # Who collects what is nobody's any more is another process than the API server.
        return (there.kube is None or not await there.object("pdb", "default-workers")) and not await there.pods()

    await until(is_gone)
    pools = there.plane.client.pools.ListPools(pb.ListPoolsRequest()).pools
    assert "default" not in {pool.name for pool in pools}
