"""What an out-of-tree backend's test looks like: how to make one, and what its actors answer."""

from __future__ import annotations

import json
from pathlib import Path

from greenroom_inmemory import InMemoryBackend

from greenroom.sandbox.port import Backend, SandboxClass
from greenroom.testing.backend_conformance import BackendConformance, Reading


class TestInMemoryBackend(BackendConformance):
    lacks = frozenset({"command", "exec", "logs", "warm"})
    survives_agent = False

    async def make_backend(self) -> Backend:
        return InMemoryBackend()

    async def make_class(self, tmp_path: Path) -> SandboxClass:
        return SandboxClass(rootfs=Path("/"), image_digest="", argv=("none",), env=())

    def read(self, body: bytes) -> Reading:
        said = json.loads(body)
        return Reading(said["count"], said["count"], said["actor"], said["generation"], said["boot"])
