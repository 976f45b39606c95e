"""A real server in processes of its own, for the demo, end-to-end tests and benchmarks."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, GreenroomError
from greenroom.core.records import Template, TemplateSpec, TemplateState

GREENROOM = [sys.executable, "-m", "greenroom"]
#: An idle machine takes a second or two (gVisor tests itself at start); this bounds a broken one.
START_TIMEOUT_S = 60.0
#: Suspending what runs and removing every sandbox takes some seconds at most.
STOP_TIMEOUT_S = 120.0
_POLL_S = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer through the gateway. ``phases``: of the wake-up that it waited for, in ms, from ``Server-Timing``; they
    sum to the time that the gateway measured."""

    status: int
    body: bytes
    headers: dict[str, str]
    phases: tuple[tuple[str, float], ...] = ()

    @property
    def wake_ms(self) -> float:
        return sum(ms for _, ms in self.phases)


@dataclass(slots=True)
class LiveServer:
    """`start`, then use ``client`` and `request`, then `stop` (in order) or `kill` (``kill -9``); may be started again.

    The server runs in a session of its own, so that Ctrl-C reaches only the caller.
    """

    data_dir: Path
    backend: str = "gvisor"
    workers: int = 2
    slots: int = 4
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    #: Whether it is killed when the thread that started it ends, also by ``kill -9``.
    dies_with_us: bool = False
    process: subprocess.Popen[bytes] | None = None
    client: Client = field(init=False)
    gateway: tuple[str, int] = ("", 0)

    @property
    def address(self) -> str:
        return f"unix:{self.data_dir / 'run' / 'api.sock'}"

    @property
    def control(self) -> str:
        """Where it takes agents."""
        return f"unix:{self.data_dir / 'run' / 'agents.sock'}"

    @property
    def log_path(self) -> Path:
        return self.data_dir / "server.log"

    def start(self) -> None:
        """Returns when the API answers.

        Raises:
            FailedPrecondition: it ended instead; the message has the end of its log.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        shape = [f"--workers={self.workers}", f"--slots={self.slots}", f"--backend={self.backend}"]
        command = [*GREENROOM, "up", f"--data={self.data_dir}", *shape, "--listen=127.0.0.1:0", *self.options]
        if self.dies_with_us:
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.env},
            )
        until = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None:
                raise FailedPrecondition(f"the server did not start:\n{self.log_tail()}", reason="NOT_STARTED")
            if time.monotonic() > until:
                raise DeadlineExceeded(f"the server does not answer:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        client = Client(self.address)
        try:
            info = client.system.GetServerInfo(pb.GetServerInfoRequest())
        except GreenroomError:
            client.close()
            return False
        url = urlsplit(info.gateway_url)
        self.client, self.gateway = client, (url.hostname or "", url.port or 0)
        return True

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def request(self, actor: str, path: str = "/inc", *, method: str = "GET", timeout_s: float = 60.0) -> Answer:
        """One request through the gateway to ``namespace/name``."""
        connection = http.client.HTTPConnection(*self.gateway, timeout=timeout_s)
        try:
            connection.request(method, path, headers={"Greenroom-Actor": actor})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        items = [item.strip().partition(";dur=") for item in response.headers.get("Server-Timing", "").split(",")]
        phases = tuple((name, float(ms)) for name, sep, ms in items if sep and name != "total")
        return Answer(response.status, body, dict(response.headers), phases)

    def apply(self, name: str, spec: TemplateSpec, *, timeout_s: float = 120.0) -> Template:
        """Applies a template of namespace ``default`` and waits until it is Ready or Failed."""
        message = convert.to_message(spec)
        self.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(namespace="default", name=name, spec=message))
        until = time.monotonic() + timeout_s
        while True:
            request = pb.GetTemplateRequest(namespace="default", name=name)
            template = convert.from_message(Template, self.client.templates.GetTemplate(request))
            if template.state in (TemplateState.READY, TemplateState.FAILED):
                return template
            if time.monotonic() > until:
                raise DeadlineExceeded(f"template {name} is still {template.state}:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def pids(self) -> list[int]:
        """The server's process and its agents', not the sandboxes'."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def kill(self, *, sandboxes: bool = False) -> None:
        """``kill -9`` of the server and its agents; with ``sandboxes`` of every other process below them too."""
        assert self.process is not None
        pids = self.pids()
        if sandboxes:
            for pid in list(pids):
                pids += descendants(pid)
        for pid in dict.fromkeys(pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.client.close()

    def kill_agent(self, worker: str) -> bool:
        """``kill -9`` of one of its agents, which it starts again; False when there is none of that worker just now."""
        for pid in self.pids()[1:]:
            try:
                if f"--worker={worker}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    return True
            except (FileNotFoundError, ProcessLookupError):
                continue
        return False

    def stop(self) -> int:
        """Ends it in order, as Ctrl-C does; returns its exit status."""
        assert self.process is not None
        if self.gateway[0]:
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)


@dataclass(slots=True)
class LiveAgent:
    """An agent of its own, not kept by a server: `start`, then `kill` (``kill -9``) or `stop`; may be started again.
    Its sandboxes survive it, unless it is stopped.

    ``control``: where replicas of the control plane take agents (`LiveServer.control`)."""

    name: str
    state_dir: Path
    images: Path
    snapshots: Path | str
    control: tuple[str, ...]
    backend: str = "gvisor"
    slots: int = 4
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self.state_dir.with_suffix(".log")

    def start(self) -> None:
        """Returns at once: a server that it connects to lists it as a worker then."""
        self.state_dir.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *GREENROOM,
            "agent",
            f"--worker={self.name}",
            "--pool=default",
            f"--backend={self.backend}",
            f"--slots={self.slots}",
            f"--state-dir={self.state_dir}",
            f"--images={self.images}",
            f"--snapshots={self.snapshots}",
            *(f"--control={address}" for address in self.control),
            *self.options,
        ]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, *, timeout_s: float = 60.0) -> None:
        """Ends it and what it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)  # wipe: see greenroom.cli.agent
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, from its children down."""
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [found for child in children for found in (child, *descendants(child))]


def cpu_seconds(pids: list[int]) -> float:
    """User and system time that the processes have used so far, in seconds, without their children's."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS
