"""TLS and tokens of the API over TCP, while certificates are renewed and tokens are rotated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_control import FakeControl
from structlog.testing import capture_logs

from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.access import Access, Guard
from greenroom.api.client import AioClient, Client
from greenroom.api.server import ApiServer
from greenroom.core.errors import FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable
from greenroom.testing.certificates import Authority

HOSTS = ["127.0.0.1"]
ASK = pb.GetServerInfoRequest()


@dataclass
class Site:
    root: Path
    authority: Authority
    address: str = ""

    @property
    def guard(self) -> Guard:
        return Guard(self.root / "tls.crt", self.root / "tls.key", self.root / "tokens")

    def issue(self, authority: Authority | None = None, left_s: float = 1e6) -> None:
        (authority or self.authority).issue(self.root / "tls.crt", self.root / "tls.key", HOSTS, left_s)

    async def ask(self, **access: Any) -> str:
        """On a connection of its own."""
        knows = {"ca": self.authority.ca, "token": "t1"} | access
        async with AioClient(self.address, Access(**knows)) as client:
            return str((await client.system.GetServerInfo(ASK, timeout=10)).version)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path, Authority(tmp_path))
    site.issue()
    (tmp_path / "tokens").write_text("t0\n\n  t1  \n")
    server = ApiServer(FakeControl(), guard=site.guard)
    await server.start(["127.0.0.1:0", f"unix:{tmp_path}/s"])
    site.address = server.addresses[0]
    yield site
    await server.close(0)


async def test_every_token_of_the_file_is_good_and_no_other(site: Site) -> None:
    for token in ("t0", "t1"):
        assert await site.ask(token=token)
    with pytest.raises(FailedPrecondition, match="is no token"):
        await site.ask(token="t0\tt1")
    for token in ("", "t", "t2"):
        with pytest.raises(Unauthenticated, match="this server asks for a token"):
            await site.ask(token=token)


async def test_the_socket_asks_for_nothing(site: Site) -> None:
    async with AioClient(f"unix:{site.root}/s", Access(token="whatever")) as client:
        assert (await client.system.GetServerInfo(ASK)).version


async def test_streams_are_refused_too(site: Site) -> None:
    async with AioClient(site.address, Access(ca=site.authority.ca)) as client:
        with pytest.raises(Unauthenticated):
            async for _ in client.system.Watch(pb.WatchRequest()):
                pass


async def test_tokens_are_rotated_without_a_restart(site: Site) -> None:
    (site.root / "mine").write_text("t1\n")
    async with AioClient(site.address, Access(ca=site.authority.ca, token_file=site.root / "mine")) as client:
        assert (await client.system.GetServerInfo(ASK)).version
        (site.root / "tokens").write_text("t1\nt2\n")
        (site.root / "mine").write_text("t2\n")
        assert (await client.system.GetServerInfo(ASK)).version
        (site.root / "tokens").write_text("t2\n")
        assert (await client.system.GetServerInfo(ASK)).version, "the same client, on the same connection"
        with pytest.raises(Unauthenticated):
            await site.ask(token="t1")
        (site.root / "tokens").unlink()  # while it is being replaced
        assert (await client.system.GetServerInfo(ASK)).version
        (site.root / "tokens").write_text("")
        with pytest.raises(Unauthenticated):
            await client.system.GetServerInfo(ASK)
        (site.root / "mine").unlink()
        with pytest.raises(Unavailable, match="can't be read any more"):
            await client.system.GetServerInfo(ASK)


async def test_a_certificate_is_renewed_without_a_restart_also_by_another_authority(site: Site) -> None:
    async with AioClient(site.address, Access(ca=site.authority.ca, token="t1")) as open_client:
        assert (await open_client.system.GetServerInfo(ASK)).version
        new = Authority(site.root, "new")
        site.issue(new)
        assert await site.ask(ca=new.ca)
        with pytest.raises(Unavailable, match="set GREENROOM_CA") as unknown:
            await site.ask()
        assert unknown.value.reason == "CERTIFICATE_UNKNOWN"
        assert (await open_client.system.GetServerInfo(ASK)).version, "what is connected stays so"


async def test_a_client_that_lives_long_takes_up_another_authority(site: Site) -> None:
    """The operator's pod: the secret changes, and only then does its connection break."""
    mine = site.root / "mine.crt"
    mine.write_bytes(site.authority.ca.read_bytes())
    server = ApiServer(FakeControl(), guard=site.guard)
    await server.start(["127.0.0.1:0"])
    address = server.addresses[0]
    async with AioClient(address, Access(ca=mine, token="t1")) as client, asyncio.timeout(30):
        assert (await client.system.GetServerInfo(ASK)).version
        new = Authority(site.root, "new")
        site.issue(new)
        await server.close(0)
        server = ApiServer(FakeControl(), guard=site.guard)
        await server.start([address])
        try:
            with pytest.raises(Unavailable, match="set GREENROOM_CA"):
                await _asked(client)
            mine.write_bytes(new.ca.read_bytes())  # the kubelet is later than the control plane
            with pytest.raises(Unavailable, match="set GREENROOM_CA"):
                await _asked(client)
            assert await _asked(client)
        finally:
            await server.close(0)


