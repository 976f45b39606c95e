"""Limits in a container: control groups that are mounted read-only, on this machine's own kernel.

A container is a process in a mount namespace of its own that sees, as its whole tree, a group that was made for it, as
container runtimes mount it. Of version 2 this machine has one controller, hugetlb: with it the kernel's rules of
delegation are seen; the files of its memory, cpu and pids are not."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gvisor_support import make_rootfs, skip_unless_possible

from greenroom.operator.isolation import RIGHTS

HERE = Path(__file__).parent
CGROUPS = Path("/sys/fs/cgroup")
V1 = ("memory", "cpu", "cpuacct", "pids")
WITHOUT_MOUNTS = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
ENTER = """
for group in "$@"; do [ "$group" = -- ] && break; echo $$ >"$group/cgroup.procs" || exit 125; done
"""
#: Each hierarchy's group over the hierarchy itself, read-only.
MOUNT_V1 = """
while [ "$1" != -- ]; do
  mount --bind "$1" "${1%/*}" && mount -o remount,bind,ro "${1%/*}" || exit 125; shift
done; shift; exec "$@"
"""
MOUNT_V2 = """
shift; mount -t cgroup2 -o ro none "$1" || exit 125; shift 2; exec "$@"
"""

pytestmark = [pytest.mark.root, pytest.mark.timeout(120), pytest.mark.xdist_group("sandboxes")]


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts and control groups need root")


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """A container's groups; afterwards nothing is in them."""
    name = f"container-{secrets.token_hex(4)}"
    if missing := [c for c in V1 if not (CGROUPS / c / "cgroup.procs").exists()]:
        pytest.skip(f"no version 1 hierarchy of {', '.join(missing)}")
    made = [CGROUPS / c / name for c in V1]
    for group in made:
        group.mkdir()
    yield made
    for group in made:
        assert [path.name for path in group.iterdir() if path.is_dir()] == []
        group.rmdir()


def mounts() -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if "cgroup" in line]


