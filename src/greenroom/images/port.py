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

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from greenroom.core.records import LayerProgress, Record

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
    async def prepare(self, reference: str, on_progress: OnProgress | None = None) -> Image:
        """Resolves, downloads and unpacks; what is already there is not done again. Cancellation-safe: a partial
        download is kept and gone on with.

        Raises:
            InvalidArgument: the reference is malformed.
            NotFound: no such directory, repository, tag or blob (reason ``IMAGE_NOT_FOUND``).
            Unavailable: the registry does not answer; what was fetched is kept for the next attempt.
            FailedPrecondition: no manifest for this architecture, an unknown media type, a hostile archive (reason
                ``IMAGE_INVALID``, the entry named); the registry wants a login (reason ``REGISTRY_AUTH``).
            DataLoss: a blob's digest is wrong (reason ``DIGEST_MISMATCH``).
            ResourceExhausted: the disk is full (reason ``DISK_FULL``); what was half written is removed.
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

    async def remove(self, digest: str) -> None:
        """Removes the tree and the blobs that no other image uses. Idempotent. The caller sees to it that none
        runs."""
