"""An agent's links over TCP: replicas that it learns of, certificates that are renewed, tokens that are rotated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from agent_kit import Bench, short_directory, until
from grpc import StatusCode
from grpc.aio import AioRpcError
from link_kit import Replica
from msgspec.structs import replace
from structlog.testing import capture_logs

from greenroom.agent import link as agent_link
from greenroom.agent.links import Links
from greenroom.api._gen.greenroom.link.v1alpha1 import link_pb2, link_pb2_grpc
from greenroom.api.access import Access, Guard
from greenroom.core.errors import InvalidArgument
from greenroom.core.rosters import Berth
from greenroom.testing.certificates import Authority

#: What the certificate is for: the name of the service, behind which all replicas are.
NAME = "localhost"


@dataclass
class Site:
    bench: Bench
    authority: Authority
    replicas: list[Replica]
    links: list[Links] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.bench.root

    def issue(self, left_s: float = 1e6) -> None:
        self.authority.issue(self.root / "tls.crt", self.root / "tls.key", [NAME], left_s)

    def named(self, number: int) -> str:
        """The address as a person writes it, whom the certificate is for."""
        return f"{NAME}:{self.replicas[number].address.rpartition(':')[2]}"

    def link(self, *given: str) -> Links:
        access = Access(ca=self.authority.ca, token_file=self.root / "token")
        self.links.append(Links(self.bench.agent, given, access))
        self.links[-1].start()
        return self.links[-1]


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(agent_link, "LAST_PAUSE_S", 0.2)
    with short_directory() as root:
        async with Bench(root) as bench, AsyncExitStack() as ends:
            guard = Guard(root / "tls.crt", root / "tls.key", root / "tokens")
            site = Site(bench, Authority(root), [Replica(root, f"r{n}", guard) for n in range(2)])
            site.issue()
            for name in ("token", "tokens"):
                (root / name).write_text("t1\n")
            for replica in site.replicas:
                await replica.start()
                ends.push_async_callback(replica.kill)
            yield site
            for links in site.links:
                await links.close()


async def test_a_replica_that_is_learned_of_by_its_own_address_is_known_by_the_name_of_all(site: Site) -> None:
    one, two = site.replicas
    one.say(one, two)
    assert two.address.startswith("127.0.0.1:")
    links = site.link(site.named(0))
    await until(lambda: one.connected and two.connected)
    assert two.address in links.targets


async def test_sockets_are_not_learned_of_from_afar(site: Site) -> None:
    beside = Replica(site.root, "r9")
    site.replicas[0].say(beside, site.replicas[1])
    links = site.link(site.named(0))
    await until(lambda: site.replicas[1].connected)
    assert beside.address not in links.targets


async def test_a_link_survives_that_its_token_and_its_certificate_are_replaced(site: Site) -> None:
    one = site.replicas[0]
    site.link(site.named(0))
    await until(lambda: one.connected)
    (site.root / "tokens").write_text("t2\n")
    site.issue()
    one.heartbeats.clear()
    await until(lambda: len(one.heartbeats) > 3)
    assert len(one.connects) == 1, "what is connected stays so"
    (site.root / "token").write_text("t2\n")
    await one.kill()
    await one.start()  # on the port that it had
    await until(lambda: len(one.connects) == 2)


def _foreign_token(site: Site) -> None:
    (site.root / "token").write_text("t0\n")


def _no_token(site: Site) -> None:
    (site.root / "token").unlink()


def _expired(site: Site) -> None:
    site.issue(left_s=-1)


def _another_authority(site: Site) -> None:
    Authority(site.root, "x").issue(site.root / "tls.crt", site.root / "tls.key", [NAME])


def _another_name(site: Site) -> None:
    site.authority.issue(site.root / "tls.crt", site.root / "tls.key", ["elsewhere"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_foreign_token, "TOKEN_REFUSED"),
        (_no_token, "FILE_UNREADABLE"),
        (_expired, "CERTIFICATE_EXPIRED"),
        (_another_authority, "CERTIFICATE_UNKNOWN"),
        (_another_name, "CERTIFICATE_OF_ANOTHER"),
    ],
)
async def test_what_is_wrong_is_said_once_and_tried_again_until_it_is_right(
    site: Site, spoil: Callable[[Site], None], reason: str
) -> None:
    spoil(site)
    with capture_logs() as said:

        def warned() -> int:
            return sum(line["log_level"] == "warning" and line.get("reason") == reason for line in said)

        def tries() -> int:
            return sum(line["event"] == "no link to the control plane" for line in said)

        site.link(site.named(0))
        await until(lambda: tries() > 3)
        assert warned() == 1 and not site.replicas[0].connects
        (site.root / "token").write_text("t1\n")
        site.issue()
        await until(lambda: site.replicas[0].connected)


async def test_agents_are_not_taken_from_everywhere_without_a_token(site: Site) -> None:
    open_to_all = Replica(site.root, "r5", Guard(site.root / "tls.crt", site.root / "tls.key"))
    open_to_all.address = "0.0.0.0:0"
    with pytest.raises(InvalidArgument, match="--agent-token-file"):
        await open_to_all.start()


async def test_a_name_alone_does_not_cut_off_the_pod_that_has_it(site: Site) -> None:
    """All agents share their tokens: another one that claims the name of a registered worker is not heard."""
    one = site.replicas[0]
    site.link(site.named(0))
    await until(lambda: one.connected)
    real = one.hub.connected()["w"]
    access = Access(ca=site.authority.ca, token_file=site.root / "token")

    async def claim(berth: Berth) -> AioRpcError | None:
        """What an agent that says so is told at once, if anything."""
        async with access.aio_channel(site.named(0), ()) as channel:
            stream = link_pb2_grpc.AgentLinkStub(channel).Connect()
            body = msgspec.json.encode(replace(real, boot_id="x", berth=berth))
            await stream.write(link_pb2.Frames(frames=[link_pb2.Frame(kind=link_pb2.Frame.HELLO, body=body)]))
            try:
                await stream.read()
            except AioRpcError as error:
                return error
            return None

    refused = await claim(Berth(pool_uid="u", epoch=1, pod_uid="another"))
    assert refused is not None and refused.code() is StatusCode.ALREADY_EXISTS
    assert one.hub.connected()["w"] == real and not one.gone
    assert await claim(real.berth) is None, "but the same pod's agent, which has restarted, takes its own place"


async def test_who_took_a_name_while_its_worker_was_registered_is_not_taken_for_it(site: Site) -> None:
    """Until it is registered anybody with a token may replace it; its registration then vouches for nobody else."""
    one = site.replicas[0]
    one.answers = False
    site.link(site.named(0))
    await until(lambda: one.connected)
    real = one.hub.connected()["w"]
    access = Access(ca=site.authority.ca, token_file=site.root / "token")
    async with access.aio_channel(site.named(0), ()) as channel:
        stream = link_pb2_grpc.AgentLinkStub(channel).Connect()
        body = msgspec.json.encode(replace(real, boot_id="x", berth=Berth(pool_uid="u", epoch=1, pod_uid="another")))
        await stream.write(link_pb2.Frames(frames=[link_pb2.Frame(kind=link_pb2.Frame.HELLO, body=body)]))
        await until(lambda: one.hub.connected()["w"].boot_id == "x")
        one.hub.acknowledge(real)
        await until(lambda: one.hub.connected()["w"].boot_id == real.boot_id)
