"""The API over a real gRPC connection."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog.testing
from fake_control import FakeControl, serving
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from greenroom.api import convert, errors, service
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import resources_pb2 as res
from greenroom.api.access import CONNECT_TIMEOUT_MS
from greenroom.api.client import AioClient, Client
from greenroom.api.server import ApiServer
from greenroom.core.errors import (
    BY_CODE,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    Internal,
    InvalidArgument,
    LeaseHeld,
    NotFound,
    ResourceExhausted,
    Unavailable,
    rebuild,
)
from greenroom.core.records import Actor, ActorState, Failure, Operation, OperationState, Template, TemplateSpec


class Rig:
    def __init__(self, control: FakeControl, client: AioClient) -> None:
        self.control, self.client = control, client

    async def create(self, name: str, **more: Any) -> Any:
        return await self.client.actors.CreateActor(pb.CreateActorRequest(name=name, template="counter", **more))

    async def actor(self, name: str) -> Actor:
        return await self.control.store.get(Actor, f"default/{name}")

    async def until(self, name: str, state: ActorState) -> None:
        events = self.control.store.watch()
        async with asyncio.timeout(60):
            while (await self.actor(name)).state is not state:
                await anext(events)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as (control, address), AioClient(address) as client:
        await control.furnish()
        yield Rig(control, client)


def request(name: str = "a", **more: Any) -> Any:
    return pb.ActorRequest(name=name, **more)


# --- actors -----------------------------------------------------------------------------------------------------


async def test_life_of_an_actor(rig: Rig) -> None:
    created = await rig.create("a", labels={"team": "x"})
    assert created.actor.state == res.ACTOR_STATE_SUSPENDED and created.operation.state == res.OPERATION_STATE_DONE

    operation = await rig.client.actors.ResumeActor(request())
    assert operation.state == res.OPERATION_STATE_DONE
    assert [p.name for p in operation.phases] == ["bind", "restore"]
    assert (await rig.actor("a")).state is ActorState.RUNNING
    stats = await rig.client.actors.GetActorStats(pb.GetActorRequest(name="a"))
    assert stats.memory_bytes == 64 << 20

    await rig.client.actors.PauseActor(request())
    await rig.client.actors.SuspendActor(request())
    shown = convert.from_message(Actor, await rig.client.actors.GetActor(pb.GetActorRequest(name="a")))
    assert shown == await rig.actor("a")
    snapshot = await rig.client.snapshots.GetSnapshot(pb.GetSnapshotRequest(id=shown.snapshot))
    assert snapshot.size_bytes == 48 << 20 and snapshot.actor == "a"

    await rig.client.actors.DeleteActor(request())
    with pytest.raises(NotFound):
        await rig.client.actors.GetActor(pb.GetActorRequest(name="a"))


async def test_the_same_request_id_answers_with_the_same_operation(rig: Rig) -> None:
    first = await rig.create("a", request_id="r1")
    again = await rig.create("a", request_id="r1")
    assert first.operation.id == again.operation.id
    with pytest.raises(AlreadyExists):
        await rig.create("a", request_id="r2")


async def test_a_wait_that_passes_answers_with_the_running_operation(rig: Rig) -> None:
    await rig.create("a")
    rig.control.gate.clear()
    operation = await rig.client.actors.ResumeActor(request(wait=convert.duration(0.05)))
    assert operation.state == res.OPERATION_STATE_RUNNING
    rig.control.gate.set()
    done = await rig.client.operations.WaitOperation(pb.WaitOperationRequest(id=operation.id))
    assert done.state == res.OPERATION_STATE_DONE and done.id == operation.id


async def test_the_wait_ends_before_the_deadline_of_the_call(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DEADLINE_MARGIN_S", 20.0)
    await rig.create("a")
    rig.control.gate.clear()
    operation = await rig.client.actors.ResumeActor(request(), timeout=20.5)
    assert operation.state == res.OPERATION_STATE_RUNNING


async def test_a_caller_that_gives_up_does_not_cancel_the_operation(rig: Rig) -> None:
    await rig.create("a")
    rig.control.gate.clear()
    call = asyncio.ensure_future(rig.client.actors.ResumeActor(request()))
    await rig.until("a", ActorState.RESUMING)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    rig.control.gate.set()
    await rig.until("a", ActorState.RUNNING)


async def test_a_failed_operation_is_an_answer(rig: Rig) -> None:
    await rig.create("a")
    rig.control.fail = Failure(code="DATA_LOSS", reason="SNAPSHOT_CORRUPT", message="pages differ")
    operation = await rig.client.actors.ResumeActor(request())
    assert operation.state == res.OPERATION_STATE_FAILED
    assert (operation.error.code, operation.error.reason) == ("DATA_LOSS", "SNAPSHOT_CORRUPT")


async def test_lists_go_page_by_page_and_filter(rig: Rig) -> None:
    for index in range(5):
        await rig.create(f"a{index}", labels={"parity": str(index % 2)})
    await rig.client.actors.ResumeActor(request("a3"))
    names, token = [], ""
    while True:
        page = await rig.client.actors.ListActors(pb.ListActorsRequest(page_size=2, page_token=token))
        assert len(page.actors) <= 2
        names += [a.name for a in page.actors]
        token = page.next_page_token
        if not token:
            break
    assert names == ["a0", "a1", "a2", "a3", "a4"]

    async def listed(**filters: Any) -> list[str]:
        return [a.name for a in (await rig.client.actors.ListActors(pb.ListActorsRequest(**filters))).actors]

    assert await listed(state="Running") == ["a3"]
    assert await listed(labels={"parity": "1"}) == ["a1", "a3"]
    assert await listed(namespace="elsewhere") == []
    with pytest.raises(InvalidArgument, match="Suspended"):
        await listed(state="running")
    with pytest.raises(InvalidArgument, match="page_size"):
        await listed(page_size=1001)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (pb.CreateActorRequest(name="Bad_Name", template="counter"), "DNS label"),
        (pb.CreateActorRequest(name="80--x", template="counter"), "selects a port"),
        (pb.CreateActorRequest(name="", template="counter"), "name is empty"),
        (pb.CreateActorRequest(name="a", namespace="No", template="counter"), "namespace"),
        (pb.CreateActorRequest(name="a", template="counter", labels={"a b": "c"}), "label"),
        (pb.CreateActorRequest(name="a", template="counter", request_id="x" * 129), "request_id"),
        (
            pb.CreateActorRequest(name="a", template="counter", worker_selector={"gpu": "a b"}),
            "worker selector gpu=a b",
        ),
    ],
)
async def test_bad_requests_are_refused(rig: Rig, call: Any, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        await rig.client.actors.CreateActor(call)
    assert await rig.control.store.list(Actor) == []


async def test_wait_out_of_range(rig: Rig) -> None:
    await rig.create("a")
    with pytest.raises(InvalidArgument, match="wait"):
        await rig.client.actors.ResumeActor(request(wait=convert.duration(4000)))


# --- exec and logs ----------------------------------------------------------------------------------------------


async def run(rig: Rig, *argv: str, stdin: bytes = b"", **start: Any) -> tuple[int, bytes, bytes]:
    async def frames() -> AsyncIterator[Any]:
        yield pb.ExecRequest(start=pb.ExecStart(name="a", argv=argv, **start))
        for offset in range(0, len(stdin), 50_000):
            yield pb.ExecRequest(stdin=stdin[offset : offset + 50_000])
        yield pb.ExecRequest(stdin_closed=True)

    out, err, code = b"", b"", -1
    async for frame in rig.client.actors.Exec(frames()):
        out, err = out + frame.stdout, err + frame.stderr
        if frame.WhichOneof("frame") == "exit_code":
            code = frame.exit_code
    return code, out, err


@pytest.mark.grpc_race
async def test_exec_streams_both_ways_and_tells_the_exit_code(rig: Rig) -> None:
    await rig.create("a")
    assert await run(rig, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    assert (await rig.actor("a")).state is ActorState.RUNNING  # woken by exec
    data = bytes(range(256)) * 2000
    assert await run(rig, "cat", stdin=data) == (0, data, b"")
    assert await run(rig, "sh", "-c", "echo $X; pwd", env={"X": "1"}, cwd="/usr") == (0, b"1\n/usr\n", b"")
    assert (await run(rig, "sleep", "60", timeout=convert.duration(0.1)))[0] == 137


@pytest.mark.grpc_race
async def test_exec_of_a_command_that_does_not_read_ends(rig: Rig) -> None:
    await rig.create("a")
    assert (await run(rig, "true", stdin=b"x" * 5_000_000))[0] == 0


@pytest.mark.grpc_race
async def test_ending_the_exec_call_kills_the_command(rig: Rig) -> None:
    await rig.create("a")

    async def frames() -> AsyncIterator[Any]:
        yield pb.ExecRequest(start=pb.ExecStart(name="a", argv=["sh", "-c", "echo ready; exec sleep 60"]))
        await asyncio.Event().wait()

    async with rig.client.actors.Exec(frames()) as stream:
        async for frame in stream:
            if frame.started:
                continue
            assert frame.stdout == b"ready\n"
            break
    async with asyncio.timeout(60):
        await rig.control.kills.wait()
    assert rig.control.killed == [("sh", "-c", "echo ready; exec sleep 60")]


@pytest.mark.grpc_race
@pytest.mark.parametrize(
    ("start", "field", "says"),
    [
        ({"env": {"A": "b\0c"}}, "env.A", "env.A: may not hold a NUL"),
        ({"env": {"A=B": "c"}}, "env.A=B", "is not a name of an environment variable"),
        ({"env": {"": "c"}}, "env.", "is not a name of an environment variable"),
        ({"env": {"A": "b" * 200_000}}, "env.A", "at most 131072 bytes"),
        ({"cwd": "/a\0b"}, "cwd", "cwd: may not hold a NUL"),
        ({"cwd": "tmp"}, "cwd", "cwd: must be an absolute path, not 'tmp'"),
        ({"timeout": Duration(seconds=-1)}, "timeout", "timeout: must be between 0 and 3.1536e+08, not -1"),
        ({"timeout": Duration(nanos=-1)}, "timeout", "timeout: must be between"),
        ({"timeout": Duration(seconds=10**11)}, "timeout", "timeout: must be between"),
    ],
)
async def test_exec_of_what_linux_would_not_take(rig: Rig, start: dict[str, Any], field: str, says: str) -> None:
    await rig.create("a")
    with pytest.raises(InvalidArgument) as caught:
        await run(rig, "true", **start)
    assert says in caught.value.message and caught.value.metadata == {"field": field}
    with pytest.raises(InvalidArgument, match=r"argv\[1\]: may not hold a NUL") as caught:
        await run(rig, "true", "a\0b")
    assert caught.value.metadata == {"field": "argv[1]"}
    assert (await rig.actor("a")).state is ActorState.SUSPENDED, "nothing was woken for it"


@pytest.mark.grpc_race
async def test_a_timeout_of_less_than_can_be_sent_is_still_one(rig: Rig) -> None:
    await rig.create("a")
    assert (await run(rig, "sleep", "60", timeout=convert.duration(1e-12)))[0] == 137


@pytest.mark.grpc_race
async def test_exec_errors(rig: Rig) -> None:
    with pytest.raises(NotFound):
        await run(rig, "true")
    await rig.create("a")
    with pytest.raises(FailedPrecondition, match="no-such-command") as caught:
        await run(rig, "no-such-command")
    assert caught.value.reason == "COMMAND_NOT_FOUND"
    with pytest.raises(InvalidArgument, match="argv is empty"):
        await run(rig)

    async def no_start() -> AsyncIterator[Any]:
        yield pb.ExecRequest(stdin=b"x")

    with pytest.raises(InvalidArgument, match="first frame"):
        async for _ in rig.client.actors.Exec(no_start()):
            pass


async def test_logs(rig: Rig) -> None:
    await rig.create("a")

    async def read(**more: Any) -> bytes:
        return b"".join([m.data async for m in rig.client.actors.Logs(pb.LogsRequest(name="a", **more))])

    assert await read() == b"one\ntwo\nthree\n"
    assert await read(tail_lines=1) == b"three\n"
    assert await read(tail_lines=0) == b""
    rig.control.log_lines = [b"x" * 200_000 + b"\n"]
    assert await read() == rig.control.log_lines[0]

    stream = aiter(rig.client.actors.Logs(pb.LogsRequest(name="a", tail_lines=0, follow=True)))
    following = asyncio.ensure_future(anext(stream))
    await rig.control.follows.wait()
    rig.control.log_lines.append(b"new\n")
    rig.control.more_logs.set()
    assert (await following).data == b"new\n"


# --- templates, pools, operations ------------------------------------------------------------------------------


async def test_apply_template_waits_and_shows_progress(rig: Rig) -> None:
    rig.control.gate.clear()
    apply = pb.ApplyTemplateRequest(
        name="t", spec=convert.to_message(TemplateSpec(image="example.org/x:1")), wait=convert.duration(0)
    )
    started = await rig.client.templates.ApplyTemplate(apply)
    assert started.template.state == res.TEMPLATE_STATE_PREPARING
    seen = []
    async for op in rig.client.operations.WatchOperation(pb.GetOperationRequest(id=started.operation.id)):
        seen.append(convert.from_message(Operation, op))
        if seen[-1].layers and seen[-1].layers[0].done_bytes == 3 << 20:
            rig.control.gate.set()
    assert seen[-1].state is OperationState.DONE
    assert [op.version for op in seen] == sorted({op.version for op in seen})
    again = await rig.client.templates.ApplyTemplate(apply)
    assert again.template.state == res.TEMPLATE_STATE_READY and not again.HasField("operation")
    # fields that another client leaves out have their defaults
    await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="u", spec=res.TemplateSpec(image="x")))
    stored = await rig.control.store.get(Template, "default/u")
    assert stored.spec == TemplateSpec(image="x", ports=())  # no default is as empty as no ports


async def test_specs_are_validated_by_the_server(rig: Rig) -> None:
    bad = res.TemplateSpec(image="x", resources=res.Resources(memory_bytes=1))
    with pytest.raises(InvalidArgument, match=r"spec\.resources\.memory_bytes") as caught:
        await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t", spec=bad))
    assert caught.value.metadata["field"] == "spec.resources.memory_bytes"
    with pytest.raises(InvalidArgument, match="replicas"):
        await rig.client.pools.ApplyPool(pb.ApplyPoolRequest(name="p", spec=res.PoolSpec(replicas=65)))
    with pytest.raises(InvalidArgument, match="image"):
        await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t"))
    bad = res.TemplateSpec(image="x", worker_selector={"zone": "a b"})
    with pytest.raises(InvalidArgument, match=r"spec\.worker_selector\.zone: label zone=a b is not valid"):
        await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t", spec=bad))
    bad = res.TemplateSpec(image="x", worker_selector={f"k{n}": "v" for n in range(65)})
    with pytest.raises(InvalidArgument, match=r"spec\.worker_selector: at most 64 labels"):
        await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t", spec=bad))
    future = res.TemplateSpec(image="x")
    future.on_crash = 99  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match="does not know value 99"):
        await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t", spec=future))


async def test_pools_and_workers(rig: Rig) -> None:
    spec = res.PoolSpec(replicas=0, backend="sim")
    pool = await rig.client.pools.ApplyPool(pb.ApplyPoolRequest(name="empty", spec=spec))
    assert (pool.spec.replicas, pool.spec.slots) == (0, 4)
    assert [p.name for p in (await rig.client.pools.ListPools(pb.ListPoolsRequest())).pools] == ["default", "empty"]
    workers = await rig.client.workers.ListWorkers(pb.ListWorkersRequest(pool="default"))
    assert [w.name for w in workers.workers] == ["default-0", "default-1"]
    await rig.client.pools.DeletePool(pb.DeletePoolRequest(name="empty"))
    with pytest.raises(NotFound):
        await rig.client.pools.GetPool(pb.GetPoolRequest(name="empty"))


# --- watch ------------------------------------------------------------------------------------------------------


async def test_watch_lists_then_tells_changes(rig: Rig) -> None:
    await rig.create("a")
    events = aiter(rig.client.system.Watch(pb.WatchRequest(kinds=["actor"], namespace="default")))
    first = await anext(events)
    assert first.type == pb.WatchEvent.TYPE_PUT and first.actor.name == "a"
    assert (await anext(events)).type == pb.WatchEvent.TYPE_SYNCED
    await rig.client.actors.ResumeActor(request())
    states = [(await anext(events)).actor.state for _ in range(2)]
    assert states == [res.ACTOR_STATE_RESUMING, res.ACTOR_STATE_RUNNING]
    await rig.client.actors.DeleteActor(request())
    while (event := await anext(events)).type != pb.WatchEvent.TYPE_DELETED:
        pass
    assert event.actor.name == "a"


async def test_watch_of_everything_and_of_nonsense(rig: Rig) -> None:
    seen = set()
    async for event in rig.client.system.Watch(pb.WatchRequest()):
        if event.type == pb.WatchEvent.TYPE_SYNCED:
            break
        seen.add(event.WhichOneof("record"))
    assert seen == {"template", "pool", "worker", "snapshot", "operation"}
    with pytest.raises(InvalidArgument, match="lease"):
        await anext(aiter(rig.client.system.Watch(pb.WatchRequest(kinds=["lease"]))))


# --- errors -----------------------------------------------------------------------------------------------------


def test_every_error_survives_the_wire() -> None:
    for cls in [*BY_CODE.values(), LeaseHeld]:
        sent = cls("it broke", reason="" if cls is LeaseHeld else "SOME_REASON", metadata={"k": "v"})
        if isinstance(sent, ResourceExhausted | Unavailable):
            sent.retry_after_s = 2.5
        raw = errors.to_status(sent).SerializeToString()
        code = getattr(grpc.StatusCode, sent.code)
        rpc_error = grpc.aio.AioRpcError(
            code, grpc.aio.Metadata(), grpc.aio.Metadata((errors.STATUS_KEY, raw)), details="it broke"
        )
        got = errors.from_rpc_error(rpc_error, "unix:/x")
        assert type(got) is cls
        assert (got.message, got.reason, got.metadata) == ("it broke", sent.reason, {"k": "v"})
        if isinstance(got, ResourceExhausted | Unavailable):
            assert got.retry_after_s == 2.5


def test_an_error_that_is_stored_comes_back_whole() -> None:
    for error, retry_after_s in (
        (ResourceExhausted("full", retry_after_s=0.25), 0.25),
        (Unavailable("away", metadata={"k": "v"}, retry_after_s=12.0), 12.0),
        (Unavailable("away"), 0.0),
    ):
        again = rebuild(error.code, error.reason, error.message, error.facts())
        assert isinstance(again, ResourceExhausted | Unavailable) and type(again) is type(error)
        assert again.retry_after_s == retry_after_s and again.facts() == error.facts()
    assert Unavailable("away").facts() == {}
    assert NotFound("x", metadata={"k": "v"}).facts() == {"k": "v"}


async def test_errors_over_a_real_connection(rig: Rig) -> None:
    await rig.create("a")
    held = {"holder": "server-1", "operation": "op-7", "until": "1700000000.000"}
    for sent in (
        LeaseHeld("held", metadata=held),
        Unavailable("the store does not answer", reason="STORE_AWAY", retry_after_s=2.5),
        Unavailable("nobody knows for how long"),
        Cancelled("given up"),
    ):
        for blocking in (False, True):
            rig.control.refuse = sent
            with pytest.raises(GreenroomError) as caught:
                if blocking:
                    with Client(rig.client.address) as client:
                        await asyncio.to_thread(client.actors.ResumeActor, request())
                else:
                    await rig.client.actors.ResumeActor(request())
            got = caught.value
            assert type(got) is type(sent) and (got.reason, got.metadata) == (sent.reason, sent.metadata)
            assert getattr(got, "retry_after_s", None) == getattr(sent, "retry_after_s", None)


async def test_a_bug_in_the_server_tells_no_secrets(rig: Rig) -> None:
    await rig.create("a")
    rig.control.explode = True
    with structlog.testing.capture_logs() as logs, pytest.raises(Internal) as caught:
        await rig.client.actors.ResumeActor(request())
    assert "secret" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert [(entry["log_level"], entry["exc_info"]) for entry in logs] == [("error", True)]


async def test_long_messages_arrive(rig: Rig) -> None:
    rig.control.fail = Failure(code="INTERNAL", reason="X", message="y" * 100_000)
    await rig.create("a")
    assert len((await rig.client.actors.ResumeActor(request())).error.message) == 100_000  # in a message: whole

    async def refuse(*_: Any, **__: Any) -> None:
        raise FailedPrecondition("z" * 100_000, metadata={"a": "b", "big": "c" * 100_000})

    rig.control.resume = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(FailedPrecondition, match=r"\[cut\]") as caught:  # in headers: cut
        await rig.client.actors.ResumeActor(request())
    assert caught.value.metadata == {"a": "b"}


@pytest.mark.parametrize("text", ["z", "%", "\n", "é", "作", "😀", "/tmp/\udcff"])
async def test_long_messages_in_any_language_arrive(rig: Rig, text: str) -> None:
    await rig.create("a")
    said = text * 10_000
    rig.control.refuse = FailedPrecondition(said, reason="WHY", metadata={"a": text * 200, "big": said})
    with pytest.raises(FailedPrecondition) as caught:
        await rig.client.actors.ResumeActor(request())
    shown = said.encode(errors="backslashreplace").decode()
    message = caught.value.message.removesuffix(" [cut]")
    assert shown.startswith(message) and len(message.encode()) > 1490, "as much of it as there is room for"
    assert caught.value.reason == "WHY"
    assert caught.value.metadata in ({}, {"a": shown[: len(shown) // 50]})


async def test_deadline_of_the_client(rig: Rig) -> None:
    await rig.create("a")
    rig.control.gate.clear()
    operation = await rig.client.actors.ResumeActor(request(wait=convert.duration(0)))
    with pytest.raises(DeadlineExceeded) as caught:
        async for _ in rig.client.operations.WatchOperation(pb.GetOperationRequest(id=operation.id), timeout=0.2):
            pass
    assert caught.value.reason == "REQUEST_TIMEOUT"


# --- the server -------------------------------------------------------------------------------------------------


async def test_server_info_health_and_reflection(rig: Rig, tmp_path: Path) -> None:
    info = await rig.client.system.GetServerInfo(pb.GetServerInfoRequest())
    assert info.version == "0.1.0" and list(info.backends) == ["sim"]
    assert (info.gateway_url, info.domain) == ("http://127.0.0.1:8880", "actors.localhost")
    assert info.started_at.seconds > 0
    async with grpc.aio.insecure_channel(rig.client.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="greenroom.v1alpha1.Actors"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

        from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async for answer in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask()):
            names = {s.name for s in answer.list_services_response.service}
            assert {"greenroom.v1alpha1.Actors", "greenroom.v1alpha1.System", "grpc.health.v1.Health"} <= names


async def test_the_socket_is_private_and_can_not_be_taken(tmp_path: Path) -> None:
    async with serving(tmp_path) as (control, address):
        path = Path(address.removeprefix("unix:"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(FailedPrecondition, match="another Greenroom server") as caught:
            await ApiServer(control).start([address])
        assert caught.value.reason == "PORT_IN_USE"
        async with AioClient(address) as client:
            await client.system.GetServerInfo(pb.GetServerInfoRequest())
    async with serving(tmp_path):  # free again
        pass


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mknod(tmp_path / "run/api.sock", 0o600 | stat.S_IFSOCK)
    async with serving(tmp_path) as (_, address), AioClient(address) as client:
        await client.system.GetServerInfo(pb.GetServerInfoRequest())


async def test_tcp_only_on_loopback_and_not_shared(tmp_path: Path) -> None:
    control = FakeControl()
    server = ApiServer(control)
    await server.start(["127.0.0.1:0"])
    try:
        address = server.addresses[0]
        async with AioClient(address) as client:
            assert (await client.system.GetServerInfo(pb.GetServerInfoRequest())).version
        with pytest.raises(FailedPrecondition) as caught:
            await ApiServer(control).start([address])
        assert caught.value.reason == "PORT_IN_USE"
    finally:
        await server.close(0)
    for address in ("0.0.0.0:0", "[::]:0", "nonsense", "127.0.0.1:99999", "unix:relative", "unix:/" + "x" * 120):
        with pytest.raises(InvalidArgument):
            await ApiServer(control).start([address])


async def test_closing_ends_waits_and_streams_at_once(tmp_path: Path) -> None:
    control = FakeControl()
    server = ApiServer(control)
    address = f"unix:{tmp_path}/api.sock"
    await server.start([address])
    await control.furnish()
    async with AioClient(address) as client:
        await client.actors.CreateActor(pb.CreateActorRequest(name="a", template="counter"))
        control.gate.clear()
        waiting = asyncio.ensure_future(client.actors.ResumeActor(request()))
        events = aiter(client.system.Watch(pb.WatchRequest(kinds=["actor"])))
        while (await anext(events)).actor.state != res.ACTOR_STATE_RESUMING:
            pass
        async with asyncio.timeout(60):
            await server.close(30)
        with pytest.raises(Unavailable) as caught:
            await waiting
        assert caught.value.reason == "SERVER_CLOSING"
        with pytest.raises(GreenroomError):
            async for _ in events:
                pass
        with pytest.raises(Unavailable, match="greenroom up") as caught:
            await client.actors.GetActor(pb.GetActorRequest(name="a"))
        assert caught.value.reason == "SERVER_NOT_RUNNING"
    control.gate.set()
    async with asyncio.timeout(60):  # the operation went on without the server
        operation = await control.wait_operation((await control.store.list(Operation))[-1].id)
    assert operation.state is OperationState.DONE
    await control.close()


async def test_a_server_that_stands_still_is_waited_for_and_one_that_is_not_there_is_not(tmp_path: Path) -> None:
    began = asyncio.get_running_loop().time()
    async with AioClient(f"unix:{tmp_path}/absent.sock") as client:
        with pytest.raises(Unavailable) as absent:
            await client.templates.ListTemplates(pb.ListTemplatesRequest())
    assert absent.value.reason == "SERVER_NOT_RUNNING"
    assert asyncio.get_running_loop().time() - began < CONNECT_TIMEOUT_MS / 2000
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "still.sock"))
        listening.listen()
        async with AioClient(f"unix:{tmp_path}/still.sock") as client:
            with pytest.raises(DeadlineExceeded):
                await client.templates.ListTemplates(pb.ListTemplatesRequest(), timeout=1.0)
