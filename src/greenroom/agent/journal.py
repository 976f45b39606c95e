"""What an agent remembers across its own death: the highest generation seen per actor, and the results of operations.

It is written before a call is answered, so a control plane that lost the answer gets the same one again, and a stale
control plane stays refused. It need not survive the death of the *machine*: then no sandbox has survived either. So a
line appended to a file, without a sync, is enough; it costs some microseconds on every wake, where a database's
transaction costs a hundred. The file is written anew, with what still counts, when it is opened and when it has grown.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import msgspec

from greenroom.core.errors import DataLoss
from greenroom.core.records import Record

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
        """Raises:
        DataLoss: a line in the middle can't be read (the last one may be torn: then it was never acted on).
        """
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
                if number < len(lines):
                    raise DataLoss(f"line {number} of the journal {path} can't be read: {error}") from error
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
        with new.open("wb") as file:
            for fence in self._fences.values():
                file.write(_encode(fence) + b"\n")
            for (operation, call), answer in self._results.items():
                file.write(_encode(_Result(operation_id=operation, call=call, answer=msgspec.Raw(answer))) + b"\n")
        new.replace(self._path)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._appended = 0

    def _append(self, entry: _Fence | _Result) -> None:
        line = _encode(entry) + b"\n"
        if os.write(self._fd, line) != len(line):
            raise OSError(28, "the journal could not be written", str(self._path))
        self._remember(entry)
        self._appended += len(line)
        if self._appended > REWRITE_BYTES:
            os.close(self._fd)
            self._rewrite()

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
        os.close(self._fd)
