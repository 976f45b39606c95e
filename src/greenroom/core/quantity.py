"""Quantities (``512Mi``, ``500m``) and durations (``5m``, ``1h30m``) as Kubernetes writes them.

Source: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/ and Go's time.ParseDuration.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([eE][+-]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)")
_SUFFIXES = {
    **{s: Decimal(10) ** e for s, e in zip("num", (-9, -6, -3), strict=True)},
    **{s: Decimal(10) ** e for s, e in zip("kMGTPE", (3, 6, 9, 12, 15, 18), strict=True)},
    **{f"{s}i": Decimal(1024) ** e for s, e in zip("KMGTPE", range(1, 7), strict=True)},
}
_DURATION = re.compile(r"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|ms|s|m|h))+")
_PART = re.compile(r"([0-9.]+)(ns|us|µs|ms|s|m|h)")
_NANOS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def parse_quantity(text: str) -> Decimal:
    """Raises:
    ValueError: says what is accepted.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; write for example 512Mi, 2Gi, 500m or 1.5")
    number, exponent, suffix = match.groups()
    return Decimal(number + (exponent or "")) * _SUFFIXES.get(suffix or "", Decimal(1))


def parse_bytes(text: str) -> int:
    """A quantity of bytes; fractions are rounded up, as Kubernetes does. Raises `ValueError`."""
    return math.ceil(parse_quantity(text))


def parse_duration(text: str) -> float:
    """Seconds, to the nanosecond: as it is after it was sent as a ``google.protobuf.Duration``. Raises `ValueError`."""
    text = text.strip()
    if text == "0":
        return 0.0
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration; write numbers with units, for example 300ms, 30s, 5m or 1h30m")
    nanos = round(sum(Fraction(Decimal(number)) * _NANOS[unit] for number, unit in _PART.findall(text)))
    try:
        return nanos / 10**9
    except OverflowError:
        raise ValueError(f"{text!r} is longer than anything") from None


def format_bytes(value: int) -> str:
    """As a manifest has it, exactly: 536870912 -> ``512Mi``."""
    for suffix in ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki"):
        unit = int(_SUFFIXES[suffix])
        if value and value % unit == 0:
            return f"{value // unit}{suffix}"
    return str(value)


def format_cpus(value: float) -> str:
    """0.5 -> ``500m``, 2.0 -> ``2``."""
    if value == int(value):
        return str(int(value))
    return f"{round(value * 1000)}m" if round(value * 1000) / 1000 == value else repr(value)


def format_duration(seconds: float) -> str:
    """As a manifest has it: 300.0 -> ``5m``, 90.0 -> ``1m30s``, 0.25 -> ``250ms``."""
    if seconds != int(seconds):
        value, unit = (seconds * 1000, "ms") if seconds < 1 else (seconds, "s")
        return f"{value:.6f}".rstrip("0").rstrip(".") + unit
    rest, text = int(seconds), ""
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        if rest >= size:
            text += f"{rest // size}{unit}"
            rest %= size
    return text or "0s"


def human_bytes(value: float) -> str:
    """For people, three digits: ``48.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_age(seconds: float) -> str:
    """As kubectl: ``42s``, ``5m``, ``3h``, ``12d``."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f}s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f}m"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.0f}h"
    return f"{seconds / 86400:.0f}d"
