"""Two servers on one PostgreSQL: what either does the other knows, either may die, and the database may go and come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import Kit, until
from shell import Shell

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.errors import FailedPrecondition, GreenroomError, Unavailable
from greenroom.core.records import ActorState, OnCrash, Operation, OperationState
from greenroom.testing.live import LiveServer
from greenroom.testing.postgres import PostgresServer

LEASE_TTL_S = 6.0
WORKER_RETURN_S = 5.0

pytestmark = [pytest.mark.xdist_group("servers"), pytest.mark.timeout(240)]


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A database server of the test's own, which it may stop."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def replica(data_dir: Path, server: PostgresServer) -> Iterator[Callable[..., Kit]]:
    """Starts replicas by name; all share a database, snapshots and images, and each has one worker of its own."""
    url = server.url(server.create_database())
    kits: list[Kit] = []

    def start(name: str, place: str = "", store: str = url, lease_ttl_s: float = LEASE_TTL_S) -> Kit:
        clocks = (f"--lease-ttl={lease_ttl_s:g}", f"--worker-return={WORKER_RETURN_S:g}")
        shared = (f"--store={store}", f"--snapshots={data_dir / 'snapshots'}", f"--images={data_dir / 'images'}")
        options = (*shared, *clocks, f"--name={name}")
        live = LiveServer(data_dir / (place or name), backend="sim", workers=1, slots=8, options=options)
        kit = Kit(live, "none")
        kits.append(kit)
        live.start()
        return kit

    yield start
    for kit in kits:
        if kit.live.process is not None and kit.live.process.poll() is None:
            kit.live.stop()


def both(replica: Callable[..., Kit]) -> tuple[Kit, Kit]:
    a, b = replica("a"), replica("b")
    a.apply(on_crash=OnCrash.RESTORE_LAST, idle_timeout_s=0)
    for kit in (a, b):
        until(lambda kit=kit: woken_by(kit), lambda workers: workers == {"a-default-0", "b-default-0"})
    return a, b


def woken_by(kit: Kit) -> set[str]:
    """On which workers this replica places two actors: on those that are connected to it, which the other says as soon
    as they are connected to that one."""
    names = ("probe1", "probe2")
    kit.create(*names)
    for name in names:
        until(lambda name=name: kit.live.request(f"default/{name}").status, lambda status: status == 200)
    workers = {kit.actor(name).worker for name in names}
    for name in names:
        kit.act("Delete", name)
    return workers


def resume(kit: Kit, name: str) -> Operation:
    request = pb.ActorRequest(namespace="default", name=name)
    return convert.from_message(Operation, kit.client.actors.ResumeActor(request))


def test_what_one_does_the_other_knows(replica: Callable[..., Kit]) -> None:
    a, b = both(replica)
    a.create("x", "y")
    assert a.get("x")["count"] == 1
    assert b.get("x")["count"] == 2, "the same incarnation, through the other gateway"
    b.act("Suspend", "x")
    assert a.get("x")["count"] == 3, "woken again by the one that had it"
    assert b.get("y")["count"] == 1
    b.act("Pause", "y")
    # A GET that the other gateway had sent before it heard of the pause is sent again, as HTTP lets it.
    assert a.get("y")["count"] in (2, 3)
    a.act("Delete", "y")
    # The other gateway hears of it a moment later; until then it asks a sandbox that is gone.
    until(lambda: b.live.request("default/y").status, lambda status: status == 404)
    operation = b.act("Suspend", "x")
    shown = a.client.operations.GetOperation(pb.GetOperationRequest(id=operation.id))
    assert convert.from_message(Operation, shown).state is OperationState.DONE
    assert shown.owner.startswith("b/")


def test_when_one_dies_with_its_worker_the_other_goes_on(replica: Callable[..., Kit]) -> None:
    a, b = both(replica)
    names = [f"x{n}" for n in range(8)]
    a.create(*names)
    for name in names:
        a.get(name)
        a.act("Suspend", name)
        a.get(name)
    assert {b.actor(name).worker for name in names} == {"a-default-0", "b-default-0"}
    a.live.kill(sandboxes=True)
    died = time.monotonic()
    for name in names:
        until(lambda name=name: b.live.request(f"default/{name}").status, lambda status: status == 200)
    assert time.monotonic() - died < LEASE_TTL_S + 20
    for name in names:
        assert b.get(name)["count"] >= 3, "nothing that was saved is lost"
    assert {b.actor(name).worker for name in names} == {"b-default-0"}
    again = replica("a")
    assert again.get("x0")["count"] >= 4
    until(again.workers, lambda workers: sum(w.used for w in workers) == len(names))


def test_a_database_that_goes_and_comes(replica: Callable[..., Kit], server: PostgresServer) -> None:
    a, b = both(replica)
    a.create("x", "y")
    assert a.get("x")["count"] == 1
    a.act("Suspend", "x")
    server.stop()
    answer = b.live.request("default/x")
    assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1, answer
    with pytest.raises(Unavailable) as away:
        resume(a, "y")
    assert away.value.retry_after_s > 0
    server.start()
    for kit in (a, b):
        until(lambda kit=kit: kit.live.request("default/x").status, lambda status: status == 200)
    assert a.actor("x").state is ActorState.RUNNING
    assert b.get("x")["count"] == 4
    assert all(o.state != "Running" for o in a.client.operations.ListOperations(pb.ListOperationsRequest()).operations)


def test_a_server_that_starts_before_its_database(replica: Callable[..., Kit], server: PostgresServer) -> None:
    server.stop()
    a = replica("a")
    with pytest.raises(Unavailable):
        a.actors()
    assert a.live.request("default/x").status == 503
    server.start()

    def ready() -> bool:
        try:
            return [w.state for w in a.workers()] == ["Active"]
        except GreenroomError:
            return False

    until(ready, bool)
    a.apply()
    a.create("x")
    assert a.get("x")["count"] == 1


def test_a_database_of_a_newer_program_is_refused(replica: Callable[..., Kit], server: PostgresServer) -> None:
    a = replica("a")
    url = a.live.options[0].partition("=")[2]
    a.live.stop()
    name = url.partition("?")[0].rpartition("/")[2]
    server.execute("UPDATE schema SET version = 99, compatible_from = 99", name)
    with pytest.raises(FailedPrecondition, match="schema 99"):
        replica("a")


def test_a_name_that_another_has_is_refused(replica: Callable[..., Kit]) -> None:
    a = replica("a", lease_ttl_s=60.0)  # it lives as long as its last word is younger than that
    until(lambda: a.client.system.ListReplicas(pb.ListReplicasRequest()).replicas, bool)
    with pytest.raises(FailedPrecondition, match="another replica of the control plane is called 'a'"):
        replica("a", place="elsewhere", lease_ttl_s=60.0)


def test_a_second_server_on_the_same_data_leaves_the_first_its_agents(replica: Callable[..., Kit]) -> None:
    a = replica("a")
    a.apply()
    a.create("x")
    until(a.workers, lambda workers: [w.state for w in workers] == ["Active"])
    assert a.live.process is not None
    home = a.live.data_dir
    second = Shell(home)(
        "up", f"--data={home}", "--backend=sim", "--listen=127.0.0.1:0", "--name=b", *a.live.options[:2]
    )
    assert a.live.kill_agent("a-default-0")
    assert a.get("x")["count"] == 1, "its agent has connected again"
    second.failed(4, f"data directory {home} is in use by process {a.live.process.pid} ", "use another data directory")
