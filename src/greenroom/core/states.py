"""The one table of legal transitions of an actor; nothing else decides what is legal.

SUSPENDED -> RESUMING -> RUNNING -> SUSPENDING -> SUSPENDED, RUNNING -> PAUSING -> PAUSED, and PAUSED is never a dead
end. CRASHED says that a live incarnation was lost, or a snapshot that was nowhere but on a lost
worker. Each operation can be backed out to where it came from. Delete works
from every state.
"""

from __future__ import annotations

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import ActorState

_S = ActorState

LEGAL: dict[ActorState, frozenset[ActorState]] = {
    _S.SUSPENDED: frozenset({_S.RESUMING, _S.CRASHED, _S.DELETING}),
    _S.RESUMING: frozenset({_S.RUNNING, _S.SUSPENDED, _S.PAUSED, _S.CRASHED, _S.DELETING}),
    _S.RUNNING: frozenset({_S.SUSPENDING, _S.PAUSING, _S.CRASHED, _S.DELETING}),
    _S.SUSPENDING: frozenset({_S.SUSPENDED, _S.RUNNING, _S.PAUSED, _S.CRASHED, _S.DELETING}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.CRASHED, _S.DELETING}),
    _S.PAUSED: frozenset({_S.RESUMING, _S.SUSPENDING, _S.CRASHED, _S.DELETING}),
    _S.CRASHED: frozenset({_S.RESUMING, _S.DELETING}),
    _S.DELETING: frozenset({_S.DELETING}),
}

#: States in which an actor holds a slot of a worker (while DELETING it may: until its sandbox is gone).
BOUND = frozenset({_S.RESUMING, _S.RUNNING, _S.SUSPENDING, _S.PAUSING, _S.PAUSED})
#: States that an operation in progress owns.
BUSY = frozenset({_S.RESUMING, _S.SUSPENDING, _S.PAUSING, _S.DELETING})


def check(subject: str, old: ActorState, new: ActorState) -> None:
    """Raises:
    FailedPrecondition: ``old`` -> ``new`` is not in the table (reason ``WRONG_STATE``).
    """
    if new not in LEGAL[old]:
        legal = ", ".join(sorted(LEGAL[old])) or "nothing"
        raise FailedPrecondition(
            f"actor {subject} is {old} and can't become {new}; from here it can become: {legal}",
            reason="WRONG_STATE",
            metadata={"state": old},
        )
