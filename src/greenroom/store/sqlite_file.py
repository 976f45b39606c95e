"""The database file: opening, migrating, what its errors mean, and the reserve for a full disk."""

from __future__ import annotations

import contextlib
import errno
import importlib.resources
import os
from pathlib import Path

import apsw
import structlog

from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    Internal,
    ResourceExhausted,
    Unavailable,
)

log = structlog.get_logger(__name__)

DATABASE_FILE = "greenroom.db"
RESERVE_FILE = "reserve"
#: As much as the write-ahead log grows before SQLite copies it into the database (1000 pages of 4 KiB, its default), so
#: that on a full disk the log of what makes room always fits.
RESERVE_BYTES = 4 << 20
#: How long a statement waits for a lock that another program holds (someone with the sqlite3 shell).
BUSY_TIMEOUT_MS = 5_000
#: The log is cut back to this after a burst (a checkpoint that could not keep up).
JOURNAL_LIMIT_BYTES = 16 << 20


def open_writer(path: Path) -> apsw.Connection:
    """The connection that writes; makes the file, or migrates it.

    Raises:
        DataLoss: the file is not a database, or is damaged.
        FailedPrecondition: it was written by a newer program (reason ``SCHEMA_TOO_NEW``), or may not be written.
        ResourceExhausted: the disk is full.
    """
    try:
        # Made here, because it holds what templates pass to actors; the log gets the same mode from SQLite.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = apsw.Connection(str(path))
        try:
            connection.set_busy_timeout(BUSY_TIMEOUT_MS)
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",  # the log is synced at every commit: what was answered is durable
                f"journal_size_limit = {JOURNAL_LIMIT_BYTES}",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            migrate(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection
    except (apsw.Error, OSError) as error:
        raise translate(error, path) from error


def open_reader(path: Path) -> apsw.Connection:
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        return connection
    except apsw.Error as error:
        raise translate(error, path) from error


# --- schema -----------------------------------------------------------------------------------------------


def migrations() -> list[str]:
    """The scripts in order; script n (from 1) leads from schema n - 1 to n."""
    folder = importlib.resources.files("greenroom.store") / "migrations"
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    assert [int(n[:4]) for n in names] == list(range(1, len(names) + 1)), (
        f"migrations are not numbered in order: {names}"
    )
    return [(folder / n).read_text(encoding="utf-8") for n in names]


def migrate(connection: apsw.Connection, path: Path, scripts: list[str] | None = None) -> None:
    """Brings the schema up to date in one transaction. Raises `FailedPrecondition` if it is newer than this program."""
    scripts = migrations() if scripts is None else scripts
    have = connection.pragma("user_version")
    if have > len(scripts):
        raise FailedPrecondition(
            f"{path} has schema {have}, but this program knows schemas up to {len(scripts)}: a newer Greenroom wrote "
            "it; start that version or a newer one, or use another data directory",
            reason="SCHEMA_TOO_NEW",
            metadata={"schema": str(have), "known": str(len(scripts))},
        )
    if have == len(scripts):
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # reads the file: damage shows here
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for script in scripts[have:]:
            connection.execute(script)
        connection.execute(f"PRAGMA user_version = {len(scripts)}")
        connection.execute("COMMIT")
    except BaseException:
        rollback(connection)
        raise


def rollback(connection: apsw.Connection) -> None:
    if connection.in_transaction:  # some errors end the transaction by themselves
        connection.execute("ROLLBACK")


# --- errors -----------------------------------------------------------------------------------------------


def translate(error: Exception, path: Path) -> GreenroomError:
    """What an error of SQLite or of the system means."""
    if isinstance(error, GreenroomError):
        return error
    if is_disk_full(error, path.parent):
        return disk_full(path)
    match error:
        case apsw.CorruptError() | apsw.NotADBError():
            return DataLoss(
                f"{path} is damaged ({error}); restore it from a backup, or try `sqlite3 {path} .recover`",
                reason="DATABASE_CORRUPT",
            )
        case apsw.BusyError() | apsw.LockedError():
            return Unavailable(f"{path} is locked by another program ({error}); close it", reason="DATABASE_LOCKED")
        case apsw.ReadOnlyError() | apsw.CantOpenError() | PermissionError():
            return FailedPrecondition(
                f"{path} can't be opened for writing ({error}); check owner and mode of it and of its directory",
                reason="DATA_DIR_NOT_WRITABLE",
            )
        case apsw.IOError() | OSError():
            return Unavailable(f"{path} can't be read or written: {error}", reason="STORE_IO")
        case _:
            return Internal(f"{path}: {type(error).__name__}: {error}")


def is_disk_full(error: Exception, directory: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, apsw.IOError):  # some writes, for example of the shared memory, say no more than "I/O error"
        return os.statvfs(directory).f_bfree == 0
    return isinstance(error, apsw.FullError)


def disk_full(path: Path) -> ResourceExhausted:
    return ResourceExhausted(
        f"the disk that holds {path} is full: nothing new is begun until there is room; delete actors, or free "
        f"{2 * RESERVE_BYTES >> 20} MiB on it",
        reason="DISK_FULL",
        retry_after_s=10.0,
    )


# --- reserve ----------------------------------------------------------------------------------------------


class Reserve:
    """A file that only takes up room. Given back when the disk is full, so that deletes can be written."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVE_FILE

    def make(self) -> bool:
        """Whether the room is set aside now. Leaves as much again free, so that the disk isn't full at once again. A
        disk that does not let it, for whatever reason, is treated as a full one."""
        try:
            return self._make()
        except OSError as error:
            log.warning("no room can be set aside", path=str(self._path), error=str(error))
            return False

    def _make(self) -> bool:
        if self._path.exists() and self._path.stat().st_size == RESERVE_BYTES:
            return True
        space = os.statvfs(self._path.parent)
        if space.f_bavail * space.f_frsize < 2 * RESERVE_BYTES:
            return False
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError as error:
            if not is_disk_full(error, self._path.parent):
                raise
            self.free()
            return False
        finally:
            os.close(fd)
        return True

    def free(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
