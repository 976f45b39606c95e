"""The port that a sandbox backend implements.

Words
    *class*    what a sandbox is made for (root file system, command, limits): `SandboxClass`. Sandboxes of one class
    are
               interchangeable until an actor moves in, so they can be created before they are needed.
    *sandbox*  one isolated process tree with an id (``sid``, 32 hex digits, never reused) that the backend makes up.
    *owner*    the `Identity` of the actor that lives in it; recorded on disk before anything of the actor runs.

Life of a sandbox
    (warm) -> start | restore -> RUNNING <-> FROZEN -> destroy
                                 RUNNING -> checkpoint -> FROZEN -> thaw | destroy

Rules, checked by `greenroom.testing.backend_conformance` (passing it is what makes a class a backend):
    - All state lives below the ``state_dir`` that the backend is opened with; nothing else on the machine is left
      after `close`: no process, mount, namespace, interface or cgroup.
    - A failed `start` or `restore` leaves nothing behind, and raises. The backend never retries.
    - A failed `checkpoint` leaves the actor *running* and the destination empty. Nothing is lost by a failure.
    - `destroy` and `thaw` are idempotent; destroying an unknown sid is success.
    - `reconcile` runs first after `open` and finds, from disk, every sandbox of an earlier agent process that is
    still
      alive (pids verified by their start time), so that an agent that restarts never kills a healthy actor. What is
      half made or dead is cleaned up by `reconcile` itself and not returned.
    - An `Endpoint` is never given to two actors: a stale one can't reach another actor.
    - Methods are called from one event loop; they must not block it for more than a millisecond or two.

Errors: `GreenroomError` subclasses. `FailedPrecondition` for a thing that can't run here (reason
``COMMAND_NOT_FOUND`` when the image lacks the command), `DataLoss` for an unreadable snapshot, `Unavailable` for a
sandbox that is gone, `ResourceExhausted` for a full disk (reason ``DISK_FULL``).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from greenroom.core.agentapi import ActorStats, Identity, ResidentState
from greenroom.core.records import Endpoint, PhaseTime, Record, Resources, SnapshotScope


class Capabilities(Record, frozen=True, kw_only=True):
    """What a backend can do. ``isolation``: ``vm``, ``kernel`` (user-space kernel), ``namespace`` or ``none``."""

    scope: SnapshotScope
    isolation: str
    security_boundary: bool
    needs_image: bool = True


class Check(Record, frozen=True, kw_only=True):
    """One line of a backend's self-examination, shown by ``greenroom doctor``. Not ``ok`` in a backend that is
    available all the same: what actors there do without."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


class BackendProbe(Record, frozen=True, kw_only=True):
    """``fingerprint``: what a memory snapshot is bound to (build, platform, CPU features); equal means compatible.
    ``checks`` explain an unavailable backend."""

    available: bool
    version: str
    fingerprint: str
    checks: tuple[Check, ...] = ()

    @property
    def reason(self) -> str:
        return "; ".join(f"{c.name}: {c.detail}" for c in self.checks if not c.ok)


class SandboxClass(Record, frozen=True, kw_only=True):
    """Everything that is equal for all sandboxes of one template: see the module docstring.

    ``rootfs`` is an unpacked tree that many sandboxes share and none may change. ``argv`` is complete (image and
    template merged), ``env`` too; ``uid``/``gid`` are numeric; ``port`` is the template's first port, where the actor
    listens (0 to 65535; 0 for none). ``stop_signal``: number of the signal that asks the actor to end, where a backend
    stops it to save its files.
    """

    rootfs: Path
    image_digest: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    port: int = 8080
    resources: Resources = Resources()
    stop_signal: int = 15

    @property
    def digest(self) -> str:
        """A short stable name for the class, 16 hex digits."""
        identity = (self.rootfs, self.image_digest, self.argv, self.env, self.cwd, self.uid, self.gid, self.port)
        raw = msgspec.json.encode([*map(str, identity), self.resources, self.stop_signal])
        return hashlib.sha256(raw).hexdigest()[:16]


class Running(Record, frozen=True, kw_only=True):
    """A sandbox with an actor in it. ``log_fifo``: named pipe that carries stdout and stderr; the agent reads it, and
    the
    sandbox holds both ends itself, so that nothing breaks while no agent reads. ``phases`` in order of happening;
    ``warm``: a pre-created sandbox was used."""

    sid: str
    endpoint: Endpoint
    log_fifo: Path | None = None
    phases: tuple[PhaseTime, ...] = ()
    warm: bool = False


