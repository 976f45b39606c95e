"""What a server and an agent do to their own process before anything else."""

from __future__ import annotations

import gc
import os
import resource

#: Open files that a process needs beside connections and sandboxes: databases, logs, sockets, libraries.
RESERVED_FILES = 256
#: New objects after which garbage is looked for, and how many such looks make one at what has survived them. Nearly all
#: that a server makes is freed at once, by counting; with Python's own 700 a server that knows ten thousand actors
#: spent a tenth of its time looking.
GARBAGE_THRESHOLDS = (20_000, 20, 20)


def prepare() -> int:
    """New files are this user's alone, as many files may be open as the machine allows, and garbage is looked for
    less often.

    Returns:
        How many files may be open, beyond the reserve.
    """
    os.umask(0o077)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(64, hard - RESERVED_FILES)
