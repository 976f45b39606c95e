"""The memory store keeps the contract of every store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from greenroom.store.memory import MemoryStore
from greenroom.testing.contracts.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[MemoryStore]:
        store = MemoryStore()
        yield store
        await store.close()
