"""What a server that has ended must not leave on the machine; for tests and the demo."""

from __future__ import annotations

import time
from pathlib import Path

from greenroom.sandbox.gvisor.backend import scope_name
from greenroom.sandbox.gvisor.network import NETNS_DIRECTORY

GRACE_S = 30.0


def leftovers(data_dir: Path) -> list[str]:
    """Processes, mounts, network namespaces and cgroups that belong to the server of ``data_dir``; empty is good. The
    kernel may take a moment to let go of what was removed, so it looks again for up to ``GRACE_S`` seconds.

    A process belongs to it when its command line names the directory. Namespaces and cgroups are called after the
    directory of the worker that they belong to, so the workers' directories must still be there.
    """
    until = time.monotonic() + GRACE_S
    while (found := look(data_dir)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def look(data_dir: Path) -> list[str]:
    """What there is of it right now."""
    name = str(data_dir.absolute())
    found = [f"process {pid}: {command}" for pid, command in _processes() if name in command]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    # What is mounted as the directory itself is its owner's.
    found += [f"mount {line.split()[4]}" for line in mounts if name in line and line.split()[4] != name]
    for state_dir in data_dir.glob("workers/*/sandboxes"):
        scope = scope_name(state_dir)
        found += [f"network namespace {scope}"] * (NETNS_DIRECTORY / scope).exists()
        found += [f"cgroup {path}" for path in _cgroups(scope)]
    return found


def _processes() -> list[tuple[int, str]]:
    out = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has ended
                continue
            out.append((int(entry.name), command))
    return out


def _cgroups(scope: str) -> list[Path]:
    root = Path("/sys/fs/cgroup")
    above = [root, *(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    return [path for parent in above if (path := parent / "greenroom" / scope).is_dir()]
