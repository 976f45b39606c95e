"""The roles of the chart are what is really asked for: nothing is missing, and nothing is there that is not used."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from install_kit import NAMESPACE, VALUES, objects, of_kind, operator_rights
from operator_kit import Setting, setting, until

from greenroom.testing.fake_kube.rbac import Guard, Right, rights
from greenroom.testing.live import LiveServer

#: Where the operator of this test is at home.
HERE = "default"
#: Rights that no request shows, and why they are given all the same.
UNSEEN = {
    Right(HERE, "greenroom.dev", "workerpools/finalizers", "update"): "checked when a pod names its owner, by an "
    "admission plugin that not every cluster has",
}


async def test_the_operator_may_do_what_it_does_and_nothing_else(tmp_path: Path) -> None:
    data = Path(tempfile.mkdtemp(prefix="gr-"))
    given = operator_rights(HERE)
    async with setting(tmp_path, LiveServer(data, backend="sim", workers=0)) as there:
        assert there.kube is not None
        guard = Guard(there.kube.api.handle, given, agent="greenroom-operator")
        there.kube._handler = guard.handle
        operator = there.operator("first", f"--namespace={HERE}")
        await until(operator.leads)
        await _live(there)
        assert await operator.stop() == 0
    shutil.rmtree(data)
    assert not guard.refused, "it asks for what the roles do not give"
    assert given - guard.used == set(UNSEEN), "the roles give what it never asks for"


async def _live(there: Setting) -> None:
    """All that happens to what it looks after, in one life of each."""
    asset = {"url": "https://example.org/x", "sha256": "0" * 64, "path": "x"}
    await there.apply("SandboxConfig", "sim", backend="sim", assets=[asset])
    await there.apply("WorkerPool", "default", replicas=2, backend="sim")
    await there.apply("ActorTemplate", "counter", image="none", pool="default")

    async def pods(count: int) -> bool:
        return len(await there.pods()) == count

    async def used() -> bool:
        return bool((await there.object("sandboxconfig", "sim")).get("status"))

    async def accepted() -> bool:
        return bool((await there.object("actortemplate", "counter")).get("status"))

    async def has_budget() -> bool:
        return ((await there.object("pdb", "default-workers")).get("spec") or {}).get("maxUnavailable") == 1

    for holds in (lambda: pods(2), used, accepted, has_budget):
        await until(holds)
    await there.kubectl("patch", "pdb", "default-workers", "--type=merge", "-p", '{"spec": {"maxUnavailable": 2}}')
    await until(has_budget)
    await there.kubectl("scale", "wp/default", "--replicas=1")
    await until(lambda: pods(1))
    await there.kubectl("delete", "actortemplate", "counter", "--timeout=60s")
    await there.kubectl("delete", "wp", "default", "--timeout=60s")
    await until(lambda: pods(0))


def test_the_role_for_people_is_what_kubectl_greenroom_asks_for() -> None:
    role = of_kind(objects(VALUES["manifest"]), "Role")["greenroom-client"]
    assert rights([role]) == {
        Right(NAMESPACE, "", "services", "get", "greenroom"),
        Right(NAMESPACE, "", "pods", "list"),
        # The second is what a server of 1.35 asks for besides.
        Right(NAMESPACE, "", "pods/portforward", "get"),
        Right(NAMESPACE, "", "pods/portforward", "create"),
        Right(NAMESPACE, "", "secrets", "get", "greenroom-tokens"),
        Right(NAMESPACE, "", "secrets", "get", "greenroom-tls"),
    }


def test_nobody_else_has_a_right() -> None:
    for values in VALUES.values():
        found = objects(values)
        bound = [s["name"] for b in of_kind(found, "RoleBinding", "ClusterRoleBinding").values() for s in b["subjects"]]
        assert set(bound) == {"greenroom-operator"}