def container(groups: list[Path], *command: str) -> Any:
    """What the command prints, as JSON; and no mount of it is seen outside."""
    before = mounts()
    inside = ("unshare", "-m", "--propagation", "private", "sh", "-c", ENTER + MOUNT_V1, "sh", *map(str, groups), "--")
    done = subprocess.run(
        (*inside, *command),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert mounts() == before
    return json.loads(done.stdout.splitlines()[-1])


def python(script: str, *args: object) -> tuple[str, ...]:
    return (sys.executable, "-c", script, *map(str, args))


# --- a whole backend ------------------------------------------------------------------------------------------

ACTOR = """
import asyncio, json, sys
from pathlib import Path
import structlog
from gvisor_support import get, identity, python_class, worker_name
from greenroom.sandbox.gvisor import GvisorBackend

async def main():
    state, rootfs = Path(sys.argv[1]), Path(sys.argv[2])
    backend = GvisorBackend()
    with structlog.testing.capture_logs() as logs:
        probe = await backend.open(state, "test")
    await backend.reconcile()
    running = await backend.start(python_class(rootfs), identity("limited"))
    await get(running.endpoint)
    group, found = f"greenroom/{worker_name(backend)}/{running.sid}", {}
    for name in ("memory/{}/memory.limit_in_bytes", "pids/{}/pids.max", "cpu/{}/cpu.cfs_quota_us"):
        path = Path("/sys/fs/cgroup", name.format(group))
        found[path.name] = int(path.read_text()) if path.exists() else None
    procs = Path("/sys/fs/cgroup/memory", group, "cgroup.procs")
    members = len(procs.read_text().split()) if procs.exists() else 0
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    writable = [m[1] for m in mounts if m[2] == "cgroup" and m[1].endswith("/memory") and "rw" in m[3].split(",")]
    seconds = (await backend.stats(running.sid)).cpu_seconds
    await backend.close(keep_running=False)
    checks = {c.name: [c.ok, c.detail] for c in probe.checks}
    print(json.dumps([found, members, seconds, checks, logs, len(writable)]))

asyncio.run(main())
"""


@pytest.mark.gvisor
def test_an_actor_in_a_read_only_tree_has_its_limits(groups: list[Path], tmp_path: Path) -> None:
    """With the rights that a worker's pod has, and no other."""
    skip_unless_possible()
    rootfs = make_rootfs(tmp_path / "rootfs")
    (CGROUPS / "cpu" / groups[0].name / "cpu.cfs_quota_us").write_text("150000")
    kept = ",".join(f"+{name.lower()}" for name in RIGHTS["gvisor"].capabilities)
    rights = ("setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--")
    command = python(ACTOR, tmp_path / "state", rootfs)
    found, members, seconds, checks, logs, writable = container(groups, *rights, *command)
    # The class's 2 CPUs are more than the container has: version 1 takes no more than that.
    assert found == {
        "memory.limit_in_bytes": (128 + 64) << 20,
        "pids.max": 128 + 4 * 64,
        "cpu.cfs_quota_us": 150_000,
    }
    assert members >= 2
    assert seconds > 0
    assert checks["cgroups"] == [True, "memory, cpu, pids limits hold: set on a group and read back"]
    assert logs == []
    assert writable == 1  # the machine's, below the container's: that is as read-only as before


@pytest.mark.gvisor
def test_where_it_may_not_be_changed_that_is_said(groups: list[Path], tmp_path: Path) -> None:
    """Without CAP_SYS_ADMIN no sandbox can be made; the view alone is refused here."""
    skip_unless_possible()
    rootfs = make_rootfs(tmp_path / "rootfs")
    refuse = (
        "import errno, os\n"
        "from greenroom.sandbox.gvisor import views\n"
        "def refuse(*_): raise OSError(errno.EPERM, os.strerror(errno.EPERM))\n"
        "views._check = refuse\n"
    )
    script = refuse + ACTOR
    found, _, _, checks, logs, _ = container(groups, *python(script, tmp_path / "state", rootfs))
    assert set(found.values()) == {None}
    ok, said = checks["cgroups"]
    assert not ok
    assert "limits NOT enforced: memory (" in said
    assert {(entry["controller"], entry["log_level"]) for entry in logs} == {(c, "warning") for c in V1}
    assert all("mounted read-only" in entry["reason"] for entry in logs)
    assert all("Operation not permitted" in entry["reason"] for entry in logs)


# --- the groups alone -----------------------------------------------------------------------------------------

OPEN = """
import json
from greenroom.core.records import Resources
from greenroom.sandbox.gvisor.cgroups import Cgroups
told = Cgroups.detect("w").check()
groups = Cgroups.detect("w")
check, refused = groups.open()
made = list(groups.make("s", Resources()).directories)
removed = groups.remove("s"); groups.remove_worker(); groups.close()
print(json.dumps([told.ok, told.detail, check.ok, check.detail, refused, made, removed]))
"""


def test_without_the_right_to_mount_no_limit_is_claimed(groups: list[Path]) -> None:
    told, said, ok, detail, refused, made, removed = container(groups, *WITHOUT_MOUNTS, *python(OPEN))
    assert (told, ok, made, removed) == (False, False, [], True)
    assert said == detail
    assert set(refused) == set(V1)
    for controller in ("memory", "cpu", "pids"):
        assert f"{controller} (/sys/fs/cgroup/{controller} is mounted read-only, and the worker may not" in detail
    assert "Operation not permitted" in detail


def test_with_that_right_it_holds(groups: list[Path]) -> None:
    told, _, ok, _, refused, made, removed = container(groups, *python(OPEN))
    assert (told, ok, refused, removed) == (True, True, {}, True)
    assert sorted(made) == sorted(V1)


# --- version 2 ------------------------------------------------------------------------------------------------

DELEGATED = """
import json, subprocess, sys
from pathlib import Path
from greenroom.core.records import Resources
from greenroom.sandbox.gvisor import cgroups, views
cgroups.CONTROLLERS = ("hugetlb",)
root, foreign = Path(sys.argv[1]), sys.argv[2] == "foreign"
other = subprocess.Popen(["sleep", "60"])
if foreign:
    own = Path(f"/proc/self/fd/{views.writable_view(root)}/else")
    own.mkdir()
    (own / "cgroup.procs").write_text("0")
mounts = f"none {root} cgroup2 ro 0 0\\n"
groups = cgroups.Cgroups.detect("w", mounts)
check, refused = groups.open()
left = (root / "cgroup.procs").read_text().split()
answer = [check.ok, check.detail, refused, str(other.pid) in left if foreign else left]
if not refused:
    group = groups.make("s", Resources())
    procs = str(group.process_files[0])
    line = subprocess.run(["sh", "-c", 'echo $$ >"$1"; grep ^0: /proc/self/cgroup', "sh", procs],
        capture_output=True, text=True).stdout.strip()
    answer += [line, (root / "greenroom/w/s/hugetlb.2MB.max").read_text().strip(),
        str(other.pid) in (root / "greenroom-agent/cgroup.procs").read_text().split(),
        groups.remove("s")]
    groups.remove_worker()
other.kill(); other.wait()
groups.close()
print(json.dumps(answer))
"""


@pytest.fixture
def unified() -> Iterator[Path]:
    """A version 2 group that has a controller."""
    root = next((p for p in (CGROUPS / "unified", CGROUPS) if (p / "cgroup.controllers").exists()), None)
    if root is None or "hugetlb" not in (root / "cgroup.controllers").read_text().split():
        pytest.skip("no version 2 hierarchy with the controller hugetlb")
    control = root / "cgroup.subtree_control"
    before = control.read_text().split()
    control.write_text("+hugetlb")
    group = root / f"container-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        yield group
    finally:
        assert not (group / "greenroom").exists()
        for name in {"greenroom-agent", "else"} & {path.name for path in group.iterdir()}:  # goes with the container
            (group / name).rmdir()
        group.rmdir()
        if "hugetlb" not in before:
            control.write_text("-hugetlb")


def version_2(group: Path, point: Path, *args: str) -> Any:
    point.mkdir()
    inner = ("unshare", "-C", "-m", "--propagation", "private", "sh", "-c", MOUNT_V2, "sh", "--", str(point), "--")
    command = (*inner, *python(DELEGATED, point, *args))
    done = subprocess.run(
        ("sh", "-c", f'{ENTER}\nshift 2; exec "$@"', "sh", str(group), "--", *command),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_version_2_is_delegated_from_a_containers_root(unified: Path, tmp_path: Path) -> None:
    ok, detail, refused, left, line, limit, moved, removed = version_2(unified, tmp_path / "m", "own")
    assert (ok, refused, left) == (True, {}, []), detail
    assert line == "0::/greenroom/w/s"
    assert int(limit) > 0  # so the controller is there
    assert moved and removed


def test_version_2_busy_with_others_is_said_and_they_stay(unified: Path, tmp_path: Path) -> None:
    ok, detail, refused, left = version_2(unified, tmp_path / "m", "foreign")
    assert not ok
    assert "limits NOT enforced: hugetlb (" in detail
    assert "Device or resource busy" in refused["hugetlb"]
    assert left is True
