"""The parts of the gVisor backend that need neither root nor runsc."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from greenroom.core.errors import FailedPrecondition, Internal
from greenroom.core.records import Resources
from greenroom.sandbox import reaper
from greenroom.sandbox.gvisor import binary, spec, urpc
from greenroom.sandbox.gvisor.box import Box, BoxRecord, BoxState, Factory, finish, read_record
from greenroom.sandbox.gvisor.cgroups import HOST_TASKS_PER_ACTOR_TASK, SENTRY_MEMORY_BYTES, SENTRY_TASKS, Cgroups
from greenroom.sandbox.gvisor.control import Control, exit_code
from greenroom.sandbox.gvisor.network import COUNTER_BLOCK, Counter, Network, Slot, base36
from greenroom.sandbox.gvisor.rootfs import MAX_DIRECTORIES, MAX_NAMES, MAX_PATH_BYTES, find_command, resolve
from greenroom.sandbox.gvisor.stacks import is_changing, is_frozen
from greenroom.sandbox.port import SandboxClass

# --- which runsc ----------------------------------------------------------------------------------------------


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_runsc_is_looked_for_in_order(tmp_path: Path) -> None:
    prefix = tmp_path / "project" / ".venv"
    with pytest.raises(FailedPrecondition, match="make setup"):
        binary.find_path({"PATH": str(tmp_path / "bin")}, prefix)
    tools = program(tmp_path / "project/.tools/bin/runsc")
    assert binary.find_path({"PATH": str(tmp_path / "bin")}, prefix) == tools
    on_path = program(tmp_path / "bin/runsc")
    assert binary.find_path({"PATH": str(tmp_path / "bin")}, prefix) == on_path
    chosen = program(tmp_path / "mine")
    assert binary.find_path({"PATH": str(tmp_path / "bin"), "GREENROOM_RUNSC": str(chosen)}, prefix) == chosen
    with pytest.raises(FailedPrecondition, match="GREENROOM_RUNSC"):
        binary.find_path({"GREENROOM_RUNSC": str(tmp_path / "absent")}, prefix)


@pytest.mark.parametrize("version", ["0.0~20221219.0", "release-20221219.0", "release-20240101.0"])
def test_releases_that_lose_actors_are_refused(version: str) -> None:
    with pytest.raises(FailedPrecondition, match="kills the actor") as caught:
        binary.check_release("/usr/bin/runsc", version)
    assert caught.value.reason == "RUNSC_TOO_OLD"


@pytest.mark.parametrize("version", ["0.0~20240729.0", "release-20251110.0", "VERSION_MISSING"])
def test_other_releases_are_left_to_the_self_test(version: str) -> None:
    binary.check_release("/usr/bin/runsc", version)


def test_fingerprint_says_what_a_snapshot_is_bound_to() -> None:
    one = binary.Runsc(path="/a", version="1", platform="ptrace", cpu="x")
    assert one.fingerprint == binary.Runsc(path="/b", version="1", platform="ptrace", cpu="x").fingerprint
    others = [("2", "ptrace", "x"), ("1", "systrap", "x"), ("1", "ptrace", "y")]
    prints = {binary.Runsc(path="/a", version=v, platform=p, cpu=c).fingerprint for v, p, c in others}
    assert len(prints | {one.fingerprint}) == 4
    assert binary.cpu_features("flags : b a\n") == binary.cpu_features("model: x\nflags\t: a b\n")
    assert binary.cpu_features("Features : fp\n") not in (binary.cpu_features("Features : sve\n"), "unknown")


def test_platform_is_one_that_is_known() -> None:
    assert binary.platform_of({}) == "ptrace"
    assert binary.platform_of({"GREENROOM_GVISOR_PLATFORM": "systrap"}) == "systrap"
    with pytest.raises(FailedPrecondition, match="kvm"):
        binary.platform_of({"GREENROOM_GVISOR_PLATFORM": "kvm"})


# --- paths in an image ----------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    program(root / "usr/bin/tool")
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/alias").symlink_to("/bin/tool")
    (root / "usr/bin/up").symlink_to("../../../../../usr/bin/tool")
    (root / "usr/bin/loop").symlink_to("loop")
    (root / "usr/bin/host").symlink_to("/etc/host-only")
    (root / "usr/bin/data").write_text("no program")
    (root / "srv").mkdir()
    program(root / "srv/here")
    return root


def test_links_stay_inside(root: Path) -> None:
    tool = root / "usr/bin/tool"
    for path in ("/bin/tool", "/bin/alias", "/bin/up", "/../../bin//./tool", "/srv/../bin/tool"):
        assert resolve(root, path) == tool
    for path in ("/bin/loop", "/bin/host", "/bin/missing", "/bin/tool/x"):
        assert resolve(root, path) is None
    assert resolve(root, "/..") == root


def test_commands_are_found_as_execvp_does(root: Path) -> None:
    path = "/sbin:/bin"
    assert find_command(root, "tool", path, "/") == "/bin/tool"
    assert find_command(root, "/usr/bin/alias", path, "/") == "/usr/bin/alias"
    assert find_command(root, "./here", path, "/srv") == "/srv/./here"
    assert find_command(root, "here", ":/bin", "/srv/") == "/srv/here"
    for command in ("data", "missing", "/bin/missing", "/bin", "loop", "", "./here"):
        with pytest.raises(FailedPrecondition) as caught:
            find_command(root, command, path, "/")
        assert caught.value.reason == "COMMAND_NOT_FOUND"
        assert repr(command) in caught.value.message


def test_a_path_of_an_image_is_looked_through_within_bounds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    real = os.lstat

    def lstat(*args: Any, **kwargs: Any) -> os.stat_result:
        nonlocal looked
        looked += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "lstat", lstat)
    deep = "/".join(["a"] * 60)
    (root / deep).mkdir(parents=True)
    with pytest.raises(FailedPrecondition, match=f"first {MAX_DIRECTORIES} directories of PATH") as caught:
        find_command(root, "x", ":" * 100_000, f"/{deep}")
    assert looked <= MAX_DIRECTORIES * 61
    assert len(caught.value.message) < 500
    looked = 0
    (root / "far").symlink_to("a/../" * 800)
    assert resolve(root, "/far" * 40 + "/bin/tool") is None
    assert resolve(root, "/" * MAX_PATH_BYTES + "bin/tool") is None
    assert looked <= MAX_NAMES


async def test_a_command_is_looked_for_beside_the_event_loop(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def refuse(*_: object) -> None:
        threads.append(threading.current_thread())
        raise FailedPrecondition("the image has no program")

    async def make_slot(*, with_netns: bool) -> Slot:
        return Slot("", socket.socket())

    monkeypatch.setattr(spec, "config", refuse)
    control = cast("Control", SimpleNamespace(needs_netns=False))
    network = cast("Network", SimpleNamespace(make_slot=make_slot))
    cgroups = cast("Cgroups", SimpleNamespace(processes=lambda sid: [], remove=lambda sid: True))
    runsc = binary.Runsc(path="/a", version="1", platform="ptrace", cpu="x")
    with pytest.raises(FailedPrecondition, match="no program"):
        await Factory(runsc, control, network, cgroups, tmp_path).create(
            SandboxClass(rootfs=root, image_digest="x", argv=("tool",), env=())
        )
    assert threads != [threading.main_thread()]
    assert [*tmp_path.iterdir()] == [root]


def test_specification(root: Path, tmp_path: Path) -> None:
    cls = SandboxClass(
        rootfs=root, image_digest="x", argv=("tool", "-v"), env=(("A", "b=c"),), cwd="/srv", uid=5, gid=6
    )
    config = spec.config(cls, tmp_path)
    args = config["process"]["args"]
    assert args == ["/dev/.greenroom/init", "/dev/.greenroom/hostname", "/usr/bin/tool", "-v"]
    assert "A=b=c" in config["process"]["env"]
    assert config["process"]["noNewPrivileges"] is True
    bound = [m for m in config["mounts"] if m["type"] == "bind"]
    assert [m["destination"] for m in bound] == ["/run/greenroom", "/dev/.greenroom"]
    assert all("ro" in m["options"] for m in bound)
    assert spec.mask(("CAP_CHOWN", "CAP_SYS_ADMIN")) == 1 | 1 << 21
    assert spec.mask(spec.CAPABILITIES) & spec.mask(("CAP_SYS_ADMIN", "CAP_SETPCAP")) == 0
    with pytest.raises(FailedPrecondition, match="set the template's command"):
        spec.config(SandboxClass(rootfs=root, image_digest="x", argv=(), env=()), tmp_path)


# --- control groups -------------------------------------------------------------------------------------------

RESOURCES = Resources(memory_bytes=100 << 20, cpus=0.5, pids=10)


def test_version_1_limits(tmp_path: Path) -> None:
    mounts = "".join(f"cgroup {tmp_path}/{c} cgroup rw,{c} 0 0\n" for c in ("memory", "cpu", "cpuacct", "pids"))
    for controller in ("memory", "cpu", "cpuacct", "pids"):
        (tmp_path / controller).mkdir()
    groups = Cgroups.detect("w", mounts)
    assert groups.check().ok
    group = groups.make("s", RESOURCES)
    groups.limit_cpu(group, RESOURCES)
    place = tmp_path / "{}/greenroom/w/s"
    assert Path(str(place).format("memory"), "memory.limit_in_bytes").read_text() == str(
        (100 << 20) + SENTRY_MEMORY_BYTES
    )
    assert Path(str(place).format("pids"), "pids.max").read_text() == str(SENTRY_TASKS + 10 * HOST_TASKS_PER_ACTOR_TASK)
    assert Path(str(place).format("cpu"), "cpu.cfs_quota_us").read_text() == "50000"
    assert len(group.process_files) == 4
    Path(str(place).format("cpuacct"), "cpuacct.usage").write_text("1500000000\n")
    assert groups.cpu_seconds(group) == 1.5
    oom = Path(str(place).format("memory"), "memory.oom_control")
    oom.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    assert not groups.out_of_memory(group)
    oom.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert groups.out_of_memory(group)
    assert groups.leftovers() == {"s"}
    assert groups.find("s") == group
    assert groups.find("other").directories == {}


def test_version_1_takes_no_more_cpu_than_the_group_above_has(tmp_path: Path) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("20000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("50000\n")
    groups = Cgroups.detect("w", f"cgroup {tmp_path} cgroup rw,cpu 0 0\n")
    group = groups.make("s", RESOURCES)
    groups.limit_cpu(group, RESOURCES)
    assert (tmp_path / "greenroom/w/s/cpu.cfs_quota_us").read_text() == "40000"


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's tree with the kernel's rules of delegation: a process is in one group, and a group with processes
    gives no controller on. Groups have the files of their controllers, and are removed with all of them."""
    write = Path.write_text
    root = tmp_path / "unified"
    root.mkdir()
    files = {"memory": ("memory.max", "memory.swap.max"), "cpu": ("cpu.max",), "pids": ("pids.max",)}

    def write_text(path: Path, text: str, *args: object) -> int:
        if root not in path.parents:
            return write(path, text)
        if path.name == "cgroup.procs":
            for other in root.rglob("cgroup.procs"):
                write(other, "".join(f"{pid}\n" for pid in other.read_text().split() if pid != text))
            return write(path, path.read_text() + f"{text}\n" if path.exists() else f"{text}\n")
        if path.name == "cgroup.subtree_control":
            if (procs := path.with_name("cgroup.procs")).exists() and procs.read_text():
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            given = path.read_text().split() if path.exists() else []
            return write(path, " ".join(dict.fromkeys([*given, text])))
        known = path.with_name("..").resolve() / "cgroup.subtree_control"
        assert any(path.name in files[c.strip("+")] for c in known.read_text().split()), f"no {path.name} yet"
        return write(path, text)

    def rmdir(path: Path, remove: Callable[[Path], None] = Path.rmdir) -> None:
        if root in path.parents and path.exists() and not any(p.is_dir() for p in path.iterdir()):
            for file in path.iterdir():
                file.unlink()
        remove(path)

    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (root / "cgroup.procs").write_text(f"{os.getpid()}\n7\n")
    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    return root


