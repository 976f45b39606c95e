"""Whole control planes in virtual time: `greenroom.testing.simulation`.

A seed that failed once goes into `FAILED_ONCE` with a word about what it found. As the simulation itself changes, a
seed comes to stand for another world; the list is then a record of what it was good for, and some more seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from greenroom.core.records import Durability, OperationKind
from greenroom.testing.simulation.faults import AT_CALL, Fault
from greenroom.testing.simulation.run import Broken, Report, run, run_all
from greenroom.testing.simulation.script import run_step

SHARDS = 40
SEEDS_PER_SHARD = 50

#: What each found when it failed; all with the engine as it was then.
FAILED_ONCE = {
    6: "a replica whose feed had a gap went on routing to an actor that had crashed meanwhile",
    27: "the same",
    76: "a binding made from the late reply of a commit, after the actor had been deleted",
    135: "begun anew after a crash, an actor forgot a snapshot that nobody removed then",
    141: "a worker that wanted to end was not seen off again after the first try had failed",
    151: "a suspend that was backed out left a copy on the worker; later: a resume that was moved twice by one command",
    158: "a snapshot that was on a worker's disk only, and the worker came back with an empty disk",
    170: "a request to cancel met a step whose time was just up: RuntimeError",
    189: "a binding that went back to an older generation: AssertionError",
    74: "a worker counted as lost too early, when a look at the store took long",
    300360: "an actor of a lost worker was crashed late, when the worker was back",
    290: "the exit of a first try of a wake crashed what the second had woken",
    148: "a worker that wanted to end was not seen off again after the first try had failed",
    278: "the same",
    1576: "after an outage of the store every worker refused to wake, as none had been answered again yet",
    50001: "the exit of a sandbox whose answer was lost crashed the one that the same call had made since",
    1939: "a replica that was closed while it looked for its snapshot store: CancelledError out of its start",
    26: "a drained worker's record forgot why, and the worker stayed drained",
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "simulation"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.mark.parametrize("shard", range(SHARDS))
def test_seeds(shared: Path, shard: int) -> None:
    counts, broken = Counter[str](), []
    for came in run_all(range(shard * SEEDS_PER_SHARD, (shard + 1) * SEEDS_PER_SHARD)):
        if isinstance(came, Broken):
            broken.append(came)
        else:
            counts.update(said_of(came))
    assert not broken, "\n".join(map(str, broken))
    (shared / f"{shard}.new").write_text(json.dumps(counts))
    (shared / f"{shard}.new").rename(shared / f"{shard}.json")
    done = list(shared.glob("*.json"))
    if len(done) == SHARDS:  # the last one looks at what all of them came to
        check_coverage(sum((Counter(json.loads(path.read_text())) for path in done), Counter()))


def said_of(report: Report) -> dict[str, int]:
    return {f"fault: {fault.value}": times for fault, times in report.hits.items()} | dict(report.ends)


def check_coverage(counts: Counter[str]) -> None:
    """Every kind of fault was done, and every kind of operation has ended in every way."""
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    wanted = [f"fault: {fault.value}" for fault in Fault]
    for kind in OperationKind:
        wanted += [f"{kind} Done"]
        if kind not in (OperationKind.CREATE, OperationKind.CRASH):  # these are done when they are recorded
            wanted += [f"{kind} taken over"]
            if kind is not OperationKind.DELETE:  # goes on until it is done
                wanted += [f"{kind} Failed"]
    wanted += [f"crash: {reason}" for reason in ("Exited", "SandboxLost", "WorkerLost", "SnapshotLost")]
    wanted += ["set back: SnapshotCorrupt", "set back: SnapshotLost", "set back: boot"]
    missing = [what for what in wanted if not counts[what]]
    assert not missing, f"these seeds show nothing of {missing}"


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_seeds_that_failed_once(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("fault", AT_CALL)
def test_every_step_of_an_actors_life(fault: Fault, durability: Durability) -> None:
    """Step 1 goes wrong, then step 2, and so on, until there was no step of that number."""
    step = 1
    while run_step(step, fault, durability):
        step += 1
    assert step > 50, "an actor's life is longer than that"


DIGESTS = "from greenroom.testing.simulation.run import run; print([run(seed).digest for seed in (3, 5, 8, 13)])"


def test_the_same_seed_takes_the_same_course() -> None:
    """In processes whose hashes of strings and addresses of objects differ."""

    def digests(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run([sys.executable, "-c", DIGESTS], env=env, capture_output=True, text=True, check=True)
        return ran.stdout

    assert digests("1") == digests("2")
    assert len(set(digests("3").split(","))) == 4
