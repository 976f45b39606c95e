"""Questions about an unpacked image, answered without ever leaving it. They block: not for the event loop.

A path in an image means what it means to a process whose root it is: an absolute symbolic link begins at the image's
root, and ``..`` ends there.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from pathlib import Path

from greenroom.core.errors import FailedPrecondition

#: As Linux has it (MAXSYMLINKS).
MAX_LINKS = 40
#: As Linux has it (PATH_MAX).
MAX_PATH_BYTES = 4096
#: Names that are looked up on the way of one path, those of links among them.
MAX_NAMES = 1000
#: Directories of a PATH that are looked through. Each of these bounds is far above what any image needs; without them
#: one that wants to hurt has the agent look up millions of names.
MAX_DIRECTORIES = 100
#: Of what an image says and an error quotes.
_MAX_SHOWN = 100
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def resolve(root: Path, inside: str) -> Path | None:
    """The file on the host that ``inside`` (absolute, in the image) names; None when there is none, or none that is
    found within the bounds."""
    if len(os.fsencode(inside)) > MAX_PATH_BYTES:
        return None
    todo = deque(inside.split("/"))
    base = here = str(root)
    links = names = 0
    while todo:
        part = todo.popleft()
        names += 1
        if names > MAX_NAMES:
            return None
        if part in ("", "."):
            continue
        if part == "..":
            here = here.rpartition("/")[0] if here != base else base
            continue
        path = f"{here}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(mode):
            here = path
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        target = str(Path(path).readlink())
        if target.startswith("/"):
            here = base
        todo.extendleft(reversed(target.split("/")))
    return Path(here)


def find_command(root: Path, command: str, search_path: str, cwd: str) -> str:
    """The absolute path in the image of ``command``, found as `execvp` does.

    Raises:
        FailedPrecondition: there is no such program in the image (reason ``COMMAND_NOT_FOUND``).
    """
    if "/" in command:
        candidates = [command if command.startswith("/") else f"{cwd.rstrip('/')}/{command}"]
        where = _shown(candidates[0])
    else:
        directories = search_path.split(":") if command else []
        candidates = [f"{(d or cwd).rstrip('/')}/{command}" for d in directories[:MAX_DIRECTORIES]]
        part = f"the first {MAX_DIRECTORIES} directories of " if len(directories) > MAX_DIRECTORIES else ""
        where = f"{part}PATH ({_shown(search_path)})"
    for candidate in candidates:
        if is_program(root, candidate):
            return candidate
    raise FailedPrecondition(
        f"the image has no program {_shown(command)!r}: looked at {where}; correct the template's command",
        reason="COMMAND_NOT_FOUND",
        metadata={"command": _shown(command)},
    )


def is_program(root: Path, inside: str) -> bool:
    path = resolve(root, inside)
    if path is None:
        return False
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
