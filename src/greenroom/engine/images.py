"""The images that workers have: who has what, and what people ask for. Workers of one machine may share a store; then
one of them is asked for all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from greenroom.core.records import CachedImage, Evicted, ImageCache, ImageDetail, PullProgress, Record
from greenroom.engine import clock
from greenroom.engine.operations import as_failure
from greenroom.images.peers import MAX_PEERS
from greenroom.images.reference import parse
from greenroom.images.uses import is_warm

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R", bound=Record)

#: How long a worker may take to say what it has; it measures trees that an older version unpacked.
LIST_TIMEOUT_S = 30.0
#: Digits of a digest that stand for all of it.
MIN_PREFIX = 6
#: Digits of it that are said; as many as docker shows.
SHOWN_DIGITS = 12
#: Reports of a pull that may wait for a slow reader; older ones are dropped, each is the whole truth.
MAX_REPORTS = 64


class Images:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def caches(self, workers: Sequence[str] = ()) -> list[ImageCache]:
        """Each store once, with the workers that share it; of these ``workers`` ([]: of all that are connected).

        Raises:
            NotFound: there is no such worker.
            Unavailable: one is not connected, or none is.
        """
        names = await self._workers(workers)

        async def ask(worker: str) -> ImageCache:
            return await self._ask(worker, api.ListImages(), ImageCache)

        answers = await asyncio.gather(*map(ask, names))
        stores: dict[str, ImageCache] = {}
        for worker, cache in zip(names, answers, strict=True):
            before = stores.get(cache.id)
            stores[cache.id] = replace(cache, workers=(*(before.workers if before else ()), worker))
        return [*stores.values()]

    async def inspect(self, name: str, workers: Sequence[str] = ()) -> list[tuple[ImageCache, ImageDetail]]:
        """Of every store that has it. Raises `NotFound`, `InvalidArgument`."""
        there = await self._find(name, workers)

        async def ask(cache: ImageCache, image: CachedImage) -> tuple[ImageCache, ImageDetail]:
            call = api.InspectImage(digest=image.digest)
            return cache, await self._ask(cache.workers[0], call, ImageDetail)

        return await asyncio.gather(*(ask(cache, image) for cache, image in there))

    async def remove(self, name: str, workers: Sequence[str] = (), *, unpin: bool = False) -> list[ImageCache]:
        """From every store that has it; returns these.

        Raises:
            NotFound: none has it.
            FailedPrecondition: it is in use somewhere (reason ``IMAGE_IN_USE``); elsewhere it is removed. Or it has
                other names that would go with this one (reason ``IMAGE_HAS_NAMES``); nothing is removed.
        """
        there = await self._find(name, workers)
        for _, image in there:
            others = [one for one in image.references if _meant(one) != _meant(name)]
            if others and not is_digest(image, name):
                raise FailedPrecondition(
                    f"image {name} is also called {', '.join(others)}; to remove it under all its names, say its "
                    f"digest: {image.digest.removeprefix('sha256:')[:SHOWN_DIGITS]}",
                    reason="IMAGE_HAS_NAMES",
                )
        await self._cool(there)
        call = {image.digest: api.RemoveImage(digest=image.digest, unpin=unpin) for _, image in there}
        await self._each(
            there, lambda cache, image: self._ask(cache.workers[0], call[image.digest], api.Done, timeout_s=None)
        )
        return [cache for cache, _ in there]

    async def pin(self, name: str, workers: Sequence[str] = (), *, undo: bool = False) -> list[ImageCache]:
        there = await self._find(name, workers)
        await self._each(
            there,
            lambda cache, image: self._ask(cache.workers[0], api.PinImage(digest=image.digest, undo=undo), api.Done),
        )
        return [cache for cache, _ in there]

    async def prune(self, workers: Sequence[str] = (), *, dry_run: bool = False) -> list[tuple[ImageCache, Evicted]]:
        async def ask(cache: ImageCache) -> tuple[ImageCache, Evicted]:
            warm_only = [(cache, i) for i in cache.images if not i.pinned and i.users and all(map(is_warm, i.users))]
            if not dry_run:
                await self._cool(warm_only)
            call = api.PruneImages(dry_run=dry_run)
            return cache, await self._ask(cache.workers[0], call, Evicted, timeout_s=None)

        return await asyncio.gather(*map(ask, await self.caches(workers)))

    async def pull(
        self, reference: str, workers: Sequence[str] = (), *, pin: bool = False
    ) -> AsyncIterator[PullProgress]:
        """Has it prepared in every store, and tells how far each is; the last of each is ``done`` or has an ``error``.
        Who stops listening stops nothing.

        Raises:
            InvalidArgument: the reference is malformed.
        """
        parse(reference)
        caches = await self.caches(workers)
        reports: asyncio.Queue[PullProgress] = asyncio.Queue()

        async def one(worker: str) -> None:
            moved = clock.monotonic()

            def heard(progress: api.Progress) -> None:
                nonlocal moved
                moved = clock.monotonic()
                if reports.qsize() < MAX_REPORTS:
                    reports.put_nowait(PullProgress(worker=worker, phase=progress.phase, layers=progress.layers))

            prepare = api.Prepare(image=reference, pin=pin, peers=self.peers(worker))
            call = asyncio.ensure_future(self._engine.hub.call(worker, prepare, heard))
            try:
                while not call.done():
                    left_s = moved + self._engine.config.stall_s - clock.monotonic()
                    if left_s <= 0:
                        raise DeadlineExceeded(
                            f"pulling {reference} on worker {worker}: nothing has moved for "
                            f"{self._engine.config.stall_s:g} s",
                            reason="STALLED",
                        )
                    await asyncio.wait({call}, timeout=left_s)
                prepared = await call
                assert isinstance(prepared, api.Prepared)
                last = PullProgress(
                    worker=worker, done=True, digest=prepared.image_digest, size_bytes=prepared.size_bytes
                )
            except GreenroomError as error:
                last = PullProgress(worker=worker, error=as_failure(error))
            except Exception as bug:  # whoever listens must hear of an end, also of one that nobody thought of
                log.exception("a pull failed in a way nobody thought of", image=reference, worker=worker)
                last = PullProgress(worker=worker, error=as_failure(Internal(f"{type(bug).__name__}: {bug}")))
            finally:
                call.cancel()
            reports.put_nowait(last)

        left = {cache.workers[0] for cache in caches}
        tasks = [self._engine.spawn(one(worker), f"pull-{worker}") for worker in left]
        while left:
            report = await reports.get()
            if report.done or report.error is not None:
                left.discard(report.worker)
            yield report
        await asyncio.gather(*tasks)

    async def take_in(self, name: str, tag: str, chunks: AsyncIterator[bytes], worker: str) -> api.Prepared:
        """Sends an archive (OCI layout or docker archive, as tar) to the store of ``worker``; there it is called
        ``name`` from then on, without any registry being asked, and pinned.

        Raises:
            FailedPrecondition: it is no such archive, or holds no such image (reason ``IMAGE_INVALID``).
        """
        stream = self._engine.hub.open(worker, api.ImportImage(name=name, tag=tag))
        answer = asyncio.ensure_future(stream.result())
        try:
            async for chunk in chunks:
                if chunk and not answer.done():
                    await stream.send(chunk)
            if not answer.done():
                await stream.send(b"")
            prepared = await answer
        finally:
            stream.cancel()
            answer.cancel()
        assert isinstance(prepared, api.Prepared)
        return prepared

    def peers(self, worker: str, digest: str = "") -> tuple[str, ...]:
        """Where ``worker`` may get an image that it does not have: base URLs of workers that give layers to others,
        those first that have it. "" for ``digest``: not known yet. () when it has it."""
        census = self._engine.census
        if digest and census.has_image(worker, digest):
            return ()
        others = {name: hello.blobs for name, hello in self._engine.hub.connected().items() if hello.blobs}
        others.pop(worker, None)
        found = sorted(others, key=lambda name: (not census.has_image(name, digest), name))
        return tuple(others[name] for name in found[:MAX_PEERS])

    # --- parts -------------------------------------------------------------------------------------------

    async def _workers(self, wanted: Sequence[str]) -> list[str]:
        connected = self._engine.hub.connected()
        for name in wanted:
            if name not in connected:
                raise Unavailable(
                    f"worker {name} is not connected; `greenroom get workers` shows which are",
                    reason="WORKER_DISCONNECTED",
                )
        if not connected:
            raise Unavailable(
                "no worker is connected: one that starts takes some seconds; else start a server with workers",
                reason="NO_WORKER",
            )
        return sorted(set(wanted) or connected)

    async def _ask(
        self, worker: str, call: api.AgentCall, answer: type[R], timeout_s: float | None = LIST_TIMEOUT_S
    ) -> R:
        try:
            async with asyncio.timeout(timeout_s):
                said = await self._engine.hub.call(worker, call)
        except TimeoutError:
            raise Unavailable(
                f"worker {worker} did not say within {timeout_s:g} s which images it has", reason="WORKER_HANGS"
            ) from None
        assert isinstance(said, answer)
        return said

    async def _find(self, name: str, workers: Sequence[str]) -> list[tuple[ImageCache, CachedImage]]:
        """``name``: a reference, a digest, or its first digits."""
        caches = await self.caches(workers)
        found = [(cache, image) for cache in caches for image in cache.images if is_called(image, name)]
        if not found:
            raise NotFound(
                f"no worker has image {name}; `greenroom images list` shows what there is", reason="IMAGE_NOT_FOUND"
            )
        digests = sorted({image.digest for _, image in found})
        if len(digests) > 1:
            raise InvalidArgument(f"{name} may be {' or '.join(digests)}: say which", reason="AMBIGUOUS_IMAGE")
        return found

    async def _cool(self, there: Sequence[tuple[ImageCache, CachedImage]]) -> None:
        """Warm sandboxes of images that are to go, on every worker that shares the store, would only be in the way."""
        calls = [(worker, api.CoolImage(digest=image.digest)) for cache, image in there for worker in cache.workers]
        await asyncio.gather(*(self._ask(worker, call, api.Done) for worker, call in calls))

    async def _each(
        self,
        there: Sequence[tuple[ImageCache, CachedImage]],
        work: Callable[[ImageCache, CachedImage], Awaitable[object]],
    ) -> None:
        results = await asyncio.gather(*(work(*one) for one in there), return_exceptions=True)
        for (cache, _), result in zip(there, results, strict=True):
            if isinstance(result, GreenroomError):
                result.message = f"on {', '.join(cache.workers)}: {result.message}"
                raise result
            if isinstance(result, BaseException):
                raise result


def is_called(image: CachedImage, name: str) -> bool:
    """Whether ``name`` is a reference that led to the image, its digest, or the first digits of that."""
    if is_digest(image, name) or name in image.references:
        return True
    digest = name.partition("@")[2]
    if digest and digest != image.digest:
        return False
    # An image that was fetched by its digest is what its name meant when the template was made from it.
    return _meant(name) in map(_meant, image.references)


def is_digest(image: CachedImage, name: str) -> bool:
    """Whether ``name`` is the image's digest or its first digits."""
    digits = name.removeprefix("sha256:")
    return len(digits) >= MIN_PREFIX and set(digits) <= set("0123456789abcdef") and image.digest[7:].startswith(digits)


def _meant(reference: str) -> object:
    """Equal for two references that mean the same, but for the digest, as ``nginx`` and
    ``docker.io/library/nginx:latest``."""
    name = reference.partition("@")[0]
    try:
        return parse(name)
    except InvalidArgument:
        return name
