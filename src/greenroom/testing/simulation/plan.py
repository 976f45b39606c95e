"""How large a simulated world is and what may go wrong in it. A seed draws its own: different seeds look for different
things, and a seed with few kinds of faults gets further with each of them than one with all."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from greenroom.core.records import Durability, OnCrash, Retention
from greenroom.engine.config import EngineConfig
from greenroom.testing.simloop import Pace
from greenroom.testing.simulation.faults import OF_PARTS, Fault

#: Clocks that keep the proportions of the real ones (`EngineConfig`), a fifth as long, so that a minute holds many of
#: them.
CLOCKS = EngineConfig(
    owner="",
    lease_ttl_s=6.0,
    operation_deadline_s=25.0,
    prepare_deadline_s=60.0,
    worker_return_s=8.0,
    worker_gone_s=15.0,
    stall_s=12.0,
    drain_grace_s=0.5,
    capacity_wait_s=12.0,
    idle_scan_s=1.0,
    janitor_s=2.0,
    reconcile_s=6.0,
    mark_s=9.0,
    scrub_s=7.0,
    retry_s=0.2,
    store_away_s=5.0,
)


PACE = Pace()

USUAL = Retention()


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    actors: each is used by one or two people.
    acts: how often each of them does something, within ``trouble_s`` seconds.
    step_rate: share of messages of replicas that go wrong.
    parts: how often some part of the world fails.
    kinds: the faults of parts that are drawn from.
    without: faults of messages that never happen.
    hold: suspends keep the snapshot on the worker first.
    """

    replicas: int = 2
    machines: int = 2
    slots: int = 2
    actors: int = 4
    acts: int = 8
    trouble_s: float = 40.0
    step_rate: float = 0.0
    parts: int = 0
    kinds: tuple[Fault, ...] = ()
    without: frozenset[Fault] = frozenset()
    pace: Pace = PACE
    durability: Durability = Durability.ACKED_AFTER_UPLOAD
    retention: Retention = USUAL
    on_crash: OnCrash = OnCrash.RESTORE_LAST
    idle_timeout_s: float = 15.0
    clocks: EngineConfig = field(default=CLOCKS)

    @staticmethod
    def draw(seed: int) -> Plan:
        draw = random.Random(f"plan {seed}")
        kinds = tuple(f for f in OF_PARTS if draw.random() < 0.4)
        return Plan(
            replicas=draw.choice((2, 2, 2, 3)),
            machines=draw.choice((2, 2, 3)),
            slots=draw.choice((1, 2, 2, 3)),
            actors=draw.choice((3, 4, 5)),
            acts=draw.choice((5, 8)),
            step_rate=draw.choice((0.0, 0.003, 0.01, 0.03)),
            parts=draw.choice((0, 2, 4, 8)) if kinds else 0,
            kinds=kinds,
            on_crash=draw.choice((OnCrash.RESTORE_LAST, OnCrash.RESTORE_LAST, OnCrash.HOLD, OnCrash.BOOT)),
            durability=draw.choice(tuple(Durability)),
            idle_timeout_s=draw.choice((0.0, 3.0, 15.0)),
            retention=draw.choice((USUAL, USUAL, Retention(keep_last=3), Retention(keep_for_s=8.0))),
        )
