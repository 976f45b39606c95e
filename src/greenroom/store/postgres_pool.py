"""Connections to the database: how one is made, how many there are, and how long a call may take.

The statements are sent on connections in autocommit mode, so a call that is one statement is one transaction and one
round trip. Nothing here says the password, and nothing keeps the URL that it came in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from greenroom.core.errors import InvalidArgument
from greenroom.store.postgres_errors import Overtaken, is_conflict, overloaded, translate

T = TypeVar("T")
Connection = AsyncConnection[tuple[Any, ...]]
Pool = AsyncConnectionPool[Connection]

#: Connections of one process. A call holds one for about a millisecond, most of which is the wait for the disk, which
#: many calls share; more connections than that cost the server memory and gain nothing.
MAX_CONNECTIONS = 16
#: Kept open, so that the first calls after a quiet time need not connect.
MIN_CONNECTIONS = 2
#: Calls that may wait for a connection: seconds of work. Beyond it callers are better told at once.
MAX_WAITING = 10_000
#: How long a call may wait for a connection, in seconds.
CONNECTION_WAIT_S = 5.0
#: How long making a connection may take, in seconds: a server that is there answers in milliseconds.
CONNECT_TIMEOUT_S = 5
#: How long the server lets a statement run. The longest ones (a page of a large table, the slots of a large worker)
#: take some 100 ms.
STATEMENT_TIMEOUT_MS = 10_000
#: How long a statement waits for a row that another one has locked; none holds one longer than a round trip.
LOCK_TIMEOUT_MS = 5_000
#: How long a transaction may do nothing: its process is frozen, and others wait for its rows.
IDLE_TRANSACTION_TIMEOUT_MS = 5_000
#: After this a call is given up because the server, or the network to it, does not answer at all: more than the
#: server's own limits, so that where it answers, it says what was wrong. In seconds.
CALL_TIMEOUT_S = 15.0

# What it has to say (that it could not connect, again and again) the feed says once, in our words.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

_PARAMETERS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "client_encoding": "utf8",
    # A network that is cut is noticed by the kernel too, in about the time that a call may take.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 5,
    "tcp_user_timeout": 15_000,
    # Of several hosts the one that takes writes, also after a failover.
    "target_session_attrs": "read-write",
}


class Database:
    """One database as this process reaches it. Made on an event loop, for use there."""

    def __init__(self, url: str, name: str, *, max_connections: int = MAX_CONNECTIONS) -> None:
        """``name``: of this process, for the server's list of its connections.

        Raises:
            InvalidArgument: ``url`` is no URL of a database (``postgresql://USER@HOST:PORT/NAME``).
        """
        try:
            given = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            given = {}
        if not given:  # what it was is not said: there may be a password in it
            raise InvalidArgument(
                "this is no URL of a PostgreSQL database; it looks like postgresql://USER@HOST:PORT/NAME"
            )
        self._parameters: dict[str, Any] = _PARAMETERS | {k: v for k, v in given.items() if v is not None}
        limits = {
            "statement_timeout": STATEMENT_TIMEOUT_MS,
            "lock_timeout": LOCK_TIMEOUT_MS,
            "idle_in_transaction_session_timeout": IDLE_TRANSACTION_TIMEOUT_MS,
            # A row is found by its key, which needs no plan of its own for each key; the server would make one, because
            # it reckons that it saves looking into seven of eight partitions, and that takes longer than the look.
            "plan_cache_mode": "force_generic_plan",
        }
        self._parameters["fallback_application_name"] = f"greenroom {name}".strip()
        options = "".join(f" -c {name}={value}" for name, value in limits.items())
        self._parameters["options"] = str(self._parameters.get("options", "")) + options
        #: For messages.
        self.where = _describe(given)
        self._parameters |= {"autocommit": True, "cursor_factory": AsyncRawCursor, "prepare_threshold": 0}
        self._max_connections = max_connections
        self._pool: Pool | None = None

    async def connect(self) -> Connection:
        """A connection of its own, for the caller to close. Raises `psycopg.Error`."""
        return await AsyncConnection.connect(**self._parameters)

    async def open(self) -> None:
        """Makes connections anew: those that there were may be dead, and the pool may be waiting before it tries again.
        To be called when the database can be reached, the first time and after every time that it could not."""
        old, self._pool = (
            self._pool,
            AsyncConnectionPool(
                "",
                kwargs=self._parameters,
                min_size=min(MIN_CONNECTIONS, self._max_connections),
                max_size=self._max_connections,
                max_waiting=MAX_WAITING,
                timeout=CONNECTION_WAIT_S,
                # The pool waits longer from try to try; after this it waits until somebody wants a connection again.
                reconnect_timeout=CONNECTION_WAIT_S,
                check=_check,
                open=False,
                name="greenroom",
            ),
        )
        await self._pool.open()
        if old is not None:
            await old.close()

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """``work`` with a connection. What psycopg raises comes out as an error of Greenroom.

        Raises:
            Overtaken: another transaction was in the way.
            Unavailable: reason ``STORE_UNAVAILABLE``; whether it was carried out is not known.
            ResourceExhausted: too many calls wait (reason ``STORE_OVERLOADED``), or the disk is full (``DISK_FULL``).
        """
        pool = self._pool
        assert pool is not None, "opened before"
        try:
            connection = await pool.getconn()
        except TooManyRequests as error:
            raise overloaded(MAX_WAITING) from error
        except (PoolTimeout, PoolClosed) as error:
            raise translate(error, self.where) from error
        try:
            async with limited(connection):
                return await work(connection)
        except (psycopg.Error, OSError) as error:
            if is_conflict(error):
                raise Overtaken(str(error)) from error
            raise translate(error, self.where) from error
        finally:
            await pool.putconn(connection)

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()


@contextlib.asynccontextmanager
async def limited(connection: Connection) -> AsyncIterator[None]:
    """Within it the connection is cut after `CALL_TIMEOUT_S`, which ends what waits for it with an error."""
    timer = asyncio.get_running_loop().call_later(CALL_TIMEOUT_S, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection) -> None:
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


async def _check(connection: Connection) -> None:
    """Whether a connection that lay idle is still one: nothing is to be read from it, not even its end."""
    poll = select.poll()
    if not connection.closed:
        poll.register(connection.fileno(), select.POLLIN)
    if connection.closed or poll.poll(0):
        await connection.close()
        raise psycopg.OperationalError("the connection was closed while it was idle")


def _describe(given: dict[str, Any]) -> str:
    host = given.get("host") or given.get("hostaddr") or "localhost"
    name = given.get("dbname") or given.get("user") or "of the user"
    return f"{name} at {host}" if str(host).startswith("/") else f"{name} at {host}:{given.get('port') or 5432}"
