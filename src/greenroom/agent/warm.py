"""Keeps sandboxes ready before they are needed, off the wake path.

Sandboxes are made for the classes that woke here last (or that the control plane announced): the latest class gets as
many as ``size``, others keep one while there is room. Making one costs about 0.1 s of CPU, so it waits until no wake
is under way and the last one's actor has had time to answer; one at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection

import structlog

from greenroom.core.errors import FailedPrecondition, NotFound
from greenroom.sandbox.port import SandboxClass, Warmer

log = structlog.get_logger(__name__)

#: Classes remembered; one more is forgotten, the longest unused first.
MAX_CLASSES = 64
#: After a wake nothing is made for this long: the actor works on its first answer then, with cold caches, for 10 to
#: 20 ms, and would share the cores. Longer would leave the pool empty between wakes that come ten a second.
QUIET_S = 0.05
#: After a failure (no memory, no disk) nothing is made for this long.
PAUSE_AFTER_FAILURE_S = 5.0


def plan(wanted: list[str], ready: dict[str, int], size: int) -> tuple[list[str], list[str]]:
    """(to make, to drop), one entry per sandbox. ``wanted`` are class digests, the latest used first. Pure."""
    others = wanted[1:size]
    target = {digest: 1 for digest in others}
    if wanted and size:
        target[wanted[0]] = size - len(others)
    make = [d for d in wanted for _ in range(target.get(d, 0) - ready.get(d, 0))]
    drop = [d for d, count in ready.items() for _ in range(count - target.get(d, 0))]
    return make, drop


class WarmPool:
    """``keep_images`` is told, before anything is made, of which images (digests) there are warm sandboxes or soon will
    be; it raises `NotFound` when one is not here any more."""

    def __init__(
        self, warmer: Warmer, size: int, keep_images: Callable[[Collection[str]], Awaitable[None]] | None = None
    ) -> None:
        self._warmer = warmer
        self._size = size
        self._keep_images = keep_images
        self._image_of: dict[str, str] = {}  # by class digest, of those that a sandbox was made of
        self._classes: OrderedDict[str, SandboxClass] = OrderedDict()  # latest last
        self._busy = 0
        self._making = ""
        self._turn = asyncio.Lock()  # of whoever makes and drops sandboxes
        self._quiet_until = 0.0
        self._rests = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name="warm-pool")

    def want(self, cls: SandboxClass) -> None:
        """This class is in use here: keep some ready."""
        self._classes[cls.digest] = cls
        self._classes.move_to_end(cls.digest)
        while len(self._classes) > MAX_CLASSES:
            self._classes.popitem(last=False)
        self._changed.set()

    def unwant(self, image_digest: str) -> None:
        """Nothing of this image will wake here again."""
        for digest in [d for d, c in self._classes.items() if c.image_digest == image_digest]:
            del self._classes[digest]
        self._changed.set()

    def rest(self, yes: bool) -> None:
        """Whether nothing is to be kept ready for now."""
        if yes != self._rests:
            self._rests = yes
            self._changed.set()

    async def cool(self, image_digest: str) -> None:
        """As `unwant`, and they are gone when this returns."""
        self.unwant(image_digest)
        async with self._turn:
            for digest in [d for d, image in self._image_of.items() if image == image_digest]:
                while self._warmer.warm_counts().get(digest):
                    await self._warmer.chill(digest)
            self._making = ""
            await self._hold()

    def __enter__(self) -> None:
        """Around a wake: nothing is begun meanwhile, nor for a moment afterwards."""
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._quiet_until = time.monotonic() + QUIET_S
        self._changed.set()

    async def _keep(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._step()
            except (
                FailedPrecondition,
                NotFound,
            ) as error:  # it will be so the next time as well: not before it is wanted again
                log.info("no sandbox can be made ready", error=error.message)
                self._classes.pop(self._making, None)
                self._changed.set()
            except Exception as error:
                log.warning("could not make a sandbox ready, tries again", error=str(error))
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
                self._changed.set()

    async def _step(self) -> None:
        if self._busy:
            return  # the end of the wake wakes us again
        if (quiet_s := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(quiet_s)
            self._changed.set()  # to look again: the next wake may be under way
            return
        make, drop = plan(list(reversed(self._classes)), self._warmer.warm_counts(), 0 if self._rests else self._size)
        async with self._turn:
            for digest in drop:
                await self._warmer.chill(digest)
            self._making = make[0] if make and make[0] in self._classes else ""
            await self._hold()
            if self._making:
                await self._warmer.warm(self._classes[self._making])
                self._changed.set()

    async def _hold(self) -> None:
        """The images of what is ready, and of what is about to be made."""
        if self._making:
            self._image_of[self._making] = self._classes[self._making].image_digest
        ready = {digest for digest, count in self._warmer.warm_counts().items() if count} | {self._making}
        self._image_of = {digest: image for digest, image in self._image_of.items() if digest in ready}
        if self._keep_images is not None:
            await self._keep_images(set(self._image_of.values()))

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
