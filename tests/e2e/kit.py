"""What an end-to-end test does to a server, in its own words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.gc import blobs
from greenroom.core.records import (
    Actor,
    Operation,
    OperationState,
    Pool,
    Snapshot,
    Template,
    TemplateSpec,
    Worker,
)
from greenroom.testing.live import LiveServer


@dataclass(slots=True)
class Kit:
    live: LiveServer
    image: str

    @property
    def client(self) -> Any:
        return self.live.client

    def apply(self, name: str = "counter", **fields: Any) -> Template:
        """Applies a template and waits until it is Ready or Failed."""
        fields.setdefault("image", self.image)
        fields.setdefault("readyz", {"path": "/healthz"})
        return self.live.apply(name, msgspec.convert(fields, TemplateSpec))

    def template(self, name: str) -> Template:
        request = pb.GetTemplateRequest(namespace="default", name=name)
        return convert.from_message(Template, self.client.templates.GetTemplate(request))

    def templates(self) -> list[Template]:
        answer = self.client.templates.ListTemplates(pb.ListTemplatesRequest())
        return [convert.from_message(Template, message) for message in answer.templates]

    def pools(self) -> list[Pool]:
        answer = self.client.pools.ListPools(pb.ListPoolsRequest())
        return [convert.from_message(Pool, message) for message in answer.pools]

    def create(self, *names: str, template: str = "counter") -> None:
        for name in names:
            self.client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name=name, template=template))

    def actor(self, name: str) -> Actor:
        request = pb.GetActorRequest(namespace="default", name=name)
        return convert.from_message(Actor, self.client.actors.GetActor(request))

    def snapshot(self, snapshot_id: str) -> Snapshot:
        answer = self.client.snapshots.GetSnapshot(pb.GetSnapshotRequest(id=snapshot_id))
        return convert.from_message(Snapshot, answer)

    def stored(self, snapshot_id: str) -> dict[str, Path]:
        """Where the files of a snapshot lie, by name, and its manifest as "manifest"."""
        snapshot = self.snapshot(snapshot_id)
        keys = dict(zip(("manifest", *(f.name for f in snapshot.files)), blobs.keys_of(snapshot), strict=True))
        return {name: self.live.data_dir / "snapshots" / key for name, key in keys.items()}

    def actors(self) -> list[Actor]:
        answer = self.client.actors.ListActors(pb.ListActorsRequest())
        return [convert.from_message(Actor, message) for message in answer.actors]

    def workers(self) -> list[Worker]:
        answer = self.client.workers.ListWorkers(pb.ListWorkersRequest())
        return [convert.from_message(Worker, message) for message in answer.workers]

    def act(self, verb: str, name: str) -> Operation:
        """Resume, Suspend, Pause or Delete; the operation has ended well."""
        request = pb.ActorRequest(namespace="default", name=name)
        operation = convert.from_message(Operation, getattr(self.client.actors, f"{verb}Actor")(request))
        assert operation.state is OperationState.DONE, operation
        return operation

    def get(self, name: str, path: str = "/inc") -> dict[str, Any]:
        answer = self.live.request(f"default/{name}", path)
        assert answer.status == 200, (answer.status, answer.body)
        return json.loads(answer.body)  # type: ignore[no-any-return]


def until(read: Callable[[], Any], good: Callable[[Any], bool], timeout_s: float = 60.0) -> Any:
    """What ``read`` returns once it is good."""
    end = time.monotonic() + timeout_s
    while not good(value := read()):
        assert time.monotonic() < end, f"still {value}"
        time.sleep(0.05)
    return value
