"""What an agent remembers across its own death: the highest generation seen per actor, and the results of operations.

It is written before a call is answered, so a control plane that lost the answer gets the same one again, and a stale
control plane stays refused. It need not survive the death of the *machine*: then no sandbox has survived either. So a
line appended to a file, without a sync, is enough; it costs some microseconds on every wake, where a database's
transaction costs a hundred. The file is written anew, with what still counts, when it is opened and when it has grown.

A full disk must not keep actors from being thawed and deleted, so then the journal goes on in memory: what is not on
disk counts as long as this process lives, and is written with the next entry that finds room.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path

import msgspec
import structlog

from greenroom.core.records import Record

log = structlog.get_logger(__name__)

#: Results kept. An operation is asked for again within minutes, and a worker does at most some hundred a second.
KEPT_RESULTS = 20_000
#: Actors whose generation is kept, the last seen ones. A call that comes late comes within minutes; an actor that is
#: here has its generation in its sandbox as well.
KEPT_FENCES = 50_000
#: Bytes appended after which the file is written anew; the content that counts is some 10 MB at most.
REWRITE_BYTES = 64 << 20


class _Fence(Record, frozen=True, kw_only=True, tag="fence"):
    actor_uid: str
    generation: int
    #: The operation of this generation that was ended here by a Discard.
    ended: str = ""


class _Result(Record, frozen=True, kw_only=True, tag="result"):
    operation_id: str
    call: str
    answer: msgspec.Raw


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Fence | _Result).decode


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._fences: OrderedDict[str, _Fence] = OrderedDict()  # the last seen last
        self._results: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                self._remember(_decode(line))
            except msgspec.DecodeError as error:
                # The last one may be torn: it was never acted on. Another one is damage, and lost; the actors that are
                # here have their generations in their sandboxes as well, so there is no reason to keep them waiting.
                if number < len(lines):
                    log.error("a line of the journal is lost", path=str(path), line=number, error=str(error))
        self._fd = -1
        self._behind = False
        self._rewrite()

    def _remember(self, entry: _Fence | _Result) -> None:
        if isinstance(entry, _Result):
            self._results[entry.operation_id, entry.call] = bytes(entry.answer)
            while len(self._results) > KEPT_RESULTS:
                self._results.popitem(last=False)
        else:
            self._fences[entry.actor_uid] = entry
            self._fences.move_to_end(entry.actor_uid)
            while len(self._fences) > KEPT_FENCES:
                self._fences.popitem(last=False)

    def _rewrite(self) -> None:
        new = self._path.with_suffix(".new")
        try:
            with new.open("wb") as file:
                for fence in self._fences.values():
                    file.write(_encode(fence) + b"\n")
                for (operation, call), answer in self._results.items():
                    file.write(_encode(_Result(operation_id=operation, call=call, answer=msgspec.Raw(answer))) + b"\n")
            new.replace(self._path)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self._fall_behind(error)
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size, self._written, self._behind = fd, os.fstat(fd).st_size, 0, False

    def _append(self, entry: _Fence | _Result) -> None:
        self._remember(entry)
        if self._behind:
            self._rewrite()
            return
        line = _encode(entry) + b"\n"
        try:
            if os.write(self._fd, line) != len(line):
                os.ftruncate(self._fd, self._size)  # nothing is to be glued to half a line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError as error:
            self._fall_behind(error)
            return
        self._size += len(line)
        self._written += len(line)
        if self._written > REWRITE_BYTES:
            self._rewrite()

    def _fall_behind(self, error: OSError) -> None:
        if not self._behind:
            log.error("the journal can't be written; it goes on in memory", path=str(self._path), error=str(error))
        self._behind = True

    def generation(self, actor_uid: str) -> int:
        """The highest generation seen; 0 for an actor never seen."""
        fence = self._fences.get(actor_uid)
        return fence.generation if fence else 0

    def raise_fence(self, actor_uid: str, generation: int) -> None:
        if generation > self.generation(actor_uid):
            self._append(_Fence(actor_uid=actor_uid, generation=generation))

    def ended(self, actor_uid: str) -> str:
        """The operation that was ended under the highest generation seen; "" when none was."""
        fence = self._fences.get(actor_uid)
        return fence.ended if fence else ""

    def end_operation(self, actor_uid: str, operation_id: str) -> None:
        """Nothing that this operation asks for under the present generation may begin any more."""
        if self.ended(actor_uid) != operation_id:
            self._append(_Fence(actor_uid=actor_uid, generation=self.generation(actor_uid), ended=operation_id))

    def answer(self, operation_id: str, call: str) -> bytes | None:
        return self._results.get((operation_id, call))

    def record(self, operation_id: str, call: str, answer: bytes) -> None:
        self._append(_Result(operation_id=operation_id, call=call, answer=msgspec.Raw(answer)))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
