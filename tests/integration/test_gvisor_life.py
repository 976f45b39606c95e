"""The life of an actor in gVisor sandboxes: start, answer, sleep, wake elsewhere, end. With real sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from gvisor_support import (
    READY_TIMEOUT_S,
    assert_nothing_left,
    connect,
    get,
    identity,
    make_rootfs,
    opened,
    python_class,
    request,
    run,
    sandbox_processes,
    skip_unless_possible,
    until,
    worker_name,
)

from greenroom.agent.execs import carry_out
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import FailedPrecondition, Unavailable
from greenroom.core.records import Endpoint, Resources
from greenroom.sandbox import dial
from greenroom.sandbox.gvisor import GvisorBackend
from greenroom.sandbox.gvisor import network as gvisor_network
from greenroom.sandbox.gvisor.network import GUEST_ADDRESS, Network
from greenroom.sandbox.port import ExecSpec, SandboxClass
from greenroom.sandbox.reaper import readable
from greenroom.testing.backend_conformance import held, until_nothing

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    skip_unless_possible()
    yield make_rootfs(tmp_path_factory.mktemp("gvisor") / "rootfs")


@pytest.fixture
def counter(rootfs: Path) -> SandboxClass:
    return python_class(rootfs)


@pytest.fixture(params=["socket", "cli"])
def control(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GREENROOM_GVISOR_CONTROL", request.param)
    return str(request.param)


@pytest.fixture
async def backend(rootfs: Path, tmp_path: Path) -> AsyncIterator[GvisorBackend]:
    # Deeper than a unix socket's address can hold.
    async with opened(tmp_path / ("deep-" * 20)) as backend:
        yield backend


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


async def test_sleep_and_wake_elsewhere(
    control: str, backend: GvisorBackend, counter: SandboxClass, image: Path
) -> None:
    await backend.warm(counter)
    first = await backend.start(counter, identity("alice"))
    assert first.warm
    born = await get(first.endpoint, "/inc")
    assert (born["hostname"], born["actor"], born["ram"], born["file"], born["pid"]) == ("alice", "alice", 1, 1, 1)

    await backend.checkpoint(first.sid, image)
    assert sorted(p.name for p in image.iterdir()) == ["checkpoint.img", "pages.img", "pages_meta.img"]
    files = {p.name: p.read_bytes() for p in image.iterdir()}
    await backend.destroy(first.sid)
    assert await backend.wait(first.sid) == 137

    await backend.warm(counter)
    again = await backend.restore(counter, identity("alice", 2), image, "alice")
    assert again.warm
    assert [p.name for p in again.phases] == ["restore"]
    woken = await get(again.endpoint, "/inc")
    assert (woken["boot"], woken["ram"], woken["file"]) == (born["boot"], 2, 2)
    assert (woken["hostname"], woken["generation"]) == ("alice", 2)
    assert again.endpoint.device != first.endpoint.device
    assert {p.name: p.read_bytes() for p in image.iterdir()} == files

    other = await backend.restore(counter, identity("bob"), image, "alice")
    assert not other.warm
    assert [p.name for p in other.phases] == ["create", "restore", "hostname"]
    clone = await get(other.endpoint, "/inc")
    assert (clone["hostname"], clone["actor"], clone["ram"], clone["boot"]) == ("bob", "bob", 2, born["boot"])


async def test_two_restores_of_one_image_at_once(backend: GvisorBackend, counter: SandboxClass, image: Path) -> None:
    golden = await backend.start(counter, identity("golden"))
    await get(golden.endpoint, "/inc")
    await backend.checkpoint(golden.sid, image)
    await asyncio.gather(backend.warm(counter), backend.warm(counter))
    assert backend.warm_counts() == {counter.digest: 2}
    running = await asyncio.gather(
        *(backend.restore(counter, identity(name), image, "golden") for name in ("one", "two"))
    )
    assert backend.warm_counts() == {}
    for name, sandbox in zip(("one", "two"), running, strict=True):
        answer = await get(sandbox.endpoint, "/inc")
        assert (answer["hostname"], answer["actor"], answer["ram"]) == (name, name, 2)


async def test_host_name_is_right_from_the_first_instruction(backend: GvisorBackend, rootfs: Path) -> None:
    source = "import os, time; print(os.uname().nodename, flush=True); time.sleep(1000)"
    running = await backend.start(python_class(rootfs, "-c", source), identity("early-bird"))
    assert await first_line(running.log_fifo) == b"early-bird\n"


async def first_line(fifo: Path | None) -> bytes:
    assert fifo is not None
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await readable(fd)
        return os.read(fd, 4096)
    finally:
        os.close(fd)


async def test_actor_has_few_rights(backend: GvisorBackend, rootfs: Path) -> None:
    source = "import time; print(open('/proc/self/status').read(), flush=True); time.sleep(1000)"
    for uid, rights in ((0, 0x4FB), (1000, 0)):
        running = await backend.start(python_class(rootfs, "-c", source, uid=uid, gid=uid), identity("few"))
        said = bytearray()
        async with following(running.log_fifo, said):
            await until(lambda said=said: b"Seccomp" in said)  # type: ignore[misc]
        told = {line.split(":")[0]: line.split()[1:] for line in said.decode().splitlines() if line}
        assert told["Uid"] == [str(uid)] * 4
        assert [int(told[name][0], 16) for name in ("CapEff", "CapPrm", "CapInh")] == [rights, rights, 0]
        assert int(told["CapBnd"][0], 16) == 0x4FB


async def test_freeze_and_thaw(control: str, backend: GvisorBackend, counter: SandboxClass) -> None:
    running = await backend.start(counter, identity("ice"))
    await get(running.endpoint)
    await backend.freeze(running.sid)
    await backend.freeze(running.sid)
    with await connect(running.endpoint) as sock:  # gVisor's network stack answers, the actor does not
        await asyncio.get_running_loop().sock_sendall(sock, b"GET /inc HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.get_running_loop().sock_recv(sock, 1)
        assert await backend.thaw(running.sid) == running.endpoint
        assert await backend.thaw(running.sid) == running.endpoint
        async with asyncio.timeout(READY_TIMEOUT_S):
            assert (await asyncio.get_running_loop().sock_recv(sock, 100)).startswith(b"HTTP/1.1 200")


async def test_nothing_runs_between_the_image_and_the_freeze(
    control: str, backend: GvisorBackend, rootfs: Path, image: Path
) -> None:
    """A program counts as fast as it can; what it said before the image and after it joins without gap or overlap."""
    source = "import itertools\nfor i in itertools.count(): print(i, flush=True)"
    busy = python_class(rootfs, "-c", source)
    running = await backend.start(busy, identity("busy"))
    told = bytearray()
    async with following(running.log_fifo, told):
        await until(lambda: told.count(b"\n") > 1000)
        await backend.checkpoint(running.sid, image)
        await asyncio.sleep(0.2)  # time in which a sandbox that is not frozen would betray itself
        said = len(told)
        await asyncio.sleep(0.2)
        assert len(told) == said
    more = bytearray()
    woken = await backend.restore(busy, identity("busy"), image, "busy")
    async with following(woken.log_fifo, more):
        await until(lambda: more.count(b"\n") > 100)
    # A line that the image cut in two is whole again when both are joined.
    numbers = [int(line) for line in bytes(told + more).splitlines()[:-1]]
    assert numbers == list(range(len(numbers)))


@contextlib.asynccontextmanager
async def following(fifo: Path | None, into: bytearray) -> AsyncIterator[None]:
    """Reads a log into ``into`` during the block, and what is left of it at the end."""
    assert fifo is not None
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    async def follow() -> None:
        while True:
            await readable(fd)
            into.extend(os.read(fd, 1 << 16))

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        os.close(fd)


async def test_open_connection_is_reset_by_saving_but_not_by_freezing(
    backend: GvisorBackend, counter: SandboxClass, image: Path
) -> None:
    running = await backend.start(counter, identity("chatty"))
    await get(running.endpoint)
    with await connect(running.endpoint) as kept:
        await request(kept, "/inc")
        await backend.freeze(running.sid)
        await backend.thaw(running.sid)
        assert b'"ram": 2' in await request(kept, "/inc")
        await backend.checkpoint(running.sid, image)
        with pytest.raises(ConnectionResetError):  # at once, not by running into a timeout
            await request(kept, "/inc")
    await backend.thaw(running.sid)
    assert (await get(running.endpoint, "/inc"))["ram"] == 3
    woken = await backend.restore(counter, identity("chatty"), image, "chatty")
    assert (await get(woken.endpoint, "/inc"))["ram"] == 3


async def test_exec(control: str, backend: GvisorBackend, counter: SandboxClass) -> None:
    running = await backend.start(counter, identity("tools"))
    source = (
        "import os, sys; text = sys.stdin.read(); print(text.upper(), os.environ['EXTRA'], os.getcwd(), end='');"
        "print('oops', end='', file=sys.stderr); sys.exit(7)"
    )
    spec = ExecSpec(argv=("python3", "-c", source), env=(("EXTRA", "more"),), cwd="/tmp")
    assert await run(await backend.exec(running.sid, spec), b"hello") == (7, b"HELLO more /tmp", b"oops")

    big = os.urandom(3 << 20)
    copy = ExecSpec(
        argv=("python3", "-c", "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)")
    )
    session = await backend.exec(running.sid, copy)

    async def feed() -> None:
        await session.write(big)
        await session.write(b"")

    feeding = asyncio.create_task(feed())
    received = b"".join([data async for _, data in session.output()])
    await feeding
    assert received == big
    assert await session.wait() == 0

    with pytest.raises(FailedPrecondition) as caught:
        await backend.exec(running.sid, ExecSpec(argv=("no-such-tool",)))
    assert caught.value.reason == "COMMAND_NOT_FOUND"
    assert (await backend.stats(running.sid)).pids >= 1


async def test_exec_takes_more_arguments_than_a_pipe_holds(
    control: str, backend: GvisorBackend, counter: SandboxClass
) -> None:
    running = await backend.start(counter, identity("wordy"))
    count = ("python3", "-c", "import sys; print(sum(map(len, sys.argv[1:])), end='')")
    session = await backend.exec(running.sid, ExecSpec(argv=(*count, "x" * 60_000, "y" * 60_000)))
    assert await run(session) == (0, b"120000", b"")


async def test_exec_is_ended_by_timeout_kill_and_the_end_of_the_sandbox(
    control: str, backend: GvisorBackend, counter: SandboxClass
) -> None:
    running = await backend.start(counter, identity("short"))
    sleep = ("python3", "-c", "import time; print('up', flush=True); time.sleep(1000)")
    timed = await backend.exec(running.sid, ExecSpec(argv=sleep, timeout_s=0.3))
    assert (await run(timed))[0] == 137
    killed = await backend.exec(running.sid, ExecSpec(argv=sleep))
    await killed.kill()
    await killed.kill()
    assert (await run(killed))[0] == 137
    lost = await backend.exec(running.sid, ExecSpec(argv=sleep))
    await backend.destroy(running.sid)
    assert (await run(lost))[0] == 137


class GoneCaller:
    """Gives no credit for output, as one that reads no more."""

    def __init__(self) -> None:
        self.began = asyncio.Event()

    def progress(self, progress: api.Progress) -> None: ...

    async def data(self, channel: int, data: bytes) -> None:
        self.began.set()
        await asyncio.Event().wait()

    async def input(self) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""


async def test_exec_whose_caller_goes_away_leaves_nothing(
    control: str, backend: GvisorBackend, counter: SandboxClass
) -> None:
    running = await backend.start(counter, identity("left"))
    await get(running.endpoint)
    assert (await run(await backend.exec(running.sid, ExecSpec(argv=("python3", "-c", "")))))[0] == 0
    had = set(held())
    flood = ("python3", "-c", "import sys\nwhile True: sys.stdout.write('x' * 65536)")
    caller = GoneCaller()
    call = api.Exec(actor_uid="uid-left", argv=flood)
    carried = asyncio.create_task(carry_out(backend, running.sid, call, caller))
    await caller.began.wait()
    await asyncio.sleep(0.5)  # all that can wait somewhere is full
    carried.cancel()
    await asyncio.wait([carried])
    await until_nothing(lambda: [what for what in held() if what not in had])
    assert (await get(running.endpoint))["ram"] == 0


async def test_stats(backend: GvisorBackend, counter: SandboxClass) -> None:
    running = await backend.start(counter, identity("fat"))
    await get(running.endpoint, "/touch?mb=20")
    stats = await backend.stats(running.sid)
    assert 20 << 20 < stats.memory_bytes < 100 << 20
    assert stats.cpu_seconds > 0.01
    assert stats.pids >= 1


@pytest.mark.parametrize("code", [0, 7])
async def test_exit_status_of_the_actor(backend: GvisorBackend, counter: SandboxClass, code: int) -> None:
    running = await backend.start(counter, identity("mortal"))
    waiting = [asyncio.create_task(backend.wait(running.sid)) for _ in range(2)]
    await get(running.endpoint, f"/exit?code={code}")
    async with asyncio.timeout(READY_TIMEOUT_S):
        assert await asyncio.gather(*waiting) == [code, code]
    with pytest.raises(Unavailable):
        await backend.freeze(running.sid)
    await backend.destroy(running.sid)
    await backend.destroy(running.sid)
    assert await backend.wait(running.sid) == code
    await backend.destroy("0" * 32)


async def test_large_bodies_arrive_whole(backend: GvisorBackend, counter: SandboxClass) -> None:
    running = await backend.start(counter, identity("big"))
    await get(running.endpoint)
    with await connect(running.endpoint) as sock:
        body = os.urandom(5 << 20)
        sock.settimeout(READY_TIMEOUT_S)
        head = f"POST /echo HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()

        def exchange() -> bytes:
            import threading

            sending = threading.Thread(target=sock.sendall, args=(head + body,))
            sending.start()
            received = b""
            while b"\r\n\r\n" not in received or len(received.split(b"\r\n\r\n", 1)[1]) < len(body):
                chunk = sock.recv(1 << 20)
                assert chunk
                received += chunk
            sending.join()
            return received.split(b"\r\n\r\n", 1)[1]

        assert await asyncio.to_thread(exchange) == body


async def test_shared_image_is_not_written_to(backend: GvisorBackend, counter: SandboxClass, rootfs: Path) -> None:
    running = await backend.start(counter, identity("writer"))
    await get(running.endpoint, "/inc")
    write = ExecSpec(argv=("python3", "-c", "open('/etc/passwd', 'a').write('x'); open('/new', 'w').write('y')"))
    assert (await run(await backend.exec(running.sid, write)))[0] == 0
    assert not (rootfs / "new").exists()
    assert not (rootfs / "data/count.txt").exists()
    assert (rootfs / "etc/passwd").read_text().count("\n") == 2


async def test_unknown_command_is_refused_before_anything_is_made(backend: GvisorBackend, rootfs: Path) -> None:
    cls = SandboxClass(rootfs=rootfs, image_digest="x", argv=("/opt/missing",), env=())
    for attempt in (backend.start(cls, identity("nobody")), backend.warm(cls)):
        with pytest.raises(FailedPrecondition) as caught:
            await attempt
        assert caught.value.reason == "COMMAND_NOT_FOUND"
        assert "/opt/missing" in caught.value.message


async def test_warm_sandboxes_come_and_go(backend: GvisorBackend, counter: SandboxClass, tmp_path: Path) -> None:
    await backend.warm(counter)
    await backend.chill(counter.digest)
    await backend.chill(counter.digest)
    assert backend.warm_counts() == {}
    assert sandbox_processes(next(tmp_path.glob("deep-*"))) == []


async def test_adoption_after_the_death_of_the_agent(rootfs: Path, tmp_path: Path, image: Path) -> None:
    counter = python_class(rootfs)
    old = GvisorBackend()
    await old.open(tmp_path, "test")
    assert await old.reconcile() == []
    await old.warm(counter)
    awake = await old.start(python_class(rootfs, "/app.py", "again"), identity("awake", 3))
    asleep = await old.start(python_class(rootfs, "/app.py", "again"), identity("asleep"))
    dying = await old.start(python_class(rootfs, "/app.py", "again"), identity("dying"))
    for running in (awake, asleep, dying):
        await get(running.endpoint, "/inc")
    await old.freeze(asleep.sid)
    await get(dying.endpoint, "/exit?code=3")
    await old.wait(dying.sid)
    process = old._boxes[dying.sid].process
    assert process is not None
    await process.ended()  # gVisor tells of the program's end a moment before its own
    # The old agent is abandoned as it is; nothing of it is closed.

    new = GvisorBackend()
    await new.open(tmp_path, "test")
    found = {f.owner.name: f for f in await new.reconcile()}
    assert found.keys() == {"awake", "asleep"}
    assert found["awake"].state is ResidentState.RUNNING
    assert found["asleep"].state is ResidentState.FROZEN
    assert found["awake"].owner == identity("awake", 3)
    assert found["awake"].endpoint == awake.endpoint
    assert new.warm_counts() == {}
    assert len(list((tmp_path / "sandboxes").iterdir())) == 2

    assert (await get(found["awake"].endpoint, "/inc"))["ram"] == 2
    await new.thaw(asleep.sid)
    assert (await get(found["asleep"].endpoint, "/inc"))["ram"] == 2
    await new.checkpoint(asleep.sid, image)
    await new.destroy(asleep.sid)
    waiting = asyncio.create_task(new.wait(awake.sid))
    await get(awake.endpoint, "/exit?code=5")
    async with asyncio.timeout(READY_TIMEOUT_S):
        assert await waiting == 5
    await new.close(keep_running=False)
    assert_nothing_left(tmp_path, worker_name(new))


async def test_closed_agent_leaves_owned_sandboxes_running(rootfs: Path, tmp_path: Path) -> None:
    counter = python_class(rootfs)
    first = GvisorBackend()
    await first.open(tmp_path, "test")
    await first.reconcile()
    await first.warm(counter)
    running = await first.start(counter, identity("stayer"))
    await first.warm(counter)
    await get(running.endpoint, "/inc")
    await first.close(keep_running=True)
    assert [p.name for p in (tmp_path / "sandboxes").iterdir()] == [running.sid]
    assert len(sandbox_processes(tmp_path)) == 2  # the sandbox and its file server
    assert (await get(running.endpoint, "/inc"))["ram"] == 2

    second = GvisorBackend()
    await second.open(tmp_path, "test")
    assert [f.sid for f in await second.reconcile()] == [running.sid]
    assert (await get(running.endpoint, "/inc"))["ram"] == 3
    await second.close(keep_running=False)
    assert_nothing_left(tmp_path, worker_name(second))
    with pytest.raises(Unavailable):
        dial.make_socket(running.endpoint)


def own_addresses() -> list[str]:
    """The addresses of this machine that another machine could use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing; only chooses a way out
        except OSError:
            return []
        return [sock.getsockname()[0]]


