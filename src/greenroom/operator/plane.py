"""What the operator needs of Greenroom's own control plane. Records go in and out; the calls are the API's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from greenroom.core.demand import Demand
from greenroom.core.records import Key, PoolSpec, Record, Template, TemplateSpec
from greenroom.core.rosters import Roster


class Change(Record, frozen=True, kw_only=True):
    """A template as it is now; ``template`` None: it is gone. Without a key: all that there were have been told."""

    key: Key | None = None
    template: Template | None = None


class Plane(Protocol):
    """The control plane. Every call may raise `Unavailable` and is safe to repeat, and to cancel."""

    async def apply_pool(self, name: str, spec: PoolSpec) -> None:
        """Raises `FailedPrecondition` when there is one of another backend."""

    async def delete_pool(self, name: str) -> None:
        """One that is not there is as good. Raises `FailedPrecondition` (reason ``POOL_IN_USE``) while a template names
        it."""

    async def admit(self, roster: Roster) -> None:
        """Raises `Conflict` when a later one is known, `FailedPrecondition` (reason ``POOL_NAME_TAKEN``) when a pool of
        that name is there in another namespace."""

    async def demand(self, pool: str) -> Demand:
        """Raises `NotFound`."""

    async def apply_template(self, key: Key, spec: TemplateSpec) -> Template:
        """Returns it as it is then; what becomes of it `templates` tells.

        Raises:
            FailedPrecondition: there is one with another spec (reason ``TEMPLATE_IMMUTABLE``).
            InvalidArgument: names the field.
        """

    async def delete_template(self, key: Key) -> None:
        """One that is not there is as good. Raises `FailedPrecondition` (reason ``TEMPLATE_IN_USE``) while actors are
        made from it."""

    def templates(self) -> AsyncIterator[Change]:
        """All there are, then a `Change` without a key, then what changes; ends by an error only."""
