"""The image store on disk: `greenroom.images.catalog` says what lies where, `greenroom.images.uses` who uses it,
`greenroom.images.cache` how much is kept, `greenroom.images.repair` what becomes of what a killed process left.

Whoever changes something of a digest holds its lock, and lets go of it when the threads that do so have ended
(`greenroom.images.download.to_the_end`), also when cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    InvalidArgument,
    NotFound,
)
from greenroom.core.records import Evicted, ImageCache
from greenroom.images.archive import local_source
from greenroom.images.blobs import BlobStore, private, try_lock, write_atomically
from greenroom.images.cache import LOW_PART, MAX_NAMED, RECENT_S, Cache, Marks
from greenroom.images.catalog import Catalog, ImageRecord, disk_bytes
from greenroom.images.client import Client
from greenroom.images.config import (
    Descriptor,
    Manifest,
    choose,
    invalid,
    parse_config,
    parse_manifest,
)
from greenroom.images.download import Interrupted, new_budget, to_the_end
from greenroom.images.flight import Flights
from greenroom.images.incoming import received
from greenroom.images.origins import Origins, Source
from greenroom.images.peers import PeerSource
from greenroom.images.port import Image, ImageConfig, OnProgress
from greenroom.images.progress import Progress
from greenroom.images.reference import LayoutReference, RegistryReference, check_digest, parse
from greenroom.images.registries import Registries
from greenroom.images.registry import RegistrySource
from greenroom.images.repair import repair
from greenroom.images.room import Guest, Room
from greenroom.images.shared import SharedProgress
from greenroom.images.unpack import MAX_ENTRIES, MAX_UNPACKED_BYTES, Job, JobLayer
from greenroom.images.unpacker import run_unpacker
from greenroom.images.uses import PIN, Uses, user_of

#: Layers fetched side by side, so that small ones do not wait for a large one; their pieces share one budget.
PARALLEL_LAYERS = 3
#: Indexes inside indexes; one level is common, two are odd.
_MAX_INDEX_DEPTH = 3


class _Wanted(NamedTuple):
    reference: str
    digest: str
    data: bytes
    manifest: Manifest


class DiskImageStore:
    """`greenroom.images.port.ImageStore` below the directory ``root``, which several processes may share.

    Args:
        root: made if it is not there, for this user alone: images bring programs that are root's whoever runs them
            (set-user-id), which nobody of this machine must be able to.
        registries: accounts, mirrors and certificates; by default there are none.
        peers: base URLs of agents that are asked before a registry (`greenroom.images.peers`), beside those that
            `prepare` is given; called for each image, so that they may come and go.
        peer_token: what the peers want to be told.
        max_entries, max_unpacked_bytes: what one image may unpack to.
        high_bytes, low_bytes: when there is more than ``high_bytes`` of images, those that have been unused longest are
            evicted until there are ``low_bytes`` (0: `LOW_PART` of ``high_bytes``). 0: never.
        limit_bytes: there are never more of images than this: one that does not fit is refused. For where the disk has
            more room than the store may take of it. What is unpacked at the same time does not count. 0: none.
        recent_s: what was used in the last so many seconds is not evicted.
    """

    def __init__(
        self,
        root: Path,
        *,
        registries: Registries | None = None,
        peers: Callable[[], Sequence[str]] = tuple,
        peer_token: str = "",
        max_entries: int = MAX_ENTRIES,
        max_unpacked_bytes: int = MAX_UNPACKED_BYTES,
        high_bytes: int = 0,
        low_bytes: int = 0,
        limit_bytes: int = 0,
        recent_s: float = RECENT_S,
    ) -> None:
        self._root = root.absolute()
        private(self._root)
        self._registries = registries or Registries()
        self._peers = peers
        self._peer_token = peer_token
        self._max_entries = max_entries
        self._max_unpacked_bytes = max_unpacked_bytes
        self._catalog = Catalog(self._root)
        self._blobs = BlobStore(self._root)
        self._uses = Uses(self._root)
        marks = Marks(high=high_bytes, low=low_bytes or int(high_bytes * LOW_PART), limit=limit_bytes)
        self._cache = Cache(self._root, self._catalog, self._blobs, self._uses, marks, recent_s=recent_s)
        self._room = Room(self._root, self._cache, self._blobs, recent_s)
        self._shared = SharedProgress(self._root)
        self._resolving: Flights[None, tuple[str, bytes, Manifest]] = Flights()
        self._flights: Flights[OnProgress, Image] = Flights()

    async def open(self) -> None:
        await asyncio.to_thread(repair, self._root, self._catalog, self._blobs, self._uses, self._cache)

    async def prepare(self, reference: str, on_progress: OnProgress | None = None, peers: Sequence[str] = ()) -> Image:
        parsed = parse(reference)
        if on_progress is not None:
            on_progress("resolve", ())
        if (there := await asyncio.to_thread(self._known, reference, parsed.digest)) is not None:
            return there
        image = await self._bring(reference, parsed, on_progress, peers)
        if not parsed.digest:  # else there is nothing to remember: it was not resolved
            await asyncio.to_thread(self._catalog.note, reference, image.digest)
        return image

    async def _bring(
        self,
        reference: str,
        parsed: LayoutReference | RegistryReference,
        on_progress: OnProgress | None,
        peers: Sequence[str] = (),
    ) -> Image:
        async def resolve(_: Sequence[None]) -> tuple[str, bytes, Manifest]:
            async with self._open(parsed, peers) as origins:
                return await self._resolve(reference, parsed.digest, origins)

        # Who wants the same at the same time asks once. (An archive that is imported may have the name of another.)
        digest, data, manifest = await self._resolving.join(repr((reference, parsed)), None, resolve)

        async def work(listeners: Sequence[OnProgress | None]) -> Image:
            # With connections of its own: whoever began may give up before the others.
            async with self._open(parsed, peers) as origins:
                return await self._prepare(_Wanted(reference, digest, data, manifest), origins, listeners)

        # Who wants the same image from elsewhere waits for its lock, as another process does: what is wrong with the
        # one place is not wrong with the other.
        image = await self._flights.join(repr((digest, parsed)), on_progress, work)
        return msgspec.structs.replace(image, reference=reference)

    async def take_in(self, name: str, tag: str, archive: AsyncIterator[bytes]) -> Image:
        called = parse(name)
        if not isinstance(called, RegistryReference) or called.digest:
            raise InvalidArgument(
                f"an imported image can't be called {name!r}: give it a name as of a registry, for example "
                "imported/counter:1",
                reason="INVALID_IMAGE_REFERENCE",
            )
        async with received(self._root, archive) as path:
            try:
                image = await self._bring(name, LayoutReference(directory=path, tag=tag), None)
            except GreenroomError as error:
                error.message = error.message.replace(str(path), "the archive")  # nobody knows it by our name for it
                raise
        await self.pin(image.digest)
        await asyncio.to_thread(self._catalog.note, name, image.digest, imported=True)
        return image

    def _known(self, reference: str, digest: str) -> Image | None:
        """The image, where nobody needs to be asked what the reference means: a digest never means anything else, and
        an imported image is what its name means here."""
        if not digest:
            meaning = self._catalog.meaning(reference)
            digest = meaning.digest if meaning is not None and meaning.imported else ""
        image = self._usable(digest) if digest else None
        return image and msgspec.structs.replace(image, reference=reference)

    async def get(self, digest: str) -> Image:
        image = await asyncio.to_thread(self._catalog.load, check_digest(digest))
        if image is None:
            raise _not_here(digest)
        return image

    async def list(self) -> list[Image]:
        return [*await asyncio.to_thread(self._catalog.load_all)]

    def digests(self) -> tuple[str, ...]:
        return self._catalog.digests()

    # --- use ---------------------------------------------------------------------------------------------

    async def hold(self, digest: str, holder: str, actor_uid: str, who: str = "") -> None:
        # A caller who is cancelled has it, or does not, when that is over, so that a release that follows is the last.
        if not await to_the_end(self._hold, check_digest(digest), user_of(holder, actor_uid), who):
            raise _not_here(digest)

    def _hold(self, digest: str, user: str, who: str) -> bool:
        # The tree is looked for after the use was written: from then on it is not removed.
        if self._uses.add(digest, user, who) and self._catalog.tree(digest).is_dir():
            return True
        self._uses.drop(digest, user)
        return False

    async def release(self, digest: str, holder: str, actor_uid: str) -> None:
        await asyncio.to_thread(self._uses.drop, check_digest(digest), user_of(holder, actor_uid))

    async def keep_only(
        self, holder: str, actor_uids: Collection[str], state_dir: Path | None = None
    ) -> dict[str, tuple[str, ...]]:
        return await asyncio.to_thread(self._uses.keep_only, holder, actor_uids, state_dir)

    async def pin(self, digest: str, *, undo: bool = False) -> None:
        if undo:
            await asyncio.to_thread(self._uses.drop, check_digest(digest), PIN)
        elif not await asyncio.to_thread(self._hold, check_digest(digest), PIN, ""):
            raise _not_here(digest)

    # --- how much is kept --------------------------------------------------------------------------------

    async def cache(self) -> ImageCache:
        return await asyncio.to_thread(self._described)

    def _described(self) -> ImageCache:
        used, marks = self._cache.used_bytes(), self._cache.marks
        return ImageCache(
            id=self._id(),
            used_bytes=used,
            free_bytes=self._cache.free_bytes(),
            high_bytes=marks.high,
            low_bytes=marks.low,
            over_bytes=max(0, used - marks.high) if marks.high else 0,
            images=tuple(self._cache.listed()),
        )

    def _id(self) -> str:
        """Random, made once: who shares a store says the same."""
        path = self._root / "id"
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
        write_atomically(path, uuid.uuid4().hex.encode())
        return path.read_text()

    async def trim(self) -> Evicted:
        return await asyncio.to_thread(self._cache.trim)

    async def prune(self, *, dry_run: bool = False) -> Evicted:
        return await asyncio.to_thread(self._cache.evict, None, dry_run=dry_run)

    async def remove(self, digest: str) -> None:
        check_digest(digest)
        lock_fd = try_lock(self._root, digest)
        if lock_fd is None:  # a preparation may take hours; who wants to remove something is not held for that
            raise FailedPrecondition(
                f"image {digest} is being prepared or removed just now: try again when that is over, or end it "
                "(`greenroom get operations --state=running`)",
                reason="IMAGE_IN_USE",
            )
        try:
            await to_the_end(self._uses.drop_stale)
            if await to_the_end(self._cache.remove_locked, digest):
                return
        finally:
            os.close(lock_fd)
        users = await asyncio.to_thread(self._uses.described, digest)
        names = (await asyncio.to_thread(self._catalog.references)).get(digest, (digest,))
        why = f"used by {', '.join(users[:MAX_NAMED])}" if users else "pinned: unpin it first"
        raise FailedPrecondition(f"image {names[0]} is {why}", reason="IMAGE_IN_USE")

    # --- preparing -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open(self, parsed: LayoutReference | RegistryReference, peers: Sequence[str]) -> AsyncIterator[Origins]:
        if isinstance(parsed, LayoutReference):
            async with local_source(parsed) as source:
                yield Origins([source])
            return
        async with contextlib.AsyncExitStack() as stack:
            sources: list[Source] = []
            if peers := [*peers, *self._peers()]:
                peer_source = PeerSource(peers, digest=parsed.digest, token=self._peer_token)
                sources.append(await stack.enter_async_context(peer_source))
            client = await stack.enter_async_context(Client(self._registries))
            for endpoint in self._registries.endpoints(parsed):
                sources.append(RegistrySource(endpoint, parsed, self._registries, client))
            yield Origins(sources)

    async def _resolve(self, reference: str, pinned: str, origins: Origins) -> tuple[str, bytes, Manifest]:
        """The manifest for this machine, through indexes: its digest, bytes and content."""
        try:
            # An attempt before this one may have kept it: then, with the layers here too, nobody has to be asked.
            known = await asyncio.to_thread(self._blobs.find_manifest, pinned) if pinned else None
            data, media_type = (known, "") if known is not None else await origins.resolve()
            for _ in range(_MAX_INDEX_DEPTH):
                found = parse_manifest(reference, data, media_type)
                if isinstance(found, Manifest):
                    return f"sha256:{hashlib.sha256(data).hexdigest()}", data, found
                chosen = choose(reference, found)
                data, media_type = await origins.manifest(chosen), chosen.media_type
        except Interrupted as error:
            raise error.final(f"image {reference} can't be resolved") from error
        raise invalid(f"image {reference} has indexes inside indexes more than {_MAX_INDEX_DEPTH} deep")

    async def _prepare(self, wanted: _Wanted, origins: Origins, listeners: Sequence[OnProgress | None]) -> Image:
        progress = Progress(wanted.manifest.layers, listeners)
        image = await asyncio.to_thread(self._usable, wanted.digest)
        if image is None:
            async with self._turn(wanted.digest, progress) as lock_fd:
                image = await asyncio.to_thread(self._catalog.load, wanted.digest)  # another process may have made it
                if image is None:
                    guest = Guest(wanted.reference, wanted.digest, wanted.manifest.layers)
                    async with self._shared.told(wanted.digest, progress.stage):
                        image = await self._room.given(
                            guest, progress, lambda: self._make(wanted, origins, progress, lock_fd)
                        )
                self._uses.open(wanted.digest)  # should its removal have been begun, and cut short
        progress.finish()
        return image

    def _usable(self, digest: str) -> Image | None:
        """The image, if it is whole and nobody is removing it."""
        image = self._catalog.load(digest)
        if image is None or not self._uses.is_open(digest):
            return None
        self._uses.touch(digest)
        return image

    @asynccontextmanager
    async def _turn(self, digest: str, progress: Progress) -> AsyncIterator[int]:
        """The digest's lock. While another process has it, the progress is that one's."""
        async with contextlib.AsyncExitStack() as stack:
            async with self._shared.heard(digest, progress.show):
                lock_fd = await stack.enter_async_context(self._blobs.locked(digest))
            yield lock_fd

    async def _make(self, wanted: _Wanted, origins: Origins, progress: Progress, lock_fd: int) -> Image:
        reference, digest, manifest = wanted.reference, wanted.digest, wanted.manifest
        record = ImageRecord(
            reference=reference,
            digest=digest,
            config_digest=manifest.config.digest,
            config=ImageConfig(),
            layers=tuple(layer.digest for layer in manifest.layers),
            size_bytes=sum(layer.size for layer in manifest.layers),
        )
        await to_the_end(self._catalog.write, record)
        await to_the_end(self._blobs.write, wanted.data)
        try:
            budget = new_budget()
            await self._blobs.fetch(manifest.config, origins.sources, budget, lambda done: None)
            data = await asyncio.to_thread(self._blobs.read, manifest.config.digest)
            config, diff_ids = parse_config(reference, data, len(manifest.layers))
            await self._fetch_layers(manifest, origins, budget, progress)
        except Interrupted as error:
            raise error.final(f"image {reference} can't be fetched") from error
        await self._unpack(msgspec.structs.replace(record, config=config), manifest, diff_ids, progress, lock_fd)
        image = await asyncio.to_thread(self._catalog.load, digest)
        assert image is not None
        return image

    async def _fetch_layers(
        self, manifest: Manifest, origins: Origins, budget: asyncio.Semaphore, progress: Progress
    ) -> None:
        turns = asyncio.Semaphore(PARALLEL_LAYERS)

        async def fetch(layer: Descriptor) -> None:
            async with turns, progress.watched(layer, self._blobs.done_bytes) as tell:
                await self._blobs.fetch(layer, origins.sources, budget, tell)

        try:
            async with asyncio.TaskGroup() as group:
                for layer in {layer.digest: layer for layer in manifest.layers}.values():
                    group.create_task(fetch(layer))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _unpack(
        self, record: ImageRecord, manifest: Manifest, diff_ids: Sequence[str], progress: Progress, lock_fd: int
    ) -> None:
        room = await asyncio.to_thread(self._cache.room_bytes)
        staged = self._catalog.staged(record.digest)
        await to_the_end(_make_empty, staged)
        job = Job(
            target=str(staged),
            layers=tuple(
                JobLayer(blob=str(self._blobs.path(layer.digest)), digest=layer.digest, diff_id=diff_id)
                for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
            ),
            max_entries=self._max_entries,
            max_unpacked_bytes=self._max_unpacked_bytes,
            room_bytes=room,
        )
        try:
            await run_unpacker(
                job, lambda number, done: progress.update("unpack", manifest.layers[number].digest, done), lock_fd
            )
            await to_the_end(self._commit, record)
        except BaseException as error:
            await to_the_end(shutil.rmtree, staged, ignore_errors=True)
            if isinstance(error, (DataLoss, FailedPrecondition)):
                # Either the image is wrong, or a blob has rotted since it was verified, which must not last.
                for layer in manifest.layers:
                    await to_the_end(self._blobs.remove_if_damaged, layer.digest)
            raise

    def _commit(self, record: ImageRecord) -> None:
        """Its tree is whole: from now on the image is there, and may be used."""
        tree_bytes = disk_bytes(self._catalog.staged(record.digest))
        self._catalog.write(msgspec.structs.replace(record, tree_bytes=tree_bytes))
        self._uses.open(record.digest)
        self._catalog.commit_tree(record.digest)


def _not_here(digest: str) -> NotFound:
    return NotFound(f"image {digest} is not on this machine: prepare it first", reason="IMAGE_NOT_FOUND")


def _make_empty(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
    path.mkdir(mode=0o755, parents=True)
    path.chmod(0o755)  # whatever the umask; the layers may say otherwise
