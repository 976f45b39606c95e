"""Of the contract of stores: what those who share one know of each other, and the clock that they share."""

from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

from greenroom.core.errors import AlreadyExists, Conflict, NotFound
from greenroom.core.marks import Mark
from greenroom.core.records import Replica
from greenroom.core.rosters import Roster, RosterEntry
from greenroom.store.port import EventType, Store

#: How far a store's clock may be from this machine's: both count seconds since the epoch, on machines whose clocks are
#: set by the same people.
CLOSE_S = 5.0


class Shared:
    """Replicas of the control plane, rosters, and their clock."""

    # replicas

    async def test_a_replica_says_that_it_lives(self, store: Store) -> None:
        one = await store.put(Replica(name="r1", incarnation="i1", link="10.0.0.1:7000", started_at=1.0, seen_at=2.0))
        assert one.version == 1 and await store.get(Replica, "r1") == one
        two = await store.put(replace(one, seen_at=5.0, uses={"uid-1": 4.5, "uid-2": 4.0}))
        assert two.version == 2 and (await store.get(Replica, "r1")).uses == {"uid-1": 4.5, "uid-2": 4.0}
        with pytest.raises(Conflict) as stale:
            await store.put(replace(one, seen_at=9.0))
        assert stale.value.reason == "VERSION_CONFLICT"
        assert await store.get(Replica, "r1") == two

    async def test_a_replica_that_starts_again_is_told_from_the_one_before(self, store: Store) -> None:
        old = await store.put(Replica(name="r1", incarnation="i1", seen_at=2.0, uses={"uid-1": 2.0}))
        with pytest.raises(AlreadyExists):  # it reads first, and sees that it was here before
            await store.put(Replica(name="r1", incarnation="i2"))
        new = await store.put(replace(old, incarnation="i2", uses={}))
        with pytest.raises(Conflict):  # the one before learns that it was replaced
            await store.put(replace(old, seen_at=3.0))
        assert await store.get(Replica, "r1") == new

    async def test_replicas_are_listed_and_removed(self, store: Store) -> None:
        made = [await store.put(Replica(name=f"r{i}", incarnation="i", link=f"10.0.0.{i}:7000")) for i in (3, 1, 2)]
        assert [r.name for r in await store.list(Replica)] == ["r1", "r2", "r3"]
        assert [r.name for r in await store.list(Replica, namespace="ns", after="r1", limit=1)] == ["r2"]
        seen = await store.put(replace(made[1], seen_at=9.0))
        with pytest.raises(Conflict):  # it lives: who took it for gone must look again
            await store.remove(made[1])
        await store.remove(seen)
        await store.remove(seen)
        with pytest.raises(NotFound) as gone:
            await store.get(Replica, "r1")
        assert gone.value.reason == "REPLICA_NOT_FOUND"
        assert [r.name for r in await store.list(Replica)] == ["r2", "r3"]

    async def test_replicas_are_watched(self, store: Store) -> None:
        watch = store.watch()
        one = await store.put(Replica(name="r1", incarnation="i1"))
        two = await store.put(replace(one, seen_at=5.0))
        await store.remove(two)
        seen = [await anext(watch) for _ in range(3)]
        assert [(e.type, e.record) for e in seen] == [
            (EventType.PUT, one),
            (EventType.PUT, two),
            (EventType.DELETED, two),
        ]

    # rosters

    async def test_a_roster_is_replaced_as_a_whole(self, store: Store) -> None:
        with pytest.raises(NotFound) as none:
            await store.get(Roster, "p")
        assert none.value.reason == "ROSTER_NOT_FOUND"
        one = await store.put(Roster(pool="p", pool_uid="u", workers=(RosterEntry(name="p-1-0", ordinal=0, epoch=1),)))
        with pytest.raises(AlreadyExists):
            await store.put(Roster(pool="p", pool_uid="u"))
        two = await store.put(replace(one, epoch=2, ledger_version=9, workers=()))
        assert two.version == 2 and await store.get(Roster, "p") == two
        with pytest.raises(Conflict):  # whoever replaces it from what it was before looks again
            await store.put(replace(one, epoch=3))
        assert await store.list(Roster) == [two]

    async def test_rosters_are_watched(self, store: Store) -> None:
        watch = store.watch()
        one = await store.put(Roster(pool="p", pool_uid="u", pool_namespace="ns", former_uids=("t",)))
        await store.remove(one)
        seen = [await anext(watch) for _ in range(2)]
        assert [(e.type, e.record) for e in seen] == [(EventType.PUT, one), (EventType.DELETED, one)]
        assert await store.list(Roster) == []

    # marks

    async def test_who_is_first_gives_the_mark(self, store: Store) -> None:
        one = await store.put(Mark(name="snapshots", value="a"))
        with pytest.raises(AlreadyExists):
            await store.put(Mark(name="snapshots", value="b"))
        two = await store.put(replace(one, placed=True))
        assert await store.get(Mark, "snapshots") == two and await store.list(Mark) == [two]

    # the clock

    async def test_the_clock_tells_the_time_and_never_goes_back(self, store: Store) -> None:
        before = time.time()
        times = [store.clock() for _ in range(1000)]
        times.append(store.clock())
        assert times == sorted(times)
        assert before - CLOSE_S < times[0] and times[-1] < time.time() + CLOSE_S

    @pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
    async def test_setting_the_machines_clock_moves_nobody(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, jump_s: float
    ) -> None:
        before, real = store.clock(), time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        await store.put(Replica(name="r1", incarnation="i1"))
        after = store.clock()
        assert 0 <= after - before < CLOSE_S, "no lease ends or lasts longer by it"
