"""The port of the worker's image store.

An *image reference* is ``oci:<path>[:<tag>]`` (an OCI image layout on this machine, as a directory or as a tar archive,
or what ``docker save`` wrote) or a registry reference
``host[:port]/repository[:tag][@sha256:...]``; loopback registries are spoken to without TLS. An image becomes, once
and for
all its users, a root file system tree on disk that is never changed afterwards. Several agents of one machine may
share
a store: work on one digest is done once, by whoever holds its lock.

Nothing is ever held in memory whole: blobs are streamed, hashed while written, synced, and renamed into place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from greenroom.core.records import Evicted, ImageCache, LayerProgress, Record

#: Of the images of one machine that are told to others (71 bytes each); a worker that has more is full of images.
MAX_DIGESTS = 1000

OnProgress = Callable[[str, tuple[LayerProgress, ...]], None]
"""Called with (phase, layers); phases are ``resolve``, ``download``, ``unpack``."""


class ImageConfig(Record, frozen=True, kw_only=True):
    """What the image says about how to run it (OCI image config, ``config`` object)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = "/"
    user: str = ""
    exposed_ports: tuple[int, ...] = ()
    stop_signal: str = ""


class Image(Record, frozen=True, kw_only=True):
    """An unpacked image. ``digest`` is the manifest's; ``size_bytes`` that of the compressed layers."""

    reference: str
    digest: str
    rootfs: Path
    config: ImageConfig
    size_bytes: int
    layers: tuple[str, ...] = ()


class ImageStore(Protocol):
    """What is here and used (`hold`) or pinned is never removed; the rest goes when there is too much (`trim`), what
    was unused longest first. Uses are on disk: a sandbox outlives the process that made it."""

    async def open(self) -> None:
        """Removes or makes whole what killed processes left. Once, before anything else; others may be at work in the
        same store."""

    async def prepare(self, reference: str, on_progress: OnProgress | None = None, peers: Sequence[str] = ()) -> Image:
        """Resolves, downloads and unpacks; what is already there is not done again. Cancellation-safe: a partial
        download is kept and gone on with.

        Args:
            on_progress: hears how far it is, also while another process does it.
            peers: base URLs of workers that are asked for what they have before the registry is
                (`greenroom.images.peers`).

        Raises:
            InvalidArgument: the reference is malformed.
            NotFound: no such directory, repository, tag or blob (reason ``IMAGE_NOT_FOUND``).
            Unavailable: the registry does not answer (reason ``REGISTRY_UNAVAILABLE``), or redirects to nowhere (reason
                ``REGISTRY_REDIRECT``); what was fetched is kept for the next attempt.
            FailedPrecondition: no manifest for this architecture, an unknown media type, a hostile archive (reason
                ``IMAGE_INVALID``, the entry named); the registry wants a login, or another one (reason
                ``REGISTRY_AUTH``); its certificate is not trusted (reason ``REGISTRY_TLS``); this machine's
                configuration of registries blocks it (reason ``REGISTRY_BLOCKED``) or can't be read (reason
                ``REGISTRY_CONFIG``).
            DataLoss: a blob's digest is wrong (reason ``DIGEST_MISMATCH``), or its size is not what the manifest says
                (reason ``SIZE_MISMATCH``).
            ResourceExhausted: the disk is full (reason ``DISK_FULL``, ``metadata["missing_bytes"]``); what was half
                written is removed. Or the registry's limit of requests is reached (reason ``REGISTRY_RATE_LIMIT``).
        """

    async def get(self, digest: str) -> Image:
        """The unpacked image of this manifest digest.

        Raises:
            NotFound: it is not on this worker.
        """

    async def list(self) -> list[Image]: ...

    def digests(self) -> tuple[str, ...]:
        """Manifest digests of the images that are there, sorted, at most `MAX_DIGESTS`. A hint for placement, asked for
        with every heartbeat: costs microseconds while nothing changes."""

    async def hold(self, digest: str, holder: str, actor_uid: str, who: str = "") -> None:
        """From now on the image is used, until `release`; idempotent. To be called before anything is started from it.

        Args:
            holder: a worker (`greenroom.images.uses.holder_of`).
            actor_uid: of the actor, or ``warm`` for the sandboxes that are kept ready.
            who: the actor as people call it.

        Raises:
            NotFound: it is not here (reason ``IMAGE_NOT_FOUND``), also when it has just been removed.
        """

    async def release(self, digest: str, holder: str, actor_uid: str) -> None:
        """Idempotent."""

    async def keep_only(
        self, holder: str, actor_uids: Collection[str], state_dir: Path | None = None
    ) -> dict[str, tuple[str, ...]]:
        """At a worker's start: of its uses only those of these actors are left; returns the digests that each uses.
        Once the directory ``state_dir`` is gone, so are all of them. At its end, when everything on it is gone: without
        actors and ``state_dir``."""

    async def pin(self, digest: str, *, undo: bool = False) -> None:
        """Somebody wants to keep it. Raises `NotFound`."""

    async def remove(self, digest: str) -> None:
        """Removes the tree and the blobs that no other image needs. Idempotent.

        Raises:
            FailedPrecondition: it is in use or pinned, by whom is said, or being prepared (reason ``IMAGE_IN_USE``).
        """

    async def take_in(self, name: str, tag: str, archive: AsyncIterator[bytes]) -> Image:
        """An image of an archive, an OCI layout or what ``docker save`` writes, as tar. From then on ``name`` means it
        here, and no registry is asked. It is pinned: it can't be pulled again.

        Args:
            name: as of an image in a registry, without a digest.
            tag: which image of the archive; "" for its only one.

        Raises:
            InvalidArgument: no such name can be.
            NotFound: the archive has no such image.
            FailedPrecondition: it is no such archive, or the image can't be used (reason ``IMAGE_INVALID``).
            ResourceExhausted: the disk is full (reason ``DISK_FULL``).
        """

    async def trim(self) -> Evicted:
        """Evicts down to the low mark if there is more than the high mark; else nothing."""

    async def prune(self, *, dry_run: bool = False) -> Evicted:
        """Removes everything that may be removed, or says what that is."""

    async def cache(self) -> ImageCache:
        """What is here, with sizes and users."""
