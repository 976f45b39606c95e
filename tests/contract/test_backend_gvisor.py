"""The `gvisor` backend keeps the port's rules."""

from __future__ import annotations

import asyncio
import os

import pytest

from greenroom.core.errors import GreenroomError
from greenroom.sandbox.gvisor import GvisorBackend, binary
from greenroom.sandbox.port import Backend
from greenroom.testing.backend_conformance import BackendConformance

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("gVisor sandboxes need root")
    try:
        asyncio.run(binary.find())
    except GreenroomError as e:
        pytest.skip(f"no usable runsc: {e}")


class TestGvisorBackend(BackendConformance):
    async def make_backend(self) -> Backend:
        return GvisorBackend()
