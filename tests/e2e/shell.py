"""The command line as people use it: a process each time, with its exit status and what it wrote."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from greenroom.testing.live import GREENROOM

#: Far above what any command of the tests takes, so that a hanging one is seen as such.
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    def ok(self) -> str:
        """What it wrote to stdout; it has succeeded."""
        assert self.code == 0, self
        return self.out

    def failed(self, code: int, *says: str) -> str:
        """What it wrote to stderr; it has failed with this code, and said all of ``says`` without a traceback."""
        assert self.code == code, self
        for part in says:
            assert part in self.err, self
        assert "Traceback" not in self.err, self
        return self.err


@dataclass(frozen=True, slots=True)
class Shell:
    """Calls ``greenroom`` for the server whose data directory is ``home``."""

    home: Path

    def start(self, *args: str, program: list[str] = GREENROOM) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GREENROOM_HOME": str(self.home)},
        )

    def __call__(self, *args: str, stdin: str = "", program: list[str] = GREENROOM) -> Result:
        process = self.start(*args, program=program)
        try:
            out, err = process.communicate(stdin, TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return Result(process.returncode, out, err)


def document(kind: str, name: str, spec: str) -> str:
    """One YAML document; ``spec`` in flow style."""
    head = "---\napiVersion: greenroom.dev/v1alpha1\n"
    return f"{head}kind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def template(name: str, image: str, more: str = "readyz: {path: /healthz}") -> str:
    return document("Template", name, f"{{image: '{image}', ports: [8080], {more}}}")
