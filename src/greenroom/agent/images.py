"""The worker's side of the image store: what of it this worker uses, and what people ask of it.

An image is held from before the first sandbox is made from it until the last one has ended, warm ones included; an
agent that starts takes over what the sandboxes hold that it finds alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import assert_never

import structlog

from greenroom.core import agentapi as api
from greenroom.core.errors import Cancelled, FailedPrecondition, GreenroomError, NotFound
from greenroom.core.records import ImageCache, ImageDetail, Record
from greenroom.images.port import Image, ImageStore, OnProgress
from greenroom.images.reference import pinned
from greenroom.images.uses import WARM, holder_of, is_warm

log = structlog.get_logger(__name__)

#: How often is looked whether there is too much. What a preparation needs is made room for at once.
TRIM_S = 30.0
#: An image that is evicted again and again between its preparation and its use is not this worker's to save.
_ATTEMPTS = 3


class WorkerImages:
    """``worker`` and ``state_dir``: who holds what is held. ``unwant``: told the digest of an image that only warm
    sandboxes of this worker keep, while there is too much."""

    def __init__(self, store: ImageStore, worker: str, state_dir: Path) -> None:
        self._store = store
        self._holder = holder_of(worker, state_dir)
        self._state_dir = state_dir
        self._held: dict[str, set[str]] = {}  # by actor uid, or `WARM`
        self._pulls: dict[str, asyncio.Future[Image]] = {}
        self._trimmer: asyncio.Task[None] | None = None
        self._said_over = 0
        self.unwant: Callable[[str], None] = lambda digest: None
        #: As of the last look.
        self.used_bytes = 0
        self.over_bytes = 0

    async def open(self, actor_uids: Collection[str]) -> None:
        """``actor_uids``: whose sandboxes were found alive."""
        await self._store.open()
        held = await self._store.keep_only(self._holder, actor_uids, self._state_dir)
        self._held = {uid: set(digests) for uid, digests in held.items()}
        await self._look()
        self._trimmer = asyncio.create_task(self._trim(), name="image-trimmer")

    async def close(self, *, wipe: bool) -> None:
        """Warm sandboxes are gone by now, and with ``wipe`` those of actors too."""
        if self._trimmer is not None:
            self._trimmer.cancel()
            await asyncio.gather(self._trimmer, return_exceptions=True)
        for uid in [*self._held] if wipe else [WARM]:
            await self.release(uid)
        if wipe:
            try:
                await self._store.keep_only(self._holder, ())
            except OSError as error:  # a disk that fails; the next agent of this worker begins anew
                log.error("what the worker used could not be cleared", holder=self._holder, error=str(error))

    def digests(self) -> tuple[str, ...]:
        """Of the images that are here."""
        return self._store.digests()

    # --- use ---------------------------------------------------------------------------------------------

    async def hold(self, call: api.Start | api.Restore, on_progress: OnProgress) -> Image:
        """The image that the actor's template was made from, prepared first where it is not here, and held for it.

        Raises:
            FailedPrecondition: it can't be had any more (reason ``IMAGE_MOVED``).
            GreenroomError: as `greenroom.images.port.ImageStore.prepare`.
        """
        digest, actor_uid = call.image_digest, call.actor_uid
        who = f"{call.identity.namespace}/{call.identity.name}"
        self._held.setdefault(actor_uid, set()).add(digest)  # before it is: cut short, it is released all the same
        for attempt in range(_ATTEMPTS):
            try:
                await self._store.hold(digest, self._holder, actor_uid, who)
                return await self._store.get(digest)
            except NotFound:
                if attempt + 1 == _ATTEMPTS:
                    raise
            await self.prepare(call.spec.image, on_progress, digest, call.peers)
        raise AssertionError("the last attempt raises")

    async def release(self, actor_uid: str) -> None:
        """The actor has no sandbox here any more. Idempotent."""
        for digest in self._held.pop(actor_uid, ()):
            try:
                await self._store.release(digest, self._holder, actor_uid)
            except OSError as error:  # the next agent finds it; until then the image stays
                log.error("an image is held longer than needed", digest=digest, error=str(error))

    async def keep_warm(self, digests: Collection[str]) -> None:
        """Of these images there are warm sandboxes, or will be at once.

        Raises:
            NotFound: one is not here any more.
        """
        held = self._held.setdefault(WARM, set())
        for digest in held - set(digests):
            await self._store.release(digest, self._holder, WARM)
            held.discard(digest)
        for digest in set(digests) - held:
            held.add(digest)
            try:
                await self._store.hold(digest, self._holder, WARM)
            except NotFound:
                held.discard(digest)
                raise

    # --- what people and the control plane ask for -------------------------------------------------------

    async def prepare(
        self, reference: str, on_progress: OnProgress, digest: str = "", peers: Sequence[str] = ()
    ) -> Image:
        """``digest``: what the reference meant when it was resolved; "" to resolve it now."""
        if not digest:
            return await self._store.prepare(reference, on_progress, peers)
        try:
            return await self._store.prepare(pinned(reference, digest), on_progress, peers)
        except NotFound as error:
            raise FailedPrecondition(
                f"image {reference} was {digest} when the template was made from it, which is gone where it came from, "
                f"and this worker does not have it; make a new template, or push that image again ({error.message})",
                reason="IMAGE_MOVED",
            ) from error

    async def pull(self, call: api.Prepare, on_progress: OnProgress) -> api.Prepared:
        task = asyncio.ensure_future(self.prepare(call.image, on_progress, call.digest, call.peers))
        if call.id:
            self._pulls[call.id] = task
        try:
            image = await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise Cancelled(f"the preparation of image {call.image} was stopped; what was fetched is kept") from None
        finally:
            task.cancel()
            if self._pulls.get(call.id) is task:
                del self._pulls[call.id]
        if call.pin:
            await self._store.pin(image.digest)
        return api.Prepared(image_digest=image.digest, size_bytes=image.size_bytes)

    def stop(self, pull_id: str) -> None:
        """Ends a `pull`; unknown is fine."""
        if (task := self._pulls.get(pull_id)) is not None:
            task.cancel()

    async def handle(
        self, call: api.ListImages | api.InspectImage | api.RemoveImage | api.PinImage | api.PruneImages
    ) -> Record:
        match call:
            case api.ListImages():
                return await self._list()
            case api.InspectImage():
                return await self._inspect(call.digest)
            case api.RemoveImage():
                if call.unpin:
                    await self._store.pin(call.digest, undo=True)
                await self._store.remove(call.digest)
            case api.PinImage():
                await self._store.pin(call.digest, undo=call.undo)
            case api.PruneImages():
                return await self._store.prune(dry_run=call.dry_run)
            case _:
                assert_never(call)
        return api.Done()

    async def _list(self) -> ImageCache:
        cache = await self._store.cache()
        self.used_bytes, self.over_bytes = cache.used_bytes, cache.over_bytes
        return cache

    async def _inspect(self, digest: str) -> ImageDetail:
        image = await self._store.get(digest)
        cached = next((one for one in (await self._store.cache()).images if one.digest == digest), None)
        if cached is None:
            raise NotFound(f"image {digest} has just been removed", reason="IMAGE_NOT_FOUND")
        config = image.config
        return ImageDetail(
            image=cached,
            layers=image.layers,
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=dict(config.env),
            workdir=config.workdir,
            user=config.user,
            exposed_ports=config.exposed_ports,
            stop_signal=config.stop_signal,
        )

    async def take_in(self, call: api.ImportImage, archive: AsyncIterator[bytes]) -> api.Prepared:
        """An image of an archive."""
        image = await self._store.take_in(call.name, call.tag, archive)
        return api.Prepared(image_digest=image.digest, size_bytes=image.size_bytes)

    # --- not too much ------------------------------------------------------------------------------------

    async def _trim(self) -> None:
        while True:
            await asyncio.sleep(TRIM_S)
            try:
                await self._store.trim()
                await self._look()
            except (OSError, GreenroomError) as error:  # a disk that fails; there is another time
                log.error("could not look after the images", error=str(error))

    async def _look(self) -> None:
        cache = await self._list()
        if cache.over_bytes and not self._said_over:
            log.warning(
                "more images than there should be, all in use", over_bytes=cache.over_bytes, high_bytes=cache.high_bytes
            )
        self._said_over = cache.over_bytes
        mine = self._held.get(WARM, set())
        for image in cache.images if cache.over_bytes else ():  # the longest unused first, one at a time
            if image.digest in mine and all(map(is_warm, image.users)) and not image.pinned:
                self.unwant(image.digest)
                break
