"""The files of an actor on the host: packed into a snapshot, unpacked, removed.

GNU tar does it, not `tarfile`: it keeps extended attributes (overlayfs marks opaque directories with them), holes, hard
links and whiteouts (character devices 0/0, which every user may make since Linux 5.8), and is four times as fast.

Without root, all three run in a user namespace of their own as its root: an actor may have files that not even their
owner can read or remove, and overlayfs leaves a directory of mode 000 behind.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from greenroom.core.errors import DataLoss, GreenroomError, Internal, ResourceExhausted
from greenroom.sandbox.port import Check

ARCHIVE = "files.tar"
#: Of tar's complaints, in an error message.
MAX_COMPLAINT = 500
_XATTRS = ("--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability")
_FULL = ("No space left on device", "Disk quota exceeded", "Wrote only")


async def pack(tree: Path, directory: Path) -> None:
    """Writes what is in ``tree`` to ``files.tar`` in ``directory``, durably. Removes it again on any failure.

    Raises:
        ResourceExhausted: the disk is full (reason ``DISK_FULL``), or ``directory`` can't be written to.
    """
    archive = directory / ARCHIVE
    try:
        command = ("--create", "--sparse", "--numeric-owner", *_XATTRS, "--directory", str(tree), ".")
        complaint = await _run("tar", "--force-local", "--file", str(archive), *command)
        if complaint is not None:
            raise _disk_full(archive, complaint) or Internal(f"tar could not pack {tree}: {complaint}")
        await asyncio.to_thread(_sync, archive)
    except BaseException:
        archive.unlink(missing_ok=True)
        raise


async def unpack(directory: Path, tree: Path) -> None:
    """The reverse of `pack`, into the empty directory ``tree``.

    Raises:
        DataLoss: the archive is missing or damaged (reason ``SNAPSHOT_CORRUPT``).
        ResourceExhausted: the disk is full (reason ``DISK_FULL``).
    """
    archive = directory / ARCHIVE
    command = ("--extract", "--same-permissions", "--numeric-owner", *_XATTRS, "--directory", str(tree))
    complaint = await _run("tar", "--force-local", "--file", str(archive), *command)
    if complaint is not None:
        raise _disk_full(tree, complaint) or DataLoss(
            f"the snapshot file {archive} can't be unpacked: {complaint}", reason="SNAPSHOT_CORRUPT"
        )


async def remove(tree: Path) -> None:
    """Removes a directory with all that is in it. Idempotent."""
    complaint = await _run("rm", "--recursive", "--force", "--one-file-system", str(tree))
    if complaint is not None:
        raise Internal(f"{tree} could not be removed: {complaint}")


def check_writable(directory: Path) -> None:
    """Raises `ResourceExhausted` unless a snapshot file can be made in ``directory``; makes it, empty."""
    try:
        os.close(os.open(directory / ARCHIVE, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ResourceExhausted(
            f"can't write a snapshot into {directory}: {error.strerror}",
            reason="DISK_FULL" if error.strerror in _FULL else "SNAPSHOT_NOT_WRITABLE",
        ) from error


async def check_tar() -> Check:
    """Whether there is a tar that keeps what must be kept."""
    try:
        process = await asyncio.create_subprocess_exec("tar", "--version", stdout=asyncio.subprocess.PIPE)
    except OSError as error:
        return Check(name="tar", ok=False, detail=str(error), hint="install GNU tar")
    first = (await process.communicate())[0].decode(errors="replace").splitlines()[:1]
    ok = bool(first) and "GNU tar" in first[0]
    return Check(name="tar", ok=ok, detail=first[0] if first else "no answer", hint="" if ok else "install GNU tar")


def _sync(file: Path) -> None:
    for path, flags in ((file, os.O_RDONLY), (file.parent, os.O_RDONLY | os.O_DIRECTORY)):
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _disk_full(path: Path, complaint: str) -> GreenroomError | None:
    if any(word in complaint for word in _FULL):
        return ResourceExhausted(f"the disk that holds {path} is full: free space or add some", reason="DISK_FULL")
    return None


async def _run(*command: str) -> str | None:
    """Runs a program to its end; None, or what it complained about. Cancelled, it is killed and waited for."""
    as_root = () if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--")
    process = await asyncio.create_subprocess_exec(
        *as_root,
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
    )
    try:
        _, stderr = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    return None if process.returncode == 0 else stderr[-MAX_COMPLAINT:].decode(errors="replace").strip() or "failed"
