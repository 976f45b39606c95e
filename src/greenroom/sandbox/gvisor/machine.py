"""Whether this machine can run gVisor sandboxes."""

from __future__ import annotations

import os

from greenroom.core.errors import FailedPrecondition, GreenroomError
from greenroom.sandbox.gvisor import binary, hostname
from greenroom.sandbox.gvisor.cgroups import Cgroups
from greenroom.sandbox.port import BackendProbe, Check


async def probe_machine() -> BackendProbe:
    """See `Backend.probe`. What only trying can tell is left to `selftest`."""
    needed = [_check_machine(), _check_root()]
    checks = [*needed, Cgroups.detect("probe").check()]  # told, and no reason to refuse
    try:
        runsc = await binary.find()
    except (GreenroomError, OSError) as e:
        checks.append(Check(name="runsc", ok=False, detail=str(e), hint=binary.INSTALL_HINT))
        return BackendProbe(available=False, version="", fingerprint="", checks=tuple(checks))
    checks.append(Check(name="runsc", ok=True, detail=f"{runsc.path}, {runsc.version}, {runsc.platform}"))
    return BackendProbe(
        available=all(c.ok for c in needed),
        version=runsc.version,
        fingerprint=runsc.fingerprint,
        checks=tuple(checks),
    )


def _check_root() -> Check:
    root = os.geteuid() == 0
    return Check(
        name="root",
        ok=root,
        detail="yes" if root else "network namespaces and gVisor's own isolation need root",
        hint="" if root else "run the worker as root, or use a pool of backend `process`",
    )


def _check_machine() -> Check:
    try:
        hostname.program()
    except FailedPrecondition as e:
        return Check(name="machine", ok=False, detail=e.message)
    return Check(name="machine", ok=True, detail=os.uname().machine)
