"""The image store on disk.

Below its root, beside what `greenroom.images.blobs` keeps::

    images/<hex>.json    what the image of this manifest digest is made of; written before its blobs are fetched, so
                         that `remove` never takes a blob away that somebody is about to use
    rootfs/<hex>/        its unpacked tree; there only when it is whole
    unpacking/<hex>/     a tree under construction, or what a killed process left of one
    refs/<hex>.json      what a reference was resolved to, and when

An image exists when both its record and its tree do. Whoever changes something of a digest holds its lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from greenroom.core.errors import DataLoss, FailedPrecondition, NotFound
from greenroom.core.records import LayerProgress, Record
from greenroom.images.blobs import BlobStore, hex_of, sync_directory, write_atomically
from greenroom.images.client import Client
from greenroom.images.config import (
    Descriptor,
    Manifest,
    choose,
    invalid,
    parse_config,
    parse_manifest,
)
from greenroom.images.download import Interrupted, new_budget
from greenroom.images.flight import Flights
from greenroom.images.layout import LayoutSource
from greenroom.images.origins import Origins, Source
from greenroom.images.peers import PeerSource
from greenroom.images.port import MAX_DIGESTS, Image, ImageConfig, OnProgress
from greenroom.images.reference import LayoutReference, RegistryReference, check_digest, parse
from greenroom.images.registries import Registries
from greenroom.images.registry import RegistrySource
from greenroom.images.unpack import MAX_ENTRIES, MAX_UNPACKED_BYTES, Job, JobLayer
from greenroom.images.unpacker import run_unpacker

#: Layers fetched side by side, so that small ones do not wait for a large one; their pieces share one budget.
PARALLEL_LAYERS = 3
#: Progress calls are at least this far apart, so that a caller may send each on.
PROGRESS_PERIOD_S = 0.1
#: A directory that was changed this recently may change once more without its time showing it (the kernel's clock for
#: files ticks every 4 to 10 ms), so what was read of it is not kept.
_SETTLED_S = 0.1
#: Indexes inside indexes; one level is common, two are odd.
_MAX_INDEX_DEPTH = 3


class _ImageRecord(Record, frozen=True, kw_only=True):
    reference: str
    digest: str
    config_digest: str
    config: ImageConfig
    layers: tuple[str, ...]
    size_bytes: int


class _RefRecord(Record, frozen=True, kw_only=True):
    reference: str
    digest: str
    resolved_at: float


class _Wanted(NamedTuple):
    reference: str
    digest: str
    data: bytes
    manifest: Manifest


class DiskImageStore:
    """`greenroom.images.port.ImageStore` below the directory ``root``, which several processes may share.

    Args:
        root: made if it is not there.
        registries: accounts, mirrors and certificates; by default there are none.
        peers: base URLs of agents that are asked before a registry (`greenroom.images.peers`); called for each image,
            so that they may come and go.
        peer_token: what the peers want to be told.
        max_entries, max_unpacked_bytes: what one image may unpack to.
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
    ) -> None:
        self._root = root.absolute()
        self._registries = registries or Registries()
        self._peers = peers
        self._peer_token = peer_token
        self._max_entries = max_entries
        self._max_unpacked_bytes = max_unpacked_bytes
        self._images = self._root / "images"
        self._rootfs = self._root / "rootfs"
        self._unpacking = self._root / "unpacking"
        self._refs = self._root / "refs"
        # Sandboxes of other users may have to reach the trees; what else is here is nobody's business.
        self._rootfs.mkdir(mode=0o755, parents=True, exist_ok=True)
        for directory in (self._images, self._unpacking, self._refs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._blobs = BlobStore(self._root)
        self._flights: Flights[OnProgress, Image] = Flights()
        self._digests: tuple[str, ...] = ()
        self._digests_of = -1  # the time of the directory that they were read from (ns); -1: to be read anew

    async def prepare(self, reference: str, on_progress: OnProgress | None = None) -> Image:
        parsed = parse(reference)
        if on_progress is not None:
            on_progress("resolve", ())
        if parsed.digest:
            with contextlib.suppress(NotFound):  # a digest never means anything else: nobody needs to be asked
                return msgspec.structs.replace(await self.get(parsed.digest), reference=reference)
        async with self._open(parsed) as origins:
            digest, data, manifest = await self._resolve(reference, parsed.digest, origins)

        async def work(listeners: Sequence[OnProgress | None]) -> Image:
            # With connections of its own: whoever began may give up before the others.
            async with self._open(parsed) as origins:
                return await self._prepare(_Wanted(reference, digest, data, manifest), origins, listeners)

        image = await self._flights.join(digest, on_progress, work)
        record = _RefRecord(reference=reference, digest=digest, resolved_at=time.time())
        name = hashlib.sha256(reference.encode()).hexdigest()
        await asyncio.to_thread(write_atomically, self._refs / f"{name}.json", msgspec.json.encode(record))
        return msgspec.structs.replace(image, reference=reference)

    async def get(self, digest: str) -> Image:
        image = await asyncio.to_thread(self._load, check_digest(digest))
        if image is None:
            raise NotFound(f"image {digest} is not on this machine: prepare it first", reason="IMAGE_NOT_FOUND")
        return image

    async def list(self) -> list[Image]:
        return [*await asyncio.to_thread(self._load_all)]

    def digests(self) -> tuple[str, ...]:
        changed = self._rootfs.stat().st_mtime_ns
        if changed != self._digests_of:
            self._digests_of = changed if time.time() - changed / 1e9 > _SETTLED_S else -1
            trees = sorted(path.name for path in self._rootfs.iterdir())[:MAX_DIGESTS]
            self._digests = tuple(f"sha256:{name}" for name in trees)
        return self._digests

    async def remove(self, digest: str) -> None:
        check_digest(digest)
        async with self._blobs.locked(digest):
            record = await asyncio.to_thread(self._read_record, digest)
            await asyncio.to_thread(self._remove_tree, digest)
            (self._images / f"{hex_of(digest)}.json").unlink(missing_ok=True)
        if record is None:
            return
        for blob in (digest, record.config_digest, *record.layers):
            async with self._blobs.locked(blob):
                # Looked up under the blob's lock: a `prepare` writes its record first and then locks the blob, so
                # either its record is seen here or it finds the blob gone and fetches it.
                if not await asyncio.to_thread(self._is_used, blob):
                    self._blobs.remove(blob)

    # --- preparing -------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open(self, parsed: LayoutReference | RegistryReference) -> AsyncIterator[Origins]:
        if isinstance(parsed, LayoutReference):
            yield Origins([LayoutSource(parsed)])
            return
        async with contextlib.AsyncExitStack() as stack:
            sources: list[Source] = []
            if peers := self._peers():
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
        progress = _Progress(wanted.manifest.layers, listeners)
        image = await asyncio.to_thread(self._load, wanted.digest)
        if image is None:
            # An agent that waits for another one tells what that has done.
            async with self._blobs.locked(wanted.digest, lambda: progress.look(self._blobs)) as lock_fd:
                image = await asyncio.to_thread(self._load, wanted.digest)  # another process may have made it
                if image is None:
                    image = await self._make(wanted, origins, progress, lock_fd)
        progress.finish()
        return image

    async def _make(self, wanted: _Wanted, origins: Origins, progress: _Progress, lock_fd: int) -> Image:
        reference, digest, manifest = wanted.reference, wanted.digest, wanted.manifest
        record = _ImageRecord(
            reference=reference,
            digest=digest,
            config_digest=manifest.config.digest,
            config=ImageConfig(),
            layers=tuple(layer.digest for layer in manifest.layers),
            size_bytes=sum(layer.size for layer in manifest.layers),
        )
        await asyncio.to_thread(self._write_record, record)
        await asyncio.to_thread(self._blobs.write, wanted.data)
        try:
            budget = new_budget()
            await self._blobs.fetch(manifest.config, origins.sources, budget, lambda done: None)
            data = await asyncio.to_thread(self._blobs.read, manifest.config.digest)
            config, diff_ids = parse_config(reference, data, len(manifest.layers))
            await self._fetch_layers(manifest, origins, budget, progress)
        except Interrupted as error:
            raise error.final(f"image {reference} can't be fetched") from error
        await asyncio.to_thread(self._write_record, msgspec.structs.replace(record, config=config))
        await self._unpack(digest, manifest, diff_ids, progress, lock_fd)
        image = await asyncio.to_thread(self._load, digest)
        assert image is not None
        return image

    async def _fetch_layers(
        self, manifest: Manifest, origins: Origins, budget: asyncio.Semaphore, progress: _Progress
    ) -> None:
        turns = asyncio.Semaphore(PARALLEL_LAYERS)

        async def fetch(layer: Descriptor) -> None:
            async with turns:
                await self._blobs.fetch(
                    layer, origins.sources, budget, lambda done: progress.update("download", layer.digest, done)
                )

        try:
            async with asyncio.TaskGroup() as group:
                for layer in {layer.digest: layer for layer in manifest.layers}.values():
                    group.create_task(fetch(layer))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _unpack(
        self, digest: str, manifest: Manifest, diff_ids: Sequence[str], progress: _Progress, lock_fd: int
    ) -> None:
        staged = self._unpacking / hex_of(digest)
        await asyncio.to_thread(_make_empty, staged)
        job = Job(
            target=str(staged),
            layers=tuple(
                JobLayer(blob=str(self._blobs.path(layer.digest)), digest=layer.digest, diff_id=diff_id)
                for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
            ),
            max_entries=self._max_entries,
            max_unpacked_bytes=self._max_unpacked_bytes,
        )
        try:
            await run_unpacker(
                job, lambda number, done: progress.update("unpack", manifest.layers[number].digest, done), lock_fd
            )
            await asyncio.to_thread(self._commit_tree, staged, digest)
        except BaseException as error:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True))
            if isinstance(error, (DataLoss, FailedPrecondition)):
                # Either the image is wrong, or a blob has rotted since it was verified, which must not last.
                for layer in manifest.layers:
                    await asyncio.to_thread(self._blobs.remove_if_damaged, layer.digest)
            raise

    def _commit_tree(self, staged: Path, digest: str) -> None:
        staged.rename(self._rootfs / hex_of(digest))
        sync_directory(self._rootfs)

    # --- records ---------------------------------------------------------------------------------------------

    def _write_record(self, record: _ImageRecord) -> None:
        write_atomically(self._images / f"{hex_of(record.digest)}.json", msgspec.json.encode(record))

    def _read_record(self, digest: str) -> _ImageRecord | None:
        try:
            return msgspec.json.decode((self._images / f"{hex_of(digest)}.json").read_bytes(), type=_ImageRecord)
        except FileNotFoundError:
            return None

    def _records(self) -> Sequence[_ImageRecord]:
        found = (self._read_record(f"sha256:{path.stem}") for path in sorted(self._images.glob("[0-9a-f]*.json")))
        return [record for record in found if record is not None]

    def _load(self, digest: str) -> Image | None:
        rootfs = self._rootfs / hex_of(digest)
        record = self._read_record(digest)
        if record is None or not rootfs.is_dir():
            return None
        return Image(
            reference=record.reference,
            digest=digest,
            rootfs=rootfs,
            config=record.config,
            size_bytes=record.size_bytes,
            layers=record.layers,
        )

    def _load_all(self) -> Sequence[Image]:
        found = (self._load(record.digest) for record in self._records())
        return [image for image in found if image is not None]

    def _is_used(self, blob: str) -> bool:
        return any(blob in (r.digest, r.config_digest, *r.layers) for r in self._records())

    def _remove_tree(self, digest: str) -> None:
        """Moved away first: a tree that is only half there must never be found."""
        staged = self._unpacking / hex_of(digest)
        shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self._rootfs / hex_of(digest)).rename(staged)
            sync_directory(self._rootfs)
            shutil.rmtree(staged)


