"""One agent and several replicas over real gRPC: calls, events, heartbeats, links that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from agent_kit import SPEC, Bench, short_directory, until
from link_kit import Replica
from structlog.testing import capture_logs

from greenroom.agent import clock
from greenroom.agent import link as agent_link
from greenroom.agent.links import Links
from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2, link_pb2_grpc
from greenroom.api.link import NO_HEARTBEAT
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, Internal, InvalidArgument, Unavailable
from greenroom.core.records import SnapshotState


class Site:
    """``replicas`` by number; not all of them are started."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.replicas = [Replica(bench.root, f"r{number}") for number in range(3)]
        self.links: Links | None = None

    async def link(self, *given: str) -> Links:
        self.links = Links(self.bench.agent, given or [r.address for r in self.replicas[:2]])
        self.links.start()
        return self.links

    async def connected(self, *numbers: int) -> None:
        """Both ends of each know it."""
        await until(lambda: all(self._is_connected(self.replicas[n]) for n in numbers))

    def _is_connected(self, replica: Replica) -> bool:
        links = self.links._links.values() if self.links else ()
        up = [link for link in links if link.is_up]
        return replica.connected and any(
            link.target == replica.address or link.welcome.replica == replica.name for link in up
        )


@asynccontextmanager
async def _site() -> AsyncIterator[Site]:
    with short_directory() as root:
        async with Bench(root) as bench:
            site = Site(bench)
            try:
                yield site
            finally:
                if site.links:
                    await site.links.close()
                for replica in site.replicas:
                    await replica.kill()


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(agent_link, "LAST_PAUSE_S", 0.2)
    async with _site() as site:
        yield site


def start_call(bench: Bench, op: str, uid: str, generation: int = 1) -> api.Start:
    identity = bench.identity(generation, uid)
    return api.Start(**bench.ids(op, generation, uid), identity=identity, spec=SPEC, image_digest="")


async def test_calls_through_both_and_events_on_both(site: Site) -> None:
    one, two, _ = site.replicas
    await asyncio.gather(one.start(), two.start())
    await site.link()
    await site.connected(0, 1)
    await one.hub.call("w", start_call(site.bench, "op1", "a"))
    await two.hub.call("w", start_call(site.bench, "op2", "b"))
    listed: Any = await one.hub.call("w", api.ListResident())
    assert {r.actor_uid for r in listed.residents} == {"a", "b"}
    again = await two.hub.call("w", start_call(site.bench, "op1", "a", 2))  # who takes over is answered what was done
    assert isinstance(again, api.Started) and site.bench.backend.calls["start"] == 2
    site.bench.backend._leave(site.bench.backend._resident["ns/b"], 3)
    await until(lambda: one.exits and two.exits)
    assert one.exits == two.exits and one.exits[0].code == 3


