"""The snapshot store of one actor: suspends that are tried more than once, a collector, a scrub, and a bucket that
carries out what it was asked at any later time, any number of times.

The promises, numbered as there is need to speak of them:

B1  what the row of a snapshot refers to is in the bucket, unless it is condemned
B2  no object is deleted that such a row refers to
B3  nothing leaves CONDEMNED
N   a suspend that goes on undisturbed is never refused its commit
L   when nothing goes wrong any more, nothing is in the bucket but what rows refer to
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from greenroom.core.gc import blobs as rules
from greenroom.core.records import FileDigest, Retention, Snapshot, SnapshotScope, SnapshotState
from greenroom.testing.collection.search import Violation

UID = "ac"
Files = tuple[FileDigest, ...]
NONE: frozenset[str] = frozenset()


class Suspend(NamedTuple):
    """A running operation. ``base``: what the actor woke from; ``contents``: what its files are."""

    id: str
    contents: tuple[str, ...]
    base: Files
    attempts: int = 0


class Attempt(NamedTuple):
    """To publish a snapshot. ``puts``: keys that it has put and of which the bucket has not answered; ``sent``: its
    manifest."""

    snapshot_id: str
    number: int
    files: Files
    puts: frozenset[str]
    sent: bool = False


class Scrubbing(NamedTuple):
    """A pass under way: what it listed, and what it has read so far."""

    listed: frozenset[str]
    uploading: frozenset[str]
    rows: tuple[Snapshot, ...] | None = None


class State(NamedTuple):
    """``puts``, ``deletes``: requests that were sent, each of which may arrive whenever it likes. ``stored``: manifests
    in the bucket. ``manifests``: those on their way. ``sweeping``: snapshots whose objects are being deleted.
    ``needed``: what the actor wakes from, and its way back. ``condemned``: all that ever were."""

    rows: tuple[Snapshot, ...] = ()
    needed: tuple[str, ...] = ()
    suspend: Suspend | None = None
    attempts: tuple[Attempt, ...] = ()
    bucket: frozenset[str] = NONE
    stored: tuple[tuple[str, Files], ...] = ()
    manifests: frozenset[tuple[str, Files]] = frozenset()
    puts: frozenset[str] = NONE
    deletes: frozenset[str] = NONE
    sweeping: frozenset[tuple[str, frozenset[str]]] = frozenset()
    scrub: Scrubbing | None = None
    scrubs: int = 0
    suspends: int = 0
    remembered: frozenset[Files] = frozenset()
    condemned: frozenset[str] = NONE
    deleted: bool = False


@dataclass(frozen=True)
class Store:
    """So many suspends, each tried so often, with one of these contents.

    Attributes:
        remembers: a worker takes for stored what was so at any earlier time, not only what it is told.
        scrubs: passes of the scrub while all this goes on.
        rows_first: the scrub reads rows before operations (it must not).
        cleans_late: an attempt that failed deletes what it put also after it sent its manifest (it must not).
        calm: suspends neither fail nor die; for what is many steps away.
        settles: it is looked whether things settle.
    """

    suspends: int = 2
    tries: int = 2
    contents: tuple[tuple[str, ...], ...] = (("x",),)
    remembers: bool = False
    scrubs: int = 0
    rows_first: bool = False
    cleans_late: bool = False
    calm: bool = False
    settles: bool = True

    def initial(self) -> State:
        return State()

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        if s.suspend is None and not s.deleted:
            if s.suspends < self.suspends:
                for contents in self.contents:
                    begun = Suspend(f"{s.suspends:032x}", contents, _files_of(s, s.needed[:1]))
                    yield f"a suspend of {contents} begins", s._replace(suspend=begun, suspends=s.suspends + 1)
            if len(s.needed) == rules.NEEDED:
                yield "the actor goes back to the snapshot before", s._replace(needed=s.needed[1:])
            yield "the actor is deleted", _condemned(s, s.rows)._replace(needed=(), deleted=True)
        if s.suspend is not None:
            yield from self._tries(s, s.suspend)
            yield from () if self.calm else self._backs_out(s, s.suspend)
        for attempt in s.attempts:
            yield from self._goes_on(s, attempt)
        if over := rules.expired(s.rows, s.needed, Retention(), 0.0):
            yield "what is over is condemned", _condemned(s, over)
        yield from self._sweeps(s)
        yield from self._scrubs(s)
        yield from self._arrives(s)

    # --- suspends -----------------------------------------------------------------------------------------

    def _tries(self, s: State, suspend: Suspend) -> Iterator[tuple[str, State]]:
        if suspend.attempts == self.tries:
            return
        number = suspend.attempts
        tried = suspend._replace(attempts=number + 1)
        if (found := dict(s.stored).get(suspend.id)) is not None:
            attempt = Attempt(suspend.id, number, found, NONE, sent=True)
            yield f"attempt {number} finds the manifest", s._replace(suspend=tried, attempts=_more(s, attempt))
            return
        bases = {suspend.base} | (s.remembered if self.remembers else frozenset())
        for base in sorted(bases, key=repr):
            name = rules.upload_name(suspend.id, number)
            files = tuple(
                FileDigest(name=c, size_bytes=1, sha256=sha256, upload=reused.upload if reused else name)
                for c in suspend.contents
                for sha256 in (c.encode().hex().rjust(64, "0"),)
                for reused in (rules.reusable(base, 1, sha256),)
            )
            keys = frozenset(rules.blob_key(UID, f) for f in files if f.upload == name)
            attempt = Attempt(suspend.id, number, files, keys)
            after = s._replace(suspend=tried, attempts=_more(s, attempt), puts=s.puts | keys)
            yield f"attempt {number} at {_short(suspend.id)} puts {len(keys)} files", after

    def _goes_on(self, s: State, attempt: Attempt) -> Iterator[tuple[str, State]]:
        what = f"attempt {attempt.number} at {_short(attempt.snapshot_id)}"
        left = s._replace(attempts=tuple(a for a in s.attempts if a != attempt))
        if (not attempt.sent or self.cleans_late) and not self.calm:
            own = {rules.blob_key(UID, f) for f in attempt.files if f.upload == _name(attempt)}
            yield f"{what} fails", left._replace(deletes=s.deletes | own)
        if not self.calm:
            yield f"{what} dies", left
        for key in attempt.puts & s.bucket:
            yield (
                f"{what} hears that {key[-12:]} is there",
                left._replace(attempts=_more(left, attempt._replace(puts=attempt.puts - {key}))),
            )
        if not attempt.puts and not attempt.sent:
            sent = left._replace(
                attempts=_more(left, attempt._replace(sent=True)),
                manifests=s.manifests | {(attempt.snapshot_id, attempt.files)},
            )
            yield f"{what} sends its manifest", sent
        answered = attempt.sent and (attempt.snapshot_id, attempt.files) in s.stored
        if answered and s.suspend is not None and s.suspend.id == attempt.snapshot_id:
            yield from self._commits(s, left, s.suspend, attempt)

    def _commits(self, s: State, left: State, suspend: Suspend, attempt: Attempt) -> Iterator[tuple[str, State]]:
        made = _snapshot(suspend.id, attempt.files)
        if missing := rules.not_there(made, [r for r in s.rows if r.id in s.needed]):
            if not self.remembers:
                raise Violation(f"N: suspend {_short(suspend.id)} is refused: {missing}")
            return
        yield (
            f"suspend {_short(suspend.id)} is committed",
            left._replace(
                rows=tuple(sorted((*s.rows, made), key=lambda r: r.id)),
                needed=(made.id, *s.needed[:1]),
                suspend=None,
                remembered=s.remembered | {attempt.files} if self.remembers else s.remembered,
            ),
        )

    def _backs_out(self, s: State, suspend: Suspend) -> Iterator[tuple[str, State]]:
        yield f"suspend {_short(suspend.id)} is backed out, and nobody cleans up", s._replace(suspend=None)
        listed = {key for key in s.bucket if (p := rules.place_of(key)) and p.snapshot_id == suspend.id}
        if listed:
            after = s._replace(suspend=None, deletes=s.deletes | listed)
            yield f"suspend {_short(suspend.id)} is backed out and retracted", after

    # --- collection ---------------------------------------------------------------------------------------

    def _sweeps(self, s: State) -> Iterator[tuple[str, State]]:
        under_way = {snapshot_id for snapshot_id, _ in s.sweeping}
        for row in s.rows:
            if row.state is SnapshotState.CONDEMNED and row.id not in under_way:
                keys = frozenset(rules.doomed(row, s.rows))
                after = s._replace(sweeping=s.sweeping | {(row.id, keys)}, deletes=s.deletes | keys)
                yield f"the sweep of {_short(row.id)} begins", after
        for snapshot_id, keys in s.sweeping:
            if not keys & s.bucket:
                rows = tuple(r for r in s.rows if r.id != snapshot_id)
                after = s._replace(rows=rows, sweeping=s.sweeping - {(snapshot_id, keys)})
                yield f"the row of {_short(snapshot_id)} is removed", after

    def _scrubs(self, s: State) -> Iterator[tuple[str, State]]:
        """Objects of any age, found once: with intent first nothing depends on more."""
        uploading = frozenset((s.suspend.id,)) if s.suspend else NONE
        if s.scrub is None:
            if s.scrubs < self.scrubs and s.bucket:
                begun = Scrubbing(s.bucket, NONE if self.rows_first else uploading, s.rows if self.rows_first else None)
                yield "a scrub lists, and reads", s._replace(scrub=begun, scrubs=s.scrubs + 1)
            return
        rows = s.scrub.rows if s.scrub.rows is not None else s.rows
        found = rules.strays(sorted(s.scrub.listed), rows, uploading if self.rows_first else s.scrub.uploading)
        yield f"a scrub reads the rest and finds {len(found)}", s._replace(scrub=None, deletes=s.deletes | {*found})

    def _arrives(self, s: State) -> Iterator[tuple[str, State]]:
        for key in s.puts - s.bucket:
            yield f"the put of {key[-12:]} arrives", s._replace(bucket=s.bucket | {key})
        for snapshot_id, files in s.manifests:
            key = rules.manifest_key(UID, snapshot_id)
            if key not in s.bucket:
                stored = tuple(sorted((*(m for m in s.stored if m[0] != snapshot_id), (snapshot_id, files))))
                yield f"a manifest of {_short(snapshot_id)} arrives", s._replace(stored=stored, bucket=s.bucket | {key})
        for key in s.deletes & s.bucket:
            if key in _owned(s):
                raise Violation(f"B2: {key[-12:]} is deleted, and a snapshot refers to it")
            stored = tuple(m for m in s.stored if rules.manifest_key(UID, m[0]) != key)
            yield f"the delete of {key[-12:]} arrives", s._replace(bucket=s.bucket - {key}, stored=stored)

    # --- promises -----------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        if missing := _owned(state) - state.bucket:
            raise Violation(f"B1: {sorted(missing)} are not in the bucket")
        for row in state.rows:
            if row.id in state.condemned and row.state is not SnapshotState.CONDEMNED:
                raise Violation(f"B3: {row.id} was condemned and is {row.state}")
        if self.settles:
            self._settles(state)

    def _settles(self, s: State) -> None:
        """The suspend is backed out; requests that were sent have arrived, the puts last; what is condemned is swept,
        and the bucket is scrubbed."""
        manifests = {rules.manifest_key(UID, snapshot_id) for snapshot_id, _ in s.manifests}
        bucket = (s.bucket - s.deletes) | s.puts | manifests
        for row in s.rows:
            if row.state is SnapshotState.CONDEMNED:
                bucket -= {*rules.doomed(row, s.rows)}
        rows = [r for r in s.rows if r.state is not SnapshotState.CONDEMNED]
        left = bucket - {*rules.strays(sorted(bucket), rows, ())}
        if left != _owned(s):
            raise Violation(f"L: {sorted(left)} are in the bucket for ever")


def _owned(s: State) -> frozenset[str]:
    return frozenset(k for r in s.rows if r.state is not SnapshotState.CONDEMNED for k in rules.keys_of(r))


def _files_of(s: State, ids: Iterable[str]) -> Files:
    return tuple(file for row in s.rows if row.id in ids for file in row.files)


def _more(s: State, attempt: Attempt) -> tuple[Attempt, ...]:
    return tuple(sorted((*s.attempts, attempt), key=lambda a: (a.snapshot_id, a.number)))


def _name(attempt: Attempt) -> str:
    return rules.upload_name(attempt.snapshot_id, attempt.number)


def _condemned(s: State, over: Iterable[Snapshot]) -> State:
    ids = {r.id for r in over}
    rows = tuple(replace(r, state=SnapshotState.CONDEMNED) if r.id in ids else r for r in s.rows)
    return s._replace(rows=rows, condemned=s.condemned | ids)


def _short(snapshot_id: str) -> str:
    return snapshot_id.lstrip("0") or "0"


def _snapshot(snapshot_id: str, files: Files) -> Snapshot:
    return Snapshot(
        id=snapshot_id,
        namespace="default",
        actor="a",
        actor_uid=UID,
        template="t",
        generation=1,
        scope=SnapshotScope.MEMORY,
        backend="sim",
        fingerprint="one",
        image_digest="",
        hostname="a",
        created_at=float(int(snapshot_id, 16)),
        files=files,
    )