class _Progress:
    """Gathers what the layers report and passes it on, at most every `PROGRESS_PERIOD_S` and always the last."""

    def __init__(self, layers: Sequence[Descriptor], listeners: Sequence[OnProgress | None]) -> None:
        self._listeners = listeners
        self._descriptors = layers
        self._layers = {layer.digest: LayerProgress(digest=layer.digest, total_bytes=layer.size) for layer in layers}
        self._phase = "download"
        self._next = 0.0

    def update(self, phase: str, digest: str, done_bytes: int) -> None:
        known = self._layers[digest]
        self._layers[digest] = msgspec.structs.replace(known, done_bytes=done_bytes, phase=phase)
        changed = phase != self._phase
        self._phase = phase
        now = time.monotonic()
        if changed or now >= self._next:
            self._next = now + PROGRESS_PERIOD_S
            self._tell()

    def look(self, blobs: BlobStore) -> None:
        """Tells how far another process is."""
        for descriptor in self._descriptors:
            if (done_bytes := blobs.done_bytes(descriptor)) > self._layers[descriptor.digest].done_bytes:
                self.update("download", descriptor.digest, done_bytes)

    def finish(self) -> None:
        self._phase = "unpack"
        for digest, known in self._layers.items():
            self._layers[digest] = msgspec.structs.replace(known, done_bytes=known.total_bytes, phase="unpack")
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            if listener is not None:
                listener(self._phase, tuple(self._layers.values()))


def _make_empty(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
    path.mkdir(mode=0o755, parents=True)
    path.chmod(0o755)  # whatever the umask; the layers may say otherwise