async def test_guest_reaches_nothing_of_the_host(backend: GvisorBackend, counter: SandboxClass) -> None:
    running = await backend.start(counter, identity("prisoner"))
    neighbour = await backend.start(counter, identity("neighbour"))
    await get(running.endpoint)
    await get(neighbour.endpoint)
    source = """
import socket, sys
for address in sys.argv[2:]:
    s = socket.socket(); s.settimeout(0.3)
    try:
        s.connect((address, int(sys.argv[1]))); print("reached", address)
    except OSError as e:
        print("no", address)
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print("raw socket")
except OSError:
    print("no raw socket")
"""
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        targets = ["169.254.77.1", "10.0.0.1", *own_addresses()]
        argv = ("python3", "-c", source, str(port), *targets)
        code, out, err = await run(await backend.exec(running.sid, ExecSpec(argv=argv)))
        assert code == 0, err
        assert out.decode().splitlines() == [*(f"no {t}" for t in targets), "no raw socket"]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_memory_limit_holds(backend: GvisorBackend, rootfs: Path) -> None:
    limited = python_class(rootfs, resources=Resources(memory_bytes=64 << 20, cpus=2.0, pids=64))
    running = await backend.start(limited, identity("glutton"))
    await get(running.endpoint)
    with await connect(running.endpoint) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, b"GET /touch?mb=400 HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(READY_TIMEOUT_S):
            assert await backend.wait(running.sid) == 137


