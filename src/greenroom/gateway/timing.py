"""The header that says where the time of a waking request went. Pure.

The phases follow each other without a gap: ``queue`` (waiting before and around the wake-up operation), each phase of
the operation, ``answer`` (from the binding to the first byte of the response). So they sum to ``total``, to the last
digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from greenroom.core.records import PhaseTime

_NOT_TOKEN = re.compile(r"[^0-9A-Za-z!#$%&'*+.^_`|~-]")


def server_timing(parsed: float, obtained: float, answered: float, phases: Sequence[PhaseTime]) -> bytes:
    """Value of ``Server-Timing`` (W3C), in milliseconds with two decimals.

    Args:
        parsed: when the request's head was complete; all three in seconds of one clock, in this order.
        obtained: when the binding was there.
        answered: when the first byte of the response arrived.
        phases: of the operation. A request that joined it half-way waited for its later part only: what lies before the
            request is cut off from the front.
    """
    left = max(0.0, obtained - parsed)
    waited: list[tuple[str, float]] = []
    for phase in reversed(phases):
        part = min(left, max(0.0, phase.seconds))
        left -= part
        waited.append((_NOT_TOKEN.sub("-", phase.name) or "phase", part))
    waited.append(("queue", left))
    waited.reverse()
    waited.append(("answer", max(0.0, answered - obtained)))
    # Rounding the moments, not the durations, keeps the sum exact.
    items: list[str] = []
    moment = 0.0
    before = 0
    for name, seconds in waited:
        moment += seconds
        now = round(moment * 1e5)
        items.append(f"{name};dur={_milliseconds(now - before)}")
        before = now
    items.append(f"total;dur={_milliseconds(before)}")
    return ", ".join(items).encode()


def _milliseconds(hundredths: int) -> str:
    return f"{hundredths // 100}.{hundredths % 100:02d}"
