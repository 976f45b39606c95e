"""What can go wrong, and when it does: drawn from the seed, or one chosen fault at one chosen step."""

from __future__ import annotations

import enum
import random
from collections import Counter
from dataclasses import dataclass


class Fault(enum.Enum):
    """The first group happens at single steps (one message of a replica to store, workers or snapshots, and its
    answer), the second to parts of the world."""

    LOST = "lost"  # it does not arrive; whoever asked is told so, later
    REPLY_LOST = "reply-lost"  # it is carried out, but whoever asked is told that nobody answers
    LATE = "late"  # whoever asked has given up when it is carried out
    TWICE = "twice"  # it is carried out again a while later
    SLOW = "slow"  # it takes seconds; what is sent later arrives earlier
    CRASH_BEFORE = "crash-before"  # the replica dies before it is sent
    CRASH_AFTER = "crash-after"  # the replica dies when it has been carried out
    AGENT_BEFORE = "agent-before"  # the agent dies before it gets a call
    AGENT_AFTER = "agent-after"  # the agent dies when it has carried it out

    REPLICA_CRASH = "replica-crash"
    REPLICA_DOUBLE = "replica-double"  # it stands still, another one of its name is started, and both go on
    REPLICA_STOP = "replica-stop"  # it ends as it should, and is started again
    REPLICA_PAUSE = "replica-pause"  # the process stops for longer than a lease, and goes on
    CLOCK_JUMP = "clock-jump"  # a replica's clock, back or forth
    AGENT_CRASH = "agent-crash"  # its sandboxes live on, for the next agent process to find
    AGENT_LEAVES = "agent-leaves"  # it is asked to end, and waits until its actors are suspended
    AGENT_PAUSE = "agent-pause"  # the agent stops; its sandboxes run on
    MACHINE_CRASH = "machine-crash"  # with everything that ran there
    MACHINE_PAUSE = "machine-pause"  # everything there stops, and goes on
    LINK_CUT = "link-cut"  # a connection of an agent breaks and is made anew
    PARTITION = "partition"  # one replica and one worker
    ISOLATION = "isolation"  # one worker and all replicas
    STORE_CUT = "store-cut"  # one replica and the store
    STORE_OUTAGE = "store-outage"  # all replicas and the store
    SNAPSHOTS_OUTAGE = "snapshots-outage"
    FEED_LAG = "feed-lag"  # a replica hears of others' writes seconds later
    FEED_CUT = "feed-cut"  # a replica's change feed has a gap and says so
    SANDBOX_EXIT = "sandbox-exit"  # an actor's program ends by itself
    HANG = "hang"  # a sandbox backend takes tens of seconds
    DISK_FULL = "disk-full"  # a worker can't write snapshots for a while
    DISK_LOST = "disk-lost"  # a machine comes back with nothing on its disk
    CORRUPTION = "corruption"  # a stored snapshot is not what was written


#: At a message to the store or to the snapshot store.
AT_ASK = (Fault.LOST, Fault.REPLY_LOST, Fault.LATE, Fault.TWICE, Fault.SLOW, Fault.CRASH_BEFORE, Fault.CRASH_AFTER)
#: At a call to a worker.
AT_CALL = (*AT_ASK, Fault.AGENT_BEFORE, Fault.AGENT_AFTER)
#: To parts of the world.
OF_PARTS = tuple(fault for fault in Fault if fault not in AT_CALL and fault is not Fault.HANG)

#: Weight of a step that changes something.
HEAVY = 5.0

_DEADLY = frozenset({Fault.CRASH_BEFORE, Fault.CRASH_AFTER, Fault.AGENT_BEFORE, Fault.AGENT_AFTER})


@dataclass(frozen=True, slots=True)
class Chosen:
    """Systematic mode: step number ``step`` of the replicas goes wrong in one way, and nothing else does."""

    step: int
    fault: Fault


class Injector:
    """Asked at every step of a replica whether it goes wrong.

    Most steps are looks at the same few records again and again. Those that change something are more likely to go
    wrong (`HEAVY`).

    Args:
        rate: share of steps that do, while there is `trouble`.
        deadly: share of those at which somebody dies.
    """

    def __init__(
        self, seed: int | str, *, rate: float = 0.0, deadly: float = 0.1, without: frozenset[Fault] = frozenset()
    ) -> None:
        self._random = random.Random(f"faults {seed}")
        self._rate = rate
        self._deadly = deadly
        self.without = without
        self._chosen: Chosen | None = None
        #: Whether faults are drawn now.
        self.trouble = False
        self.steps = 0
        self.hits: Counter[Fault] = Counter()

    def choose(self, chosen: Chosen) -> None:
        """From now on steps are counted, from 1, and that one goes wrong."""
        self._chosen, self.steps = chosen, 0

    def at(self, possible: tuple[Fault, ...], weight: float = 1.0) -> Fault | None:
        """The fault of the step that is being taken. ``weight``: how likely it is compared with others."""
        if self._chosen is not None:
            self.steps += 1
            if self.steps == self._chosen.step and self._chosen.fault in possible:
                return self._hit(self._chosen.fault)
            return None
        if not self.trouble or self._random.random() >= self._rate * weight:
            return None
        dies = self._random.random() < self._deadly
        among = [f for f in possible if (f in _DEADLY) is dies and f not in self.without]
        return self._hit(self._random.choice(among)) if among else None

    def _hit(self, fault: Fault) -> Fault:
        self.hits[fault] += 1
        return fault
