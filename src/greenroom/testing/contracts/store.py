"""The contract of `greenroom.store.port.Store`. An adapter's test is its factory:

class TestMyStore(StoreContract):
    @pytest.fixture
    async def store(self): ...
"""

from __future__ import annotations

import pytest

from greenroom.store.port import Store
from greenroom.testing.contracts.store_leases import Leases
from greenroom.testing.contracts.store_life import Life
from greenroom.testing.contracts.store_records import Records
from greenroom.testing.contracts.store_shared import Shared
from greenroom.testing.contracts.store_slots import Slots
from greenroom.testing.contracts.store_snapshots import Snapshots
from greenroom.testing.contracts.store_world import World, audit, dump, list_all

__all__ = ["StoreContract", "World", "audit", "dump", "list_all"]


class StoreContract(Records, Shared, Life, Leases, Slots, Snapshots):
    """What every store does. The subclass has a fixture ``store`` that makes an empty one and closes it."""

    @pytest.fixture
    async def world(self, store: Store) -> World:
        return await World(store).setup()