def on(root: Path) -> Cgroups:
    return Cgroups.detect("w", f"cgroup2 {root} cgroup2 rw 0 0\n")


def test_version_2_limits(version_2: Path) -> None:
    groups = on(version_2)
    check, refused = groups.open()
    assert (check.ok, refused) == (True, {})
    assert (version_2 / "cgroup.procs").read_text() == ""
    assert (version_2 / "greenroom-agent/cgroup.procs").read_text().split() == [str(os.getpid()), "7"]
    assert groups.leftovers() == set()
    group = groups.make("s", RESOURCES)
    groups.limit_cpu(group, RESOURCES)
    place = version_2 / "greenroom/w/s"
    assert (place / "memory.max").read_text() == str((100 << 20) + SENTRY_MEMORY_BYTES)
    assert (place / "cpu.max").read_text() == "50000 100000"
    assert group.process_files == [place / "cgroup.procs"]
    for parent in (version_2, version_2 / "greenroom", version_2 / "greenroom/w"):
        assert set((parent / "cgroup.subtree_control").read_text().split()) == {"+memory", "+cpu", "+pids"}
    (place / "cpu.stat").write_bytes(b"usage_usec 2500000\nuser_usec 1\n")
    assert groups.cpu_seconds(group) == 2.5
    (place / "memory.events").write_bytes(b"low 0\noom 1\noom_kill 1\n")
    assert groups.out_of_memory(group)


