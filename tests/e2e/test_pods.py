"""A control plane that keeps no workers, and agents that come over TCP, started as pods are: in a network namespace of
their own, configured by variables, on a roster that an operator sends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from agent_kit import short_directory
from kit import Kit, until

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import resources_pb2 as res
from greenroom.api.access import Access
from greenroom.api.client import Client
from greenroom.core.errors import Conflict, GreenroomError, Unauthenticated, Unavailable
from greenroom.core.records import ActorState
from greenroom.testing.certificates import Authority
from greenroom.testing.live import LiveServer

POOL_UID = "pool-uid"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass(frozen=True)
class Net:
    """A cable between this machine and a network namespace: a node and a pod on it."""

    name: str
    here: str
    there: str


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a network namespace")
    number = os.getpid() % 16384
    base = f"10.213.{number >> 6}.{(number & 63) * 4}".rpartition(".")
    net = Net(f"grt{number}", f"{base[0]}.{int(base[2]) + 1}", f"{base[0]}.{int(base[2]) + 2}")
    try:
        _run("ip", "netns", "add", net.name)
        _run("ip", "link", "add", f"{net.name}h", "type", "veth", "peer", "name", "eth0", "netns", net.name)
        _run("ip", "addr", "add", f"{net.here}/30", "dev", f"{net.name}h")
        _run("ip", "link", "set", f"{net.name}h", "up")
        for device, address in (("lo", ""), ("eth0", f"{net.there}/30")):
            if address:
                _run("ip", "-n", net.name, "addr", "add", address, "dev", device)
            _run("ip", "-n", net.name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "del", net.name], check=False, capture_output=True)
        pytest.skip(f"can't make a network namespace: {error}")
    yield net
    _run("ip", "netns", "del", net.name)


@dataclass
class Cluster:
    root: Path
    net: Net
    authority: Authority
    live: LiveServer
    kit: Kit
    others: list[LiveServer] = field(default_factory=list)
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def agents_address(self) -> str:
        return str(self._event("takes agents")["address"])

    @property
    def api_address(self) -> str:
        return str(self._event("api listens")["addresses"][1])

    @property
    def metrics(self) -> str:
        with urllib.request.urlopen(self._event("metrics are served")["address"], timeout=10) as answer:
            return str(answer.read().decode())

    def _event(self, said: str) -> dict[str, Any]:
        lines = (json.loads(line) for line in self.log().splitlines() if line.startswith("{"))
        return next(line for line in lines if line["event"] == said)

    def log(self) -> str:
        return self.live.log_path.read_text(errors="replace")

    def said(self, worker: str) -> str:
        return (self.root / f"{worker}.log").read_text(errors="replace")

    def client(self, **access: Any) -> Client:
        return Client(self.api_address, Access(**({"ca": self.authority.ca, "token": "api-token-1"} | access)))

    def pod(self, ordinal: int, **changed: str) -> str:
        """Starts one; returns the worker's name."""
        worker = f"p-1-{ordinal}"
        variables = {
            "WORKER": worker,
            "POOL": "p",
            "BACKEND": "sim",
            "SLOTS": "2",
            "WARM": "0",
            "STATE_DIR": str(self.root / worker),
            "IMAGES": str(self.root / "images"),
            "SNAPSHOTS": str(self.root / "snapshots"),
            "CONTROL": self.agents_address,
            "CA": str(self.authority.ca),
            "TOKEN_FILE": str(self.root / "agent-token"),
            "EPOCH": "1",
            "ORDINAL": str(ordinal),
            "POD_UID": f"pod-{ordinal}",
            "POOL_UID": POOL_UID,
            "POD_IP": self.net.there,
            "SERVE": "0.0.0.0:0",
            "HEALTH": f"{self.net.there}:{9000 + ordinal}",
            "DRAIN_TIMEOUT": "20",
        } | changed
        with (self.root / f"{worker}.log").open("ab") as log:
            self.agents[worker] = subprocess.Popen(
                ["ip", "netns", "exec", self.net.name, sys.executable, "-m", "greenroom", "agent"],
                env=os.environ | {f"GREENROOM_{name}": value for name, value in variables.items()},
                stdout=log,
                stderr=log,
            )
        return worker

    def end_pods(self) -> None:
        for worker, agent in self.agents.items():
            agent.send_signal(signal.SIGUSR1)  # ends, together with everything that runs on it
            agent.wait(timeout=30)
            print(f"--- {worker}:", self.said(worker))  # shown of a test that fails

    def admit(self, *ordinals: int, epoch: int = 1, version: int) -> Any:
        return self.kit.client.pools.AdmitWorkers(
            pb.AdmitWorkersRequest(
                pool="p",
                pool_uid=POOL_UID,
                namespace="team",
                epoch=epoch,
                ledger_version=version,
                workers=[res.RosterEntry(name=f"p-1-{n}", ordinal=n, epoch=1, pod_uid=f"pod-{n}") for n in ordinals],
            )
        )

    def through_agents(self) -> list[str]:
        """Connections of the gateway to pods: neither health checks nor the links of agents, which these open."""
        shown = subprocess.run(["ss", "-Htn", "dst", self.net.there], check=True, capture_output=True, text=True)
        ends = [line.split()[3:5] for line in shown.stdout.splitlines() if line.startswith("ESTAB")]
        links = self.agents_address.rpartition(":")[2]
        return [
            peer
            for own, peer in ends
            if own.rpartition(":")[2] != links and not 9000 <= int(peer.rpartition(":")[2]) < 9100
        ]

    def ready(self, ordinal: int) -> int:
        try:
            with urllib.request.urlopen(f"http://{self.net.there}:{9000 + ordinal}/readyz", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def active(self, *names: str) -> None:
        until(
            lambda: sorted(w.name for w in self.kit.workers() if w.state == "Active"), lambda now: now == [*names], 20
        )


@contextlib.contextmanager
def _cluster(net: Net, *names: str, store: str = "") -> Iterator[Cluster]:
    """One replica, or several that share a store, by ``names``; `Cluster.live` is the first."""
    with short_directory() as root, contextlib.ExitStack() as ends:
        authority = Authority(root)
        authority.issue(root / "tls.crt", root / "tls.key", [net.here, "localhost"])
        (root / "agent-token").write_text("agent-token-1\n")
        (root / "agent-tokens").write_text("agent-token-1\n")
        (root / "api-tokens").write_text("api-token-0\napi-token-1\n")
        options = (
            f"--snapshots={root}/snapshots",
            f"--agents={net.here}:0",
            f"--api={net.here}:0",
            "--metrics=127.0.0.1:0",
            f"--tls-cert={root}/tls.crt",
            f"--tls-key={root}/tls.key",
            f"--agent-token-file={root}/agent-tokens",
            f"--api-token-file={root}/api-tokens",
            "--rosters",
            "--worker-return=3",
        )
        lives = []
        for name in names or ("server",):
            own = (f"--name={name}", f"--store={store}") if store else ()
            live = LiveServer(root / name, backend="sim", workers=0, options=(*options, *own))
            live.start()
            ends.callback(lambda live=live: print(f"--- {live.data_dir}:", live.log_path.read_text(errors="replace")))
            ends.callback(live.stop)
            lives.append(live)
        cluster = Cluster(root, net, authority, lives[0], Kit(lives[0], "sim:t"), others=lives[1:])
        ends.callback(cluster.end_pods)
        spec = res.PoolSpec(replicas=0, slots=2, backend="sim")
        lives[0].client.pools.ApplyPool(pb.ApplyPoolRequest(name="p", spec=spec))
        yield cluster


@pytest.fixture
def cluster(net: Net) -> Iterator[Cluster]:
    with _cluster(net) as cluster:
        yield cluster


def test_a_request_wakes_an_actor_in_a_pod_and_reaches_it_through_its_agent(cluster: Cluster) -> None:
    cluster.admit(0, version=1)
    worker = cluster.pod(0)
    cluster.active(worker)
    assert until(lambda: cluster.ready(0), lambda status: status == 200)
    cluster.kit.apply("t", pool="p")
    cluster.kit.create("a", template="t")
    answer = cluster.live.request("default/a")
    assert answer.status == 200, answer.body
    assert [cluster.live.request("default/a").status for _ in range(20)] == [200] * 20
    assert cluster.through_agents(), "the gateway has a connection to the agent, and none to the actor"
    cluster.kit.act("Suspend", "a")
    assert cluster.live.request("default/a").status == 200
    demand = cluster.kit.client.pools.GetDemand(pb.GetDemandRequest(pool="p"))
    assert (demand.slots, demand.awake, demand.waiting) == (2, 1, 0) and demand.wakes_per_s > 0
    assert [(w.name, w.awake, w.ready, w.idle_s) for w in demand.workers] == [(worker, 1, True, 0.0)]
    assert 'greenroom_pool_awake{pool="p"} 1.0' in cluster.metrics
    wakes = next(line for line in cluster.metrics.splitlines() if line.startswith("greenroom_pool_wakes_total"))
    assert wakes == 'greenroom_pool_wakes_total{pool="p"} 3.0', "one is the first boot of the template"
    # A pod that is asked to end: its actors are suspended first.
    agent = cluster.agents[worker]
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=20)
    assert cluster.kit.actor("a").state is ActorState.SUSPENDED


