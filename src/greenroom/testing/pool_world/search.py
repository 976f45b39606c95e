"""Scripts from seeds, to look further than a test suite has time for, and how the algorithms compare.

python -m greenroom.testing.pool_world --seeds 1000 [--from 0]
python -m greenroom.testing.pool_world --table --seeds 100
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

from greenroom.testing.fake_kube.adversary import CALM, Odds
from greenroom.testing.pool_world.losers import ALGORITHMS
from greenroom.testing.pool_world.world import Act, Plan, run

ROUGH = Odds(lost=0.03, reply_lost=0.05, late=0.05, twice=0.03, refused=0.03, failed=0.03)
ODDS = (
    *(ROUGH,) * 3,
    CALM,
    Odds(late=0.3),
    Odds(reply_lost=0.3),
    Odds(lost=0.3),
    Odds(late=0.15, reply_lost=0.15, twice=0.1),
)
#: What may happen to a pool, and below which number (see `world.World`).
ACTS = {
    "crash": 3,
    "pause": 3,
    "freeze": 60,
    "compact": 1,
    "scale": 7,
    "suspend": 2,
    "victim": 5,
    "fail": 5,
    "evict": 5,
    "lose": 5,
    "unlabel": 5,
    "relabel": 5,
    "disown": 5,
    "foreign": 3,
    "limit": 6,
    "storm": 60,
    "wipe": 1,
    "edit": 1,
}
#: The same of a pool beside a control plane, by whose demand it is sized.
SIZED = {what: most for what, most in ACTS.items() if what not in ("scale", "victim")} | {"demand": 30}
#: Labels of a pod are not edited when its pool is forced away: then nothing says any more whose it is.
FORCED = {"recreate": 1} | {what: most for what, most in ACTS.items() if what not in ("unlabel", "relabel", "disown")}
MOST_ACTS = 25

#: What a controller of pods meets, from the harmless to what breaks most.
SITUATIONS = {
    "lag": Plan(lag_s=4.0, script=(Act(60, "fail"), Act(120, "evict"), Act(200, "fail", 1))),
    # What it made after a death is not seen for longer than anybody remembers it.
    "long lag and deaths": Plan(
        lag_s=1.0, script=(Act(39, "blind", 90), Act(40, "fail"), Act(159, "blind", 90), Act(160, "fail", 1))
    ),
    "restart": Plan(
        lag_s=5.0,
        script=(
            Act(19, "blind", 60),
            Act(20, "fail"),
            Act(35, "crash"),
            Act(100, "blind", 60),
            Act(101, "evict"),
            Act(120, "crash"),
        ),
    ),
    "unknown outcomes": Plan(
        lag_s=2.0, odds=Odds(reply_lost=0.2, late=0.2), script=(Act(60, "fail"), Act(90, "evict", 1))
    ),
    # The second takes over from a view that does not show what the first has made.
    "two leaders": Plan(
        lag_s=4.0,
        operators=2,
        script=(Act(19, "blind", 250), Act(20, "fail"), Act(35, "pause"), Act(60, "pause", 1)),
    ),
}


def plan_of(seed: int) -> Plan:
    """What happens to a pool with this seed: anything, at any time."""
    chance = random.Random(f"plan {seed}")
    acts = FORCED if chance.random() < 0.1 else ACTS
    sized = seed % 4 == 3
    if sized:
        acts = SIZED
    script = []
    for _ in range(chance.randint(0, MOST_ACTS)):
        what = chance.choice(sorted(acts))
        script.append(Act(chance.uniform(1, 280), what, chance.randrange(acts[what])))
    return Plan(
        seed=seed,
        script=tuple(script),
        odds=chance.choice(ODDS),
        lag_s=chance.choice([0.0, 1.0, 5.0, 40.0, 100.0]),
        operators=chance.choice([1, 2, 3]),
        plane=sized,
        plane_trouble=chance.choice([0.0, 0.1, 0.5]) if sized else 0.0,
    )


def search(first: int, count: int) -> Iterator[tuple[int, AssertionError]]:
    """Seeds that show something wrong, and what."""
    for seed in range(first, first + count):
        try:
            run(plan_of(seed))
        except AssertionError as error:
            yield seed, error


def broken(situation: str, algorithm: str, seeds: int) -> tuple[int, int]:
    """In how many of so many runs of a situation there were too many pods at some time, and in how many a healthy pod
    was deleted though there were not too many."""
    most = unjust = 0
    for seed in range(seeds):
        shift = random.Random(f"shift {seed}").uniform(0, 5)
        plan = SITUATIONS[situation]
        script = tuple(act._replace(at=act.at + shift) for act in plan.script)
        report = run(replace(plan, seed=seed, script=script, algorithm=algorithm))
        most += report.overshoot[0] > 0
        unjust += report.overshoot[1] > 0
    return most, unjust


def table(seeds: int) -> Iterator[str]:
    """Lines of: percent of runs with too many pods / with a healthy one deleted."""
    yield "| algorithm | " + " | ".join(SITUATIONS) + " |"
    yield "|---" * (len(SITUATIONS) + 1) + "|"
    for algorithm in (*ALGORITHMS, "ledger"):
        cells = []
        for situation in SITUATIONS:
            most, unjust = broken(situation, algorithm, seeds)
            cells.append(f"{100 * most / seeds:g}/{100 * unjust / seeds:g}")
        yield f"| {algorithm} | " + " | ".join(cells) + " |"
