"""The garbage collection keeps its promises in every state of small models; and what the search is worth: each rule is
taken away in turn, and it must find what goes wrong then, as the shortest way to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from greenroom.core.gc import control, worker
from greenroom.core.gc.records import Local, Papers, Register, ResourceState
from greenroom.testing.collection import worker as model
from greenroom.testing.collection.search import Model, Search, Violation
from greenroom.testing.collection.sizes import SMALL
from greenroom.testing.collection.worker import Worker

Patch = pytest.MonkeyPatch
LIMIT = 200_000
CREATING = ResourceState.CREATING


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_broken(name: str) -> None:
    found = Search(SMALL[name], LIMIT).run()
    print(f"{name}: {found}")
    assert found.states > 500


def absence_always_counts(patch: Patch) -> None:
    """Without ``closed_seq`` on the control plane's side."""
    patch.setattr(control, "is_missing", lambda row, report, have: row.state is not CREATING and row.handle not in have)


def creates_come_late(patch: Patch) -> None:
    """Without ``closed_seq`` on the worker's side."""
    patch.setattr(worker, "is_open", lambda papers, create: papers.answered and create.epoch == papers.epoch)


def inventory_without_init(patch: Patch) -> None:
    patch.setattr(worker, "is_listed", lambda entry: entry.state is not Local.INIT)


def inventory_without_dying(patch: Patch) -> None:
    patch.setattr(worker, "is_listed", lambda entry: entry.state is not Local.DYING)


def reports_of_any_epoch(patch: Patch) -> None:
    patch.setattr(control, "is_current", lambda member, report: True)


def closes_what_is_being_made(patch: Patch) -> None:
    patch.setattr(control, "closable", lambda member, rows: member.seq)


def closes_what_may_still_be_given_out(patch: Patch) -> None:
    """With numbers that are shared."""
    closable = control.closable
    patch.setattr(control, "closable", lambda member, rows: closable(replace(member, shared=False), rows))


def nothing_is_abandoned(patch: Patch) -> None:
    patch.setattr(control, "abandon", lambda row: row)


def made_whenever_asked(patch: Patch) -> None:
    admit = worker.admit
    patch.setattr(worker, "admit", lambda papers, entries, executed, create: admit(papers, entries, (), create))


def destroying_may_end(patch: Patch) -> None:
    """The answer to a create makes a row LIVE that was given up."""
    patch.setattr(control, "confirm", lambda row: replace(row, state=ResourceState.LIVE))


def parents_first(patch: Patch) -> None:
    patch.setattr(
        worker,
        "sweep",
        lambda entries, busy: [e for e in entries.values() if e.state is Local.DYING and e.handle not in busy],
    )


def numbers_are_not_compared(patch: Patch) -> None:
    """What is on the worker and not in the database is destroyed, whatever its number."""
    patch.setattr(control, "_went_back", lambda *args: "")


def any_empty_disk_is_welcome(patch: Patch) -> None:
    """Without naming the epoch that it ends; so a registration that comes late ends another."""
    register = control.register

    def welcome(member: Any, rows: Any, said: Register) -> control.Decision:
        return register(member, rows, replace(said, replaces=member.epoch))

    patch.setattr(control, "register", welcome)


def every_process_has_its_own_claim(patch: Patch) -> None:
    """Also when the one before may have registered, and died before it heard of it."""

    def begin(papers: Papers, claim: str) -> Papers:
        return replace(papers, claim=claim, answered=False)

    patch.setattr(worker, "begin", begin)


def answered_again_as_if_new(patch: Patch) -> None:
    """The answer to a repeated registration closes what was meant for the worker since the first."""
    registered = control._registered
    patch.setattr(control, "_registered", lambda member, rows: registered(member, []))


def made_before_it_is_heard(patch: Patch) -> None:
    """After the database was restored: numbers that it has forgotten are given out again, and hide what has them."""
    restored = model._restored
    patch.setattr(model, "_restored", lambda *args: restored(*args)._replace(greeted=True))


class Mutation(NamedTuple):
    """``steps``: of the shortest way to what it breaks."""

    taken_away: Callable[[Patch], None]
    found_in: Model[Any]
    promise: str
    steps: int


ONE = Worker(handles=1, reports=2)
SAFE = Worker(handles=1, reports=2, settles=False)
RESTORED = Worker(handles=2, reports=1, processes=0, losses=0, restores=True, settles=False)
MUTATIONS = [
    Mutation(absence_always_counts, ONE, "G2", 5),
    Mutation(creates_come_late, ONE, "G2", 8),
    Mutation(inventory_without_init, SAFE, "G2", 7),
    Mutation(inventory_without_init, ONE, "L", 2),
    Mutation(inventory_without_dying, ONE, "G2", 8),
    Mutation(reports_of_any_epoch, ONE, "G5", 7),
    Mutation(closes_what_is_being_made, ONE, "N", 4),
    Mutation(closes_what_may_still_be_given_out, Worker(handles=1, reports=2, shared=1), "N", 4),
    Mutation(nothing_is_abandoned, ONE, "L", 1),
    Mutation(made_whenever_asked, ONE, "G3", 4),
    Mutation(destroying_may_end, ONE, "G4", 5),
    Mutation(parents_first, Worker(handles=2, reports=1, processes=0, nested=True, settles=False), "G11", 10),
    Mutation(numbers_are_not_compared, RESTORED, "G12", 7),
    Mutation(any_empty_disk_is_welcome, Worker(handles=0, reports=1, processes=2), "G5", 5),
    Mutation(every_process_has_its_own_claim, Worker(handles=0, reports=1, processes=2), "G5", 3),
    Mutation(answered_again_as_if_new, ONE, "N", 5),
    Mutation(made_before_it_is_heard, RESTORED, "N", 8),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.taken_away.__name__}-{m.promise}")
def test_each_rule_is_needed(mutation: Mutation, monkeypatch: Patch) -> None:
    mutation.taken_away(monkeypatch)
    with pytest.raises(Violation) as found:
        Search(mutation.found_in, LIMIT).run()
    assert (found.value.promise.partition(":")[0], len(found.value.steps)) == (mutation.promise, mutation.steps), str(
        found.value
    )
