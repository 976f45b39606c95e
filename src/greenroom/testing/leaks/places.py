"""What there is on the machine: below workers' state directories, in the kernel, in the snapshot store."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from greenroom.core.gc import blobs
from greenroom.images.uses import PIN, holder_of
from greenroom.sandbox.dial import inside_netns
from greenroom.sandbox.gvisor import box as gvisor
from greenroom.sandbox.gvisor.backend import scope_name
from greenroom.sandbox.gvisor.network import DEVICE_PREFIX, NETNS_DIRECTORY
from greenroom.sandbox.process import record as process

_SANDBOX = re.compile(r"/sandboxes/([0-9a-f]{32})\b")
_WORKER = re.compile(r"--worker=(\S+)")
#: What is written under another name first, to be renamed: at rest there is none.
_UNFINISHED = re.compile(r"^\.|\.new$")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """``uid``: of its actor; "" for a warm one. ``pid``: of its first process, 0 when that is not alive (or another has
    its number). ``device``: its network interface; "" for none."""

    sid: str
    uid: str = ""
    pid: int = 0
    started: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """One worker's. ``broken``: directories of sandboxes that nobody can make sense of. ``held``: keys, as in a
    snapshot store (`greenroom.core.gc.blobs`); ``staged``: actors (uid); ``logs``: files by actor (uid); ``devices``:
    interfaces in its network namespace; ``cgroups``: sandboxes (sid) that have any; ``processes``: by sandbox (sid);
    ``uses``: actors (uid) that hold an image, and ``warm``; ``unfinished``: files that were to be renamed, and what is
    being removed."""

    state_dir: Path
    exists: bool = True
    sandboxes: tuple[Sandbox, ...] = ()
    broken: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()
    staged: frozenset[str] = frozenset()
    cached: frozenset[str] = frozenset()
    logs: Mapping[str, int] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()
    netns: bool = False
    processes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    uses: frozenset[str] = frozenset()
    is_holder: bool = False
    unfinished: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """``agents``: how many agent processes each worker has. ``processes``: others that name the data directory, by
    pid. ``objects``: keys in the snapshot store. ``holders``: of image uses, that are none of ``places``."""

    places: Mapping[str, Place] = field(default_factory=dict)
    agents: Mapping[str, int] = field(default_factory=dict)
    processes: Mapping[int, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    objects: frozenset[str] = frozenset()
    holders: frozenset[str] = frozenset()


def look(data_dir: Path, state_dirs: Mapping[str, Path], images: Path, objects: Iterable[str] | Path) -> Machine:
    """``state_dirs``: of all workers, also those that are to be gone. ``objects``: the keys in the snapshot store, or
    the directory that it is."""
    own = _own_processes()
    seen = {p: text for p, text in _processes().items() if p not in own}
    mine = {pid: text for pid, text in seen.items() if _names(text, data_dir) or _any(text, state_dirs.values())}
    agents: dict[str, int] = {}
    rest: dict[int, str] = {}
    of_sandboxes: dict[Path, dict[str, tuple[int, ...]]] = {path: {} for path in state_dirs.values()}
    for pid, text in mine.items():
        at = next((path for path in state_dirs.values() if _names(text, path / "sandboxes")), None)
        sid = _SANDBOX.search(text)
        if at is not None and sid is not None:
            of_sandboxes[at][sid[1]] = (*of_sandboxes[at].get(sid[1], ()), pid)
        elif " agent " in text and (worker := _WORKER.search(text)) is not None:
            agents[worker[1]] = agents.get(worker[1], 0) + 1
        elif " up " not in f"{text} ":
            rest[pid] = text
    uses = _uses(images)
    holders = {holder_of(name, path): name for name, path in state_dirs.items()}
    on_disk = {path.name for path in (images / "holders").glob("[!.]*")} | uses.keys()
    return Machine(
        places={
            name: _place(name, path, of_sandboxes[path], uses, holder_of(name, path) in on_disk)
            for name, path in state_dirs.items()
        },
        agents=agents,
        processes=rest,
        mounts=tuple(
            line.split()[4]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if _names(line, data_dir) or _any(line, state_dirs.values())
        ),
        objects=frozenset(files_below(objects) if isinstance(objects, Path) else objects),
        holders=frozenset(on_disk - holders.keys()),
    )


def files_below(root: Path) -> list[str]:
    """Paths relative to ``root``, sorted; [] when it is not there. What goes meanwhile is left out."""
    found = []
    for directory, _, names in os.walk(root):
        found += [os.path.relpath(Path(directory) / name, root) for name in names]
    return sorted(found)


def entries(directory: Path) -> list[Path]:
    """Sorted; [] when it is not there."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


# --- one worker -------------------------------------------------------------------------------------------