def test_every_replica_reaches_a_pod_that_was_told_of_one(net: Net, database: str) -> None:
    with _cluster(net, "a", "b", store=database) as cluster:
        cluster.admit(0, version=1)
        worker = cluster.pod(0)  # with the address of the first replica alone
        cluster.active(worker)
        cluster.kit.apply("t", pool="p", idle_timeout_s=0)
        cluster.kit.create("x", template="t")
        b = Kit(cluster.others[0], "sim:t")
        assert [kit.get("x")["count"] for kit in (cluster.kit, b, cluster.kit, b)] == [1, 2, 3, 4]
        cluster.kit.act("Suspend", "x")
        assert b.get("x")["count"] == 5, "woken by the one that the pod was not told of"
        demand = cluster.kit.client.pools.GetDemand(pb.GetDemandRequest(pool="p"))
        theirs = b.client.pools.GetDemand(pb.GetDemandRequest(pool="p"))
        assert (demand.awake, theirs.awake, demand.slots, theirs.slots) == (1, 1, 2, 2)
        # The other replica is asked to admit; this one holds to it, too.
        b.client.pools.AdmitWorkers(pb.AdmitWorkersRequest(pool="p", pool_uid=POOL_UID, epoch=1, ledger_version=2))
        with pytest.raises(Conflict):
            cluster.admit(0, version=1)
        cluster.agents[worker].wait(timeout=30)
        until(cluster.kit.workers, lambda workers: not workers, 20)
        assert cluster.kit.actor("x").state is ActorState.SUSPENDED


