"""Objects in a bucket, through `obstore` (S3, GCS, Azure; also a local or in-memory one, which the tests use)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.exceptions import NotFoundError as NoSuchObjectError

from greenroom.core.errors import Unavailable
from greenroom.snapshots.local import digest_file
from greenroom.snapshots.objects import CHUNK_BYTES, Stop, Stored, disk_full, garbled

if TYPE_CHECKING:
    from obstore.store import ObjectStore

#: Parts of one upload under way at once; with parts of 8 MiB this bounds the memory of an upload to 32 MiB.
UPLOAD_PARTS = 4
UPLOAD_PART_BYTES = 8 << 20

#: Keys deleted per call; S3 takes at most this many in one request.
DELETE_BATCH = 1000

#: What `BucketObjects.clock` puts there for a moment, and how often it tries when others do the same.
_CLOCK, CLOCK_TRIES = "clock", 5

_NOT_THERE = (FileNotFoundError, NoSuchObjectError)
_REFUSED = (PermissionDeniedError, UnauthenticatedError, PermissionError)


class BucketObjects:
    """Objects of one bucket. A bucket is durable when it answers, so nothing needs to be synced."""

    is_near = False

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name

    def __str__(self) -> str:
        return self._name

    def put_file(
        self, prefix: str, source: Path, staged: str, name: Callable[[int, str], str], stop: Stop
    ) -> tuple[int, str]:
        # Its key names its content, so it is read twice: from this machine's memory, far faster than it is sent.
        known = digest_file(source, stop, share=0.2)
        called = name(*known)
        if not called:
            stop.moved(known[0] * 0.8)
            return known
        key = f"{prefix}/{called}"
        sent = _Sent(source, stop)
        with self._errors(), self._keeps():
            obstore.put(
                self._store,
                key,
                sent.chunks(),
                use_multipart=known[0] > UPLOAD_PART_BYTES,
                chunk_size=UPLOAD_PART_BYTES,
                max_concurrency=UPLOAD_PARTS,
            )
            digest, size = hashlib.sha256(), 0
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
                stop.check()
                digest.update(chunk)
                size += len(chunk)
                stop.moved(len(chunk) * 0.4)
        if (size, digest.hexdigest()) != known:
            raise garbled(f"{self._name}/{key}", source)
        return known

    def seal(self, prefix: str) -> None:
        pass

    def put_new(self, key: str, data: bytes, staged: str) -> bool:
        try:
            with self._errors(), self._keeps():
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        try:
            with self._errors():
                if obstore.head(self._store, key)["size"] == 0:  # an empty object has no range
                    return b""
                return bytes(obstore.get_range(self._store, key, start=0, end=limit_bytes + 1))
        except _NOT_THERE:
            return None

    def download(self, key: str, target: Path, stop: Stop) -> int | None:
        try:
            with self._errors():
                result = obstore.get(self._store, key)
                size = 0
                with target.open("xb") as file:
                    for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                        stop.check()
                        size += file.write(chunk)
                        stop.moved(len(chunk))
        except _NOT_THERE:
            return None
        return size

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            batch = [*keys[start : start + DELETE_BATCH]]
            try:
                with self._errors():
                    obstore.delete(self._store, batch)
            except _NOT_THERE:  # a store without a call for many stops at the first that is missing
                for key in batch:
                    with self._errors(), contextlib.suppress(*_NOT_THERE):
                        obstore.delete(self._store, key)

    def list(self, prefix: str) -> Iterator[Stored]:
        with self._errors():
            for batch in obstore.list(self._store, prefix=prefix):
                for entry in batch:
                    yield Stored(entry["path"], entry["last_modified"].timestamp())

    def clock(self) -> float:
        for _ in range(CLOCK_TRIES):
            with self._errors(), contextlib.suppress(*_NOT_THERE):  # another one has just removed it
                obstore.put(self._store, _CLOCK, b"", use_multipart=False)
                now: float = obstore.head(self._store, _CLOCK)["last_modified"].timestamp()
                self.delete([_CLOCK])
                return now
        raise self._keeps_nothing("it is gone at once")

    def _keeps_nothing(self, why: str) -> Unavailable:
        return Unavailable(
            f"the snapshot store {self._name} does not keep what is put there: {why}; see that the bucket exists",
            reason="SNAPSHOT_STORE_REFUSES",
        )

    @contextlib.contextmanager
    def _keeps(self) -> Iterator[None]:
        """Who puts something and is told that it is not there has found no bucket. (To obstore that is the error of a
        file system, which would speak against this machine's disk.)"""
        try:
            yield
        except _NOT_THERE as error:
            raise self._keeps_nothing(_first_line(error)) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what obstore can't put in words of its own (a refused connection, a full disk) into ours."""
        try:
            yield
        except _REFUSED as error:
            raise Unavailable(
                f"the snapshot store {self._name} refuses access: {_first_line(error)}; check the credentials and what "
                "they may do there",
                reason="SNAPSHOT_STORE_REFUSES",
            ) from error
        except GenericError as error:
            if "os error 28" in str(error) or "os error 122" in str(error):
                raise disk_full(self._name) from error
            raise Unavailable(f"the snapshot store {self._name} does not answer: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Sent:
    """A file on its way into the bucket: hashed as it is read, so that it is read once, and stopped between two chunks.
    (Given a path, obstore says nothing until the whole file is there.)"""

    def __init__(self, source: Path, stop: Stop) -> None:
        self._source = source
        self._stop = stop
        self.digest = hashlib.sha256()
        self.size = 0

    def chunks(self) -> Iterator[bytes]:
        with self._source.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                self._stop.check()
                self.digest.update(chunk)
                self.size += len(chunk)
                self._stop.moved(len(chunk) * 0.4)  # and as much when it is read back
                yield chunk
