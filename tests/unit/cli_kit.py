"""The command line for tests: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

from click.testing import CliRunner, Result
from fake_control import ThreadedServer

from greenroom.cli.main import cli
from greenroom.core.records import Actor, Failure

#: Far above what any command takes.
TIMEOUT_S = 30.0


class Shell:
    def __init__(self, server: ThreadedServer) -> None:
        self.server, self.control = server, server.control

    def __call__(self, *args: str, code: int = 0, stdin: str = "") -> Result:
        result = CliRunner().invoke(cli, args, input=stdin)
        assert result.exit_code == code, (args, result.exit_code, result.output)
        if code not in (0, 7):
            assert "Traceback" not in result.stderr and result.stderr.strip()
        return result

    def fail_next(self, code: str, reason: str, message: str) -> None:
        def set_it() -> None:
            self.control.fail = Failure(code=code, reason=reason, message=message)

        self.server.call(set_it)

    def actor(self, name: str) -> Actor:
        found = self.server.run(self.control.store.get(Actor, f"default/{name}"))
        assert isinstance(found, Actor)
        return found


def process(*args: str, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from greenroom.cli.main import main; main()", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload,no-any-return]


class Terminal:
    """A command on a terminal, which is its stderr and, with ``whole``, its stdout too."""

    def __init__(self, *args: str, whole: bool = False, columns: int = 200) -> None:
        self._parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from greenroom.cli.main import main; main()", *args],
            stdin=subprocess.DEVNULL,
            stdout=child if whole else subprocess.PIPE,
            stderr=child,
            text=True,
            # Programs believe COLUMNS more than the terminal, and a runner of tests may have set it.
            env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"},
        )
        os.close(child)
        self.shown = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while data := _read_some(self._parent):
            # Without what steers the terminal; the text between is what a person sees, drawn again and again.
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))

    def until(self, text: str) -> None:
        """Waits until it has shown ``text``."""
        end = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            assert time.monotonic() < end, (text, self.shown)
            time.sleep(0.02)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self, code: int = 0) -> str:
        """Waits for its end; what it wrote to stdout, if that is no terminal."""
        out, _ = self._process.communicate(timeout=TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        os.close(self._parent)
        assert self._process.returncode == code, (self._process.returncode, self.shown)
        return out or ""


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # nobody has the terminal open any more
        return b""
