"""A real PostgreSQL server for tests and benchmarks: Debian's programs, a cluster in a temporary directory, reached
through a unix socket (and a loopback port if asked for), ended for sure.

`find_programs` says where the programs are; `scripts/setup.sh --test` gets them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psycopg

from greenroom.testing.ports import free_port

#: Releases older than this are not supported by the store.
OLDEST = 15
#: Until a server answers or has ended, in seconds: it replays its log when it was killed before.
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
#: Who runs the server when this process is root, as whom PostgreSQL refuses to run.
UNPRIVILEGED = 65534  # nobody, on every Linux
USER = "greenroom"
#: Room that a cluster of tests takes at most: its log, and some databases.
MEMORY_BYTES = 3 << 30

#: Of temporary directories, and of the file in each that says which process it is for.
_PREFIX, _OWNER = "gr-pg-", "owner"


def find_programs() -> Path | None:
    """The directory of ``postgres`` and ``initdb``; None where there are none that are new enough."""
    tools = Path(__file__).parents[3] / ".tools" / "postgres"
    versions = [*tools.glob("usr/lib/postgresql/*/bin"), *Path("/usr/lib/postgresql").glob("*/bin")]
    found = [d for d in versions if d.parent.name.isdigit() and int(d.parent.name) >= OLDEST]
    found.sort(key=lambda d: int(d.parent.name), reverse=True)
    if (on_path := shutil.which("initdb")) is not None:
        found.append(Path(on_path).resolve().parent)
    return next((d for d in found if (d / "postgres").exists() and (d / "initdb").exists()), None)


def _memory() -> str | None:
    """A file system in memory with room for a cluster: making a database writes a thousand files."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= MEMORY_BYTES
    return str(shm) if roomy else None


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class PostgresServer:
    """One server with one cluster. A context manager, for the main thread: it ends with the thread that starts it.

    Args:
        durable: as in production: a commit is on the disk when it is answered. Otherwise nothing is synced, and the
            cluster is in memory where that is possible.
        settings: further settings of the server, by name.
        tcp: also listens on a free port of 127.0.0.1 (`port`).
        directory: where to make the cluster; a temporary one that is removed at the end by default.
    """

    def __init__(
        self,
        *,
        durable: bool = False,
        settings: Mapping[str, str] | None = None,
        tcp: bool = False,
        directory: Path | None = None,
    ) -> None:
        programs = find_programs()
        if programs is None:
            raise FileNotFoundError(
                f"no PostgreSQL server of release {OLDEST} or newer; scripts/setup.sh --test gets one"
            )
        self._programs = programs
        self._given = directory
        self._durable = durable
        self._settings = dict(settings or {})
        self._tcp = tcp
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []
        self._names = itertools.count(1)

    def __enter__(self) -> PostgresServer:
        base = self._given or self._temporary()
        base.mkdir(parents=True, exist_ok=True)
        self.directory = base
        try:
            # The server's user has to get through, and the name of a socket is limited to 107 bytes.
            base.chmod(0o711)
            self._make_private(base / "data")
            self._make_private(base / "run")
            self._reach_programs()
            self._initdb()
            if self._tcp:
                self.port = free_port()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        if self._given is None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _temporary(self) -> Path:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=None if self._durable else _memory()))
        for left in directory.parent.glob(f"{_PREFIX}*/{_OWNER}"):  # by processes that were killed
            with contextlib.suppress(OSError, ValueError):
                if not Path(f"/proc/{int(left.read_text())}").exists():
                    shutil.rmtree(left.parent, ignore_errors=True)
        (directory / _OWNER).write_text(str(os.getpid()))
        return directory

    # --- running ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when it takes connections."""
        assert self.process is None, "it runs"
        settings = {
            "unix_socket_directories": str(self.directory / "run"),
            "listen_addresses": "127.0.0.1" if self._tcp else "",
            "port": str(self.port or 5432),
            "max_connections": "100",
            "shared_buffers": "256MB",
            "max_wal_size": "1GB",
            "log_checkpoints": "off",
            "jit": "off",
            "timezone": "GMT",
            "log_timezone": "GMT",
        }
        if not self._durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}  # a commit still survives the server's death
        settings |= self._settings
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        with open(self.log_file, "ab") as log:
            program = str(self._programs / "postgres")
            self.process = self._popen([program, "-D", str(self.directory / "data"), *options], log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with psycopg.connect(self.url("postgres"), connect_timeout=5):
                    return
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"PostgreSQL did not start: {error}\n{self.log_file.read_text()[-4000:]}"
                    ) from error
            time.sleep(0.02)  # between looks at the condition

    def stop(self) -> None:
        """As an administrator does: sessions are ended, what they have not committed is undone."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """At once, without tidying up; it recovers at the next `start`. What was committed is kept."""
        self._end(signal.SIGQUIT)

    def pause(self) -> None:
        """From now on all its processes stand still, and none answers."""
        assert self.process is not None and not self._paused
        pid = self.process.pid
        os.kill(pid, signal.SIGSTOP)  # first, that it makes no more of them
        self._paused = [pid, *_children(pid)]
        for pid in self._paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self._paused:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._paused = []

    def freeze(self, seconds: float) -> None:
        """It stands still that long. Blocks."""
        self.pause()
        time.sleep(seconds)
        self.resume()

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        self.resume()
        process, self.process = self.process, None
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def log_file(self) -> Path:
        return self.directory / "log"

    # --- databases ----------------------------------------------------------------------------------------

    def url(self, database: str, *, tcp: bool = False, user: str = USER) -> str:
        if tcp:
            return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"
        return f"postgresql:///{database}?host={self.directory / 'run'}&port={self.port or 5432}&user={user}"

    def create_database(self, template: str = "template1") -> str:
        """Makes a database, empty or as another one is, and returns its name."""
        name = f"test{next(self._names)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop_database(self, name: str) -> None:
        """Also one that somebody is connected to."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[object, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    # --- starting programs --------------------------------------------------------------------------------

    def _make_private(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o700 if directory.name == "data" else 0o755)
        if os.geteuid() == 0:
            os.chown(directory, UNPRIVILEGED, UNPRIVILEGED)

    def _reach_programs(self) -> None:
        """Programs below a directory that the server's user may not enter are copied to one that it may."""
        tree = next((p for p in self._programs.parents if p.name == "postgres" and p.parent.name == ".tools"), None)
        if os.geteuid() != 0 or tree is None:
            return
        if not all(p.stat().st_mode & 0o001 for p in tree.parents):
            shutil.copytree(tree, self.directory / "programs", symlinks=True)
            self._programs = self.directory / "programs" / self._programs.relative_to(tree)

    def _initdb(self) -> None:
        if (self.directory / "data" / "PG_VERSION").exists():
            return
        initdb = [str(self._programs / "initdb"), "-D", str(self.directory / "data"), "-U", USER, "-A", "trust"]
        with open(self.log_file, "wb") as log:
            process = self._popen([*initdb, "-E", "UTF8", "--no-locale", "--no-sync", "--no-instructions"], log)
            if process.wait() != 0:
                raise RuntimeError(f"initdb failed: {self.log_file.read_text()}")

    def _popen(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Starts a program as somebody who may not do much, to end with this thread."""
        environment = {"PATH": os.environ.get("PATH", ""), "TZ": "GMT", "LC_ALL": "C"}
        libraries = self._programs.parents[2]
        if libraries != Path("/usr/lib"):  # those that the system lacks were unpacked beside the programs
            environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries.glob("*-linux-gnu*")))
        # Not by a function in the forked child (`preexec_fn`): a process that speaks gRPC can't run one, its threads
        # hold locks. SIGQUIT: the postmaster takes its children along.
        become = ["setpriv", "--pdeathsig", "QUIT"]
        if os.geteuid() == 0:
            become += ["--reuid", str(UNPRIVILEGED), "--regid", str(UNPRIVILEGED), "--clear-groups"]
        return subprocess.Popen(
            [*become, "--", *command],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's interrupt is for the tests, which then end the server
        )
