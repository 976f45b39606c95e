"""The unpacker: a process of its own that applies the layers of one image to an empty directory.

Run as ``python -m greenroom.images.unpack``: a `Job` as JSON on standard input, lines of `Report` as JSON on standard
output, the last of which says how it went. A process of its own, because the memory and the processor time of hostile
or huge archives must not be the agent's, and because it ends with its parent: a report to nobody kills it.

Layers are applied as the OCI image spec says ("Applying changesets", "Whiteouts"). Decided where it leaves a choice:

* a leading ``/`` of a name means the image's root; ``..`` in a name is refused;
* device nodes below ``dev/`` are left out, because sandboxes bring a ``/dev`` of their own; elsewhere they are refused;
* links are followed inside the image only (see `greenroom.images.tree`).
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import hashlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard
from isal import igzip, igzip_lib

from greenroom.core.errors import DataLoss, FailedPrecondition, GreenroomError
from greenroom.core.records import Failure, Record
from greenroom.images import space, tar
from greenroom.images.stream import Data, Malformed, Readable, ReadAhead, Source
from greenroom.images.tree import Attributes, Parts, Refused, Tree

#: Entries of all layers together: ten times as many as the largest images in use have.
MAX_ENTRIES = 2_000_000
#: Bytes that the layers may unpack to: a bound against decompression bombs (gzip reaches 1:1000).
MAX_UNPACKED_BYTES = 64 << 30
#: Source: Linux, PATH_MAX.
MAX_NAME_BYTES = 4096
#: Source: Linux: (uid_t)-1 means "no change" to chown.
_MAX_ID = 2**32 - 2
#: The window that a zstd stream may ask for (its memory); the largest that the zstd tool accepts unasked.
_MAX_ZSTD_WINDOW = 128 << 20
#: Backstop against our own mistakes: the unpacker needs some 150 MiB of address space plus the zstd window.
_ADDRESS_SPACE_BYTES = 2 << 30
#: It works for actors that do not run yet; those that do come first.
_NICENESS = 10
_REPORT_PERIOD_S = 0.1
_MAX_SHOWN = 200

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What each entry takes on disk beside its bytes, which are rounded up to whole blocks.
_BLOCK_BYTES = 4096


class JobLayer(Record, frozen=True, kw_only=True):
    """One layer: a blob on disk, and the digest that it must have once it is unpacked."""

    blob: str
    digest: str
    diff_id: str


class Job(Record, frozen=True, kw_only=True):
    """What to unpack (lowest layer first), where to, and how much at most: of any image, and, where it is known, that
    the store has room for."""

    target: str
    layers: tuple[JobLayer, ...]
    max_entries: int = MAX_ENTRIES
    max_unpacked_bytes: int = MAX_UNPACKED_BYTES
    room_bytes: int | None = None


class Report(Record, frozen=True, kw_only=True):
    """``read_bytes`` of layer number ``layer`` were unpacked; or, at the end, ``finished`` or ``failure``."""

    layer: int = 0
    read_bytes: int = 0
    finished: bool = False
    failure: Failure | None = None


class _Blob:
    """The compressed file; counts what was read."""

    def __init__(self, path: str) -> None:
        self._file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)  # noqa: SIM115
        self.read_bytes = 0

    def magic(self) -> bytes:
        return os.pread(self._file.fileno(), 4, 0)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.read_bytes += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self.read_bytes += count
        return count

    def close(self) -> None:
        self._file.close()


class _Full(Exception):
    """No room for entry ``name``, of which ``left_bytes`` were not written yet."""

    def __init__(self, name: str, left_bytes: int) -> None:
        super().__init__(name)
        self.name = name
        self.left_bytes = left_bytes


class _Budget:
    """What may still be unpacked."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._entries = 0
        self.unpacked_bytes = 0

    def entries(self, count: int) -> None:
        self._entries += count
        if self._entries > self._job.max_entries:
            raise Refused(f"the image has more than {self._job.max_entries} files")
        self._check_room()

    def data(self, count: int) -> None:
        self.unpacked_bytes += count
        if self.unpacked_bytes > self._job.max_unpacked_bytes:
            raise Refused(f"the image unpacks to more than {self._job.max_unpacked_bytes} bytes")
        self._check_room()

    def room_bytes(self) -> int | None:
        """What is left; None when only the disk knows."""
        if self._job.room_bytes is None:
            return None
        return max(0, self._job.room_bytes - self.unpacked_bytes - self._entries * _BLOCK_BYTES)

    def _check_room(self) -> None:
        if self.room_bytes() == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unpack(job: Job, report: BinaryIO) -> None:
    """Applies the layers of ``job``; what was written has reached the disk when it returns.

    Raises:
        FailedPrecondition: an archive can't be used; names the entry (reason ``IMAGE_INVALID``).
        DataLoss: a layer unpacks to other bytes than the config says (reason ``DIGEST_MISMATCH``).
        ResourceExhausted: the disk, or what the store may take of it, is full, or too small from the start (reason
            ``DISK_FULL``; says how much is needed and free).
    """
    budget = _Budget(job)
    target = Path(job.target)
    expected = 0
    for layer in job.layers:
        expected += space.unpacked_bytes(Path(layer.blob))
        if expected > job.max_unpacked_bytes:  # before anything is removed to make room for it
            raise FailedPrecondition(
                f"layer {layer.digest} is refused: by what it says of itself the image unpacks to more than "
                f"{job.max_unpacked_bytes} bytes",
                reason="IMAGE_INVALID",
            )
    free = space.free_bytes(target)
    if expected > (free if job.room_bytes is None else min(free, job.room_bytes)):
        raise space.disk_full("unpacking the image", target, expected, job.room_bytes)
    with Tree(target) as tree:
        for number, layer in enumerate(job.layers):
            tree.start_layer(lowest=number == 0)
            try:
                _apply_layer(tree, number, layer, budget, report)
            except _Full as full:
                missing = max(full.left_bytes, expected - budget.unpacked_bytes)
                what = f"unpacking {_shown(full.name)}"
                raise space.disk_full(what, target, missing, budget.room_bytes()) from full
        try:
            tree.finish()
            _sync_file_system(job.target)
        except OSError as error:
            if error.errno in _DISK_FULL:  # some file systems find that out late
                raise space.disk_full("the unpacked image", target, 0) from error
            raise FailedPrecondition(f"the unpacked image can't be kept: {error}", reason="IMAGE_INVALID") from error