def test_who_is_on_no_roster_waits_and_who_is_dropped_goes(cluster: Cluster) -> None:
    worker = cluster.pod(0)
    until(lambda: "waits for a roster" in cluster.log(), bool, 20)
    assert cluster.ready(0) == 503 and cluster.kit.workers() == []
    cluster.admit(1, version=1)  # another one
    other = cluster.pod(1)
    cluster.active(other)
    time.sleep(2)
    assert cluster.log().count("waits for a roster") == 2, "once for each reason: no roster, and not on it"
    assert cluster.said(worker).count("not on its pool's roster") == 1
    cluster.admit(0, 1, version=2)  # it comes in by itself
    cluster.active(worker, other)
    with pytest.raises(Conflict) as stale:
        cluster.admit(0, version=1)
    assert stale.value.reason == "STALE_ROSTER"
    cluster.kit.apply("t", pool="p")
    cluster.kit.create("a", template="t")
    assert cluster.live.request("default/a").status == 200
    on = int(cluster.kit.actor("a").worker.rpartition("-")[2])
    answer = cluster.admit(1 - on, version=3)
    assert [*answer.retiring] == [f"p-1-{on}"]
    cluster.active(f"p-1-{1 - on}")
    until(cluster.kit.workers, lambda workers: len(workers) == 1, 30)
    cluster.agents[f"p-1-{on}"].wait(timeout=20)  # its disk is erased, and it has ended
    assert cluster.live.request("default/a").status == 200
    assert cluster.kit.actor("a").worker == f"p-1-{1 - on}"


def test_a_pod_that_is_killed_and_dropped_leaves_no_tombstone(cluster: Cluster) -> None:
    cluster.admit(0, 1, version=1)
    names = [cluster.pod(0), cluster.pod(1)]
    cluster.active(*names)
    cluster.agents["p-1-0"].kill()
    cluster.admit(1, version=2)
    until(lambda: [w.name for w in cluster.kit.workers()], lambda now: now == ["p-1-1"], 90)


