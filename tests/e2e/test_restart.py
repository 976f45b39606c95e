"""``kill -9`` of everything, and up again: nothing acknowledged is lost, nothing is silently reset."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from kit import Kit, until

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]

SLEEPING = [f"s{n}" for n in range(8)]
RUNNING = ["r0", "r1"]


def eight_asleep_two_awake(kit: Kit) -> None:
    assert kit.apply().state == "Ready"
    kit.create(*SLEEPING, *RUNNING)
    for name in SLEEPING:
        kit.get(name)
        kit.act("Suspend", name)
    for name in RUNNING:
        kit.get(name)
        kit.get(name)


def settles(kit: Kit, state: str) -> None:
    """Returns when the workers are back, and the two are in that state: until a worker has been asked what lives on it,
    its actors are what they were."""
    until(lambda: kit.workers(), lambda ws: len(ws) == 2 and all(w.state == "Active" for w in ws))
    until(
        lambda: {str(kit.actor(name).state) for name in RUNNING},
        lambda states: states == {state},
    )


@pytest.mark.timeout(240)
def test_running_actors_go_on_when_their_sandboxes_survive(serve: Callable[..., Kit]) -> None:
    kit = serve()
    eight_asleep_two_awake(kit)
    kit.live.kill()
    kit.live.start()
    settles(kit, "Running")
    for name in RUNNING:
        assert until(lambda name=name: kit.live.request(f"default/{name}").status, lambda s: s == 200)
        assert kit.get(name)["ram"] == 4, "the very process that ran before"
    for name in SLEEPING:
        assert kit.get(name)["ram"] == 2
    no_slot_leaked(kit)


@pytest.mark.timeout(240)
def test_running_actors_are_reported_crashed_when_their_sandboxes_die_too(serve: Callable[..., Kit]) -> None:
    kit = serve()
    eight_asleep_two_awake(kit)
    kit.live.kill(sandboxes=True)
    kit.live.start()
    settles(kit, "Crashed")
    for name in RUNNING:
        assert kit.actor(name).unsaved_since is not None
        assert kit.live.request(f"default/{name}").status == 503, "held, not silently reset"
    for name in SLEEPING:
        assert kit.get(name)["ram"] == 2
    no_slot_leaked(kit)


@pytest.mark.timeout(240)
def test_an_agent_that_dies_interrupts_nobody(serve: Callable[..., Kit]) -> None:
    kit = serve(workers=1)
    assert kit.apply().state == "Ready"
    kit.create("a")
    kit.get("a")
    agent = kit.live.pids()[1]
    os.kill(agent, signal.SIGKILL)
    assert kit.get("a")["ram"] == 2, "requests do not pass through the agent"
    until(lambda: kit.live.pids(), lambda pids: len(pids) == 2 and pids[1] != agent)
    until(lambda: kit.workers()[0].state, lambda state: state == "Active")
    assert kit.get("a")["ram"] == 3
    kit.act("Suspend", "a")
    assert kit.get("a")["ram"] == 4


def no_slot_leaked(kit: Kit) -> None:
    bound = sum(a.state in ("Running", "Paused") for a in kit.actors())
    assert until(lambda: sum(w.used for w in kit.workers()), lambda used: used == bound, 20) == bound
    for actor in kit.actors():
        kit.act("Delete", actor.name)
    assert [w.used for w in kit.workers()] == [0, 0]
