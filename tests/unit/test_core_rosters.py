"""Which roster replaces which, and whom it admits."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition
from greenroom.core.rosters import MAX_FORMER, Berth, Roster, RosterEntry, admits, replaced

ENTRY = RosterEntry(name="p-1-4", ordinal=4, epoch=1, pod_uid="pod-4")
KNOWN = Roster(
    pool="p",
    pool_uid="u1",
    pool_namespace="ns",
    epoch=2,
    ledger_version=10,
    workers=(ENTRY, RosterEntry(name="p-2-0", ordinal=0, epoch=2)),
    version=3,
)
BERTH = Berth(pool_uid="u1", epoch=1, ordinal=4, pod_uid="pod-4")


def test_the_pod_of_the_slot_is_admitted() -> None:
    assert admits(KNOWN, "p-1-4", BERTH)


@pytest.mark.parametrize(
    ("worker", "berth"),
    [
        ("p-1-5", BERTH),  # not there
        ("p-1-4", Berth()),  # says nothing
        ("p-1-4", replace(BERTH, pod_uid="another")),
        ("p-1-4", replace(BERTH, ordinal=5)),
        ("p-1-4", replace(BERTH, epoch=2)),
        ("p-1-4", replace(BERTH, pool_uid="u0")),  # a pool of that name before
        ("p-2-0", replace(BERTH, epoch=2, ordinal=0, pod_uid="")),
    ],
)
def test_nobody_else_is(worker: str, berth: Berth) -> None:
    assert not admits(KNOWN, worker, berth)


def test_a_slot_whose_pod_nobody_has_seen_takes_the_one_of_its_name() -> None:
    assert admits(KNOWN, "p-2-0", Berth(pool_uid="u1", epoch=2, ordinal=0, pod_uid="new"))


def test_the_same_again_changes_nothing() -> None:
    assert replaced(KNOWN, replace(KNOWN, version=0)) is KNOWN


@pytest.mark.parametrize(("epoch", "version"), [(1, 99), (2, 9)])
def test_an_older_one_is_refused(epoch: int, version: int) -> None:
    with pytest.raises(Conflict, match="read the pool's ledger again") as stale:
        replaced(KNOWN, replace(KNOWN, epoch=epoch, ledger_version=version, workers=()))
    assert stale.value.reason == "STALE_ROSTER"


@pytest.mark.parametrize(("epoch", "version"), [(2, 11), (3, 0)])
def test_a_newer_one_replaces_it(epoch: int, version: int) -> None:
    new = replaced(KNOWN, replace(KNOWN, epoch=epoch, ledger_version=version, workers=(), version=0))
    assert (new.workers, new.version, new.epoch) == ((), 3, epoch)


def test_a_pool_that_is_made_anew_begins_at_the_beginning_and_the_old_one_is_heard_no_more() -> None:
    new = replaced(KNOWN, Roster(pool="p", pool_uid="u2", pool_namespace="ns", epoch=1))
    assert new.former_uids == ("u1",) and new.version == 3
    with pytest.raises(Conflict) as stale:
        replaced(new, replace(KNOWN, epoch=9))
    assert stale.value.reason == "FORMER_POOL"


def test_namesakes_in_two_namespaces_do_not_take_each_others_workers() -> None:
    other = Roster(pool="p", pool_uid="u2", pool_namespace="other")
    with pytest.raises(FailedPrecondition, match="call the one in 'other' otherwise") as taken:
        replaced(KNOWN, other)
    assert taken.value.reason == "POOL_NAME_TAKEN"
    theirs = replaced(replace(KNOWN, workers=()), other)
    assert theirs.pool_namespace == "other"
    assert replaced(theirs, replace(KNOWN, version=0)).workers == KNOWN.workers, "and back, while that one has none"


def test_only_so_many_former_pools_are_remembered() -> None:
    roster = KNOWN
    for n in range(2 * MAX_FORMER):
        roster = replaced(roster, Roster(pool="p", pool_uid=f"v{n}", pool_namespace="ns"))
    assert len(roster.former_uids) == MAX_FORMER and roster.former_uids[-1] == f"v{2 * MAX_FORMER - 2}"
