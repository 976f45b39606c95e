"""Limits of a sandbox, by control groups of either version, or both at once as on "hybrid" machines.

A sandbox gets the directory ``greenroom/<worker>/<sid>`` below the root of every controller. It holds the whole
sandbox: gVisor's own kernel (the "sentry"), its file server and the actor; so gVisor's share is added to the limits.

A mounted controller is no limit yet: in a container the hierarchies are read-only, and version 2 gives no controller on
below a group that has processes of its own. So `Cgroups.open` tries every limit, does what it may about both, and says
what does not hold (decision 23).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from greenroom.core.errors import Internal
from greenroom.core.records import Resources
from greenroom.sandbox.gvisor.views import is_read_only, writable_view
from greenroom.sandbox.port import Check

CONTROLLERS = ("memory", "cpu", "pids")
PARENT = "greenroom"
#: The group on which `open` tries the limits. In the place of a sid, so that it is swept like one.
PROBE = "probe"
#: Where the processes of a container go that are in its root group.
ASIDE = "greenroom-agent"
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
#: Any limits that the kernel does not round.
_TRIED = Resources(memory_bytes=64 << 20, cpus=0.05, pids=16)
#: Absent where the kernel does not account swap.
_OPTIONAL = frozenset({"memory.swap.max", "memory.memsw.limit_in_bytes"})
#: Each round moves those that were forked during the one before.
_ASIDE_ROUNDS = 10
#: Another worker that ends removes the common directory if it finds it empty.
_MAKE_TRIES = 10
_HINT = (
    "run the worker as root, with these controllers; in a container allow it SYS_ADMIN, on Linux 5.12 or newer, or "
    "mount /sys/fs/cgroup writable"
)


@dataclass(frozen=True)
class Group:
    """The directories of one sandbox, by controller; with version 2 all are the same."""

    directories: dict[str, Path] = field(default_factory=dict)

    @property
    def process_files(self) -> list[Path]:
        """A process that writes its pid into all of these is in the group."""
        return [d / "cgroup.procs" for d in dict.fromkeys(self.directories.values())]


class Cgroups:
    """``worker`` becomes a directory name. `open` it before the rest; nothing else tells whether limits hold."""

    def __init__(self, roots: dict[str, Path], unified: Path | None, worker: str) -> None:
        #: controller -> where its hierarchy is mounted
        self._roots = roots
        #: the version 2 hierarchy, when a controller that is used lives there
        self._unified = unified
        self._worker = worker
        #: Descriptors of writable views, in the place of hierarchies that are mounted read-only.
        self._views: list[int] = []

    @classmethod
    def detect(cls, worker: str, mounts: str | None = None) -> Cgroups:
        """Reads ``/proc/self/mounts`` (or ``mounts`` in its place). A controller bound to version 1 is not in
        version 2."""
        roots: dict[str, Path] = {}
        unified = None
        for line in (
            mounts if mounts is not None else Path("/proc/self/mounts").read_text(errors="surrogateescape")
        ).splitlines():
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
        """Which limits can be set on this machine, as far as that can be told without making anything."""
        refused = self._absent()
        for root in set(self._roots.values()):
            if why := _obstacle(root):
                refused |= {c: why for c in self._at(root)}
        return _verdict(refused, "limits can be set; a worker tries them when it starts")

    def open(self) -> tuple[Check, dict[str, str]]:
        """Finds out which limits hold, by setting all of them on a group, reading them back, and removing it.

        A hierarchy that is mounted read-only is replaced by a writable view of it that is this process's alone. Where
        version 2 refuses to delegate because this process is in the root of the tree (a container's), all processes
        there are moved to a group beside the sandboxes'. Takes some milliseconds.

        Returns:
            The verdict, and why a controller is not used, by its name. A missing limit is no reason to refuse.
        """
        refused = self._absent() | self._open_views()
        for controller, root in list(self._roots.items()):
            if controller in refused:
                continue
            try:
                self._try(controller, root)
            except OSError as error:
                refused[controller] = str(error)
        self.remove(PROBE)
        unused = {root for root in self._roots.values() if all(c in refused for c in self._at(root))}
        self._roots = {c: root for c, root in self._roots.items() if c not in refused}
        self._remove_worker(unused)
        return _verdict(refused, "limits hold: set on a group and read back"), refused

    def close(self) -> None:
        """Idempotent. What has been made stays."""
        while self._views:
            os.close(self._views.pop())

    def _absent(self) -> dict[str, str]:
        return {c: "no mounted hierarchy has it" for c in CONTROLLERS if c not in self._roots}

    def _at(self, root: Path) -> list[str]:
        return [c for c, r in self._roots.items() if r == root]

    def _open_views(self) -> dict[str, str]:
        """Why controllers can't be written to."""
        refused: dict[str, str] = {}
        for root in set(self._roots.values()):
            here = self._at(root)
            try:
                if not is_read_only(root):
                    continue
                self._views.append(writable_view(root))
            except OSError as error:
                refused |= {c: _not_writable(root, error) for c in here}
                continue
            # By the process's number: those that enter a group are other processes.
            view = Path(f"/proc/{os.getpid()}/fd/{self._views[-1]}")
            self._roots |= {c: view for c in here}
            if root == self._unified:
                self._unified = view
        return refused

    def _try(self, controller: str, root: Path) -> None:
        directory = root / PARENT / self._worker / PROBE
        try:
            self._make_directory(controller, directory)
        except OSError as error:
            if error.errno != errno.EBUSY or root != self._unified or not _step_aside(root):
                raise
            self._make_directory(controller, directory)
        for name, text in self._limits(controller, _TRIED).items():
            if not _write(directory / name, text):
                continue
            said = (directory / name).read_text().strip()
            if said != text:
                raise OSError(f"{directory / name} is {said!r} after {text!r} was written")

    def make(self, sid: str, resources: Resources) -> Group:
        """Idempotent. The CPU is not limited yet: see `limit_cpu`.

        Raises:
            Internal: a controller that `open` has found to work does not (reason ``LIMIT_NOT_SET``, metadata
                ``controller``).
        """
        directories: dict[str, Path] = {}
        for controller, root in self._roots.items():
            directory = root / PARENT / self._worker / sid
            try:
                self._make_directory(controller, directory)
                if controller != "cpu":
                    self._write_limits(controller, directory, resources)
            except OSError as error:
                raise _not_set(controller, error) from error
            directories[controller] = directory
        return Group(directories)

    def _make_directory(self, controller: str, directory: Path) -> None:
        """With version 2, with the controller in it. Idempotent."""
        for again in reversed(range(_MAKE_TRIES)):
            try:
                if self._roots[controller] == self._unified:
                    self._delegate(controller, directory)
                directory.mkdir(parents=True, exist_ok=True)
                return
            except FileNotFoundError:
                if not again:
                    raise

    def _delegate(self, controller: str, directory: Path) -> None:
        root = self._roots[controller]
        for parent in (root, root / PARENT, directory.parent):
            parent.mkdir(exist_ok=True)
            (parent / "cgroup.subtree_control").write_text(f"+{controller}")

    def _write_limits(self, controller: str, directory: Path, resources: Resources) -> None:
        for name, text in self._limits(controller, resources).items():
            _write(directory / name, text)

    def _limits(self, controller: str, resources: Resources) -> dict[str, str]:
        """What is written into which file, in this order."""
        v2 = self._roots[controller] == self._unified
        match controller:
            case "memory":
                memory = str(resources.memory_bytes + SENTRY_MEMORY_BYTES)
                if v2:  # no escape into swap
                    return {"memory.max": memory, "memory.swap.max": "0"}
                return {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}
            case "pids":
                return {"pids.max": str(SENTRY_TASKS + HOST_TASKS_PER_ACTOR_TASK * resources.pids)}
            case "cpu":
                quota = max(_LEAST_QUOTA_US, int(resources.cpus * CPU_PERIOD_US))
                if v2:
                    return {"cpu.max": f"{quota} {CPU_PERIOD_US}"}
                return {"cpu.cfs_quota_us": str(min(quota, _quota_of(self._roots["cpu"]) or quota))}
        return {}

    def limit_cpu(self, group: Group, resources: Resources) -> None:
        """Apart from the rest, because it is done last: waking is gVisor's work and must not be slowed by the actor's
        quota.

        Raises:
            Internal: as `make`.
        """
        directory = group.directories.get("cpu")
        if directory is None or resources.cpus <= 0:
            return
        try:
            self._write_limits("cpu", directory, resources)
        except OSError as error:
            raise _not_set("cpu", error) from error

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
        self._remove_worker(self._roots.values())

    def _remove_worker(self, roots: Iterable[Path]) -> None:
        for root in set(roots):
            if _rmdir(root / PARENT / self._worker):
                _rmdir(root / PARENT)


def _verdict(refused: dict[str, str], otherwise: str) -> Check:
    limits = {c: refused[c] for c in CONTROLLERS if c in refused}
    if not limits:
        return Check(name="cgroups", ok=True, detail=f"{', '.join(CONTROLLERS)} {otherwise}")
    said = "; ".join(f"{c} ({why})" for c, why in limits.items())
    return Check(name="cgroups", ok=False, detail=f"limits NOT enforced: {said}", hint=_HINT)


def _obstacle(root: Path) -> str:
    """Why no group can be made there; "" when nothing is seen."""
    try:
        if is_read_only(root):
            os.close(writable_view(root))
        elif not os.access(root, os.W_OK):
            return f"{root} is not writable"
    except OSError as error:
        return _not_writable(root, error)
    return ""


def _not_writable(root: Path, error: OSError) -> str:
    return f"{root} is mounted read-only, and the worker may not change that for itself: {error.strerror}"


def _not_set(controller: str, error: OSError) -> Internal:
    return Internal(
        f"the sandbox's {controller} limit could not be set, so it was not started: {error}",
        reason="LIMIT_NOT_SET",
        metadata={"controller": controller},
    )


def _step_aside(root: Path) -> bool:
    """Moves all processes of a version 2 group into one below; False when it is not this process's own."""
    members = root / "cgroup.procs"
    if str(os.getpid()) not in members.read_text().split():
        return False
    aside = root / ASIDE
    aside.mkdir(exist_ok=True)
    for _ in range(_ASIDE_ROUNDS):
        # 0 is one that this process can't see; written, it would mean this process.
        pids = [pid for pid in members.read_text().split() if pid != "0"]
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                (aside / "cgroup.procs").write_text(pid)
    return True


def _quota_of(group: Path) -> int | None:
    """The CPU quota of a version 1 group for `CPU_PERIOD_US`: a group below may not have more. None: no limit."""
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except FileNotFoundError:  # the root of the machine
        return None
    return quota * CPU_PERIOD_US // period if quota > 0 else None


def _write(path: Path, text: str) -> bool:
    """False where there is no such file, and there need not be."""
    if path.name not in _OPTIONAL:
        path.write_text(text)
        return True
    try:
        with open(path, "r+") as file:  # never creates, unlike "w"
            file.write(text)
    except FileNotFoundError:
        return False
    return True


def _rmdir(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