def test_a_root_that_stays_busy_is_said(version_2: Path) -> None:
    (version_2 / "cgroup.procs").write_bytes(b"1\n0\n")  # not this process's own group
    groups = on(version_2)
    check, refused = groups.open()
    assert not check.ok
    assert set(refused) == {"memory", "cpu", "pids"}
    assert all("Device or resource busy" in why for why in refused.values())
    assert all(f"{c} ({why})" in check.detail for c, why in refused.items())
    assert (version_2 / "cgroup.procs").read_text().split() == ["1", "0"]
    assert not (version_2 / "greenroom").exists()
    assert groups.make("s", RESOURCES).process_files == []


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Writing to files of this name fails, as in a kernel."""
    write = Path.write_text

    def write_text(path: Path, text: str, *args: object) -> int:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize(
    ("controller", "file"), [("memory", "memory.max"), ("pids", "pids.max"), ("cpu", "cgroup.subtree_control")]
)
def test_a_sandbox_without_a_limit_that_held_is_not_made(
    version_2: Path, monkeypatch: pytest.MonkeyPatch, controller: str, file: str
) -> None:
    groups = on(version_2)
    groups.open()
    if controller == "cpu":
        groups._roots = {"cpu": version_2}
    failing(monkeypatch, file, errno.EBUSY)
    with pytest.raises(Internal, match=f"{controller} limit could not be set.*busy") as caught:
        groups.make("s", RESOURCES)
    assert caught.value.reason == "LIMIT_NOT_SET"
    assert caught.value.metadata == {"controller": controller}


def test_an_actor_without_its_cpu_limit_does_not_start(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = on(version_2)
    groups.open()
    group = groups.make("s", RESOURCES)
    failing(monkeypatch, "cpu.max", errno.EINVAL)
    with pytest.raises(Internal, match="cpu limit could not be set"):
        groups.limit_cpu(group, RESOURCES)


def test_one_controller_that_fails_leaves_the_others(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "pids.max", errno.EACCES)
    groups = on(version_2)
    check, refused = groups.open()
    assert list(refused) == ["pids"]
    assert check.detail.startswith("limits NOT enforced: pids (")
    assert list(groups.make("s", RESOURCES).directories) == ["memory", "cpu"]


def test_a_limit_that_reads_otherwise_does_not_hold(version_2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda p, t, *_: write(p, "max" if p.name == "pids.max" else t))
    _, refused = on(version_2).open()
    assert list(refused) == ["pids"]
    assert "is 'max' after '192' was written" in refused["pids"]


def test_missing_controllers_are_said_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.controllers").write_text("hugetlb\n")
    mounts = f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\ncgroup2 {tmp_path}/unified cgroup2 rw 0 0\n"
    groups = Cgroups.detect("w", mounts)
    check, refused = groups.open()
    assert list(refused) == ["cpu", "pids"]
    assert check.detail == groups.check().detail
    assert "cpu (no mounted hierarchy has it); pids (no mounted" in check.detail
    assert list(groups.make("s", RESOURCES).directories) == ["memory"]
    assert not (tmp_path / "unified/greenroom").exists()
    assert Cgroups.detect("w", "").make("s", RESOURCES).process_files == []


def test_a_common_directory_that_another_worker_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, removed = Path.mkdir, []

    def racing(path: Path, *args: Any, **options: Any) -> None:
        if path == tmp_path / "greenroom/w" and not removed and (tmp_path / "greenroom").is_dir():
            removed.append((tmp_path / "greenroom").rmdir())
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", racing)
    groups = Cgroups.detect("w", f"cgroup {tmp_path} cgroup rw,cpu 0 0\n")
    assert list(groups.make("s", RESOURCES).directories) == ["cpu"]
    assert removed


# --- small things ---------------------------------------------------------------------------------------------


def test_slot_names_are_never_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    seen = []
    for _ in range(3):  # three agents, each of which dies without a word
        counter = Counter(path)
        seen += [counter.next() for _ in range(COUNTER_BLOCK + 5)]
    assert len(set(seen)) == len(seen)
    assert sorted(seen, key=lambda s: int(s, 36)) == seen
    assert all(len("gr" + s) <= 15 for s in seen)
    path.unlink()  # a state directory that was lost: goes on from the time of day
    assert int(Counter(path).next(), 36) > 1_700_000_000_000
    assert [base36(n) for n in (0, 35, 36, 36**9)] == ["0", "z", "10", "1000000000"]


def test_exit_codes() -> None:
    assert [exit_code(s) for s in (0, 7 << 8, 9, 15)] == [0, 7, 137, 143]


async def test_finish_outlives_cancellation() -> None:
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.01)
        done.set()

    task = asyncio.create_task(finish(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


# --- the control socket's protocol ----------------------------------------------------------------------------


class Server:
    """Answers one request with given pieces, and keeps what it was sent."""

    def __init__(self, path: Path, *pieces: bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        directory = os.open(path.parent, os.O_PATH)
        self._socket.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        self._socket.listen()
        self._pieces = pieces
        self.request = b""
        self.fds: list[int] = []

    async def serve(self) -> None:
        await asyncio.to_thread(self._serve)

    def _serve(self) -> None:
        peer, _ = self._socket.accept()
        with peer, self._socket:
            self.request, self.fds, _, _ = socket.recv_fds(peer, 1 << 16, 4)
            for piece in self._pieces:
                peer.sendall(piece)


async def talk(path: Path, server: Server, fds: tuple[int, ...] = ()) -> object:
    async with asyncio.timeout(60):
        serving = asyncio.create_task(server.serve())
        try:
            return await urpc.call(path, "m.M", {"a": 1}, fds)
        finally:
            await serving


async def test_call(tmp_path: Path) -> None:
    path = tmp_path / ("deep" * 30) / "s"
    path.parent.mkdir()
    server = Server(path, b'{"success":true,"er', b'r":"","result":{"x":[1,2]}}\n')
    null = os.open(os.devnull, os.O_RDONLY)
    assert await talk(path, server, (null,)) == {"x": [1, 2]}
    os.close(null)
    assert server.request == b'{"method":"m.M","arg":{"a":1}}'
    assert stat.S_ISCHR(os.fstat(server.fds[0]).st_mode)
    os.close(server.fds[0])


async def test_refused_call(tmp_path: Path) -> None:
    server = Server(tmp_path / "s", b'{"success":false,"err":"no way","result":null}')
    with pytest.raises(urpc.UrpcError, match="no way") as caught:
        await talk(tmp_path / "s", server)
    assert not isinstance(caught.value, urpc.UrpcClosed)


async def test_call_of_a_sandbox_that_goes_or_is_gone(tmp_path: Path) -> None:
    with pytest.raises(urpc.UrpcClosed):
        await talk(tmp_path / "s", Server(tmp_path / "s", b'{"success":tr'))
    with pytest.raises(urpc.UrpcClosed):  # the socket's file is there, its owner is not
        await urpc.call(tmp_path / "s", "m.M")
    with pytest.raises(urpc.UrpcClosed):
        await urpc.call(tmp_path / "absent" / "s", "m.M")


# --- processes of others --------------------------------------------------------------------------------------


async def test_process_is_found_only_by_its_own_start_time() -> None:
    # Not by asyncio, which would reap it first.
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # noqa: ASYNC220
    process = reaper.Process.find(child.pid)
    assert process is not None
    assert process.alive()
    assert reaper.Process.find(child.pid, process.started + 1) is None
    same = reaper.Process.find(child.pid, process.started)
    assert same is not None
    same.close()
    waiting = asyncio.create_task(process.ended())
    process.kill()
    async with asyncio.timeout(60):
        assert await waiting == 137
    assert not process.alive()
    process.kill()
    assert await process.ended() == 137
    process.close()
    assert reaper.Process.find(child.pid) is None
    assert reaper.start_time(child.pid) == 0
    child.stdin.close()  # type: ignore[union-attr]
    child.wait()


async def test_orphans_of_a_group_are_reaped_and_other_children_left_alone() -> None:
    """In a process of its own, because a subreaper stays one."""
    source = """
