"""What the two sides of the collection remember, and say to each other."""

from __future__ import annotations

import enum

from greenroom.core.records import Record

#: Numbers above this are a lie: a worker that was given a million a second would get there in three centuries.
MAX_SEQ = 1 << 53


class Kind(enum.StrEnum):
    """What a resource is; each kind is swept by a pool of its own. LOG: what an actor has written there, which its
    sandbox lives in; SNAPSHOT: one that the worker keeps on its own disk."""

    SANDBOX = "sandbox"
    LOG = "log"
    SNAPSHOT = "snapshot"


def log_handle(actor_uid: str) -> str:
    """Of what an actor has written to its log on a worker: as long as there is the actor."""
    return f"{_LOG}{actor_uid}"


def uid_of_log(handle: str) -> str:
    return handle.removeprefix(_LOG)


def fetched_handle(snapshot_id: str) -> str:
    """Of a snapshot that a worker has downloaded and keeps for those who wake from it: as long as there is the
    snapshot."""
    return f"{_FETCHED}{snapshot_id}"


def snapshot_of(handle: str) -> str:
    """The id of the snapshot that a worker has a copy of."""
    return handle.removeprefix(_FETCHED)


_LOG, _FETCHED = "log-", "fetched-"

# --- the control plane's ----------------------------------------------------------------------------------


class ResourceState(enum.StrEnum):
    CREATING = "Creating"
    LIVE = "Live"
    DESTROYING = "Destroying"


class Resource(Record, frozen=True, kw_only=True):
    """What should be on a worker. ``operation``: what made it, "" when nothing did; ``parent``: the handle of what it
    lives in, which goes after it."""

    handle: str
    worker: str
    create_seq: int
    state: ResourceState
    kind: Kind = Kind.SANDBOX
    parent: str = ""
    operation: str = ""


class Standing(enum.StrEnum):
    """What is to become of a worker. Whether it is heard is no part of it: nothing here depends on that.

    RETIRING is emptied and then deleted; DRAINING is emptied and keeps its disk; GONE is a tombstone.
    """

    ACTIVE = "Active"
    DRAINING = "Draining"
    RETIRING = "Retiring"
    GONE = "Gone"


class Member(Record, frozen=True, kw_only=True):
    """A worker's own row. ``claim``: of the last registration; ``quarantined``: why its rows can't be trusted, "" when
    they can. ``seq``: the highest number that may have been given out. ``shared``: it grows by itself and not with each
    resource, so several have the same number, and the highest may still be given out."""

    name: str
    incarnation: str
    claim: str
    epoch: int = 1
    seq: int = 0
    shared: bool = False
    standing: Standing = Standing.ACTIVE
    quarantined: str = ""


# --- the worker's -----------------------------------------------------------------------------------------


class Local(enum.StrEnum):
    INIT = "Init"  # written down; there may be something of it, or nothing
    LIVE = "Live"
    DYING = "Dying"


class Entry(Record, frozen=True, kw_only=True):
    """What is on the worker, or is just being made or destroyed there. ``owner``: whose it is, as far as the worker
    knows; ``generation``: that of its owner when the worker last heard of it."""

    handle: str
    create_seq: int
    state: Local
    kind: Kind = Kind.SANDBOX
    parent: str = ""
    owner: str = ""
    generation: int = 0


class Papers(Record, frozen=True, kw_only=True):
    """What a worker's state disk says of it. ``epoch`` is that of the last registration that was answered, 0 before the
    first; ``claim`` that of the one that was sent since, or of the answered one."""

    incarnation: str
    claim: str = ""
    epoch: int = 0
    closed_seq: int = 0
    answered: bool = False


# --- messages ---------------------------------------------------------------------------------------------


class Register(Record, frozen=True, kw_only=True):
    """A worker's process begins. ``epoch``: the last that its disk knows of; ``replaces``: with an empty disk, the
    epoch that it was told it would end (`Refused.epoch`). ``claim``: random, written to the disk before it is sent
    first, and the same until there is an answer, whatever process sends it. ``highest_seq``: of its entries."""

    worker: str
    incarnation: str
    claim: str
    epoch: int = 0
    replaces: int = 0
    closed_seq: int = 0
    highest_seq: int = 0


class Registered(Record, frozen=True, kw_only=True):
    claim: str
    epoch: int
    closed_seq: int


class Refusal(enum.StrEnum):
    """What a refused worker is to do."""

    REGISTER = "Register"  # again, in place of the epoch that it is told
    NAME_TAKEN = "NameTaken"  # later: another worker of that name, with another disk, is alive
    WIPE = "Wipe"  # destroy all that it has and begin with a new incarnation
    NOT_ON_ROSTER = "NotOnRoster"  # wait: it is not among those that its pool may have, or not yet


class Refused(Record, frozen=True, kw_only=True):
    """The answer to a registration. ``claim``: whose; of two with the same disk only that one is meant."""

    claim: str
    what: Refusal
    epoch: int


class Create(Record, frozen=True, kw_only=True):
    epoch: int
    create_seq: int
    handle: str
    kind: Kind = Kind.SANDBOX
    parent: str = ""


class Report(Record, frozen=True, kw_only=True):
    """``inventory``: every entry that the worker had at one moment after it had adopted ``closed_seq``; None when it
    could not list them all."""

    worker: str
    incarnation: str
    epoch: int
    closed_seq: int
    inventory: tuple[Entry, ...] | None


class Stale(Record, frozen=True, kw_only=True):
    """The answer to a report that is not by the worker's present process: it is to register again."""

    incarnation: str
    epoch: int


class Orders(Record, frozen=True, kw_only=True):
    """The answer to a report. ``more``: there are more to destroy than one answer holds, so report again at once;
    ``drain``: the worker is to be emptied."""

    incarnation: str
    closed_seq: int
    destroy: tuple[str, ...] = ()
    more: bool = False
    drain: bool = False
