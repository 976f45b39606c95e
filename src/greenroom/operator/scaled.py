"""What the autoscaler has decided about a pool that leaves ``replicas`` out: an annotation of the pool.

It is written with the version of the pool that it was decided from, so that a newer spec makes it fail, and it is not
in the spec, because what people have not written there is not to appear there: their next ``kubectl apply`` changes
nothing of it, and ``kubectl scale`` takes the pool out of the autoscaler's hands.
"""

from __future__ import annotations

import msgspec

from greenroom.core.records import Record
from greenroom.operator.objects import SCALED_ANNOTATION, PoolObject
from greenroom.operator.specs import MAX_REPLICAS


class Scaled(Record, frozen=True, kw_only=True):
    """``victims``: names of pods that are to go. ``at``: when this was decided (epoch seconds)."""

    replicas: int = 0
    victims: tuple[str, ...] = ()
    at: float = 0.0


def read_scaled(pool: PoolObject) -> Scaled:
    """Nothing that can be read counts as nothing decided: as few as the pool takes, and nobody is named to go."""
    text = (pool.metadata.annotations or {}).get(SCALED_ANNOTATION, "")
    try:
        found = msgspec.json.decode(text or "{}", type=Scaled)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return Scaled()
    return found if 0 <= found.replicas <= MAX_REPLICAS else Scaled()


def write_scaled(scaled: Scaled) -> dict[str, str]:
    """As annotations."""
    return {SCALED_ANNOTATION: msgspec.json.encode(scaled).decode()}
