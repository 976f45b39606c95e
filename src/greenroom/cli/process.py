"""What a server and an agent do to their own process before anything else."""

from __future__ import annotations

import os
import resource

#: Open files that a process needs beside connections and sandboxes: databases, logs, sockets, libraries.
RESERVED_FILES = 256


def prepare() -> int:
    """New files are this user's alone, and as many files may be open as the machine allows.

    Returns:
        How many files may be open, beyond the reserve.
    """
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(64, hard - RESERVED_FILES)