import asyncio, os, subprocess, sys
from greenroom.sandbox import reaper
async def main():
    reaper.become_subreaper()
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    # A parent that leaves two children behind, in a session of their own, and says its group.
    orphans = '''
import os, time
os.setsid()
for _ in range(2):
    if os.fork() == 0:
        time.sleep(0.1); os._exit(0)
print(os.getpid(), flush=True)
'''
    out = subprocess.run([sys.executable, "-c", orphans], stdout=subprocess.PIPE).stdout
    group = int(out)
    members = lambda: [p for p in reaper._children(os.getpid()) if os.getpgid(p) == group]
    assert len(members()) == 2
    await reaper.reap_group(group)
    assert members() == []
    assert other.wait() == 3
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", source)
    assert await process.wait() == 0


# --- frozen or not ------------------------------------------------------------------------------------------------


def stacks(*calls: str) -> str:
    """As Go prints goroutines: the innermost call first."""
    return "\n\n".join(f"goroutine {n} [select]:\n{call.replace(' ', chr(10))}" for n, call in enumerate(calls))


def test_frozen_is_what_all_threads_of_are_stopped() -> None:
    kernel = "gvisor.dev/gvisor/pkg/sentry/kernel"
    runs, stopped = f"{kernel}.(*Task).run(0xc0, 0x1)", f"{kernel}.(*Task).doStop(0xc0) {kernel}.(*Task).run(0xc0, 0x1)"
    other, pauses = "main.main()", "gvisor.dev/gvisor/runsc/boot.(*containerManager).Pause(0xc0, 0x1, 0x2)"
    said = [stacks(other, *threads) for threads in ([], [runs], [stopped], [stopped, runs], [stopped, stopped])]
    assert [is_frozen(s) for s in said] == [False, False, True, False, True]
    assert is_changing(stacks(stopped, pauses)) and not is_changing(stacks(stopped, runs))


# --- the record ---------------------------------------------------------------------------------------------------


async def test_a_record_is_whole_wherever_the_agent_is_cut_off(tmp_path: Path) -> None:
    fields = {"sid": "0" * 32, "class_digest": "c", "env": {}, "cwd": "/", "uid": 0, "gid": 0, "port": 0}
    record = BoxRecord(state=BoxState.CREATING, resources=Resources(), **fields)  # type: ignore[arg-type]
    box, kept, draft = Box(tmp_path, record), tmp_path / "record.json", tmp_path / "record.new"
    draft.write_bytes(b'{"sid":')  # cut off while the first one was written: never anybody's
    assert read_record(tmp_path) is None
    box.save(BoxState.WARM)
    draft.write_bytes(b'{"sid":')  # while the next one was written
    assert read_record(tmp_path) == box.record
    box.save(BoxState.RUNNING)
    assert not draft.exists() and read_record(tmp_path) == box.record
    kept.rename(draft)  # between removing the old one and renaming the new one
    assert read_record(tmp_path) == box.record
