"""Where an image may come from, several places in turn: peers, mirrors, the registry; or a layout."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from greenroom.core.errors import DataLoss, GreenroomError
from greenroom.images.config import Descriptor
from greenroom.images.download import BlobSource, Interrupted

Found = TypeVar("Found")


class Source(BlobSource, Protocol):
    """One place."""

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest or index that is meant: (digest or "" if only the bytes tell, bytes, media type or "").

        Raises:
            NotFound: it is not here.
            Interrupted: nobody answers.
            FailedPrecondition: it wants credentials (reason ``REGISTRY_AUTH``), or is no such place.
        """
        ...

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest by its digest; raises as `resolve` does."""
        ...


class Origins:
    """Asked in order, each for what those before could not give. What the last one says counts.

    Nothing is believed: what has a digest is held to it, whoever sent it.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        assert sources
        self.sources = tuple(sources)

    async def resolve(self) -> tuple[bytes, str]:
        """The manifest or index that is meant, and its media type or "".

        Raises:
            DataLoss: what was sent is not what the digest says (reason ``DIGEST_MISMATCH``).
            Interrupted, GreenroomError: as the last source says.
        """

        async def ask(source: Source) -> tuple[bytes, str]:
            digest, data, media_type = await source.resolve()
            if digest:
                _check(digest, data)
            return data, media_type

        return await self._first(ask)

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest by its digest. Raises as `resolve` does."""

        async def ask(source: Source) -> bytes:
            data = await source.manifest(descriptor)
            _check(descriptor.digest, data)
            return data

        return await self._first(ask)

    async def _first(self, ask: Callable[[Source], Awaitable[Found]]) -> Found:
        for source in self.sources[:-1]:
            try:
                return await ask(source)
            except (Interrupted, GreenroomError):
                continue
        return await ask(self.sources[-1])


def _check(digest: str, data: bytes) -> None:
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise DataLoss(f"what was sent for manifest {digest} has the digest {found}", reason="DIGEST_MISMATCH")
