"""How an installation knows what belongs to it."""

from __future__ import annotations

from greenroom.core.records import Record

#: `Mark.name` of the snapshot store's.
SNAPSHOTS = "snapshots"


class Mark(Record, frozen=True, kw_only=True):
    """What a place that an installation uses has to say when it is asked who it is.

    What is missing in a store that is another one, or not mounted, is not lost; and what lies in another
    installation's is not without an owner.

    Attributes:
        name: of the place.
        value: chosen at random when the place was used for the first time.
        placed: it was put there; so a place without it is not the right one.
    """

    name: str
    value: str
    placed: bool = False
    version: int = 0

    @property
    def pk(self) -> str:
        return self.name
