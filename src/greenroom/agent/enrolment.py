"""This worker's papers: which state disk it has, and what the control plane has told it in return
(`greenroom.core.gc.worker`).

They lie on the disk that they speak of, and are written before anybody is told what they say. A disk without papers is
an empty one.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace

from greenroom.core.agentapi import Identity
from greenroom.core.errors import Conflict, Unavailable
from greenroom.core.gc import worker as rules
from greenroom.core.gc.records import Orders, Papers, Refusal, Refused, Register, Registered

log = structlog.get_logger(__name__)

#: Below the state directory.
PAPERS = "papers.json"


#: Of the file, whatever is in it: papers have some 200.
ROOM_BYTES = 1024


def write_with_room(path: Path, data: bytes, sync: bool) -> None:
    """Replaces a small file by one that has its room already, so that a full disk does not keep a worker from being
    registered, and from making room."""
    spare = path.with_suffix(".spare")
    with spare.open("r+b" if spare.exists() else "wb") as file:
        file.write(data.ljust(ROOM_BYTES))
        file.truncate(max(len(data), ROOM_BYTES))
        file.flush()
        if sync:
            os.fsync(file.fileno())
    spare.replace(path)
    with contextlib.suppress(OSError):
        spare.write_bytes(b" " * ROOM_BYTES)


class Enrolment:
    """``new_id``: a random name that nobody else ever draws. ``write``: see `write_with_room`."""

    def __init__(
        self,
        path: Path,
        worker: str,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        write: Callable[[Path, bytes, bool], None] | None = None,
    ) -> None:
        self._write_file = write or write_with_room
        self._path = path
        self._worker = worker
        self._new_id = new_id
        self.papers = rules.begin(_read(path) or Papers(incarnation=new_id()), new_id())
        self._is_written = False

    def present(self, replaces: int) -> Register:
        """What is said of this worker. ``replaces``: the epoch that it would end if its disk is empty.

        Raises:
            OSError: it can't be written down, and so must not be said.
        """
        if not self._is_written:
            self._write(self.papers)
        return rules.registration(self.papers, self._worker, (), replaces if self.papers.epoch == 0 else 0)

    def registered(self, answer: Registered) -> None:
        """Raises `OSError` if it can't be written down."""
        papers = rules.registered(self.papers, answer)
        if papers != self.papers:
            self._write(papers)
            log.info("registered", incarnation=papers.incarnation, epoch=papers.epoch)

    @property
    def is_registered(self) -> bool:
        """Whether a replica has registered it since this process began."""
        return self.papers.answered

    def check(self) -> None:
        """Raises `Unavailable` (reason ``WORKER_NOT_REGISTERED``) while nothing may be made here."""
        if not self.is_registered:
            raise Unavailable(
                f"worker {self._worker} is not registered by any replica yet; try again", reason="WORKER_NOT_REGISTERED"
            )

    def check_epoch(self, epoch: int, incarnation: str) -> None:
        """Raises `Conflict` (reason ``WRONG_EPOCH``) when they are not those of this worker's registration.
        ``incarnation``: "" when it was not said."""
        if not self.papers.answered or epoch != self.papers.epoch:
            raise Conflict(
                f"worker {self._worker} is in epoch {self.papers.epoch}, not {epoch}; register it again",
                reason="WRONG_EPOCH",
            )
        if incarnation and incarnation != self.papers.incarnation:
            raise Conflict(
                f"worker {self._worker} has disk {self.papers.incarnation}, not {incarnation}; register it again",
                reason="WRONG_EPOCH",
            )

    def close(self, epoch: int, closed_seq: int, incarnation: str = "") -> None:
        """Nothing with that number or a lower one is made here any more.

        Raises:
            Conflict: it is meant for another registration (reason ``WRONG_EPOCH``).
            OSError: it can't be written down.
        """
        self.check_epoch(epoch, incarnation)
        papers = rules.close(self.papers, Orders(incarnation=self.papers.incarnation, closed_seq=closed_seq))
        if papers != self.papers:
            self._write(papers)

    def admit(self, identity: Identity) -> None:
        """A sandbox is about to be made.

        Raises:
            Unavailable: nothing may be made here yet (reason ``WORKER_NOT_REGISTERED``), or its number is closed
                (``NUMBER_CLOSED``): nobody waits for it any more.
        """
        self.check()
        if 0 < identity.create_seq <= self.papers.closed_seq:
            raise Unavailable(
                f"sandbox {identity.sandbox} (number {identity.create_seq}) comes too late: worker {self._worker} has "
                f"closed {self.papers.closed_seq}; nobody waits for it any more",
                reason="NUMBER_CLOSED",
            )

    def is_taken(self, refused: Refused) -> bool:
        """Whether this process can't have its name, because a worker with another disk has it."""
        return refused.what is Refusal.NAME_TAKEN and refused.claim == self.papers.claim

    def must_wipe(self, refused: Refused) -> bool:
        return rules.must_wipe(self.papers, refused)

    def renew(self) -> None:
        """Everything that was here is gone: this is an empty disk now. Raises `OSError` if it can't be written down."""
        self._write(rules.begin(Papers(incarnation=self._new_id()), self._new_id()))

    def _write(self, papers: Papers) -> None:
        # Whose disk it is is not to be lost; what is closed may be.
        is_news = replace(papers, closed_seq=0) != replace(self.papers, closed_seq=0)
        self._write_file(self._path, msgspec.json.encode(papers), is_news)
        self.papers, self._is_written = papers, True


def was_registered(path: Path) -> bool:
    """Whether the worker with these papers was ever admitted, so that there may be something on its disk."""
    papers = _read(path)
    return papers is not None and papers.epoch > 0


def incarnation_of(path: Path) -> str:
    """Whose disk these papers are of; "" without papers."""
    papers = _read(path)
    return papers.incarnation if papers is not None else ""


def _read(path: Path) -> Papers | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Papers)
    except (OSError, msgspec.MsgspecError):
        return None
