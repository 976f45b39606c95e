"""``python -m greenroom.testing.collection``: searches the models, and says how many states they have."""

from __future__ import annotations

import argparse
import sys

from greenroom.testing.collection.search import Search, Violation
from greenroom.testing.collection.sizes import FULL, SMALL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m greenroom.testing.collection")
    parser.add_argument("--full", action="store_true", help="the large models as well (hours, and some GB of memory)")
    parser.add_argument("--limit", type=int, default=50_000_000, help="states after which one is given up")
    args = parser.parse_args()
    failed = 0
    for name, model in (SMALL | FULL if args.full else SMALL).items():
        try:
            found = Search(model, args.limit).run()
        except Violation as broken:
            failed += 1
            print(f"{name}: {broken}", flush=True)
            continue
        print(
            f"{name}: {found.states} states, {found.transitions} steps between them, the furthest {found.depth} steps "
            f"away; nothing broken, in {found.seconds:.0f} s",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
