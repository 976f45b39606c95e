"""The SDK against a real server."""

from __future__ import annotations

import asyncio
import doctest
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_control import ThreadedServer, serving, threaded
from hypothesis import given
from hypothesis import strategies as st

from greenroom import Actor, AsyncActor, CommandFailed
from greenroom.core.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import ActorState, Failure
from greenroom.sdk import aio, blocking, common


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedServer]:
    with threaded(tmp_path) as server:
        monkeypatch.setenv("GREENROOM_SERVER", server.address)
        yield server


@pytest.mark.parametrize("module", [blocking, aio])
def test_the_examples_in_the_docstrings_run(server: ThreadedServer, module: object) -> None:
    Actor.create("counter", "mine").close()
    failed, tried = 0, 0
    for test in sorted(doctest.DocTestFinder().find(module, extraglobs={"Actor": Actor})):
        result = doctest.DocTestRunner().run(test)
        failed, tried = failed + result.failed, tried + result.attempted
    assert failed == 0 and tried >= 3


def test_life(server: ThreadedServer) -> None:
    actor = Actor.create("counter", labels={"a": "b"}, worker_selector={"gpu": "a100"})
    assert actor.name.startswith("counter-") and actor.info().labels == {"a": "b"}
    assert actor.info().worker_selector == {"gpu": "a100"}
    actor.kill()
    actor = Actor.create("counter")
    actor.resume()
    assert actor.info().state is ActorState.RUNNING
    actor.pause()
    assert actor.info().state is ActorState.PAUSED
    actor.suspend()
    assert actor.info().snapshot
    same = Actor.connect(actor.name)
    same.kill()
    with pytest.raises(NotFound):
        actor.info()
    with pytest.raises(NotFound):
        Actor.connect(actor.name)


def test_create_and_get_or_create(server: ThreadedServer) -> None:
    first = Actor.get_or_create("a", "counter")
    assert Actor.get_or_create("a", "counter").info().uid == first.info().uid
    with pytest.raises(AlreadyExists):
        Actor.create("counter", "a")
    with pytest.raises(NotFound, match="does not exist"):
        Actor.create("no-such-template")


def test_commands(server: ThreadedServer) -> None:
    actor = Actor.create("counter")
    assert actor.commands.run("echo $X; cat; pwd >&2", stdin="in", env={"X": "1"}, cwd="/usr") == (
        common.CommandResult(0, "1\nin", "/usr\n")
    )
    data = bytes(range(256)) * 4000
    assert actor.commands.run(["sha256sum"], stdin=data).stdout.endswith("-\n")
    assert actor.commands.run("sleep 60", timeout=0.1).exit_code == 137
    with pytest.raises(CommandFailed, match="exit code 5: bad") as caught:
        actor.commands.run("echo out; echo bad >&2; exit 5", check=True)
    assert caught.value.result == common.CommandResult(5, "out\n", "bad\n")
    assert isinstance(caught.value, GreenroomError)
    with pytest.raises(FailedPrecondition, match="no-such"):
        actor.commands.run(["no-such"], stdin=data)  # the answer, though input was waiting


@pytest.mark.grpc_race
def test_output_is_bounded(server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_OUTPUT_BYTES", 1 << 20)
    actor = Actor.create("counter")
    with pytest.raises(ResourceExhausted) as caught:
        actor.commands.run("yes")
    assert caught.value.reason == "OUTPUT_TOO_LARGE"
    gc.collect()
    server.run(asyncio.wait_for(server.control.kills.wait(), 60))


def test_with_suspends_and_does_not_hide_errors(server: ThreadedServer) -> None:
    with Actor.create("counter", "a") as actor:
        actor.resume()
    assert actor.info().state is ActorState.SUSPENDED

    actor.resume()
    server.control.fail = Failure(code="DATA_LOSS", reason="X", message="disk ate it")
    with pytest.raises(KeyError) as caught, actor:
        raise KeyError("mine")
    assert "disk ate it" in caught.value.__notes__[0]

    server.control.fail = Failure(code="DATA_LOSS", reason="X", message="disk ate it")
    with pytest.raises(DataLoss, match="disk ate it"), actor:
        pass
    with actor:
        actor.kill()


def test_an_error_says_when_to_come_again(server: ThreadedServer) -> None:
    actor = Actor.create("counter")
    for sent in (Unavailable("the store is away", retry_after_s=12.5), ResourceExhausted("full", retry_after_s=3.0)):
        # What an operation failed with, and what was refused before there was one.
        stored = Failure(code=sent.code, reason=sent.reason, message=sent.message, metadata=sent.facts())
        for server.control.fail, server.control.refuse in ((stored, None), (None, sent)):
            with pytest.raises(type(sent), match=sent.message) as caught:
                actor.resume()
            assert isinstance(caught.value, Unavailable | ResourceExhausted)
            assert caught.value.retry_after_s == sent.retry_after_s


def test_url_and_headers(server: ThreadedServer) -> None:
    actor = Actor.create("counter", "a")
    assert actor.url() == "http://a.default.actors.localhost:8880"
    assert actor.url(9000) == "http://9000--a.default.actors.localhost:8880"
    assert actor.request_headers() == {"Greenroom-Actor": "default/a"}
    with pytest.raises(InvalidArgument):
        actor.url(70000)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="greenroom up") as caught:
        Actor.connect("a", server=f"unix:{tmp_path}/none.sock")
    assert caught.value.reason == "SERVER_NOT_RUNNING"


async def test_asyncio(tmp_path: Path) -> None:
    async with serving(tmp_path) as (control, address):
        await control.furnish()
        async with await AsyncActor.create("counter", server=address) as actor:
            many = await asyncio.gather(*(actor.commands.run(f"echo {n}; exit {n}") for n in range(5)))
            assert [(r.exit_code, r.stdout) for r in many] == [(n, f"{n}\n") for n in range(5)]
            assert [line async for line in actor.logs(tail=2)] == ["two\n", "three\n"]
            assert await actor.url() == f"http://{actor.name}.default.actors.localhost:8880"
        assert (await actor.info()).state is ActorState.SUSPENDED

        again = await AsyncActor.get_or_create(actor.name, "counter", server=address)
        async with await AsyncActor.get_or_create("new", "counter", worker_selector={"a": "b"}, server=address) as new:
            assert (await new.info()).worker_selector == {"a": "b"}
        await new.close()
        running = asyncio.create_task(again.commands.run("sleep 60"))
        await control.started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await again.kill()
        with pytest.raises(NotFound):
            await actor.info()
        await again.close()
        await actor.close()


@given(st.lists(st.text(alphabet="ab\u00e9\n", max_size=5)).map("".join), st.lists(st.integers(1, 7)))
def test_lines_are_whole_however_they_come(text: str, sizes: list[int]) -> None:
    lines, found, data = common.Lines(), list[str](), text.encode()
    for size in sizes:
        found += lines.feed(data[:size])
        data = data[size:]
    found += lines.feed(data) + lines.end()
    assert found == text.splitlines(keepends=True)