def _place(
    name: str, state_dir: Path, processes: dict[str, tuple[int, ...]], uses: dict[str, set[str]], is_holder: bool
) -> Place:
    root = state_dir / "sandboxes"
    scope = scope_name(root)
    sandboxes, broken = [], []
    for directory in entries(root / "sandboxes"):
        sandbox = _sandbox(directory)
        if sandbox is None:
            broken.append(directory.name)
        else:
            sandboxes.append(sandbox)
    cgroups = _cgroups(scope)
    for sid, path in cgroups:
        pids = tuple(pid for pid in _pids(path) if pid not in processes.get(sid, ()))
        if pids:
            processes[sid] = (*processes.get(sid, ()), *pids)
    netns = NETNS_DIRECTORY / scope
    held = (f"{blobs.PREFIX}/{path}" for path in files_below(state_dir / "held" / blobs.PREFIX))
    unfinished = [p.name for p in entries(state_dir) if _UNFINISHED.search(p.name) and p.name != "journal.new"]
    unfinished += [f"trash/{p.name}" for p in entries(root / "trash")]
    return Place(
        state_dir=state_dir,
        exists=state_dir.exists(),
        sandboxes=tuple(sandboxes),
        broken=tuple(broken),
        held=frozenset(held),
        staged=frozenset(p.name for p in entries(state_dir / "staging")),
        cached=frozenset(p.name for p in entries(state_dir / "cache")),
        logs={p.name: len(entries(p)) for p in entries(state_dir / "logs")},
        devices=frozenset(_devices(netns)),
        cgroups=frozenset(sid for sid, _ in cgroups),
        netns=netns.exists(),
        processes=processes,
        uses=frozenset(uses.get(holder_of(name, state_dir), ())),
        is_holder=is_holder,
        unfinished=tuple(unfinished),
    )


def _sandbox(directory: Path) -> Sandbox | None:
    if (box := gvisor.read_record(directory)) is not None:
        uid = box.owner.uid if box.owner else ""
        pid = box.pid if _started(box.pid) == box.started else 0
        return Sandbox(box.sid, uid, pid, box.started, box.device)
    if (record := process.read_record(directory)) is not None:
        pid = record.pid if _started(record.pid) == record.started else 0
        return Sandbox(record.sid, record.owner.uid, pid, record.started)
    return None


def _started(pid: int) -> int:
    """When a process began, in ticks since the boot; -1 when it is not there, or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes() if pid else b""
    except (FileNotFoundError, ProcessLookupError):
        stat = b""
    fields = stat[stat.rfind(b")") + 2 :].split()
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else -1


def _uses(images: Path) -> dict[str, set[str]]:
    """By holder: actors (uid) that use any image, and ``warm``."""
    found: dict[str, set[str]] = {}
    for use in [use for image in entries(images / "uses") for use in entries(image) if use.name != PIN]:
        holder, _, uid = use.name.rpartition("~")
        found.setdefault(holder, set()).add(uid)
    return found


# --- the kernel -------------------------------------------------------------------------------------------


def _processes() -> dict[int, str]:
    """By pid: the command line, and what is mounted for it, if that is not what is mounted for us: an actor's program
    is known by its root file system alone."""
    ours, views = _mount_namespace("self"), dict[str, str]()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            namespace = _mount_namespace(entry.name)
            if namespace not in ("", ours) and namespace not in views:
                views[namespace] = (entry / "mountinfo").read_text(errors="replace")
        except OSError:  # it has just ended, or is somebody else's
            continue
        if _started(int(entry.name)) >= 0:
            found[int(entry.name)] = f"{command}\n{views.get(namespace, '')}" if command or namespace in views else ""
    return found


def _mount_namespace(pid: str) -> str:
    """What names it; "" for a process that is none any more, or somebody else's."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


def _own_processes() -> set[int]:
    """This one and those above it: whoever tests may name the directory too."""
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        pid = int(stat[stat.rindex(b")") + 2 :].split()[1])
    return found


def _names(text: str, path: Path) -> bool:
    """Whether a path is in it, as a whole: ``/a/w1`` is not in ``/a/w10``."""
    return re.search(re.escape(str(path.absolute())) + r"(?![\w.-])", text) is not None


def _any(text: str, paths: Iterable[Path]) -> bool:
    return any(_names(text, path) for path in paths)


def _cgroups(scope: str) -> list[tuple[str, Path]]:
    """(sid, directory) of all controllers."""
    root = Path("/sys/fs/cgroup")
    homes = [parent / "greenroom" / scope for parent in (root, *(p for p in entries(root) if p.is_dir()))]
    return [(path.name, path) for home in homes for path in entries(home) if path.is_dir()]


def _pids(cgroup: Path) -> list[int]:
    try:
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split() if _started(int(pid)) >= 0]
    except OSError:
        return []


def _devices(netns: Path) -> list[str]:
    """Greenroom's interfaces in a named network namespace; [] when there is none (any more)."""
    try:
        with inside_netns(netns):
            names = [name for _, name in socket.if_nameindex()]
    except OSError:  # gone, or the empty file that an agent left that died while it made one
        return []
    return [name for name in names if name.startswith(DEVICE_PREFIX)]
