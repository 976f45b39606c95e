"""See `greenroom.testing.pool_world.search`."""

from __future__ import annotations

import argparse
import sys

from greenroom.testing.pool_world import search


def main() -> int:
    parser = argparse.ArgumentParser(description=search.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="how the algorithms compare")
    args = parser.parse_args()
    if args.table:
        for line in search.table(args.seeds):
            print(line, flush=True)
        return 0
    found = 0
    for seed, error in search.search(args.first, args.seeds):
        found += 1
        print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    print(f"{args.seeds} seeds from {args.first}: {found} show something wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
