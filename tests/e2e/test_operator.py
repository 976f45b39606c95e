"""Whoever looks after a Greenroom, at a real server with two workers: where actors may wake, emptying a worker, and
what `explain` makes of it. No sandbox is needed for that."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import Kit
from shell import Shell, template

from greenroom.testing.live import LiveServer


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    options = ("--label=zone=a", "--name=gr-1", "--lease-ttl=5s", "--operation-deadline=resume=60")
    kit = Kit(LiveServer(directory, backend="sim", workers=2, slots=2, options=options), "none")
    kit.live.start()
    try:
        shell = Shell(directory)
        more = "workerSelector: {zone: a}, durability: acked-after-upload, evictable: false, onCrash: boot"
        shell("apply", "-f", "-", stdin=template("counter", "none", more)).ok()
        yield shell
    finally:
        kit.live.stop()
        shutil.rmtree(directory)


def explain(shell: Shell, name: str) -> dict[str, Any]:
    told = json.loads(shell("explain", name, "-o", "json").ok())
    assert isinstance(told, dict)
    return told


def test_an_actor_that_asks_for_a_label_that_no_worker_has(shell: Shell) -> None:
    shell("create", "actor", "picky", "-t", "counter", "--worker-selector", "gpu=yes").ok()
    shell("resume", "picky").failed(4, "has no label gpu=yes")
    told = explain(shell, "picky")
    assert told["noWorkerFits"] and "wakesOn" not in told
    assert {r["why"] for r in told["rejected"]} == {"has no label gpu=yes"}
    assert told["actor"]["workerSelector"] == {"gpu": "yes"}
    shell("delete", "actor", "picky").ok()


def test_emptying_a_worker(shell: Shell) -> None:
    shell("create", "actor", "mine", "-t", "counter").ok()
    shell("resume", "mine").ok()
    before = explain(shell, "mine")
    worker = before["actor"]["worker"]
    assert before["operations"][-1]["owner"].startswith("gr-1/"), "the replica that decided"

    assert f"worker/{worker} is empty" in shell("drain", "worker", worker, "--wait").ok()
    after = explain(shell, "mine")
    assert after["actor"]["state"] == "Suspended" and after["operations"][-1]["cause"] == "drain"
    assert {"worker": worker, "why": "is Draining"} in after["rejected"]
    assert len(after["wakesOn"]) == 1 and after["actor"]["durableAt"] and after["snapshot"]["state"] == "Present"
    shell("resume", "mine").ok()
    assert explain(shell, "mine")["actor"]["worker"] == after["wakesOn"][0], "where it said that it would wake"

    shell("drain", "worker", worker, "--undo").ok()
    assert all(line.split()[2] == "Active" for line in shell("get", "workers").ok().splitlines()[1:])


def test_what_has_ended_can_not_be_cancelled(shell: Shell) -> None:
    *_, last = shell("get", "operations", "-o", "name").ok().splitlines()
    shell("cancel", last).failed(4, "had ended already: Done")
