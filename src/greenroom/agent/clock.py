"""The agent's clock for all that has to go on counting while its machine sleeps."""

from __future__ import annotations

import time


def boot_time() -> float:
    """Seconds since the machine was booted, also those that it slept; never goes back. The event loop's clock stands
    still while the machine sleeps, and a worker that slept may have been given up meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