async def _asked(client: AioClient) -> str:
    """Tries again while nobody answers, as everybody does."""
    while True:
        try:
            return str((await client.system.GetServerInfo(ASK)).version)
        except Unavailable as error:
            if error.reason == "CERTIFICATE_UNKNOWN":
                raise
            await asyncio.sleep(0.05)


async def test_a_certificate_that_does_not_go_with_its_key_is_not_taken(site: Site) -> None:
    key = (site.root / "tls.key").read_bytes()
    site.issue()
    (site.root / "tls.key").write_bytes(key)  # one of the two files is there, the other is not yet
    with capture_logs() as said:
        assert await site.ask(), "the one before is shown"
    assert any("belong together" in line.get("error", "") for line in said)


async def test_an_expired_certificate_is_said_on_both_sides(site: Site) -> None:
    site.issue(left_s=-1)
    with capture_logs() as said, pytest.raises(Unavailable, match="renew it") as expired:
        await site.ask()
    assert expired.value.reason == "CERTIFICATE_EXPIRED"
    assert [line["log_level"] for line in said if "has expired" in line["event"]] == ["error"]
    site.issue()
    assert await site.ask()


async def test_a_certificate_is_for_a_name(site: Site) -> None:
    with pytest.raises(Unavailable, match="GREENROOM_SERVER_NAME") as other:
        await site.ask(server_name="greenroom.example")
    assert other.value.reason == "CERTIFICATE_OF_ANOTHER"
    site.authority.issue(site.root / "tls.crt", site.root / "tls.key", ["greenroom.example"])
    assert await site.ask(server_name="greenroom.example"), "as behind a port-forward"


async def test_a_client_without_tls_is_told_what_it_lacks(site: Site) -> None:
    with pytest.raises(Unavailable, match="it may want TLS; set GREENROOM_CA"):
        await site.ask(ca=None, token="")
    with pytest.raises(InvalidArgument, match="a token is not sent") as unsent:
        await site.ask(ca=None)
    assert unsent.value.reason == "NO_CA"


async def test_the_blocking_client_as_well(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_CA", str(site.authority.ca))
    monkeypatch.setenv("GREENROOM_TOKEN", "t1")

    def ask() -> str:
        with Client(site.address) as client:
            return str(client.system.GetServerInfo(ASK).version)

    assert await asyncio.to_thread(ask)
    monkeypatch.setenv("GREENROOM_CA", str(site.root / "none"))
    with pytest.raises(FailedPrecondition, match="can't read"):
        await asyncio.to_thread(ask)


@pytest.mark.parametrize("bad", ["no certificate", "no key", "no tokens", "empty tokens", "not a certificate"])
async def test_a_server_does_not_start_with_what_it_can_not_use(site: Site, bad: str) -> None:
    match bad:
        case "no certificate":
            (site.root / "tls.crt").unlink()
        case "no key":
            (site.root / "tls.key").unlink()
        case "no tokens":
            (site.root / "tokens").unlink()
        case "empty tokens":
            (site.root / "tokens").write_text("\n \n")
        case _:
            (site.root / "tls.crt").write_text("hello\n")
    with pytest.raises(FailedPrecondition, match=str(site.root)):
        await ApiServer(FakeControl(), guard=site.guard).start(["127.0.0.1:0"])


async def test_nothing_is_open_to_others_without_both(site: Site) -> None:
    no_tokens = Guard(site.root / "tls.crt", site.root / "tls.key")
    for guard, lacks in ((None, "--tls-cert, --tls-key and --api-token-file"), (no_tokens, "--api-token-file")):
        with pytest.raises(InvalidArgument, match=lacks) as open_to_all:
            await ApiServer(FakeControl(), guard=guard).start(["0.0.0.0:0"])
        assert open_to_all.value.reason == "ADDRESS_NOT_LOOPBACK"
    server = ApiServer(FakeControl(), guard=no_tokens)
    await server.start(["127.0.0.1:0"])
    await server.close(0)
