"""Proof, in about half a second, that this runsc can do on this machine what the backend will ask of it."""

from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path

from greenroom.core.agentapi import Identity
from greenroom.core.errors import FailedPrecondition, GreenroomError, Internal, ResourceExhausted
from greenroom.core.records import Resources
from greenroom.sandbox.gvisor import hostname
from greenroom.sandbox.gvisor.box import Box, Factory, finish
from greenroom.sandbox.gvisor.control import Control, Target
from greenroom.sandbox.gvisor.failures import disk_is_full
from greenroom.sandbox.gvisor.naming import set_hostname
from greenroom.sandbox.gvisor.stacks import is_frozen
from greenroom.sandbox.gvisor.urpc import UrpcError
from greenroom.sandbox.port import SandboxClass

#: A stuck sandbox (gVisor's KVM platform hangs on some machines) must not stop a worker's start for ever.
SELF_TEST_TIMEOUT_S = 60.0
_DIRECTORIES = ("dev", "proc", "sys", "run", "tmp")


async def self_test(factory: Factory, home: Path) -> None:
    """Creates, starts, freezes, saves, thaws, restores elsewhere and renames a sandbox; leaves nothing.

    Raises:
        FailedPrecondition: naming the step that failed (reason ``SELF_TEST_FAILED``).
        ResourceExhausted: the disk is full (reason ``DISK_FULL``), which tells nothing about gVisor.
    """
    step = "create"
    boxes: list[Box] = []
    try:
        async with asyncio.timeout(SELF_TEST_TIMEOUT_S):
            cls = await asyncio.to_thread(_make_image, home)
            for made in await asyncio.gather(factory.create(cls), factory.create(cls), return_exceptions=True):
                if isinstance(made, BaseException):
                    raise made
                boxes.append(made)
            first, second = boxes
            control, image = factory.control, home / "image"
            for number, box in enumerate(boxes):
                box.occupy(Identity(namespace="greenroom", name=f"self-test-{number}", uid="0", generation=1))
            step = "start"
            await control.start(first.target)
            step = "freeze"
            await _expect(control, first.target, frozen=False)
            await control.pause(first.target)
            await _expect(control, first.target, frozen=True)
            step = "checkpoint"
            await control.checkpoint(first.target, image)
            step = "thaw"
            await control.resume(first.target)
            step = "restore"
            await control.restore(second.target, image)
            step = "set the host name"
            await set_hostname(control, second.target, "self-test")
    except (GreenroomError, UrpcError, TimeoutError, OSError) as e:
        if is_full(e, home.parent):
            raise ResourceExhausted(f"no room for step {step!r} of gVisor's self-test: {e}", reason="DISK_FULL") from e
        log = f"; runsc says: {factory.log_of(boxes[-1])}" if boxes else ""
        raise FailedPrecondition(
            f"gVisor's self-test failed at step {step!r}: {e or 'no answer in time'}{log}", reason="SELF_TEST_FAILED"
        ) from e
    finally:
        await finish(_clean_up(factory, boxes, home))


async def _expect(control: Control, target: Target, *, frozen: bool) -> None:
    if is_frozen(await control.stacks(target)) is not frozen:
        raise Internal(f"a sandbox that is {'frozen' if frozen else 'running'} does not look so")


def is_full(error: Exception, disk: Path) -> bool:
    """Whether a step failed because the disk is full; runsc does not always say so."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return (isinstance(error, GreenroomError) and error.reason == "DISK_FULL") or disk_is_full(disk)


def _make_image(home: Path) -> SandboxClass:
    """An image with one program, which waits for ever."""
    shutil.rmtree(home, ignore_errors=True)
    rootfs = home / "rootfs"
    for name in _DIRECTORIES:
        (rootfs / name).mkdir(parents=True)
    (home / "image").mkdir()
    program = rootfs / "wait"
    program.write_bytes(hostname.program())
    program.chmod(0o755)
    return SandboxClass(
        rootfs=rootfs,
        image_digest="self-test",
        argv=("/wait",),
        env=(),
        port=0,
        resources=Resources(memory_bytes=64 << 20, pids=16),
    )


async def _clean_up(factory: Factory, boxes: list[Box], home: Path) -> None:
    await asyncio.gather(*(factory.dispose(box) for box in boxes))
    await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
