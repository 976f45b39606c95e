"""Who goes when a pool whose size somebody else decides gets smaller: those on which nobody is awake."""

from __future__ import annotations

from greenroom.testing.pool_world.plane import SimPlane
from greenroom.testing.pool_world.world import Act, Plan, World, quiet
from greenroom.testing.simloop import SimLoop


class NewestFirst(SimPlane):
    """Its actors are awake on the newest worker, which is the first to go where nobody knows better."""

    def names_on(self, pool: str) -> list[str]:
        return list(reversed(super().names_on(pool)))


class BusyNewest(World):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.plane = NewestFirst(self._random("plane"), self._running, self.clock, self.plan.plane_trouble)
        self.plane.actors = 2


def survivors(plan: Plan) -> list[int]:
    """Ordinals of the workers that are left."""
    loop = SimLoop(plan.seed, pace=plan.pace)
    try:
        with quiet():
            report = loop.run_until_complete(BusyNewest(plan, loop).run())
    finally:
        loop.close()
    return sorted(int(slot_id.partition("-")[2]) for slot_id in report.ledger["slots"])


def test_who_is_idle_goes_before_who_is_not() -> None:
    assert survivors(Plan(seed=1, script=(Act(60, "scale", 1),), plane=True)) == [2]


def test_nobody_is_chosen_while_the_control_plane_can_not_be_asked() -> None:
    for seed in range(5):
        plan = Plan(seed=seed, script=(Act(60, "mute", 0), Act(61, "scale", 1)), plane=True)
        assert survivors(plan) == [2]