#: As container runtimes do it: /proc/sys over itself, read-only.
_AS_IN_A_CONTAINER = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
_OPENS_A_NETWORK = """
import asyncio, subprocess, sys
from pathlib import Path
from greenroom.sandbox.gvisor.network import Network

async def main():
    network = Network(sys.argv[1], Path(sys.argv[2]))
    await network.open()
    try:
        (await network.make_slot()).release()
        switches = ("ip_forward", "conf/all/rp_filter", "conf/default/rp_filter")
        files = [f"/proc/sys/net/ipv4/{switch}" for switch in switches]
        subprocess.run(["nsenter", f"--net={network.path}", "cat", *files], check=True)
    finally:
        await network.close(remove=True)

asyncio.run(main())
"""


def test_the_network_is_made_where_the_switches_are_read_only(tmp_path: Path) -> None:
    python = [sys.executable, "-c", _OPENS_A_NETWORK, f"gr-test-{os.getpid()}", str(tmp_path / "counter")]
    command = ["unshare", "--mount", "sh", "-c", _AS_IN_A_CONTAINER, "sh", *python]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0"]


async def test_it_waits_for_a_connection_that_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is at the other end of either slot, so the handshake does not get on."""
    monkeypatch.setattr(gvisor_network, "SETTLE_S", 60.0)
    network = Network(f"gr-test-{os.getpid()}", tmp_path / "counter")
    await network.open()
    slots = [await network.make_slot() for _ in range(2)]
    try:
        busy, quiet = (slot.device for slot in slots)
        endpoint = Endpoint(host=GUEST_ADDRESS, port=80, netns=str(network.path), device=busy)
        with contextlib.closing(dial.make_socket(endpoint)) as opening:
            with pytest.raises(BlockingIOError):
                opening.connect(dial.address(endpoint))
            waiting = asyncio.create_task(network.settle(busy))
            await network.settle(quiet)
            assert not waiting.done(), "it waits for the other one"
        await asyncio.wait_for(waiting, 30)  # long before it would wait no more
    finally:
        for slot in slots:
            slot.release()
        await network.close(remove=True)