def _apply_layer(tree: Tree, number: int, layer: JobLayer, budget: _Budget, report: BinaryIO) -> None:
    blob = _Blob(layer.blob)
    digest = hashlib.sha256()
    next_report = time.monotonic() + _REPORT_PERIOD_S
    name, data = "", None

    def seen(piece: memoryview) -> None:
        nonlocal next_report
        digest.update(piece)
        budget.data(len(piece))
        if time.monotonic() >= next_report:
            _send(report, Report(layer=number, read_bytes=blob.read_bytes))
            next_report = time.monotonic() + _REPORT_PERIOD_S

    try:
        with ReadAhead(_decompressed(blob), seen) as ahead:
            source = Source(ahead.more)
            for entry, data in tar.entries(source):
                name = entry.name
                implied = tree.implied
                _apply(tree, entry, data)
                budget.entries(1 + tree.implied - implied)
            source.drain()
    except (Refused, Malformed) as error:
        name = getattr(error, "name", "") or name
        at = f" at entry {_shown(name)}" if name else ""
        raise FailedPrecondition(f"layer {layer.digest} is refused{at}: {error}", reason="IMAGE_INVALID") from error
    except (EOFError, gzip.BadGzipFile, igzip_lib.IsalError, zstandard.ZstdError) as error:  # type: ignore[misc]
        raise FailedPrecondition(
            f"layer {layer.digest} can't be decompressed: {error}", reason="IMAGE_INVALID"
        ) from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _Full(name, data.left if data else 0) from error
        raise FailedPrecondition(
            f"layer {layer.digest} is refused at entry {_shown(name)}: {error.strerror or error}",
            reason="IMAGE_INVALID",
        ) from error
    finally:
        blob.close()
    if f"sha256:{digest.hexdigest()}" != layer.diff_id:
        raise DataLoss(
            f"layer {layer.digest} unpacks to sha256:{digest.hexdigest()}, the image's config says {layer.diff_id}",
            reason="DIGEST_MISMATCH",
        )
    _send(report, Report(layer=number, read_bytes=blob.read_bytes))


