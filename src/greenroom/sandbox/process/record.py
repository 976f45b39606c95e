"""What is on disk about a sandbox, for an agent that comes later."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import msgspec

from greenroom.core.agentapi import Identity
from greenroom.core.records import Record
from greenroom.sandbox.port import SandboxClass
from greenroom.sandbox.reaper import Process

_FILE = "record.json"


class Phase(enum.StrEnum):
    STARTING = "starting"  # the init waits, or the program has just been let go
    RUNNING = "running"
    FROZEN = "frozen"  # stopped by signal, memory kept
    STOPPING = "stopping"  # was asked to end, so that its files can be saved
    STOPPED = "stopped"  # has ended; its files are all there is


class SandboxRecord(Record, frozen=True, kw_only=True):
    """``pid`` and ``started`` (ticks since the boot ``boot``) name the init for ever; pid 0 is none. ``complete``: it
    has run before, so its files matter."""

    sid: str
    owner: Identity
    cls: SandboxClass
    port: int
    boot: str
    phase: Phase = Phase.STARTING
    pid: int = 0
    started: int = 0
    complete: bool = False

    def moved(self, phase: Phase, process: Process | None) -> SandboxRecord:
        return msgspec.structs.replace(
            self,
            phase=phase,
            pid=process.pid if process else 0,
            started=process.started if process else 0,
            complete=self.complete or phase is Phase.RUNNING,
            boot=boot_id(),
        )


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_record(directory: Path, record: SandboxRecord) -> None:
    """Replaces it whole. Not synced: after a power failure no process is left to be found."""
    new = directory / f"{_FILE}.new"
    new.write_bytes(msgspec.json.encode(record, enc_hook=str))
    new.replace(directory / _FILE)


def read_record(directory: Path) -> SandboxRecord | None:
    """None when it was never written, or is of a program that wrote it otherwise."""
    try:
        return msgspec.json.decode((directory / _FILE).read_bytes(), type=SandboxRecord, dec_hook=_decode)
    except (OSError, msgspec.MsgspecError):
        return None


def _decode(kind: type[Any], value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)
