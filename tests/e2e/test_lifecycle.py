"""The main job: actors that sleep and wake and lose nothing, on real sandboxes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import Kit, until

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]


@pytest.fixture
def kit(serve: Callable[..., Kit]) -> Kit:
    kit = serve()
    template = kit.apply()
    assert template.state == "Ready", template
    return kit


def test_fifty_generations_keep_every_write(kit: Kit) -> None:
    kit.create("a")
    for generation in range(1, 51):
        answer = kit.get("a")
        assert (answer["ram"], answer["file"]) == (generation, generation)
        kit.act("Suspend", "a")
    assert kit.actor("a").wakes == 50
    assert kit.get("a", "/info")["ram"] == 50


def test_a_hundred_requests_to_one_sleeping_actor_are_one_wake(kit: Kit) -> None:
    kit.create("a")
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: kit.get("a"), range(100)))
    assert sorted(a["ram"] for a in answers) == list(range(1, 101))
    assert kit.actor("a").wakes == 1


def test_actors_of_one_golden_snapshot_differ(kit: Kit) -> None:
    kit.create("a", "b")
    a, b = kit.get("a"), kit.get("b")
    assert a["boot"] == b["boot"], "both come from the same frozen process"
    assert (a["hostname"], b["hostname"]) == ("a", "b")
    assert (a["actor"], b["actor"]) == ("a", "b")
    assert a["uuid"] != b["uuid"], "drawn right after the wake"
    assert kit.actor("a").uid != kit.actor("b").uid


@pytest.mark.timeout(300)
def test_twenty_actors_share_eight_slots_under_random_requests(kit: Kit) -> None:
    """For a minute, every answer comes from the right actor with the right count; room is made as it is needed."""
    names = [f"a{n}" for n in range(20)]
    kit.create(*names)
    counts: Counter[str] = Counter()
    locks = {name: threading.Lock() for name in names}
    until_time = time.monotonic() + 60
    wakes = 0

    def play(seed: int) -> None:
        nonlocal wakes
        draw = random.Random(seed)
        while time.monotonic() < until_time:
            name = draw.choice(names)
            with locks[name]:
                answer = kit.live.request(f"default/{name}")
                assert answer.status == 200, answer.body
                counts[name] += 1
                wakes += bool(answer.phases)
                said = json.loads(answer.body)
                assert (said["actor"], said["ram"], said["file"]) == (name, counts[name], counts[name])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(play, seed) for seed in range(4)]:
            done.result()
    assert len(counts) == 20
    assert wakes >= 20, "with 20 actors on 8 slots most requests wake somebody"
    assert sum(a.state == "Running" for a in kit.actors()) <= 8
    assert all(w.used <= w.capacity for w in kit.workers())


def test_pause_keeps_the_place_and_wakes_on_request(kit: Kit) -> None:
    kit.create("a")
    kit.get("a")
    kit.act("Pause", "a")
    assert kit.actor("a").state == "Paused"
    assert kit.get("a")["ram"] == 2
    kit.act("Pause", "a")
    kit.act("Suspend", "a")
    assert kit.get("a")["ram"] == 3


def test_an_actor_that_ends_by_itself_is_crashed_and_held(kit: Kit) -> None:
    kit.create("a")
    kit.get("a")
    kit.act("Suspend", "a")
    kit.get("a")
    kit.live.request("default/a", "/exit?code=7")
    actor = until(lambda: kit.actor("a"), lambda a: a.state == "Crashed")
    assert actor.unsaved_since is not None
    assert "status 7" in actor.message
    refused = kit.live.request("default/a")
    assert (refused.status, refused.headers["Greenroom-Error"]) == (503, "ACTOR_CRASHED")
    kit.act("Resume", "a")
    assert kit.get("a")["ram"] == 2, "back at its last snapshot, on purpose"
    assert kit.actor("a").unsaved_since is None


def test_delete_from_every_state(kit: Kit) -> None:
    kit.create("asleep", "running", "paused")
    kit.get("running")
    kit.get("paused")
    kit.act("Pause", "paused")
    for name in ("asleep", "running", "paused"):
        kit.act("Delete", name)
    assert kit.actors() == []
    assert all(w.used == 0 for w in kit.workers())
