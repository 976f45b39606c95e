"""Bindings; every test has a loop, whose clock they are dated by."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from greenroom.core.records import Endpoint, Key
from greenroom.engine.bindings import Binding, BindingTable

KEY = Key("ns", "a")


def binding(generation: int = 1, **fields: Any) -> Binding:
    made: dict[str, Any] = {"key": KEY, "uid": "u", "worker": "w", "endpoint": Endpoint(path="/s")}
    return Binding(generation=generation, idle_timeout_s=0.0, **made | fields)


async def test_revoking_closes_what_is_open_once() -> None:
    table, closed = BindingTable(), []
    table.bind(one := binding())
    one.on_revoke(lambda: closed.append("a"))
    gone = lambda: closed.append("b")  # noqa: E731
    one.on_revoke(gone)
    one.forget(gone)
    table.revoke(KEY)
    table.revoke(KEY)
    assert closed == ["a"] and one.revoked and table.get(KEY) is None
    with pytest.raises(AssertionError):
        one.acquire()


async def test_a_newer_incarnation_replaces_and_revokes_and_the_same_one_changes_nothing() -> None:
    table = BindingTable()
    table.bind(one := binding(1))
    table.bind(binding(1))
    assert table.get(KEY) is one and not one.revoked
    table.bind(two := binding(2))
    assert table.get(KEY) is two and one.revoked
    table.bind(binding(1))
    assert table.get(KEY) is two and not two.revoked, "one that comes late changes nothing"
    table.bind(other := binding(1, uid="somebody else"))
    assert table.get(KEY) is other and two.revoked


async def test_draining_hides_it_until_it_ends() -> None:
    table = BindingTable()
    await table.drained(KEY)  # nothing to wait for
    assert table.drain(KEY) is None, "without a binding there is nothing to drain"
    table.bind(one := binding())
    assert table.drain(KEY) is one and table.get(KEY) is None and table.peek(KEY) is one
    assert table.longest_idle() == []
    waiting = [asyncio.ensure_future(table.drained(KEY)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(w.done() for w in waiting)
    table.undrain(KEY)
    await asyncio.gather(*waiting)
    assert table.get(KEY) is one
    table.drain(KEY)
    waiter = asyncio.ensure_future(table.drained(KEY))
    await asyncio.sleep(0)
    table.revoke(KEY)
    await waiter
    table.bind(two := binding(2))
    assert table.get(KEY) is two, "what was drained before does not hide the next one"


async def test_idle_means_no_open_request() -> None:
    idle: list[str] = []
    table = BindingTable()
    table.bind(one := binding(on_idle=lambda: idle.append("one")))
    assert await one.wait_idle(10)
    one.acquire()
    one.acquire()
    assert table.longest_idle() == [] and not await one.wait_idle(0.001)
    waiter = asyncio.ensure_future(one.wait_idle(10))
    one.release()
    await asyncio.sleep(0)
    assert not waiter.done() and not idle
    one.release()
    assert await waiter and idle == ["one"] and table.longest_idle() == [one]


async def test_the_longest_idle_first_and_only_on_the_workers_asked_for() -> None:
    table = BindingTable()
    made = [binding(key=Key("ns", f"a{n}"), worker=f"w{n % 2}", last_used=100.0 - n) for n in range(4)]
    for each in made:
        table.bind(each)
    assert [b.key.name for b in table.longest_idle()] == ["a3", "a2", "a1", "a0"]
    assert [b.key.name for b in table.longest_idle(["w0"])] == ["a2", "a0"]
    assert len(table.all()) == 4


async def test_a_release_after_the_revocation_tells_nobody() -> None:
    idle: list[str] = []
    table = BindingTable()
    table.bind(one := binding(on_idle=lambda: idle.append("one")))
    one.acquire()
    table.revoke(KEY)
    one.release()
    assert not idle
