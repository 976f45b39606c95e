"""Objects in a bucket, through `obstore` (S3, GCS, Azure; also a local or in-memory one, which the tests use)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.exceptions import NotFoundError as NoSuchObjectError

from greenroom.core.errors import DataLoss, Unavailable
from greenroom.snapshots.objects import CHUNK_BYTES, Stop, disk_full

if TYPE_CHECKING:
    from obstore.store import ObjectStore

#: Parts of one upload under way at once; with parts of 8 MiB this bounds the memory of an upload to 32 MiB.
UPLOAD_PARTS = 4
UPLOAD_PART_BYTES = 8 << 20

#: Keys deleted per call; S3 takes at most this many in one request.
DELETE_BATCH = 1000


class BucketObjects:
    """Objects of one bucket. A bucket is durable when it answers, so nothing needs to be synced."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name

    def __str__(self) -> str:
        return self._name

    def put_file(self, key: str, source: Path, stop: Stop) -> tuple[int, str]:
        sent = _Sent(source, stop)
        parts = source.stat().st_size > UPLOAD_PART_BYTES
        with self._errors():
            obstore.put(
                self._store,
                key,
                sent.chunks(),
                use_multipart=parts,
                chunk_size=UPLOAD_PART_BYTES,
                max_concurrency=UPLOAD_PARTS,
            )
            digest, size = hashlib.sha256(), 0
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
                stop.check()
                digest.update(chunk)
                size += len(chunk)
                stop.moved(len(chunk) / 2)
        if (size, digest.digest()) != (sent.size, sent.digest.digest()):
            raise DataLoss(f"{self._name}/{key}: what was stored differs from {source}", reason="SNAPSHOT_CORRUPT")
        return size, digest.hexdigest()

    def seal(self, prefix: str) -> None:
        pass

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            with self._errors():
                obstore.put(self._store, key, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        try:
            with self._errors():
                if obstore.head(self._store, key)["size"] == 0:  # an empty object has no range
                    return b""
                return bytes(obstore.get_range(self._store, key, start=0, end=limit_bytes + 1))
        except (FileNotFoundError, NoSuchObjectError):
            return None

    def directory(self, prefix: str) -> Path | None:
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
        except (FileNotFoundError, NoSuchObjectError):
            return None
        return size

    def delete(self, key: str) -> None:
        self._delete_all([key])

    def delete_below(self, prefix: str) -> None:
        self._delete_all([*self.list(prefix)])

    def list(self, prefix: str) -> Iterator[str]:
        with self._errors():
            for batch in obstore.list(self._store, prefix=prefix):
                for entry in batch:
                    yield entry["path"]

    def _delete_all(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETE_BATCH):
            with self._errors(), contextlib.suppress(FileNotFoundError, NoSuchObjectError):
                obstore.delete(self._store, [*keys[start : start + DELETE_BATCH]])

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what obstore can't put in words of its own (a refused connection, a full disk) into ours."""
        try:
            yield
        except GenericError as error:
            if "os error 28" in str(error) or "os error 122" in str(error):
                raise disk_full(self._name) from error
            first_line = str(error).strip().splitlines()[0]
            raise Unavailable(f"the snapshot store {self._name} does not answer: {first_line}") from error


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
                self._stop.moved(len(chunk) / 2)  # and half when it is read back
                yield chunk
