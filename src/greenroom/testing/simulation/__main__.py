"""``python -m greenroom.testing.simulation``: see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.run import Broken, Report, Simulation, run_all

#: Seeds that one process is given at a time.
CHUNK = 20
#: Characters of a failure that are printed; the whole of it comes with ``--trace``.
SHOWN = 2000


def chunk(seeds: range) -> list[Report | str]:
    return [str(came)[:SHOWN] if isinstance(came, Broken) else came for came in run_all(seeds)]


def results(first: int, seeds: int) -> Iterator[Report | str]:
    """In parallel, as many at a time as there are cores."""
    end = first + seeds
    chunks = [range(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK)]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(chunks))) as pool:
        for came in pool.map(chunk, chunks):
            yield from came


def trace(seed: int) -> int:
    simulation = Simulation(seed, Plan.draw(seed), trace=True)
    broken: Broken | None = None
    try:
        simulation.run()
    except Broken as error:
        broken = error
    print(simulation.plan, *simulation.trace.lines, broken or "nothing is broken", sep="\n")
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m greenroom.testing.simulation")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one")
    parser.add_argument("--trace", action="store_true", help="shows all that happens with the first one")
    args = parser.parse_args()
    if args.trace:
        return trace(args.first)
    began, failed, virtual_s, slowest_s = time.monotonic(), 0, 0.0, 0.0
    hits, ends = Counter[str](), Counter[str]()
    for came in results(args.first, args.seeds):
        if isinstance(came, str):
            failed += 1
            print(came, "\n", flush=True)
            continue
        hits.update({fault.value: times for fault, times in came.hits.items()})
        ends.update(came.ends)
        virtual_s += came.virtual_s
        slowest_s = max(slowest_s, came.settle_s)
    took_s = time.monotonic() - began
    print("faults:", ", ".join(f"{what} {times}" for what, times in sorted(hits.items())))
    print("what came:", ", ".join(f"{what} {times}" for what, times in sorted(ends.items())))
    print(
        f"{args.seeds} seeds, {failed} broken; {virtual_s:.0f} virtual seconds in {took_s:.1f} s "
        f"({virtual_s / took_s:.0f} times as fast, {took_s / args.seeds * 1000:.0f} ms a seed); "
        f"at rest {slowest_s:.0f} s after the trouble at the latest"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
