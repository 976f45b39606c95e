"""Giving a running sandbox another host name: after a restore it has that of the snapshot."""

from __future__ import annotations

import asyncio
import os

from greenroom.core.errors import FailedPrecondition
from greenroom.sandbox.gvisor import hostname
from greenroom.sandbox.gvisor.control import Command, Control, Target
from greenroom.sandbox.gvisor.spec import INIT

#: It takes 4 ms.
RENAME_TIMEOUT_S = 30.0


async def set_hostname(control: Control, target: Target, name: str) -> None:
    """Runs `hostname.program` as root with the one capability that this needs; nothing of the actor gets it.

    Raises:
        FailedPrecondition: gVisor refused (reason ``HOSTNAME``).
        TimeoutError: it did not end; so in a frozen sandbox.
    """
    command = Command(
        program=INIT,
        argv=(INIT, name),
        env={},
        cwd="/",
        uid=0,
        gid=0,
        capabilities=hostname.CAPABILITIES,
    )
    async with asyncio.timeout(RENAME_TIMEOUT_S):
        started = await control.execute(target, command, ())
        errno = await started.wait()
    if errno:
        raise FailedPrecondition(f"setting the host name to {name!r} failed: {os.strerror(errno)}", reason="HOSTNAME")
