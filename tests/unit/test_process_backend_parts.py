"""The parts of the `process` backend that need no sandbox: ports, records, overlay options, program lookup."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from greenroom.core.agentapi import Identity
from greenroom.core.errors import ResourceExhausted
from greenroom.sandbox.port import SandboxClass
from greenroom.sandbox.process import _init
from greenroom.sandbox.process.ports import FIRST, HOST, LAST, Ports
from greenroom.sandbox.process.record import Phase, SandboxRecord, boot_id, read_record, write_record


def test_a_port_is_never_given_to_a_second_actor() -> None:
    ports = Ports("w", 21000, 21009)
    taken = {}
    for i in range(5):
        taken[i] = ports.take(f"uid-{i}")
        ports.give_back(taken[i])
    assert len(set(taken.values())) == 5
    assert ports.take("uid-3") == taken[3], "its own, again"
    assert ports.take("uid-3") not in taken.values(), "but not twice at once"


def test_ports_run_out_with_a_word() -> None:
    ports = Ports("w", 61010, 61012)
    for i in range(3):
        ports.give_back(ports.take(f"uid-{i}"))
    with pytest.raises(ResourceExhausted, match="all its 3 ports") as caught:
        ports.take("uid-9")
    assert caught.value.reason == "PORTS_EXHAUSTED"


def test_a_port_in_use_is_passed_over() -> None:
    ports = Ports("w", 61020, 61023)
    with socket.socket() as taken:
        taken.bind((HOST, 61021))
        taken.listen()
        given = {ports.take(f"uid-{i}") for i in range(3)}
    assert given == {61020, 61022, 61023}


def test_agents_begin_at_different_ports_of_the_range() -> None:
    first = [Ports(name).take("u") for name in ("worker-a", "worker-b")]
    assert first[0] != first[1]
    assert all(FIRST <= port <= LAST for port in first)


def test_record_survives_the_disk(tmp_path: Path) -> None:
    cls = SandboxClass(rootfs=Path("/x"), image_digest="d", argv=("a", "b"), env=(("K", "v"),), uid=7)
    owner = Identity(namespace="n", name="a", uid="u", generation=4)
    record = SandboxRecord(sid="0" * 32, owner=owner, cls=cls, port=20001, boot=boot_id())
    assert not record.complete
    running = msgspec.structs.replace(record.moved(Phase.RUNNING, None), pid=12, started=34)
    assert running.complete
    write_record(tmp_path, running)
    assert read_record(tmp_path) == running
    assert running.moved(Phase.STOPPED, None).pid == 0
    assert running.moved(Phase.STARTING, None).complete, "its files matter for ever"


def test_damaged_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "record.json").write_text('{"sid": 1}')
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(("path", "escaped"), [("/a/b", "/a/b"), ("/a:b,c", "/a\\:b\\,c"), ("/a\\b", "/a\\\\b")])
def test_paths_in_overlay_options(path: str, escaped: str) -> None:
    assert _init.escape(path) == escaped


def test_program_lookup(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tool"
    program.write_text("#!/bin/sh\n")
    env = {"PATH": f"{tmp_path}/none:{tmp_path}/bin"}
    with pytest.raises(_init.Refused, match="no program 'tool' on PATH") as caught:
        _init.find_program("tool", env, "/")
    assert caught.value.reason == "COMMAND_NOT_FOUND"
    program.chmod(0o755)
    assert _init.find_program("tool", env, "/") == str(program)
    assert _init.find_program("bin/tool", {}, str(tmp_path)) == str(program)
    with pytest.raises(_init.Refused):
        _init.find_program("./tool", env, str(tmp_path))
