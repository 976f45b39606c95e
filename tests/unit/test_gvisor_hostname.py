"""The program inside sandboxes: its bytes are its assembly, and it does what it says on a real kernel."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from greenroom.core.errors import FailedPrecondition
from greenroom.sandbox.gvisor import hostname

TOOLS = {"x86_64": ("", ""), "aarch64": ("aarch64-linux-gnu-", "qemu-aarch64-static")}

#: An assembler and an emulator of the other processor are not what a machine for tests has to have.
pytestmark = pytest.mark.other_processor


def tool(machine: str, name: str) -> str:
    prefix = "" if machine == platform.machine() else TOOLS[machine][0] or "x86_64-linux-gnu-"
    path = shutil.which(prefix + name)
    if path is None:
        pytest.skip(f"no {prefix}{name} on this machine")
    return path


@pytest.mark.parametrize("machine", TOOLS)
def test_code_is_the_assembly(machine: str, tmp_path: Path) -> None:
    source = Path(hostname.__file__).with_name(f"hostname_{machine}.S")
    subprocess.run([tool(machine, "as"), "-o", str(tmp_path / "o"), str(source)], check=True)
    extract = [tool(machine, "objcopy"), "-O", "binary", "-j", ".text", str(tmp_path / "o"), str(tmp_path / "bin")]
    subprocess.run(extract, check=True)
    assert (tmp_path / "bin").read_bytes() == hostname.code(machine)


def test_other_machines_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="riscv64"):
        hostname.program(machine="riscv64")


@pytest.fixture(params=TOOLS)
def machine(request: pytest.FixtureRequest) -> str:
    if os.geteuid() != 0:
        pytest.skip("setting a host name needs root")
    if request.param != platform.machine() and shutil.which(TOOLS[request.param][1]) is None:
        pytest.skip(f"no emulator of {request.param} on this machine")
    return str(request.param)


def execute(machine: str, directory: Path, *argv: str, uid: int = 0, gid: int = 0) -> tuple[int, str]:
    """Runs the program in a UTS namespace of its own."""
    init = directory / "init"
    init.write_bytes(hostname.program(uid, gid, machine))
    init.chmod(0o755)
    emulator = [] if machine == platform.machine() else [TOOLS[machine][1]]
    # Not below pytest's directory, which another user may not enter.
    result = subprocess.run(
        ["unshare", "--uts", *emulator, str(init), *argv], capture_output=True, text=True, timeout=30
    )
    return result.returncode, result.stdout


def test_becomes_the_command_with_the_name_of_a_file(machine: str, tmp_path: Path) -> None:
    (tmp_path / "hostname").write_text("from-file")
    script = "uname -n; id -u; id -g; id -G; grep -E 'Cap(Bnd|Eff)' /proc/self/status; echo $0 $1 $SIGN"
    os.environ["SIGN"] = "kept"
    name = str(tmp_path / "hostname")
    code, out = execute(machine, tmp_path, name, "/bin/sh", "-c", script, "zero", "one")
    lines = out.splitlines()
    assert code == 0
    assert lines[:4] == ["from-file", "0", "0", "0"]
    caps = [int(line.split()[1], 16) for line in lines[4:6]]
    assert all(not c & (1 << 21 | 1 << 8) for c in caps)
    assert all(c & 1 for c in caps)
    assert lines[6] == "zero one kept"


def test_becomes_another_user(machine: str, tmp_path: Path) -> None:
    script = "id -u; id -g; id -G; grep CapEff /proc/self/status"
    code, out = execute(machine, tmp_path, "name", "/bin/sh", "-c", script, uid=12345, gid=54321)
    lines = out.splitlines()
    assert code == 0
    assert lines[:3] == ["12345", "54321", "54321"]
    assert int(lines[3].split()[1], 16) == 0


def test_exit_statuses(machine: str, tmp_path: Path) -> None:
    assert execute(machine, tmp_path, "a-name") == (0, "")
    assert execute(machine, tmp_path, "x" * 64) == (0, "")
    assert execute(machine, tmp_path, "x" * 65)[0] == 22  # EINVAL
    assert execute(machine, tmp_path, "/no/such/file")[0] == 22
    assert execute(machine, tmp_path, "name", "/no/such/command")[0] == 127
    assert execute(machine, tmp_path, "name", "/etc/passwd")[0] == 126
