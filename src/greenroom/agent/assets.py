"""Programs that sandboxes are run with, fetched and verified before an agent uses them.

An asset is pinned by the digest of its content: nothing of it gets its final name before all of it has that digest, so
what is there under its name is right, also after a kill. Who serves it need not be trusted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import structlog

from greenroom.core.assets import Asset
from greenroom.core.errors import FailedPrecondition, GreenroomError, InvalidArgument, Unavailable

#: A sandbox's runtime has some 50 MiB.
MAX_BYTES = 1 << 30
#: A server that is silent for this long is given up; how long a whole asset takes depends on the link.
SILENCE_S = 30.0
#: Tries of one asset, and the first pause between them, which doubles. Then the kubelet begins anew.
TRIES = 5
PAUSE_S = 0.5
#: Read at once.
PIECE_BYTES = 1 << 20

_log = structlog.get_logger(__name__)


async def fetch(assets: Sequence[Asset], into: Path) -> None:
    """All of them; what is there already and right is not fetched again.

    Raises:
        InvalidArgument: a path leads out of the directory, or two are the same.
        FailedPrecondition: what is served is not what the digest says (reason ``WRONG_DIGEST``), or is too big, or the
            server refuses it.
        Unavailable: it could not be fetched, after some tries.
    """
    targets = [_target(into, asset) for asset in assets]
    if len(set(targets)) < len(targets):
        raise InvalidArgument("two assets have the same path; each needs its own")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    # Digests are of the bytes as they are kept.
    plain = {"Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(timeout=timeout, headers=plain, auto_decompress=False) as session:
        for asset, target in zip(assets, targets, strict=True):
            if await asyncio.to_thread(_is_right, target, asset.sha256):
                _log.info("asset is there", path=asset.path)
                continue
            await _try(session, asset, target)


async def _try(session: aiohttp.ClientSession, asset: Asset, target: Path) -> None:
    for number in range(TRIES):
        try:
            await _fetch(session, asset, target)
            _log.info("asset is fetched", path=asset.path, url=asset.url)
            return
        except (aiohttp.ClientError, TimeoutError, OSError, Unavailable) as error:
            what = error.message if isinstance(error, GreenroomError) else str(error) or type(error).__name__
            if number + 1 == TRIES:
                raise Unavailable(f"asset {asset.path} can't be fetched from {asset.url}: {what}") from error
            pause = PAUSE_S * 2.0**number
            _log.info("asset is fetched again", path=asset.path, error=what, again_in_s=pause)
            await asyncio.sleep(pause)


async def _fetch(session: aiohttp.ClientSession, asset: Asset, target: Path) -> None:
    await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
    spare = target.with_name(f".{target.name}.part")
    digest, size = hashlib.sha256(), 0
    async with session.get(asset.url) as answer:
        if answer.status >= 500 or answer.status == 429:
            raise Unavailable(f"the server answers {answer.status}")
        if answer.status != 200:
            raise FailedPrecondition(f"asset {asset.path}: {asset.url} answers {answer.status}; is the address right?")
        try:
            with spare.open("wb") as file:
                async for piece in answer.content.iter_chunked(PIECE_BYTES):
                    size += len(piece)
                    if size > MAX_BYTES:
                        raise FailedPrecondition(f"asset {asset.path} has more than {MAX_BYTES} bytes")
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            if digest.hexdigest() != asset.sha256:
                raise FailedPrecondition(
                    f"asset {asset.path}: what {asset.url} serves has digest {digest.hexdigest()}, not "
                    f"{asset.sha256}; it is not used. Pin the digest of what is meant, or serve that",
                    reason="WRONG_DIGEST",
                )
            spare.chmod(0o755)
            spare.replace(target)
        finally:
            spare.unlink(missing_ok=True)


def _target(into: Path, asset: Asset) -> Path:
    parts = Path(asset.path).parts
    if not parts or Path(asset.path).is_absolute() or ".." in parts:
        raise InvalidArgument(f"asset path {asset.path!r} must lead to a file below the runtime directory")
    return into / asset.path


def _is_right(path: Path, sha256: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
