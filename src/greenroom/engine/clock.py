"""Time and identity as the engine sees them: whoever runs it may give it other ones, as the simulation does."""

from __future__ import annotations

import asyncio


def monotonic() -> float:
    """Seconds of the running event loop's clock, which never goes back; what durations and waits are measured by."""
    return asyncio.get_running_loop().time()


def make_id(now: float, random_74_bits: int) -> str:
    """32 hex digits that sort by time of making (UUID version 7, RFC 9562), so lists of operations are in order."""
    milliseconds = int(now * 1000)
    low, high = random_74_bits & ((1 << 62) - 1), random_74_bits >> 62 & 0xFFF
    return f"{(milliseconds << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low:032x}"
