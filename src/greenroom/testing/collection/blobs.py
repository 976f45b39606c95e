"""A snapshot store: uploads of the same content side by side, a collector, and a bucket that carries out what it was
asked at any later time, any number of times.

The promises, numbered as there is need to speak of them:

B1  what a manifest refers to is in the bucket
B2  no object is deleted whose blob is not condemned
B3  nothing leaves CONDEMNED, and no key is used by two uploads
N   an upload whose lease runs can be committed once everything is put
L   when nothing goes wrong any more, nothing is in the bucket but what manifests refer to
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from greenroom.core.errors import LeaseLost
from greenroom.core.gc import blobs as rules
from greenroom.core.gc.blobs import Blob, BlobLease, BlobState, Manifest
from greenroom.testing.collection.search import Violation

#: A lease runs until this; all happens at 0, and one that has run out did so before.
LATER = 1.0
NOW = 0.0


class Writer(NamedTuple):
    """An upload under way. ``keys``: of all that its manifest will refer to; ``puts``: those that it has to put, and
    that the bucket has not answered yet."""

    id: str
    keys: tuple[str, ...]
    puts: frozenset[str]


class State(NamedTuple):
    """``puts``, ``deletes``: requests that were sent, each of which may arrive whenever it likes. ``read``: keys that
    somebody is reading, by its lease."""

    blobs: tuple[Blob, ...]
    leases: tuple[BlobLease, ...]
    manifests: tuple[Manifest, ...]
    writers: tuple[Writer, ...]
    bucket: frozenset[str]
    puts: frozenset[str]
    deletes: frozenset[str]
    uploads: int
    reads: int
    condemned: frozenset[tuple[str, str]]
    used: frozenset[str]


@dataclass(frozen=True)
class Store:
    """So many uploads, each of all of these contents, and readers. ``settles``: it is looked whether things settle."""

    uploads: int = 2
    contents: tuple[str, ...] = ("x",)
    reads: int = 1
    settles: bool = True

    def initial(self) -> State:
        none = frozenset[str]()
        return State((), (), (), (), none, none, none, 0, 0, frozenset(), none)

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        if s.uploads < self.uploads:
            yield from self._begins(s)
        for writer in s.writers:
            yield from self._goes_on(s, writer)
        for lease in s.leases:
            if rules.is_running(lease, NOW):
                leases = tuple(replace(e, expires_at=NOW) if e.id == lease.id else e for e in s.leases)
                yield f"the lease {lease.id} runs out", s._replace(leases=leases)
        for manifest in s.manifests:
            left = tuple(m for m in s.manifests if m.id != manifest.id)
            yield f"manifest {manifest.id} is deleted", s._replace(manifests=left)
            if s.reads < self.reads:
                lease = rules.read(manifest, f"read-{s.reads}", LATER)
                yield f"{manifest.id} is read", s._replace(leases=(*s.leases, lease), reads=s.reads + 1)
        if marked := rules.mark(s.blobs, s.manifests, s.leases, NOW):
            yield "marked", _written(s, marked)
        for blob in rules.condemned(s.blobs):
            if blob.key not in s.deletes:
                yield f"delete of {blob.key} is sent", s._replace(deletes=s.deletes | {blob.key})
            elif blob.key not in s.bucket:
                left_blobs = tuple(b for b in s.blobs if b != blob)
                yield f"{blob.key} is forgotten", s._replace(blobs=left_blobs)
        for key in s.puts - s.bucket:
            yield f"put of {key} arrives", s._replace(bucket=s.bucket | {key})
        for key in s.deletes & s.bucket:
            self._may_delete(s, key)
            yield f"delete of {key} arrives", s._replace(bucket=s.bucket - {key})
        # Objects of any age: with generations none without a row can belong to anybody.
        for key in _strays(s, s.bucket):
            yield f"{key} is scrubbed", s._replace(bucket=s.bucket - {key})

    def _begins(self, s: State) -> Iterator[tuple[str, State]]:
        name = f"up-{s.uploads}"
        upload = rules.begin(s.blobs, dict.fromkeys(self.contents, 1), name, LATER)
        puts = frozenset(blob.key for blob in upload.new)
        if again := {blob.upload for blob in upload.new} & s.used:
            raise Violation(f"B3: {again} were used before")
        writer = Writer(name, tuple(sorted(upload.keys.values())), puts)
        after = _written(s, list(upload.new))._replace(
            leases=(*s.leases, upload.lease),
            writers=(*s.writers, writer),
            puts=s.puts | puts,
            uploads=s.uploads + 1,
            used=s.used | {name},
        )
        yield f"upload {name} begins", after

    def _goes_on(self, s: State, writer: Writer) -> Iterator[tuple[str, State]]:
        others = tuple(w for w in s.writers if w.id != writer.id)
        yield f"upload {writer.id} dies", s._replace(writers=others)
        for key in writer.puts & s.bucket:
            rows = [rules.stored(blob) for blob in s.blobs if blob.key == key]
            waits = writer._replace(puts=writer.puts - {key})
            after = _written(s, rows)._replace(writers=tuple(sorted((*others, waits))))
            yield f"{writer.id} hears that {key} is there", after
        if writer.puts:
            return
        lease = next((lease for lease in s.leases if lease.id == writer.id), None)
        manifest = Manifest(id=writer.id, blobs=frozenset(writer.keys))
        rows = [blob for blob in s.blobs if blob.key in manifest.blobs]
        try:
            manifest = rules.commit(lease, writer.id, manifest, rows, NOW)
        except LeaseLost:
            if lease is not None and rules.is_running(lease, NOW):
                raise Violation(f"N: upload {writer.id} is refused and its lease runs") from None
            return
        leases = tuple(lease for lease in s.leases if lease.id != writer.id)
        manifests = tuple(sorted((*s.manifests, manifest), key=lambda m: m.id))
        yield f"{writer.id} is committed", s._replace(leases=leases, manifests=manifests, writers=others)

    def _may_delete(self, s: State, key: str) -> None:
        row = next((blob for blob in s.blobs if blob.key == key), None)
        if row is not None and row.state is not BlobState.CONDEMNED:
            raise Violation(f"B2: {key} is deleted and is {row.state}")

    def check(self, state: State) -> None:
        for manifest in state.manifests:
            if missing := manifest.blobs - state.bucket:
                raise Violation(f"B1: {missing} of manifest {manifest.id} are not in the bucket")
        for lease in state.leases:
            if lease.id.startswith("read") and rules.is_running(lease, NOW) and lease.covers - state.bucket:
                raise Violation(f"B1: {lease.covers - state.bucket} are gone while they are read")
        for blob in state.blobs:
            if (blob.digest, blob.upload) in state.condemned and blob.state is not BlobState.CONDEMNED:
                raise Violation(f"B3: {blob.key} was condemned and is {blob.state}")
        if self.settles:
            self._settles(state)

    def _settles(self, s: State) -> None:
        """Uploads have died and their leases have run out; requests that were sent have arrived, the puts last."""
        s = s._replace(writers=(), leases=(), bucket=(s.bucket - s.deletes) | s.puts)
        s = _written(s, rules.mark(s.blobs, s.manifests, (), NOW))
        gone = {blob.key for blob in rules.condemned(s.blobs)}
        bucket = s.bucket - gone
        s = s._replace(blobs=tuple(b for b in s.blobs if b.key not in gone), bucket=bucket)
        left = s.bucket - set(_strays(s, s.bucket))
        if left != frozenset().union(*(m.blobs for m in s.manifests)):
            raise Violation(f"L: {sorted(left)} are in the bucket for ever")


def _strays(s: State, bucket: frozenset[str]) -> list[str]:
    rows = {blob.key for blob in s.blobs}
    old = dict.fromkeys(bucket, rules.SCRUB_AGE_S + 1)
    return rules.strays(old, rules.without_row(bucket, rows), rows, restored=False)


def _written(s: State, rows: list[Blob]) -> State:
    found = {blob.key: blob for blob in s.blobs} | {blob.key: blob for blob in rows}
    condemned = s.condemned | {(b.digest, b.upload) for b in rows if b.state is BlobState.CONDEMNED}
    return s._replace(blobs=tuple(found[key] for key in sorted(found)), condemned=condemned)
