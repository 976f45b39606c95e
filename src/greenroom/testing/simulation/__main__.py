"""``python -m greenroom.testing.simulation``: see the package."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from os import cpu_count

from greenroom.testing.simulation.plan import Plan
from greenroom.testing.simulation.run import Broken, Report, Simulation


def _one(seed: int) -> Report | str:
    gc.disable()
    try:
        return Simulation(seed, Plan.draw(seed)).run()
    except Broken as broken:
        return str(broken)
    finally:
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m greenroom.testing.simulation")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one")
    parser.add_argument("--trace", action="store_true", help="shows all that happens")
    args = parser.parse_args()
    if args.trace:
        for seed in range(args.first, args.first + args.seeds):
            simulation = Simulation(seed, Plan.draw(seed), trace=True)
            print(simulation.plan)
            try:
                simulation.run()
            except Broken as broken:
                print("\n".join(simulation.trace.lines))
                print(broken)
                return 1
            print("\n".join(simulation.trace.lines))
        return 0
    begin, failed, hits, ends, virtual_s, slowest = time.monotonic(), 0, Counter[str](), Counter[str](), 0.0, 0.0
    with ProcessPoolExecutor(min(cpu_count() or 1, args.seeds), initializer=gc.freeze) as pool:
        for seed, came in zip(
            range(args.first, args.first + args.seeds),
            pool.map(_one, range(args.first, args.first + args.seeds), chunksize=10 if args.seeds > 50 else 1),
            strict=True,
        ):
            if isinstance(came, str):
                failed += 1
                print(f"{came[:2000]}\n  alone: make sim SEEDS=1 FROM={seed}\n")
                continue
            hits.update({f.value: n for f, n in came.hits.items()})
            ends.update(came.ends)
            virtual_s += came.virtual_s
            slowest = max(slowest, came.settle_s)
    took = time.monotonic() - begin
    print("faults:", ", ".join(f"{k} {n}" for k, n in sorted(hits.items())))
    print("ends:", ", ".join(f"{k} {n}" for k, n in sorted(ends.items())))
    print(
        f"{args.seeds} seeds, {failed} broken; {virtual_s:.0f} virtual seconds in {took:.1f} s "
        f"({took / args.seeds * 1000:.0f} ms a seed); at rest {slowest:.0f} s after the trouble at the latest"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
