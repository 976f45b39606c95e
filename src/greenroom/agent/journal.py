"""What an agent remembers across its own death: the highest generation seen per actor, and the results of operations.

It is written before a call is answered, so a control plane that lost the answer gets the same one again, and a stale
control plane stays refused. It need not survive the death of the *machine*: then no sandbox has survived either. Hence
SQLite without syncs, which costs some 30 us a write.
"""

from __future__ import annotations

from pathlib import Path

import apsw

#: Results kept. An operation is asked for again within minutes, and a worker does at most some hundred a second.
KEPT_RESULTS = 20_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS fence (actor_uid TEXT PRIMARY KEY, generation INTEGER NOT NULL) WITHOUT ROWID, STRICT;
CREATE TABLE IF NOT EXISTS result (
    id INTEGER PRIMARY KEY, operation TEXT NOT NULL, call TEXT NOT NULL, answer BLOB NOT NULL, UNIQUE (operation, call)
) STRICT;
"""


class Journal:
    def __init__(self, path: Path) -> None:
        self._db = apsw.Connection(str(path))
        self._db.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;")
        self._db.execute(_SCHEMA)
        self._fences: dict[str, int] = dict(self._db.execute("SELECT actor_uid, generation FROM fence"))

    def generation(self, actor_uid: str) -> int:
        """The highest generation seen; 0 for an actor never seen."""
        return self._fences.get(actor_uid, 0)

    def raise_fence(self, actor_uid: str, generation: int) -> None:
        if generation > self.generation(actor_uid):
            self._db.execute("INSERT OR REPLACE INTO fence VALUES (?, ?)", (actor_uid, generation))
            self._fences[actor_uid] = generation

    def forget(self, actor_uid: str) -> None:
        """The actor is deleted for ever; its uid is never used again."""
        self._db.execute("DELETE FROM fence WHERE actor_uid = ?", (actor_uid,))
        self._fences.pop(actor_uid, None)

    def answer(self, operation_id: str, call: str) -> bytes | None:
        for (data,) in self._db.execute(
            "SELECT answer FROM result WHERE operation = ? AND call = ?", (operation_id, call)
        ):
            return bytes(data)
        return None

    def record(self, operation_id: str, call: str, answer: bytes) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO result (operation, call, answer) VALUES (?, ?, ?)", (operation_id, call, answer)
        )
        if (last := self._db.last_insert_rowid()) % 1000 == 0:
            self._db.execute("DELETE FROM result WHERE id <= ?", (last - KEPT_RESULTS,))

    def close(self) -> None:
        self._db.close()