class Found(Record, frozen=True, kw_only=True):
    """What `reconcile` found alive."""

    sid: str
    owner: Identity
    state: ResidentState
    endpoint: Endpoint
    log_fifo: Path | None = None


class ExecSpec(Record, frozen=True, kw_only=True):
    """``timeout_s``: the command is ended then, and `ExecSession.output` with it, whoever it leaves; 0 means never.
    ``env`` is added to the class's."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    timeout_s: float = 0.0


class ExecSession(Protocol):
    """A command that runs inside a sandbox."""

    async def write(self, data: bytes) -> None:
        """Feeds stdin; waits while the pipe is full. An empty value closes stdin."""

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks as (1 for stdout or 2 for stderr, bytes), until both are closed."""

    async def wait(self) -> int:
        """Exit status, or 128 + signal number. Also ends when the sandbox dies (then 137)."""

    async def kill(self) -> None:
        """Ends the command. Idempotent."""

    def abort(self) -> None:
        """For who has killed it and reads no more: lets go of its pipes, now, with what is in them; `output` ends, and
        `write` must not be waiting. Idempotent."""


class Backend(Protocol):
    """One way to run sandboxes. Constructed without arguments by its entry point (group ``greenroom.backends``)."""

    name: str
    capabilities: Capabilities

    async def probe(self) -> BackendProbe:
        """Whether it can run on this machine, and why not. Changes nothing; never raises. Takes at most a few
        seconds."""

    async def open(self, state_dir: Path, worker: str) -> BackendProbe:
        """Takes possession of ``state_dir`` (created if absent) and self-tests. ``worker`` names namespaces and
        cgroups.

        Raises:
            FailedPrecondition: the backend can't run here; the message says why.
        """

    async def reconcile(self) -> list[Found]:
        """See the module docstring. Called once, directly after `open`."""

    async def start(self, cls: SandboxClass, owner: Identity) -> Running:
        """Cold start. Returns when the process runs (readiness is the agent's business)."""

    async def restore(self, cls: SandboxClass, owner: Identity, source: Path, hostname: str) -> Running:
        """Starts from the snapshot files in directory ``source``, which are only read. ``hostname`` is what the
        snapshot
        believes its host is called; afterwards the sandbox is called ``owner.hostname``."""

    async def checkpoint(self, sid: str, dest: Path) -> tuple[PhaseTime, ...]:
        """Freezes the sandbox and writes its snapshot as plain files into the empty directory ``dest``; the file
        names are
        the backend's own. The sandbox is left frozen. For a ``data``-scope backend freezing ends the process, and
        `thaw` starts it again over the same files."""

    async def freeze(self, sid: str) -> None:
        """Stops all CPU use, memory stays; a few milliseconds. Idempotent.

        Raises:
            Unimplemented: this backend can't.
        """

    async def thaw(self, sid: str) -> Endpoint:
        """Lets a frozen sandbox go on; returns where it answers. Idempotent."""

    async def exec(self, sid: str, spec: ExecSpec) -> ExecSession:
        """Runs a further command in the sandbox, as the actor's user."""

    async def stats(self, sid: str) -> ActorStats: ...

    async def wait(self, sid: str) -> int:
        """Resolves with the exit status when the sandbox's main process ends, however it ends; many may wait. After
        `destroy` it resolves too."""

    async def destroy(self, sid: str) -> None:
        """Kills at once; cleans up what is slow in the background. Idempotent."""

    async def close(self, *, keep_running: bool) -> None:
        """Ends this process's use of the backend: warm sandboxes are destroyed. With ``keep_running`` sandboxes that
        have
        an owner go on and the next `reconcile` finds them; without, everything is destroyed and cleaned up."""


@runtime_checkable
class Warmer(Protocol):
    """Optional power: sandboxes created before they are needed."""

    async def warm(self, cls: SandboxClass) -> None:
        """Creates one more sandbox of this class, off the wake path. `start` and `restore` take one when there is
        one."""

    def warm_counts(self) -> dict[str, int]:
        """How many are ready, by class digest."""

    async def chill(self, class_digest: str) -> None:
        """Destroys one warm sandbox of the class, if there is one."""


def phase_times(marks: Sequence[tuple[str, float]], started: float) -> tuple[PhaseTime, ...]:
    """Turns (name, monotonic end time) marks into phases; they sum to the last mark minus ``started``."""
    out = []
    for name, at in marks:
        out.append(PhaseTime(name=name, seconds=at - started))
        started = at
    return tuple(out)
