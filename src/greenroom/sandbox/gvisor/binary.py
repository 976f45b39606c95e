"""Which `runsc` is used, what it is called, and what a memory snapshot made by it is bound to."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record

#: The oldest release that was tested. Older ones lack ``--net-disconnect-ok``, and a failed checkpoint ends the actor.
OLDEST_RELEASE = 20240729
#: What a snapshot depends on beside runsc and the CPU: mounts, network and command line of a sandbox. Count up when
#: they change.
LAYOUT = 2
PLATFORMS = ("ptrace", "systrap")
#: `runsc --version` takes 20 ms.
VERSION_TIMEOUT_S = 10.0
INSTALL_HINT = "run `make setup`, or set GREENROOM_RUNSC to a runsc of 2024-07-29 or later"


class Runsc(Record, frozen=True, kw_only=True):
    path: str
    version: str
    platform: str
    cpu: str

    @property
    def fingerprint(self) -> str:
        """Equal for two workers of which either can restore the other's snapshots."""
        raw = f"{self.version}\0{self.platform}\0{self.cpu}\0{LAYOUT}"
        return "gvisor-" + hashlib.sha256(raw.encode()).hexdigest()[:16]


def find_path(environ: Mapping[str, str], prefix: Path) -> Path:
    """Where runsc is: ``GREENROOM_RUNSC``, then ``PATH``, then ``.tools/bin/runsc`` beside the virtual environment.

    Raises:
        FailedPrecondition: nowhere (reason ``RUNSC_NOT_FOUND``).
    """
    if chosen := environ.get("GREENROOM_RUNSC"):
        if os.access(chosen, os.X_OK):
            return Path(chosen).absolute()
        raise FailedPrecondition(f"GREENROOM_RUNSC={chosen} is no program", reason="RUNSC_NOT_FOUND")
    tools = prefix.parent / ".tools" / "bin" / "runsc"
    found = shutil.which("runsc", path=environ.get("PATH", os.defpath)) or (str(tools) if tools.exists() else "")
    if not found:
        raise FailedPrecondition(f"no runsc on PATH nor at {tools}: {INSTALL_HINT}", reason="RUNSC_NOT_FOUND")
    return Path(found).absolute()


def release_of(version: str) -> int | None:
    """The release date in a version text, as a number (20240729); None for builds that carry none."""
    found = re.search(r"20\d{6}", version)
    return int(found.group()) if found else None


def check_release(path: str, version: str) -> None:
    """Raises `FailedPrecondition` (reason ``RUNSC_TOO_OLD``) for a release that loses actors."""
    release = release_of(version)
    if release is not None and release < OLDEST_RELEASE:
        raise FailedPrecondition(
            f"{path} is release {release}, in which a checkpoint that fails kills the actor and its memory is lost "
            f"(Debian 12's own runsc is such a one): {INSTALL_HINT}",
            reason="RUNSC_TOO_OLD",
        )


def platform_of(environ: Mapping[str, str]) -> str:
    """``ptrace`` costs an idle sandbox nothing; ``systrap`` is three times faster at system calls but costs 3 % of a
    core per idle sandbox. Chosen by ``GREENROOM_GVISOR_PLATFORM``."""
    chosen = environ.get("GREENROOM_GVISOR_PLATFORM", "ptrace")
    if chosen not in PLATFORMS:
        raise FailedPrecondition(f"GREENROOM_GVISOR_PLATFORM={chosen} is none of {', '.join(PLATFORMS)}")
    return chosen


def cpu_features(cpuinfo: str) -> str:
    """A digest of the features of the CPU: gVisor refuses to restore where one is missing. Order does not matter."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
    return "unknown"


async def find() -> Runsc:
    """Finds runsc and asks for its version.

    Raises:
        FailedPrecondition: none, or one that must not be used.
    """
    path = str(find_path(os.environ, Path(sys.prefix)))
    platform = platform_of(os.environ)
    process = await asyncio.create_subprocess_exec(
        path,
        "--version",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(VERSION_TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise FailedPrecondition(f"`{path} --version` did not answer", reason="RUNSC_NOT_FOUND") from None
    first = out.decode(errors="replace").partition("\n")[0]
    if process.returncode != 0 or not first.startswith("runsc version "):
        raise FailedPrecondition(f"{path} is no runsc: `--version` says {first!r}", reason="RUNSC_NOT_FOUND")
    version = first.removeprefix("runsc version ").strip()
    check_release(path, version)
    return Runsc(path=path, version=version, platform=platform, cpu=cpu_features(Path("/proc/cpuinfo").read_text()))