def test_an_agent_says_what_is_wrong_with_the_connection_and_goes_on_when_it_is_put_right(cluster: Cluster) -> None:
    cluster.admit(0, 1, 2, version=1)
    Authority(cluster.root, "other")
    (cluster.root / "wrong-token").write_text("a-foreign-token\n")
    stranger = cluster.pod(1, TOKEN_FILE=str(cluster.root / "wrong-token"))
    until(lambda: "TOKEN_REFUSED" in cluster.said(stranger), bool, 20)
    misled = cluster.pod(2, CA=str(cluster.root / "other.crt"))
    until(lambda: "CERTIFICATE_UNKNOWN" in cluster.said(misled), bool, 20)
    hosts = [cluster.net.here, "localhost"]
    cluster.authority.issue(cluster.root / "tls.crt", cluster.root / "tls.key", hosts, left_s=-60)
    late = cluster.pod(0)
    until(lambda: "CERTIFICATE_EXPIRED" in cluster.said(late), bool, 20)
    assert "has expired" in cluster.log(), "the server says so too"
    with pytest.raises(Unavailable, match="expired: renew it") as expired, cluster.client() as client:
        client.system.GetServerInfo(pb.GetServerInfoRequest())
    assert expired.value.reason == "CERTIFICATE_EXPIRED"
    assert cluster.kit.workers() == []
    cluster.authority.issue(cluster.root / "tls.crt", cluster.root / "tls.key", hosts)
    cluster.active(late)
    # The link is there; it goes on when the token is rotated, and comes back with the new one.
    (cluster.root / "agent-tokens").write_text("agent-token-1\nagent-token-2\n")
    (cluster.root / "agent-token").write_text("agent-token-2\n")
    (cluster.root / "agent-tokens").write_text("agent-token-2\n")
    (cluster.root / "wrong-token").write_text("agent-token-2\n")
    cluster.active(late, stranger)
    everything = cluster.log() + cluster.said(late) + cluster.said(stranger)
    assert "a-foreign-token" not in everything and "agent-token-" not in everything


def test_the_api_on_tcp_asks_for_a_token(cluster: Cluster) -> None:
    ask = pb.GetServerInfoRequest()
    with cluster.client() as client:
        assert client.system.GetServerInfo(ask).version
    for token in ("", "api-token", "agent-token-1"):
        with cluster.client(token=token) as client, pytest.raises(Unauthenticated, match="TOKEN_FILE") as refused:
            client.system.GetServerInfo(ask)
        assert refused.value.reason == "TOKEN_REFUSED"
    with pytest.raises(GreenroomError, match="GREENROOM_CA"), cluster.client(ca=None, token="") as client:
        client.system.GetServerInfo(ask)
    with pytest.raises(GreenroomError, match="not sent"):
        cluster.client(ca=None)
    environment = os.environ | {"GREENROOM_CA": str(cluster.authority.ca), "GREENROOM_TOKEN": "api-token-0"}
    command = [sys.executable, "-m", "greenroom", "get", "pools", "--server", cluster.api_address]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout.split()[0] == "NAME" and "\np " in shown.stdout


def test_a_sandbox_with_a_kernel_of_its_own_is_reached_and_wakes_with_its_memory(
    cluster: Cluster, counter_image: str
) -> None:
    """As the first test, with gVisor: the actor's endpoint is in a namespace that only its agent can enter."""
    cluster.admit(0, version=1)
    worker = cluster.pod(0, BACKEND="gvisor", WARM="1")
    cluster.active(worker)
    kit = Kit(cluster.live, counter_image)
    kit.apply("t", pool="p")
    kit.create("a", template="t")
    assert [kit.get("a")["ram"] for _ in range(3)] == [1, 2, 3]
    endpoint = kit.actor("a").endpoint
    assert endpoint is not None and endpoint.netns and cluster.through_agents()
    kit.act("Suspend", "a")
    until(cluster.through_agents, lambda open_now: not open_now, 10)
    assert kit.get("a")["ram"] == 4
    agent = cluster.agents[worker]
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=30)
    assert kit.actor("a").state is ActorState.SUSPENDED


def test_a_control_plane_of_an_operator_keeps_no_workers_and_makes_no_pool() -> None:
    """A pool of two workers is the operator's to keep: agents started here would be on no roster, for ever."""
    with short_directory() as directory:
        live = LiveServer(directory, backend="sim", workers=0, options=("--rosters",))
        live.start()
        try:
            assert not live.client.pools.ListPools(pb.ListPoolsRequest()).pools
            spec = res.PoolSpec(replicas=2, slots=2, backend="sim")
            live.client.pools.ApplyPool(pb.ApplyPoolRequest(name="default", spec=spec))
            time.sleep(1)  # nothing would say that nothing happens
            assert not (directory / "workers").exists()
        finally:
            live.stop()
