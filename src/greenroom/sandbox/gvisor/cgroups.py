"""Limits of a sandbox, by control groups of either version, or both at once as on "hybrid" machines.

A sandbox gets the directory ``greenroom/<worker>/<sid>`` below the root of every controller. It holds the whole
sandbox: gVisor's own kernel (the "sentry"), its file server and the actor; so gVisor's share is added to the limits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from greenroom.core.records import Resources
from greenroom.sandbox.port import Check

CONTROLLERS = ("memory", "cpu", "pids")
PARENT = "greenroom"
#: gVisor's own memory, added to the actor's: 17 to 21 MB for an idle sandbox (sentry and file server), and about as
#: much again while it saves or restores (Go's collector doubles), plus page tables and the packet buffer.
SENTRY_MEMORY_BYTES = 64 << 20
#: gVisor's own threads on two cores are about 30. Each thread of the actor is up to three on the host: one of the
#: sentry and one or two that carry the actor's code.
SENTRY_TASKS = 128
HOST_TASKS_PER_ACTOR_TASK = 4
#: The period over which CPU time is given out: the kernel's default.
CPU_PERIOD_US = 100_000
#: The kernel refuses a quota of less than a millisecond.
_LEAST_QUOTA_US = 1_000


@dataclass(frozen=True)
class Group:
    """The directories of one sandbox, by controller; with version 2 all are the same."""

    directories: dict[str, Path] = field(default_factory=dict)

    @property
    def process_files(self) -> list[Path]:
        """A process that writes its pid into all of these is in the group."""
        return [d / "cgroup.procs" for d in dict.fromkeys(self.directories.values())]


class Cgroups:
    """``worker`` becomes a directory name. Makes nothing until `make`."""

    def __init__(self, roots: dict[str, Path], unified: Path | None, worker: str) -> None:
        #: controller -> where its hierarchy is mounted
        self._roots = roots
        #: the version 2 hierarchy, when a controller that is used lives there
        self._unified = unified
        self._worker = worker

    @classmethod
    def detect(cls, worker: str, mounts: str | None = None) -> Cgroups:
        """Reads ``/proc/self/mounts`` (or ``mounts`` in its place). A controller bound to version 1 is not in
        version 2."""
        roots: dict[str, Path] = {}
        unified = None
        for line in (mounts if mounts is not None else Path("/proc/self/mounts").read_text()).splitlines():
            _, point, kind, options, *_ = line.split()
            if kind == "cgroup":
                roots |= {c: Path(point) for c in (*CONTROLLERS, "cpuacct") if c in options.split(",")}
            elif kind == "cgroup2":
                unified = Path(point)
        if unified is not None:
            with contextlib.suppress(OSError):
                offered = (unified / "cgroup.controllers").read_text().split()
                new = {c: unified for c in CONTROLLERS if c in offered and c not in roots}
                roots |= new
                if not new:
                    unified = None
        return cls(roots, unified, worker)

    def check(self) -> Check:
        """Which limits hold on this machine. A missing one is said, and no reason to refuse."""
        missing = [c for c in CONTROLLERS if c not in self._roots]
        if missing:
            return Check(
                name="cgroups",
                ok=True,
                detail=f"NOT enforced, for want of a controller: limits of {', '.join(missing)}",
                hint="enable these cgroup controllers for the worker",
            )
        return Check(name="cgroups", ok=True, detail=f"{', '.join(CONTROLLERS)} limits hold")

    def make(self, sid: str, resources: Resources) -> Group:
        """Idempotent. The CPU is not limited yet: see `limit_cpu`. A controller that can't be used is left out."""
        directories: dict[str, Path] = {}
        for controller, root in self._roots.items():
            directory = root / PARENT / self._worker / sid
            try:
                if root == self._unified:
                    self._delegate(root, directory)
                directory.mkdir(parents=True, exist_ok=True)
                self._write_limits(controller, directory, resources)
            except OSError:
                continue
            directories[controller] = directory
        return Group(directories)

    def _delegate(self, root: Path, directory: Path) -> None:
        wanted = " ".join(f"+{c}" for c in CONTROLLERS if self._roots.get(c) == root)
        for parent in (root, root / PARENT, directory.parent):
            parent.mkdir(exist_ok=True)
            (parent / "cgroup.subtree_control").write_text(wanted)

    def _write_limits(self, controller: str, directory: Path, resources: Resources) -> None:
        memory = resources.memory_bytes + SENTRY_MEMORY_BYTES
        v2 = self._roots[controller] == self._unified
        match controller:
            case "memory":
                (directory / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(memory))
                # No escape into swap. Absent where the kernel does not account it.
                swap = directory / ("memory.swap.max" if v2 else "memory.memsw.limit_in_bytes")
                with contextlib.suppress(FileNotFoundError):
                    _overwrite(swap, "0" if v2 else str(memory))
            case "pids":
                tasks = SENTRY_TASKS + HOST_TASKS_PER_ACTOR_TASK * resources.pids
                (directory / "pids.max").write_text(str(tasks))

    def limit_cpu(self, group: Group, resources: Resources) -> None:
        """Apart from the rest, because it is done last: waking is gVisor's work and must not be slowed by the actor's
        quota."""
        directory = group.directories.get("cpu")
        if directory is None or resources.cpus <= 0:
            return
        quota = max(_LEAST_QUOTA_US, int(resources.cpus * CPU_PERIOD_US))
        if self._roots["cpu"] == self._unified:
            (directory / "cpu.max").write_text(f"{quota} {CPU_PERIOD_US}")
        else:
            (directory / "cpu.cfs_quota_us").write_text(str(quota))

    def find(self, sid: str) -> Group:
        """The group of a sandbox that an earlier agent made."""
        paths = {c: root / PARENT / self._worker / sid for c, root in self._roots.items()}
        return Group({c: p for c, p in paths.items() if p.is_dir()})

    def cpu_seconds(self, group: Group) -> float | None:
        """CPU time of the whole sandbox so far; None where nobody counts."""
        if directory := group.directories.get("cpuacct"):
            return int((directory / "cpuacct.usage").read_text()) / 1e9
        if (directory := group.directories.get("cpu")) and self._roots["cpu"] == self._unified:
            stat = dict(line.split() for line in (directory / "cpu.stat").read_text().splitlines())
            return int(stat["usage_usec"]) / 1e6
        return None

    def out_of_memory(self, group: Group) -> bool:
        """Whether the kernel has killed something in the group for want of memory."""
        directory = group.directories.get("memory")
        if directory is None:
            return False
        name = "memory.events" if self._roots["memory"] == self._unified else "memory.oom_control"
        with contextlib.suppress(FileNotFoundError):
            counts = dict(line.split()[:2] for line in (directory / name).read_text().splitlines())
            return int(counts.get("oom_kill", "0")) > 0
        return False

    def processes(self, sid: str) -> set[int]:
        """The pids in the sandbox's group. Among them those of a `runsc create` that was cut short, which nothing else
        has a record of."""
        pids: set[int] = set()
        for root in set(self._roots.values()):
            with contextlib.suppress(FileNotFoundError):
                pids |= {int(p) for p in (root / PARENT / self._worker / sid / "cgroup.procs").read_text().split()}
        return pids

    def remove(self, sid: str) -> bool:
        """False when processes are still in it. Idempotent."""
        return all(_rmdir(root / PARENT / self._worker / sid) for root in set(self._roots.values()))

    def leftovers(self) -> set[str]:
        """The sids that have a group."""
        found: set[str] = set()
        for root in set(self._roots.values()):
            with contextlib.suppress(FileNotFoundError):
                found |= {p.name for p in (root / PARENT / self._worker).iterdir() if p.is_dir()}
        return found

    def remove_worker(self) -> None:
        """Removes the worker's directory, and the common one when this was the last worker."""
        for root in set(self._roots.values()):
            if _rmdir(root / PARENT / self._worker):
                _rmdir(root / PARENT)


def _overwrite(path: Path, text: str) -> None:
    with open(path, "r+") as file:  # never creates, unlike "w"
        file.write(text)


def _rmdir(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
