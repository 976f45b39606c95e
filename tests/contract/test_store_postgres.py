"""The PostgreSQL store keeps the contract of every store, and what only a database that many share can do wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from greenroom.store.postgres import PostgresStore
from greenroom.testing.contracts.store import StoreContract


class TestPostgresStore(StoreContract):
    @pytest.fixture
    async def store(self, database: str) -> AsyncIterator[PostgresStore]:
        store = await PostgresStore.open(database)
        yield store
        await store.close()
