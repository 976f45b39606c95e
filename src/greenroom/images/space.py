"""Room on the disk: how much there is, how much a layer will take, and what is said when there is too little."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import zstandard

from greenroom.core.errors import ResourceExhausted

GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
#: Longest header of a zstd frame. Source: RFC 8878, section 3.1.1.1.
_ZSTD_HEADER_BYTES = 18
#: Header and trailer of a gzip member, with some room for names. Source: RFC 1952, section 2.3.
_GZIP_FRAME_BYTES = 64
#: By what gzip's deflate grows data that it can't compress, at most. Source: RFC 1951, section 3.2.4 (stored blocks).
_INCOMPRESSIBLE = 1.001


def is_zstd(magic: bytes) -> bool:
    """Whether a stream that begins with these four bytes is zstd: a frame, or one to be skipped (0x184D2A50 to 5F)."""
    return magic == _ZSTD or (magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50)


def unpacked_bytes(blob: Path) -> int:
    """How many bytes a layer unpacks to, at least, as far as it says so itself: exact when it is not compressed, was
    compressed by gzip in one piece, or by zstd with the size in its header; otherwise about its own size."""
    fd = os.open(blob, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        head = os.pread(fd, _ZSTD_HEADER_BYTES, 0)
        if head.startswith(GZIP) and size >= 4:
            # The size of the last member, modulo 4 GiB. Source: RFC 1952, section 2.3.1 (ISIZE).
            (said,) = struct.unpack("<I", os.pread(fd, 4, size - 4))
            return max(int(said), int(size / _INCOMPRESSIBLE) - _GZIP_FRAME_BYTES)
        if head.startswith(_ZSTD):
            try:
                said = zstandard.get_frame_parameters(head).content_size
            except zstandard.ZstdError:
                return size
            return int(said) if 0 < said < zstandard.CONTENTSIZE_UNKNOWN else size
        return size
    finally:
        os.close(fd)


def free_bytes(directory: Path) -> int:
    """What this process may still write there."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def disk_full(what: str, directory: Path, needed_bytes: int, room_bytes: int | None = None) -> ResourceExhausted:
    """The error of a disk that is full, or would be.

    Args:
        what: was or was to be done.
        directory: on the disk that is meant.
        needed_bytes: that are still to be written, at least.
        room_bytes: what a limit of the images leaves, if there is one.
    """
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    limited = room_bytes is not None and room_bytes < free
    free = min(free, free if room_bytes is None else room_bytes)
    missing = max(needed_bytes - free, 1)
    facts = {"missing_bytes": str(missing), "needed_bytes": str(needed_bytes), "free_bytes": str(free)}
    if limited:
        why = f"at least {_megabytes(needed_bytes)} are still to be written, images may take {_megabytes(free)} more"
    elif found.f_files and not found.f_favail:
        why = "it can hold no more files"
    else:
        why = f"at least {_megabytes(needed_bytes)} are still to be written, {_megabytes(free)} are free"
    return ResourceExhausted(
        f"no room on the disk of {directory} for {what}: {why}; free space or remove images",
        reason="DISK_FULL",
        metadata=facts,
        retry_after_s=30.0,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
