"""The table of legal transitions."""

from __future__ import annotations

import pytest

from greenroom.core import states
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import ActorState


def reachable(start: ActorState) -> set[ActorState]:
    seen, todo = {start}, [start]
    while todo:
        new = states.LEGAL[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(states.LEGAL) == set(ActorState)
    assert reachable(ActorState.SUSPENDED) == set(ActorState)


@pytest.mark.parametrize("state", ActorState)
def test_no_state_is_a_dead_end(state: ActorState) -> None:
    assert ActorState.DELETING in states.LEGAL[state], "delete works from every state"
    if state is not ActorState.DELETING:
        assert reachable(state) >= {ActorState.RUNNING, ActorState.SUSPENDED}


def test_nothing_comes_back_from_deleting() -> None:
    assert states.LEGAL[ActorState.DELETING] == {ActorState.DELETING}


def test_only_what_was_alive_or_asleep_on_one_worker_can_crash() -> None:
    may = {s for s in ActorState if ActorState.CRASHED in states.LEGAL[s]}
    assert may == states.BOUND | {ActorState.SUSPENDED}, "a snapshot that is on one worker only can be lost with it"


def test_an_illegal_transition_says_what_is_legal() -> None:
    with pytest.raises(
        FailedPrecondition, match=r"ns/a is Crashed and can't become Pausing.*Deleting, Resuming"
    ) as error:
        states.check("ns/a", ActorState.CRASHED, ActorState.PAUSING)
    assert error.value.reason == "WRONG_STATE" and error.value.metadata == {"state": "Crashed"}
