"""Connections to the database: how one is made, how many there are, and how long a call may take.

The statements are sent on connections in autocommit mode, so a call that is one statement is one transaction and one
round trip. Nothing here says the password, and nothing keeps the URL that it came in.

An own pool and not psycopg's: who finds no connection makes one and hears at once why it can't be made, where psycopg's
leaves callers waiting while a task of its own tries again with growing pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from greenroom.core.errors import GreenroomError, InvalidArgument
from greenroom.store.postgres_errors import Overtaken, is_conflict, overloaded, translate

T = TypeVar("T")
Connection = AsyncConnection[tuple[Any, ...]]
Turn = asyncio.Future[Connection | None]

#: Connections of one process. A call holds one for a few milliseconds, most of which is the wait for the disk, which
#: all share; so these make some 3000 calls a second. Each costs the server some MiB, and time when it is new.
MAX_CONNECTIONS = 10
#: Those that nobody has needed for so long are closed, in seconds.
MAX_IDLE_S = 600.0
#: Statements that a connection keeps ready. There are some twenty, and as many again for each partition.
MAX_PREPARED = 500
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
            # Every statement has an index that fits, and few rows to find. A plan that is made while a table is empty,
            # as those of a new database are, would do without, and be kept until the table's statistics are gathered.
            "enable_seqscan": "off",
            "enable_bitmapscan": "off",
            "jit": "off",
            # What the functions of the schema are made for: each statement in them sees what was committed before it.
            "default_transaction_isolation": "read\\ committed",
        }
        self._parameters["fallback_application_name"] = f"greenroom {name}".strip()
        options = "".join(f" -c {name}={value}" for name, value in limits.items())
        self._parameters["options"] = str(self._parameters.get("options", "")) + options
        #: For messages.
        self.where = _describe(given)
        self._parameters |= {"autocommit": True, "cursor_factory": AsyncRawCursor, "prepare_threshold": 0}
        self._max_connections = max_connections
        self._idle: list[tuple[Connection, float]] = []  # and since when (`time.monotonic`), the latest last
        self._made = 0  # idle, in use, and being made
        self._waiting: deque[Turn] = deque()
        self._failure: GreenroomError | None = None  # why the last one could not be made
        self._closed = False

    async def connect(self) -> Connection:
        """A connection of its own, for the caller to close. Raises `psycopg.Error`."""
        try:
            connection = await AsyncConnection.connect(**self._parameters)
        except BaseException as error:
            # One that is half made is closed with the last who knows of it: psycopg's frames, which this error keeps.
            traceback.clear_frames(error.__traceback__)
            raise
        connection.prepared_max = MAX_PREPARED
        return connection

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """``work`` with a connection. What psycopg raises comes out as an error of Greenroom.

        Raises:
            Overtaken: another transaction was in the way.
            Unavailable: reason ``STORE_UNAVAILABLE``; whether it was carried out is not known.
            ResourceExhausted: too many calls wait (reason ``STORE_OVERLOADED``), or the disk is full (``DISK_FULL``).
        """
        try:
            connection = await self._take()
            try:
                async with limited(connection):
                    return await work(connection)
            finally:
                self._give_back(connection)
        except (psycopg.Error, OSError) as error:
            if is_conflict(error):
                raise Overtaken(str(error)) from error
            raise translate(error, self.where) from error

    async def _take(self) -> Connection:
        while self._idle:
            connection, _ = self._idle.pop()  # the one that was used last: the others may be closed some time
            if _is_alive(connection):
                return connection
            self._discard(connection)
        if self._made < self._max_connections:
            self._made += 1
            return await self._make()
        if len(self._waiting) >= MAX_WAITING:
            raise overloaded(len(self._waiting))
        turn: Turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(CONNECTION_WAIT_S):
                given = await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came at the last moment
                self._pass_on(turn.result())
            turn.cancel()
            if isinstance(error, TimeoutError):
                raise self._failure or overloaded(len(self._waiting)) from None
            raise
        return given if given is not None else await self._make()

    async def _make(self) -> Connection:
        """There is room for it, which is counted already."""
        try:
            connection = await self.connect()
        except BaseException as error:
            if isinstance(error, Exception):
                self._failure = translate(error, self.where)
            self._pass_on(None)  # who waits tries, and hears the reason
            raise
        self._failure = None
        return connection

    def _give_back(self, connection: Connection) -> None:
        if connection.pgconn.transaction_status != TransactionStatus.IDLE or self._closed:
            self._discard(connection)
        else:
            self._pass_on(connection)

    def _discard(self, connection: Connection) -> None:
        connection.pgconn.finish()  # there is nothing to be said to the server
        self._pass_on(None)

    def _pass_on(self, connection: Connection | None) -> None:
        """To who has waited longest. None: the room of a connection that is no more."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        if connection is not None:
            self._idle.append((connection, time.monotonic()))
        else:
            self._made -= 1

    def close_idle(self) -> None:
        """Connections that nobody has needed for a while; to be called now and then."""
        until = time.monotonic() - MAX_IDLE_S
        old = [connection for connection, since in self._idle if since < until]
        self._idle = [(connection, since) for connection, since in self._idle if since >= until]
        for connection in old:
            self._discard(connection)

    def close(self) -> None:
        """When no call is under way any more."""
        self._closed = True
        while self._idle:
            self._discard(self._idle.pop()[0])


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


def _is_alive(connection: Connection) -> bool:
    """Whether a connection that lay idle still is one: nothing is to be read from it, not even its end."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


def _describe(given: dict[str, Any]) -> str:
    host = given.get("host") or given.get("hostaddr") or "localhost"
    name = given.get("dbname") or given.get("user") or "of the user"
    return f"{name} at {host}" if str(host).startswith("/") else f"{name} at {host}:{given.get('port') or 5432}"
