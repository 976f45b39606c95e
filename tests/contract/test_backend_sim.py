"""The `sim` backend keeps the port's rules."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path

import pytest

from greenroom.core.agentapi import Identity, ResidentState
from greenroom.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from greenroom.sandbox.port import Backend, SandboxClass
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimBackend, SimScript
from greenroom.testing.backend_conformance import BackendConformance, BackendTools, Reading, identity

CLASS = SandboxClass(rootfs=Path("/"), image_digest="sha256:0", argv=("none",), env=())


class TestSimBackend(BackendConformance):
    lacks = frozenset({"command", "logs"})
    survives_agent = False

    async def make_backend(self) -> Backend:
        return SimBackend(SimScript())

    async def make_class(self, tmp_path: Path) -> SandboxClass:
        return CLASS

    def read(self, body: bytes) -> Reading:
        said = json.loads(body)
        name = said["actor"].rpartition("/")[2]
        return Reading(said["count"], said["file_count"], name, said["generation"], said["boot"])

    def command(self, what: str, *args: str) -> tuple[str, ...]:
        return () if what in ("complain", "linger") else (what, *args)


class TestScript(BackendTools):
    """Latencies and failures on order, and the HTTP side."""

    async def opened_sim(self, **methods: MethodScript) -> tuple[SimBackend, Path]:
        self.place = Path(tempfile.mkdtemp(prefix="gr-"))
        self.backend = SimBackend(SimScript(methods=methods))
        await self.backend.open(self.place, "w")
        return self.backend, self.place

    def teardown_method(self) -> None:
        if place := getattr(self, "place", None):
            assert list(place.iterdir()) == [], "closed, it leaves nothing"
            place.rmdir()

    async def test_the_nth_call_fails_and_leaves_things_as_they_were(self, tmp_path: Path) -> None:
        failures = (ScriptedFailure(call=2, code="RESOURCE_EXHAUSTED", reason="DISK_FULL", message="full"),)
        backend, _ = await self.opened_sim(checkpoint=MethodScript(failures=failures))
        running = await backend.start(CLASS, identity())
        await backend.checkpoint(running.sid, tmp_path)
        await backend.thaw(running.sid)
        with pytest.raises(ResourceExhausted, match="call 2") as caught:
            await backend.checkpoint(running.sid, tmp_path)
        assert caught.value.reason == "DISK_FULL"
        assert backend.state(running.sid) is ResidentState.RUNNING
        await backend.checkpoint(running.sid, tmp_path)
        assert backend.state(running.sid) is ResidentState.FROZEN
        await backend.close(keep_running=False)

    async def test_a_failed_start_leaves_nobody(self) -> None:
        backend, _ = await self.opened_sim(start=MethodScript(failures=(ScriptedFailure(call=1, code="UNAVAILABLE"),)))
        with pytest.raises(Unavailable):
            await backend.start(CLASS, identity("one"))
        running = await backend.start(CLASS, identity("two"))
        with pytest.raises(ConnectionResetError):
            await self.http_get(running.endpoint, "/", identity("one"))
        await backend.close(keep_running=False)

    async def test_latency(self) -> None:
        backend, _ = await self.opened_sim(start=MethodScript(latency_s=0.05, jitter_s=0.01))
        running = await backend.start(CLASS, identity())
        assert running.phases[0].seconds >= 0.05
        await backend.close(keep_running=False)

    async def test_a_gate_holds_a_call_until_it_is_set(self) -> None:
        backend, _ = await self.opened_sim()
        go = backend.gates["start"] = asyncio.Event()
        starting = asyncio.ensure_future(backend.start(CLASS, identity()))
        await asyncio.sleep(0.02)
        assert backend.calls["start"] == 1 and not starting.done()
        go.set()
        assert backend.state((await starting).sid) is ResidentState.RUNNING
        await backend.close(keep_running=False)

    async def test_script_from_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "script.json"
        script.write_text('{"fingerprint": "sim-x", "methods": {"start": {"failures": [{"code": "UNAVAILABLE"}]}}}')
        monkeypatch.setenv("GREENROOM_SIM_SCRIPT", str(script))
        backend = SimBackend()
        assert (await backend.probe()).fingerprint == "sim-x"
        with pytest.raises(Unavailable):
            await backend.start(CLASS, identity())
        script.write_text("{")
        with pytest.raises(InvalidArgument, match=str(script)):
            SimBackend()

    async def test_only_residents_answer(self) -> None:
        backend, _ = await self.opened_sim()
        running = await backend.start(CLASS, identity("here"))
        assert (await self.http_get(running.endpoint, "/healthz", identity("here")))[0] == 200
        assert (await self.http_get(running.endpoint, "/nothing", identity("here")))[0] == 404
        for stranger in (identity("there"), Identity(namespace="other", name="here", uid="u", generation=1)):
            with pytest.raises(ConnectionResetError):
                await self.http_get(running.endpoint, "/healthz", stranger)
        await backend.destroy(running.sid)
        with pytest.raises(ConnectionResetError):
            await self.http_get(running.endpoint, "/healthz", identity("here"))
        await backend.close(keep_running=False)

    async def test_keep_alive_pipelining_and_bodies(self) -> None:
        backend, _ = await self.opened_sim()
        running = await backend.start(CLASS, identity())
        head = b"Greenroom-Actor: conformance/counter\r\n"
        reader, writer = await asyncio.open_unix_connection(running.endpoint.path)
        writer.write(b"POST / HTTP/1.1\r\n%bContent-Length: 5\r\n\r\nhelloGET /inc HTTP/1.1\r\n%b\r\n" % (head, head))
        writer.write(
            b"POST / HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n" % head
        )
        async with asyncio.timeout(60):
            answers = await reader.read()
        assert [answers.find(b'"count":%d' % n) > 0 for n in (1, 2, 3)] == [True] * 3
        writer.close()
        await backend.close(keep_running=False)

    async def test_nonsense_is_refused(self) -> None:
        backend, place = await self.opened_sim()
        reader, writer = await asyncio.open_unix_connection(str(place / "sim.sock"))
        writer.write(b"\x00\x01 nonsense\r\n\r\n")
        async with asyncio.timeout(60):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await backend.close(keep_running=False)

    async def test_thousands_are_cheap(self, tmp_path: Path) -> None:
        """A start, a restore: microseconds each, so a load test measures everything else. The bound is a tenth of a
        wake-up at 1000 per second and twenty times what an idle machine takes."""
        backend, _ = await self.opened_sim()
        first = await backend.start(CLASS, identity())
        await backend.checkpoint(first.sid, tmp_path)
        owners = [identity(f"a-{i}") for i in range(2000)]
        began = time.process_time()
        for owner in owners:
            running = await backend.restore(CLASS, owner, tmp_path, "x")
            await backend.destroy(running.sid)
        assert (time.process_time() - began) / len(owners) < 0.001
        await backend.close(keep_running=False)


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="too long"):
        await SimBackend(SimScript()).open(tmp_path / ("x" * 100), "w")
