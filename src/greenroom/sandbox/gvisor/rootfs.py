"""Questions about an unpacked image, answered without ever leaving it.

A path in an image means what it means to a process whose root it is: an absolute symbolic link begins at the image's
root, and ``..`` ends there.
"""

from __future__ import annotations

import stat
from collections import deque
from pathlib import Path

from greenroom.core.errors import FailedPrecondition

#: As Linux has it (MAXSYMLINKS).
MAX_LINKS = 40
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def resolve(root: Path, inside: str) -> Path | None:
    """The file on the host that ``inside`` (absolute, in the image) names; None when there is none."""
    todo = deque(inside.split("/"))
    at: list[str] = []
    links = 0
    while todo:
        part = todo.popleft()
        if part in ("", "."):
            continue
        if part == "..":
            del at[-1:]
            continue
        path = root.joinpath(*at, part)
        try:
            mode = path.lstat().st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(mode):
            at.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        target = str(path.readlink())
        if target.startswith("/"):
            at.clear()
        todo.extendleft(reversed(target.split("/")))
    return root.joinpath(*at)


def find_command(root: Path, command: str, search_path: str, cwd: str) -> str:
    """The absolute path in the image of ``command``, found as `execvp` does.

    Raises:
        FailedPrecondition: there is no such program in the image (reason ``COMMAND_NOT_FOUND``).
    """
    if "/" in command:
        candidates = [command if command.startswith("/") else f"{cwd.rstrip('/')}/{command}"]
    else:
        candidates = [f"{(d or cwd).rstrip('/')}/{command}" for d in search_path.split(":")] if command else []
    for candidate in candidates:
        if is_program(root, candidate):
            return candidate
    where = candidates[0] if "/" in command else f"PATH ({search_path})"
    raise FailedPrecondition(
        f"the image has no program {command!r}: looked at {where}; correct the template's command",
        reason="COMMAND_NOT_FOUND",
        metadata={"command": command},
    )


def is_program(root: Path, inside: str) -> bool:
    path = resolve(root, inside)
    if path is None:
        return False
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) and bool(mode & 0o111)
