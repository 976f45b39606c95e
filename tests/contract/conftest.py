"""A PostgreSQL server for the tests that need one: one a process of the test run, a fresh database for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from greenroom.testing.postgres import PostgresServer, find_programs


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if find_programs() is None:
        pytest.skip("no PostgreSQL server; scripts/setup.sh --test gets one")
    with PostgresServer(tcp=True) as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)
