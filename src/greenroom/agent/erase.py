"""The end of a worker's state disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from greenroom.core.errors import FailedPrecondition

#: Source: proc(5), /proc/pid/mountinfo; the fifth field is the mount point, with blanks and backslashes in octal.
_MOUNTS = Path("/proc/self/mountinfo")


#: Below a state directory: which backend its sandboxes are of. Whoever finds a worker's directory and has no record of
#: it needs to know.
_BACKEND = "backend"


def note_backend(directory: Path, backend: str) -> None:
    """Raises `OSError`."""
    if noted_backend(directory) != backend:
        (directory / _BACKEND).write_text(backend)


def noted_backend(directory: Path) -> str:
    """ "" when nobody has noted it."""
    try:
        return (directory / _BACKEND).read_text()
    except OSError:
        return ""


def erase(directory: Path, *, last: str = "") -> None:
    """Removes a state directory with all that is in it; absent is success. Of one that is a mount point itself the
    content goes.

    Args:
        last: name of the entry that goes when all others have gone.

    Raises:
        FailedPrecondition: something is mounted below it, which a removal would reach into (reason ``STILL_MOUNTED``).
        OSError: it can't be removed.
    """
    place = directory.resolve()
    mounts = [_unescaped(line.split()[4]) for line in _MOUNTS.read_text().splitlines()]
    if below := sorted(mount for mount in mounts if mount.startswith(f"{place}{os.sep}")):
        raise FailedPrecondition(
            f"{place} can't be removed: {below[0]} is mounted below it; unmount it, then remove the directory",
            reason="STILL_MOUNTED",
        )
    if not place.is_dir():
        return
    for entry in sorted(place.iterdir(), key=lambda entry: entry.name == last):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if str(place) not in mounts:
        place.rmdir()


def _unescaped(field: str) -> str:
    return field.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
