"""What an image says about how to run it reaches the program, and the template overrides each part of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from greenroom.agent.classes import sandbox_class
from greenroom.core.errors import GreenroomError
from greenroom.core.records import TemplateSpec
from greenroom.images.port import Image
from greenroom.images.store import DiskImageStore
from greenroom.sandbox.gvisor import GvisorBackend, binary
from greenroom.sandbox.port import Backend, ExecSpec, Running, SandboxClass
from greenroom.sandbox.process import ProcessBackend
from greenroom.testing.backend_conformance import BackendTools, identity
from greenroom.testing.contracts.images import make_layer
from greenroom.testing.oci_layout import Layout
from greenroom.testing.python_image import add_tree
from greenroom.testing.python_rootfs import build_python_rootfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="several users need root")

#: Says what it was given, then waits; told to stop, it says by which signal, into a file.
_PROGRAM = b"""
import json, os, signal, sys, time
def stopped(number, frame):
    open("/tmp/stopped", "w").write(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, stopped)
env = {k: v for k, v in os.environ.items() if k in ("HOME", "FROM_IMAGE", "FROM_BOTH", "FROM_TEMPLATE")}
said = {"uid": os.getuid(), "gid": os.getgid(), "cwd": os.getcwd(), "env": env, "args": sys.argv[1:]}
print(json.dumps(said), flush=True)
while True:
    time.sleep(60)
"""
_READ = "print(open('/tmp/stopped').read())"
_CONFIG = {
    "Entrypoint": ["python3", "/app/say.py"],
    "Cmd": ["from", "image"],
    "Env": ["PATH=/usr/bin:/bin", "FROM_IMAGE=1", "FROM_BOTH=image"],
    "WorkingDir": "srv/made/for/it",
    "User": "app:staff",
    "ExposedPorts": {"9000/tcp": {}, "53/udp": {}},
    "StopSignal": "SIGINT",
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    directory = tmp_path_factory.mktemp("image")
    directory.chmod(0o755)
    build_python_rootfs(directory / "tree")
    layout = Layout(directory / "layout")
    accounts = {
        "etc/passwd": b"root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n",
        "etc/group": b"root:x:0:\nstaff:x:50:\n",
        "app/say.py": _PROGRAM,
    }
    layout.add_image([add_tree(layout, directory / "tree"), make_layer(layout, accounts)], _CONFIG, "latest")
    return asyncio.run(DiskImageStore(directory / "store").prepare(f"oci:{directory}/layout:latest"))


class _Process(BackendTools):
    async def make_backend(self) -> Backend:
        return ProcessBackend()


class _Gvisor(BackendTools):
    async def make_backend(self) -> Backend:
        return GvisorBackend()


@pytest.fixture(
    params=[
        pytest.param(_Process, id="process"),
        pytest.param(_Gvisor, id="gvisor", marks=[pytest.mark.gvisor, pytest.mark.xdist_group("sandboxes")]),
    ]
)
async def tools(request: pytest.FixtureRequest) -> BackendTools:
    if request.param is _Gvisor:
        try:
            await binary.find()
        except GreenroomError as error:
            pytest.skip(f"no usable runsc: {error}")
    made: BackendTools = request.param()
    return made


@asynccontextmanager
async def started(tools: BackendTools, cls: SandboxClass) -> AsyncIterator[tuple[Backend, Running, dict[str, Any]]]:
    async with tools.opened() as (backend, _, _):
        running = await backend.start(cls, identity())
        assert running.log_fifo is not None
        said = await asyncio.to_thread(_first_line, running.log_fifo)
        yield backend, running, json.loads(said)


def _first_line(fifo: Path) -> bytes:
    with open(fifo, "rb") as log:
        return log.readline()


async def test_image_alone(tools: BackendTools, image: Image) -> None:
    cls = sandbox_class(image, TemplateSpec(image="x"))
    assert cls.port == 9000
    async with started(tools, cls) as (_, _, said):
        assert said == {
            "uid": 1234,
            "gid": 50,
            "cwd": "/srv/made/for/it",
            "env": {"HOME": "/home/app", "FROM_IMAGE": "1", "FROM_BOTH": "image"},
            "args": ["from", "image"],
        }


async def test_template_overrides_each(tools: BackendTools, image: Image) -> None:
    spec = TemplateSpec(
        image="x",
        args=("from", "template"),
        env={"FROM_BOTH": "template", "FROM_TEMPLATE": "1"},
        workdir="/tmp",
        user="4711:4712",
        ports=(8080, 9000),
    )
    cls = sandbox_class(image, spec)
    assert cls.port == 8080
    async with started(tools, cls) as (_, _, said):
        assert said == {
            "uid": 4711,
            "gid": 4712,
            "cwd": "/tmp",
            "env": {"HOME": "/", "FROM_IMAGE": "1", "FROM_BOTH": "template", "FROM_TEMPLATE": "1"},
            "args": ["from", "template"],
        }
    command = msgspec.structs.replace(spec, command=("/usr/bin/python3", "/app/say.py"), args=())
    async with started(tools, sandbox_class(image, command)) as (_, _, said):
        assert said["args"] == []


@pytest.mark.parametrize(
    ("asked", "expected"), [("", "SIGINT"), ("SIGTERM", "SIGTERM"), ("usr1", "SIGUSR1"), ("3", "SIGQUIT")]
)
async def test_stop_signal(image: Image, tmp_path: Path, asked: str, expected: str) -> None:
    """Where a backend stops a program to save its files."""
    tools = _Process()
    cls = sandbox_class(image, TemplateSpec(image="x", stop_signal=asked))
    async with started(tools, cls) as (backend, running, _):
        await backend.checkpoint(running.sid, tmp_path)
        again = await backend.restore(cls, identity("other"), tmp_path, "x")
        session = await backend.exec(again.sid, ExecSpec(argv=("python3", "-c", _READ)))
        status, out, err = await tools.run(session)
        assert (status, out.decode().strip()) == (0, expected), err.decode()