def _decompressed(blob: _Blob) -> Readable:
    """By the first bytes and not by the media type, which registries and tools mix up."""
    magic = blob.magic()
    if magic.startswith(space.GZIP):
        gunzip: Readable = igzip.IGzipFile(fileobj=blob, mode="rb")  # type: ignore[no-untyped-call]
        return gunzip
    if space.is_zstd(magic):
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
        unzstd: Readable = decompressor.stream_reader(blob, read_size=1 << 20, read_across_frames=True)  # type: ignore[arg-type]
        return unzstd
    return blob


def _apply(tree: Tree, entry: tar.Entry, data: Data) -> None:
    parts = _parts(entry.name)
    if parts and parts[-1].startswith(_WHITEOUT):
        return _apply_whiteout(tree, parts)
    if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
        raise Refused(f"its owner {entry.uid}:{entry.gid} can't be")
    attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.xattrs)
    match entry.kind:
        case tar.REGULAR:
            fd = tree.new_file(parts)
            try:
                _write(fd, entry, data)
                tree.finish_file(fd, attributes)
            finally:
                os.close(fd)
        case tar.DIRECTORY:
            tree.directory(parts, attributes)
        case tar.SYMLINK:
            _check_text(entry.linkname)
            tree.symlink(parts, entry.linkname, attributes)
        case tar.LINK:
            target = _parts(entry.linkname)
            if not target:
                raise Refused("it is a hard link to the root")
            tree.hard_link(parts, target)
        case tar.FIFO:
            tree.fifo(parts, attributes)
        case tar.CHARACTER | tar.BLOCKDEV:
            if parts[:1] != ("dev",):
                raise Refused("it is a device node outside of /dev")
        case _:
            raise Refused("it is of an unknown type")


def _apply_whiteout(tree: Tree, parts: Parts) -> None:
    name = parts[-1]
    if name == _OPAQUE:
        tree.opaque(parts[:-1])
    elif not name.startswith(_WHITEOUT * 2):  # further names with two prefixes are AUFS's own and mean nothing here
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise Refused("it is a whiteout of no name")
        tree.whiteout((*parts[:-1], hidden))


def _parts(name: str) -> Parts:
    _check_text(name)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise Refused("its path leads upwards (..)")
    return parts


def _check_text(text: str) -> None:
    if "\0" in text or len(os.fsencode(text)) > MAX_NAME_BYTES:
        raise Refused(f"a name in it has a NUL or more than {MAX_NAME_BYTES} bytes")


def _shown(name: str) -> str:
    return repr(name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "...")


def _write(fd: int, entry: tar.Entry, data: Data) -> None:
    if entry.fragments is None:
        for piece in data:
            _write_all(fd, piece)
        return
    # Sparse: the pieces go where the map says, holes are never written.
    if not 0 <= entry.size <= MAX_UNPACKED_BYTES:
        raise Refused(f"it is a sparse file of {entry.size} bytes")
    os.ftruncate(fd, entry.size)
    fragments = iter(entry.fragments)
    left = 0
    for piece in data:
        while len(piece):
            while left == 0:
                offset, left = next(fragments)
                os.lseek(fd, offset, os.SEEK_SET)
            part = piece[:left]
            _write_all(fd, part)
            left -= len(part)
            piece = piece[len(part) :]


def _write_all(fd: int, piece: memoryview) -> None:
    while len(piece):
        piece = piece[os.write(fd, piece) :]


def _sync_file_system(path: str) -> None:
    """One call for tens of thousands of files. Source: syncfs(2); Python has no binding."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def _send(out: BinaryIO, report: Report) -> None:
    out.write(msgspec.json.encode(report) + b"\n")
    out.flush()


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
    os.umask(0)
    os.nice(_NICENESS)
    try:
        try:
            unpack(job, sys.stdout.buffer)
        except MemoryError:
            raise FailedPrecondition(
                f"the image takes more than {_ADDRESS_SPACE_BYTES >> 20} MiB of memory to unpack: it has too many "
                "files in too long paths",
                reason="IMAGE_INVALID",
            ) from None
    except GreenroomError as error:
        message = error.message.encode(errors="backslashreplace").decode()  # names in archives are bytes
        _send(
            sys.stdout.buffer,
            Report(failure=Failure(code=error.code, reason=error.reason, message=message, metadata=error.facts())),
        )
        return 1
    _send(sys.stdout.buffer, Report(finished=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
