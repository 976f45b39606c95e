"""The `sim` backend keeps the port's rules."""

from __future__ import annotations

import json
from pathlib import Path

from greenroom.sandbox.port import Backend, SandboxClass
from greenroom.sandbox.sim import SimBackend, SimScript
from greenroom.testing.backend_conformance import BackendConformance, Reading


class TestSimBackend(BackendConformance):
    survives_agent = False

    async def make_backend(self) -> Backend:
        return SimBackend(SimScript())

    async def make_class(self, tmp_path: Path) -> SandboxClass:
        return SandboxClass(rootfs=Path("/"), image_digest="sha256:0", argv=("none",), env=())

    def read(self, body: bytes) -> Reading:
        said = json.loads(body)
        name = said["actor"].rpartition("/")[2]
        return Reading(said["count"], said["file_count"], name, said["generation"], said["boot"])

    def command(self, what: str, *args: str) -> tuple[str, ...]:
        return () if what == "complain" else (what, *args)
