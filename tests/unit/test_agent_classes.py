"""Image and template become what a sandbox is made for."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import cast

import msgspec
import pytest

from greenroom.agent import classes
from greenroom.agent.classes import sandbox_class
from greenroom.agent.images import WorkerImages
from greenroom.agent.progress import Listener, Reports
from greenroom.core.agentapi import Warm
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import TemplateSpec
from greenroom.core.words import MAX_ARGUMENT_BYTES, MAX_ARGUMENTS
from greenroom.images.config import parse_config, signal_number
from greenroom.images.port import Image, ImageConfig
from greenroom.sandbox.port import SandboxClass


def image(rootfs: Path, **config: object) -> Image:
    parsed = msgspec.convert({"entrypoint": ("/run",), **config}, ImageConfig)
    return Image(reference="x", digest="sha256:" + "0" * 64, rootfs=rootfs, config=parsed, size_bytes=0)


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "command", "args", "argv"),
    [
        (["/e"], ["c"], (), (), ("/e", "c")),
        (["/e"], ["c"], (), ("a",), ("/e", "a")),
        (["/e"], ["c"], ("/x",), (), ("/x",)),
        (["/e"], ["c"], ("/x",), ("a",), ("/x", "a")),
        ([], ["/c", "d"], (), (), ("/c", "d")),
        ([], [], ("/x",), (), ("/x",)),
    ],
)
def test_command(
    tmp_path: Path, entrypoint: list[str], cmd: list[str], command: tuple[str, ...], args: tuple[str, ...], argv: object
) -> None:
    spec = TemplateSpec(image="x", command=command, args=args)
    assert sandbox_class(image(tmp_path, entrypoint=entrypoint, cmd=cmd), spec).argv == argv


def test_nothing_to_run(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"spec\.command") as raised:
        sandbox_class(image(tmp_path, entrypoint=[]), TemplateSpec(image="x"))
    assert raised.value.reason == "COMMAND_NOT_FOUND"


@pytest.mark.parametrize(
    ("exposed", "ports", "port"),
    [
        ((), (0,), 8080),
        ((9000, 9001), (0,), 9000),
        ((9000,), (80, 81), 80),
        ((9000,), (), 0),
    ],
)
def test_ports(tmp_path: Path, exposed: tuple[int, ...], ports: tuple[int, ...], port: int) -> None:
    spec = TemplateSpec(image="x", ports=ports)
    assert sandbox_class(image(tmp_path, exposed_ports=exposed), spec).port == port


def test_stop_signal(tmp_path: Path) -> None:
    def number(of_image: str, of_template: str) -> int:
        spec = TemplateSpec(image="x", stop_signal=of_template)
        return sandbox_class(image(tmp_path, stop_signal=of_image), spec).stop_signal

    assert number("", "") == signal.SIGTERM
    assert number("SIGINT", "") == signal.SIGINT
    assert number("SIGINT", "QUIT") == signal.SIGQUIT
    assert number("no signal", "QUIT") == signal.SIGQUIT  # so there is a way out
    with pytest.raises(FailedPrecondition, match=r"'no signal'.*spec\.stopSignal") as raised:
        number("no signal", "")
    assert raised.value.reason == "IMAGE_INVALID"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN", signal.SIGRTMIN),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMIN+99", None),
        ("SIGTERM+1", None),
        ("", None),
        ("0", None),
        ("65", None),
        ("999999999999", None),
        ("-9", None),
        ("SIG", None),
        ("SIG_DFL", None),
        ("\uff19", None),
    ],
)
def test_signal_number(text: str, number: int | None) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize(
    ("said", "meant"),
    [(None, "/"), ("", "/"), ("srv", "/srv"), ("//srv/./x/", "/srv/x"), ("../../etc", "/etc"), ("/a/../..", "/")],
)
def test_working_directory(said: str | None, meant: str) -> None:
    document = {"config": {"WorkingDir": said}, "rootfs": {"diff_ids": []}}
    assert parse_config("x", msgspec.json.encode(document), 0)[0].workdir == meant


@pytest.mark.parametrize("field", ["Entrypoint", "Cmd", "Env", "WorkingDir", "User"])
def test_a_config_is_held_to_what_a_template_may_say(field: str) -> None:
    def parsed(value: str, times: int) -> ImageConfig:
        said = value if field in ("WorkingDir", "User") else [value] * times
        return parse_config("x", msgspec.json.encode({"config": {field: said}}), 0)[0]

    parsed("PATH=" + ":" * (MAX_ARGUMENT_BYTES - 5), 1)
    with pytest.raises(FailedPrecondition, match=f"more than {MAX_ARGUMENT_BYTES} bytes in its {field}") as raised:
        parsed("PATH=" + ":" * MAX_ARGUMENT_BYTES, 1)
    assert raised.value.reason == "IMAGE_INVALID"
    parsed("A=1", MAX_ARGUMENTS)
    if field not in ("WorkingDir", "User"):
        with pytest.raises(FailedPrecondition, match=f"1001 entries in its {field}; at most {MAX_ARGUMENTS}"):
            parsed("A=1", MAX_ARGUMENTS + 1)


async def test_links_of_an_image_are_followed_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noted(image: Image, spec: TemplateSpec) -> SandboxClass:
        threads.append(threading.current_thread())
        return sandbox_class(image, spec)

    monkeypatch.setattr(classes, "sandbox_class", noted)
    known = classes.Classes(cast("WorkerImages", None), needs_image=False)
    call, reports = Warm(spec=TemplateSpec(image="x"), image_digest="sha256:x"), Reports(cast("Listener", None))
    assert await known.to_warm(call, reports) == await known.to_warm(call, reports)
    assert len(threads) == 1
    assert threads != [threading.main_thread()]


@pytest.mark.parametrize("field", ["Entrypoint", "Cmd", "Env", "WorkingDir", "User"])
def test_nul_in_a_config(field: str) -> None:
    value: object = "a\0b" if field in ("WorkingDir", "User") else ["a\0b"]
    with pytest.raises(FailedPrecondition, match="NUL"):
        parse_config("x", msgspec.json.encode({"config": {field: value}}), 0)
