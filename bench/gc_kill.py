"""``kill -9`` while things come and go, and what is left: nothing that nobody needs, and everything that somebody does.

One server keeps up to two workers, a third one runs by itself. Clients create, wake, suspend and delete actors (of a
template whose suspends are answered early, and one whose are not), apply and delete templates, and make the pool
smaller and larger. At a random moment an agent, the control plane, both or none is killed, and started again. When
nothing is under way any more the database is compared with the machine (`greenroom.testing.leaks`): processes, mounts,
network namespaces and interfaces, cgroups, directories, copies of snapshots, logs, uses of images, rows, objects. And
actors with what their clients were told: none is forgotten or back from the dead, none counts less than it said, and
one that ran and was left alone is the same process still.

Goal: no finding.

    python bench/gc_kill.py [--rounds 200] [--seed 1] [--backend gvisor|process] [--keep]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from pathlib import Path

import uvloop
from _kit import WORK, conditions, report, say

from greenroom.testing import counter_app
from greenroom.testing.kills.rounds import Rounds, summary
from greenroom.testing.leftovers import leftovers
from greenroom.testing.python_image import build_python_image

HOME = WORK / "gc_kill"
#: Rest that takes longer is worth a line.
SLOW_S = 8.0


async def run(rounds: Rounds, count: int) -> None:
    for number in range(1, count + 1):
        found = await rounds.round()
        say(f"round {number}: {rounds.seconds[-1]:.1f} s, {len(found)} findings")
        if rounds.last and rounds.last[0][0] > SLOW_S and not found:
            say(f"  after {rounds.last[0][0]} s there was still: {rounds.last[0][1]}")
        for finding in found:
            say(f"  after {finding.victim} was killed: {finding.what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="gvisor" if os.geteuid() == 0 else "process")
    parser.add_argument(
        "--keep", action="store_true", help="leave the data directory, with its logs, also without findings"
    )
    args = parser.parse_args()
    before = conditions()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it started is ended too
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    image = build_python_image(HOME / "image", app=Path(counter_app.__file__), compression="none")
    rounds = Rounds(HOME, args.backend, image, seed=args.seed, actors=args.actors)
    try:
        rounds.start()
        uvloop.run(run(rounds, args.rounds))
    finally:
        rounds.stop()
    left = leftovers(HOME / "d")
    for line in left:
        say(f"left after the end: {line}")
    figures = {"backend": args.backend, "seed": args.seed, **summary(rounds), "left_after_the_end": left}
    ok = not rounds.findings and not left
    report("gc_kill", figures, before=before, ok=ok)
    if ok and not args.keep:
        shutil.rmtree(HOME, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