async def test_a_server_that_is_killed_stops_no_call(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = site.replicas
    await asyncio.gather(one.start(), two.start())
    links = await site.link()
    await site.connected(0, 1)
    play, may_end = site.bench.backend._play, asyncio.Event()

    async def play_and_wait(method: str) -> None:
        await play(method)
        if method == "start":
            await may_end.wait()

    monkeypatch.setattr(site.bench.backend, "_play", play_and_wait)
    asked = asyncio.create_task(one.hub.call("w", start_call(site.bench, "op", "a")))
    await until(lambda: site.bench.backend.calls["start"])
    await one.kill()
    with pytest.raises(Unavailable):
        await asked
    taken_over = asyncio.create_task(two.hub.call("w", start_call(site.bench, "op", "a", 2)))
    connection = links._links[two.address]._connection
    await until(lambda: connection is not None and connection._open)
    may_end.set()
    await taken_over
    assert site.bench.backend.calls["start"] == 1, "who takes the operation over joins what goes on"
    site.bench.backend._leave(site.bench.backend._resident["ns/a"], 3)
    await until(lambda: two.exits)
    one = site.replicas[0] = Replica(site.bench.root, "r0")
    await one.start()
    await site.connected(0)
    assert one.connects[0].residents == ()


async def test_heartbeats_say_what_lives_and_are_answered_with_the_latest_word(site: Site) -> None:
    one, two, three = site.replicas
    await asyncio.gather(one.start(), two.start(), three.start())
    links = await site.link()
    await site.connected(0, 1)
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    boot_id = one.connects[0].boot_id
    for replica in (one, two):
        replica.heartbeats.clear()
        await until(lambda replica=replica: replica.heartbeats)
        assert replica.heartbeats[-1].boot_id == boot_id
        assert [r.actor_uid for r in replica.heartbeats[-1].residents] == ["a"]
    assert not three.connects
    one.say(one, two, three)
    await site.connected(2)
    assert set(links.targets) == {r.address for r in site.replicas}
    await three.hub.call("w", api.Freeze(**site.bench.ids("pause", 2)))

    def last(replica: Replica) -> ResidentState | None:
        return replica.heartbeats[-1].residents[0].state if replica.heartbeats else None

    await until(lambda: {last(replica) for replica in site.replicas} == {ResidentState.FROZEN})


async def test_learned_links_go_when_nobody_names_them_and_given_ones_stay(site: Site) -> None:
    one, two, three = site.replicas
    await asyncio.gather(one.start(), three.start())
    one.say(one, two, three)
    links = await site.link(one.address)
    await site.connected(0, 2)
    one.say(one, two)
    three.say(one, two, three)
    heard = len(one.heartbeats)
    await until(lambda: len(one.heartbeats) > heard + 3)
    assert three.connected, "one that is connected stays"
    await three.kill()
    await until(lambda: three.address not in links.targets)
    assert two.address in links.targets, "it is named, and never was there"
    one.say()
    await until(lambda: set(links.targets) == {one.address})
    await one.kill()
    one = site.replicas[0] = Replica(site.bench.root, "r0")
    await one.start()
    await site.connected(0)


async def test_learned_links_are_kept_while_nobody_can_be_reached(site: Site) -> None:
    one, two, _ = site.replicas
    await asyncio.gather(one.start(), two.start())
    one.say(one, two)
    two.say(one, two)
    links = await site.link(one.address)
    await site.connected(0, 1)
    await one.kill()
    await two.kill()
    await until(lambda: not links.is_up)
    two = site.replicas[1] = Replica(site.bench.root, "r1")
    await two.start()
    await site.connected(1)


async def test_two_addresses_of_one_replica_are_one_link(site: Site) -> None:
    one, two, _ = site.replicas
    service = f"unix:{site.bench.root}/service.sock"
    await asyncio.gather(one.start(service), two.start())
    one.say(one, two)
    links = await site.link(service)
    await site.connected(0, 1)

    def one_waits_for_the_other() -> bool:
        given, learned = links._links[service], links._links[one.address]
        return any(a.is_up and b._connection is None for a, b in ((given, learned), (learned, given)))

    # The address that was learned takes the given one's place, which may take it back before it knows.
    await until(lambda: len(one.connects) >= 2 and one_waits_for_the_other())
    heard, connects = len(one.heartbeats), len(one.connects)
    await until(lambda: len(one.heartbeats) > heard + 10)
    assert len(one.connects) == connects, "they do not take it from each other again and again"
    assert len([link for link in site.bench.agent.links]) == 2 and not one.gone
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    assert set(links.targets) == {service, one.address, two.address}


async def test_alone_and_found_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock.boot_time()  # moved by hand: a machine that stands still is not alone
    monkeypatch.setattr(clock, "boot_time", lambda: now)
    one, two, _ = site.replicas
    await asyncio.gather(one.start(), two.start())
    for replica in (one, two):
        replica.say(alone_s=0.5)
    await site.link()
    await site.connected(0, 1)
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    await one.kill()

    def is_heard_now() -> bool:
        return site.bench.agent._alone._heard_at >= now

    for _ in range(15):  # longer than that
        now += 0.2
        await until(is_heard_now)
    assert site.bench.state() is ResidentState.RUNNING
    await two.kill()
    now += 0.6
    await until(lambda: site.bench.state() is ResidentState.FROZEN)
    two = site.replicas[1] = Replica(site.bench.root, "r1")
    await two.start()
    await site.connected(1)
    assert two.connects[0].residents[0].state is ResidentState.FROZEN
    await two.hub.call("w", api.Thaw(**site.bench.ids("thaw", 2)))
    assert site.bench.state() is ResidentState.RUNNING


async def test_a_machine_that_slept_is_alone_until_it_is_heard_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept_s, real = 0.0, clock.boot_time
    monkeypatch.setattr(clock, "boot_time", lambda: real() + slept_s)
    one = site.replicas[0]
    one.say(alone_s=60)
    await one.start()
    await site.link(one.address)
    await site.connected(0)
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    one.answers = False
    slept_s = 61
    await until(lambda: site.bench.state() is ResidentState.FROZEN)
    assert site.bench.agent._alone.alone
    one.answers = True
    await until(lambda: not site.bench.agent._alone.alone)
    said: Any = await one.hub.call("w", api.ListResident())
    await one.hub.call("w", api.Thaw(**site.bench.ids("thaw", 1), epoch=said.epoch))
    assert site.bench.state() is ResidentState.RUNNING


async def test_leaving_is_said_on_every_link_also_on_one_that_comes_later(site: Site) -> None:
    one, two, three = site.replicas
    await asyncio.gather(one.start(), two.start())
    await site.link(*(r.address for r in site.replicas))
    await site.connected(0, 1)
    site.bench.agent.leave()
    await until(lambda: one.leaving and two.leaving)
    await three.start()
    await until(lambda: three.leaving)
    assert one.leaving == two.leaving == three.leaving == [one.connects[0].boot_id]
    await one.hub.call("w", start_call(site.bench, "op", "a"))  # it goes on working
    await two.hub.call("w", api.Shutdown(wipe=True))
    assert site.bench.agent.shutdown.result() is True


async def test_what_waits_to_be_sent_is_sent_when_the_links_are_closed(site: Site) -> None:
    one = site.replicas[0]
    await one.start()
    for _ in range(20):
        links = await site.link(one.address)
        await site.connected(0)
        asked = asyncio.create_task(one.hub.call("w", api.Shutdown()))
        await site.bench.agent.shutdown
        await links.close()
        assert await asked == api.Done()
        site.bench.agent.shutdown = asyncio.get_running_loop().create_future()
        await until(lambda: not one.connected)


async def test_it_is_also_sent_to_a_replica_that_stands_still_for_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = site.replicas[0]
    read, goes_on = one.hub._receive, asyncio.Event()

    async def read_later(peer: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await goes_on.wait()
            for frame in message.frames:
                read(peer, frame)

    monkeypatch.setattr(one.hub, "_read", read_later)
    await one.start()
    links = await site.link(one.address)
    await site.connected(0)
    asked = asyncio.create_task(one.hub.call("w", api.Shutdown()))
    await site.bench.agent.shutdown
    asyncio.get_running_loop().call_later(1.5, goes_on.set)
    await links.close()
    assert await asked == api.Done()


async def test_snapshots_held_and_uploaded_through_different_replicas(site: Site) -> None:
    one, two, _ = site.replicas
    await asyncio.gather(one.start(), two.start())
    await site.link()
    await site.connected(0, 1)
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    announced, ids = site.bench.manifest(), site.bench.ids("sleep", 2)
    await one.hub.call("w", api.Checkpoint(**ids, snapshot=announced))
    held: Any = await one.hub.call("w", api.Publish(**ids, snapshot_id=announced.id, hold=True))
    await one.hub.call("w", api.Discard(**ids))
    await one.kill()
    stored: Any = await two.hub.call("w", api.Upload(snapshot_id=announced.id))
    assert (held.snapshot.state, stored.snapshot.state) == (SnapshotState.LOCAL, SnapshotState.PRESENT)
    await two.hub.call("w", api.Release(snapshot_id=announced.id))


# --- peers of other versions ------------------------------------------------------------------------------------


async def test_an_older_control_plane_that_says_nothing_in_its_welcome(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It welcomes once, without a body, and does not know heartbeats."""
    one = site.replicas[0]

    def answer(peer: Any, number: int) -> None:
        if number == NO_HEARTBEAT:
            peer.send(link_pb2.Frame(kind=link_pb2.Frame.WELCOME))

    monkeypatch.setattr(one.hub, "_answer", answer)
    await one.start()
    links = await site.link(one.address)
    await site.connected(0)
    assert [link.welcome for link in links._links.values()] == [api.Welcome()]
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    assert site.bench.state() is ResidentState.RUNNING and not site.bench.agent._alone.alone


async def test_a_replica_that_answers_none_for_long_is_told_on_and_counts_again_when_it_does(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not reach the store; what was not answered will never be."""
    one = site.replicas[0]
    monkeypatch.setattr(agent_link, "MAX_UNANSWERED", 3)
    await one.start()
    await site.link(one.address)
    await site.connected(0)
    await one.hub.call("w", start_call(site.bench, "op", "a"))
    one.say(alone_s=0.5)  # not before it runs: a machine that stands still while it starts is alone too
    await until(lambda: site.bench.agent._alone._alone_s == 0.5)
    one.answers = False
    heard = len(one.heartbeats)
    await until(lambda: len(one.heartbeats) > heard + 12)
    await until(lambda: site.bench.state() is ResidentState.FROZEN)
    assert site.links is not None and site.links.is_up and site.bench.agent._alone.alone
    one.answers = True
    await until(lambda: not site.bench.agent._alone.alone)
    (connection,) = site.bench.agent.links
    assert isinstance(connection, agent_link._Connection)
    await until(lambda: len(connection._unanswered) <= 1)


async def test_what_a_person_has_to_put_right_is_said_once_also_when_nobody_answers_in_between(site: Site) -> None:
    link = agent_link.AgentLink(site.bench.agent, "unix:/none")
    with capture_logs() as said:
        for reason in ("TOKEN_REFUSED", "SERVER_NOT_RUNNING", "TOKEN_REFUSED", "CERTIFICATE_EXPIRED"):
            link._complain(Unavailable("no", reason=reason))
    assert [line["reason"] for line in said if line["log_level"] == "warning"] == [
        "TOKEN_REFUSED",
        "CERTIFICATE_EXPIRED",
    ]


async def test_an_older_agent_whose_frames_have_no_body(site: Site) -> None:
    one = site.replicas[0]
    await one.start()
    await site.bench.boot()
    Frame, Frames = link_pb2.Frame, link_pb2.Frames
    async with grpc.aio.insecure_channel(one.address) as channel:
        stream = link_pb2_grpc.AgentLinkStub(channel).Connect()
        hello = site.bench.agent.hello()
        await stream.write(Frames(frames=[Frame(kind=Frame.HELLO, body=agent_link._encode(hello))]))
        await stream.read()
        odd = [Frame(kind=Frame.HEARTBEAT, id=7), Frame(kind=Frame.LEAVING), Frame(kind=99)]  # type: ignore[arg-type]
        await stream.write(Frames(frames=odd))
        (welcome,) = (await stream.read()).frames
        assert (welcome.kind, welcome.id) == (Frame.WELCOME, 7)
        await until(lambda: one.leaving)
        assert one.heartbeats == [api.Heartbeat(boot_id=hello.boot_id, residents=hello.residents)]
        assert one.leaving == [hello.boot_id]
        stream.cancel()


@pytest.mark.parametrize(
    "kind, body",
    [
        (link_pb2.Frame.RESULT, b"{"),
        (link_pb2.Frame.RESULT, b'{"residents": 7}'),
        (link_pb2.Frame.ERROR, b"\xff"),
        (link_pb2.Frame.ERROR, b'{"code":"UNAVAILABLE","reason":"","message":"","metadata":{"retry_after_s":"soon"}}'),
    ],
)
async def test_an_answer_that_nobody_can_read_is_an_error_of_that_call_alone(
    site: Site, kind: Any, body: bytes
) -> None:
    one = site.replicas[0]
    await one.start()
    Frame, Frames = link_pb2.Frame, link_pb2.Frames
    async with grpc.aio.insecure_channel(one.address) as channel:
        stream = link_pb2_grpc.AgentLinkStub(channel).Connect()
        hello = Frame(kind=Frame.HELLO, body=agent_link._encode(site.bench.agent.hello()))
        await stream.write(Frames(frames=[hello]))
        await stream.read()
        for said, answer, expected in ((kind, body, Internal), (Frame.RESULT, b"{}", api.Residents)):
            calling = asyncio.create_task(one.hub.call("w", api.ListResident()))
            (asked,) = (await stream.read()).frames
            await stream.write(Frames(frames=[Frame(kind=said, id=asked.id, body=answer)]))
            async with asyncio.timeout(5):
                (outcome,) = await asyncio.gather(calling, return_exceptions=True)
            assert isinstance(outcome, expected), outcome
        stream.cancel()


@pytest.mark.parametrize(
    "said, reason",
    [
        (api.Prepared(image_digest="x" * (5 << 20), size_bytes=0), "ANSWER_TOO_LARGE"),
        (FailedPrecondition("\0" * (5 << 20), reason="ODD", metadata={"long": "x" * (5 << 20), "short": "y"}), "ODD"),
        (FailedPrecondition("no file \udcff", reason="ODD", metadata={"short": "y"}), "ODD"),
    ],
    ids=["answer", "error", "no text"],
)
async def test_whatever_an_answer_holds_it_ends_its_own_call_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch, said: Any, reason: str
) -> None:
    """gRPC takes no message of 4 MiB, and ends the stream with all the calls of this worker."""
    one = site.replicas[0]
    await one.start()
    await site.link(one.address)
    await site.connected(0)

    async def handle(call: Any, reporter: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    with monkeypatch.context() as patch, pytest.raises(GreenroomError) as caught:
        patch.setattr(site.bench.agent, "handle", handle)
        async with asyncio.timeout(20):
            await one.hub.call("w", api.ListResident())
    assert caught.value.reason == reason
    assert len(caught.value.message) < 20_000 and (reason != "ODD" or caught.value.metadata == {"short": "y"})
    await one.hub.call("w", api.ListResident())
    assert not one.gone


async def test_what_is_too_long_to_be_asked_is_refused(site: Site) -> None:
    one = site.replicas[0]
    await one.start()
    await site.link(one.address)
    await site.connected(0)
    with pytest.raises(InvalidArgument) as caught:
        await one.hub.call("w", api.Prepare(image="x" * (5 << 20)))
    assert caught.value.reason == "CALL_TOO_LARGE"
    stream = one.hub.open("w", api.ImportImage(name="x", tag="y"))
    async with asyncio.timeout(20):
        await stream.send(bytes(5 << 20))  # in frames that fit
        await stream.send(b"")
        with pytest.raises(GreenroomError):
            await stream.result()
    await one.hub.call("w", api.ListResident())
    assert not one.gone


async def test_heartbeats_are_spread_and_bounded(site: Site) -> None:
    one = site.replicas[0]
    one.hub.welcome = api.Welcome(replica="r0", heartbeat_s=0.0)  # as often as possible, and not more
    await one.start()
    await site.link(one.address)
    await site.connected(0)
    began = asyncio.get_running_loop().time()
    one.heartbeats.clear()
    await until(lambda: len(one.heartbeats) >= 10)
    assert asyncio.get_running_loop().time() - began > 9 * agent_link.MIN_HEARTBEAT_S * 0.9
