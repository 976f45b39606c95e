"""Workers that end for good, with real agents and real sandboxes: retired in order, or dead, forgotten, and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kit import Kit, until
from shell import Shell, document

from greenroom.agent.enrolment import PAPERS
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import ActorState, WorkerState
from greenroom.snapshots.store import MARK
from greenroom.testing.leaks.places import Place, look
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]

BACKEND = "gvisor"
RETURN_S = 3


class Site:
    """A server without workers, and agents that are started by hand."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.home = kit, kit.live.data_dir
        self.shell = Shell(self.home)
        self._agents: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str) -> None:
        options = {
            "worker": name,
            "pool": "default",
            "backend": BACKEND,
            "slots": "2",
            "warm": "0",
            "state-dir": str(self.state(name)),
            "images": str(self.home / "images"),
            "snapshots": str(self.home / "snapshots"),
            "control": f"unix:{self.home}/run/agents.sock",
        }
        self._agents[name] = self.shell.start("agent", *(f"--{key}={value}" for key, value in options.items()))

    def state(self, name: str) -> Path:
        return self.home / "elsewhere" / name

    def kill(self, name: str) -> None:
        agent = self._agents.pop(name)
        agent.send_signal(signal.SIGKILL)
        agent.communicate(timeout=30)

    def ended(self, name: str) -> int:
        """The exit status of an agent that ends by itself."""
        agent = self._agents.pop(name)
        agent.communicate(timeout=60)
        return agent.returncode

    def close(self) -> None:
        for agent in self._agents.values():
            agent.send_signal(signal.SIGUSR1)  # with all that runs there
        for agent in self._agents.values():
            agent.communicate(timeout=60)

    def worker(self, name: str) -> str:
        """Its state; "" when there is no record of it."""
        return next((w.state for w in self.kit.workers() if w.name == name), "")

    def incarnation(self, name: str) -> str:
        found: str = json.loads((self.state(name) / PAPERS).read_bytes())["incarnation"]
        return found


@contextmanager
def site(data_dir: Path, image: str, *options: str) -> Iterator[Site]:
    live = LiveServer(data_dir, backend=BACKEND, workers=0, options=(f"--worker-return={RETURN_S}", *options))
    live.start()
    found = Site(Kit(live, image))
    try:
        yield found
    finally:
        found.close()
        live.stop()
    assert leftovers(data_dir) == []


@pytest.mark.timeout(240)
def test_a_dead_worker_is_forgotten_and_back_with_its_old_disk(data_dir: Path, counter_image: str) -> None:
    """Its sandboxes have outlived its agent all the while: they end before it counts again."""
    with site(data_dir, counter_image) as here:
        kit, shell = here.kit, here.shell
        here.start("one")
        until(lambda: here.worker("one"), lambda state: state == WorkerState.ACTIVE)
        assert kit.apply(on_crash="restore-last").state == "Ready"
        kit.create("a", "b")
        for name in ("a", "b"):
            kit.get(name)
            kit.act("Suspend", name)
            assert kit.get(name)["ram"] == 2
        old = here.incarnation("one")
        assert "greenroom retire worker one" in shell("forget", "worker", "one").failed(4)
        here.kill("one")
        here.start("two")
        until(lambda: here.worker("two"), lambda state: state == WorkerState.ACTIVE)

        def forgotten() -> bool:
            said = shell("forget", "worker", "one", "--yes")
            assert said.code == 0 or "can't be forgotten" in said.err, said
            return said.code == 0

        until(forgotten, bool)
        assert here.worker("one") == WorkerState.GONE
        for name in ("a", "b"):
            assert kit.get(name)["ram"] == 2, "from its last snapshot"
            assert kit.actor(name).worker == "two"
        why = shell("gc", "--explain", "worker/one").ok()
        assert "kept because it is gone (somebody has said that it will not come back)" in why

        here.start("one")
        until(lambda: here.worker("one"), lambda state: state == WorkerState.ACTIVE)
        assert here.incarnation("one") != old, "it registered as a new worker"
        (back,) = [w for w in kit.workers() if w.name == "one"]
        assert (back.used, back.distrust, back.message) == (0, "", "")
        answer = json.loads(shell("gc", "--dry-run", "-o", "json").ok())
        assert answer["items"] == [], "it has wiped itself"
        for name in ("a", "b"):
            assert kit.get(name)["ram"] == 3, "the very sandbox on the other worker"


@pytest.mark.timeout(240)
def test_a_worker_retires_and_leaves_nothing(data_dir: Path, counter_image: str) -> None:
    with site(data_dir, counter_image) as here:
        kit, shell = here.kit, here.shell
        here.start("one")
        until(lambda: here.worker("one"), lambda state: state == WorkerState.ACTIVE)
        assert kit.apply(durability="local").state == "Ready"
        kit.create("a")
        kit.get("a")
        kit.act("Suspend", "a")
        assert kit.get("a")["ram"] == 2
        said = shell("retire", "worker", "one", "--wait").ok()
        assert said == "worker/one retiring, 1 of 2 slots taken\nworker/one has retired\n"
        assert here.ended("one") == 0
        assert not here.state("one").exists() and here.worker("one") == ""
        assert kit.actor("a").state is ActorState.SUSPENDED
        here.start("two")
        assert until(lambda: kit.live.request("default/a"), lambda answer: answer.status == 200)
        assert kit.get("a")["ram"] == 4, "what was only on its disk was uploaded first"
        here.start("one")
        until(lambda: here.worker("one"), lambda state: state == WorkerState.ACTIVE)
        assert [w.epoch for w in kit.workers() if w.name == "one"] == [1]


@pytest.mark.timeout(240)
def test_a_pool_made_smaller_while_its_worker_was_dead(data_dir: Path, counter_image: str) -> None:
    live = LiveServer(data_dir, backend=BACKEND, workers=2, slots=2)
    live.start()
    kit, shell = Kit(live, counter_image), Shell(data_dir)
    try:
        until(kit.workers, lambda workers: len(workers) == 2)
        for pid in live.pids()[1:]:
            with suppress(OSError):  # it has just ended
                if b"--worker=default-1" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        shell("apply", "-f", "-", stdin=document("WorkerPool", "default", f"{{replicas: 1, backend: {BACKEND}}}")).ok()
        until(kit.workers, lambda workers: [w.name for w in workers] == ["default-0"])
        until(lambda: [p.name for p in (data_dir / "workers").iterdir()], lambda names: names == ["default-0"])
        shell("apply", "-f", "-", stdin=document("WorkerPool", "default", f"{{replicas: 2, backend: {BACKEND}}}")).ok()
        again = until(kit.workers, lambda workers: len(workers) == 2 and all(w.state == "Active" for w in workers))
        assert [(w.distrust, w.message) for w in again] == [("", ""), ("", "")]
    finally:
        live.stop()


@pytest.mark.timeout(240)
def test_a_directory_that_no_record_speaks_of_goes_with_all_that_runs_there(data_dir: Path, counter_image: str) -> None:
    """Everything was killed, and the database lost: the sandboxes of a worker that no pool asks for live on."""
    live = LiveServer(data_dir, backend=BACKEND, workers=2, slots=1, options=("--warm=0",))
    live.start()
    kit = Kit(live, counter_image)
    assert kit.apply().state == "Ready"
    kit.create("a", "b")
    for name in ("a", "b"):
        kit.get(name)
    assert {kit.actor(name).worker for name in ("a", "b")} == {"default-0", "default-1"}
    live.kill()
    for path in [*data_dir.glob("greenroom.db*"), *data_dir.glob(f"workers/*/{PAPERS}")]:
        path.unlink()
    place = left(data_dir, "default-1")
    assert place.netns and place.cgroups and place.processes and place.uses
    live.workers = 1
    with pytest.raises(FailedPrecondition) as refused:  # what the snapshots went with is gone: somebody has to say so
        live.start()
    assert "remove that object" in refused.value.message
    (data_dir / "snapshots" / MARK).unlink()
    live.start()
    try:
        until(lambda: [path.name for path in (data_dir / "workers").iterdir()], lambda names: names == ["default-0"])
        place = left(data_dir, "default-1")
        assert not (place.netns or place.cgroups or place.processes or place.uses or place.is_holder)
    finally:
        live.stop()
    assert leftovers(data_dir) == []


def left(data_dir: Path, worker: str) -> Place:
    """What a worker has on this machine."""
    directories = {worker: data_dir / "workers" / worker}
    return look(data_dir, directories, data_dir / "images", data_dir / "snapshots").places[worker]


@pytest.mark.timeout(240)
def test_garbage_and_figures_of_it(data_dir: Path, counter_image: str) -> None:
    with site(data_dir, counter_image, "--metrics=127.0.0.1:0") as here:
        kit, shell = here.kit, here.shell
        here.start("one")
        until(lambda: here.worker("one"), lambda state: state == WorkerState.ACTIVE)
        assert kit.apply().state == "Ready"
        kit.create("a")
        for _ in range(3):
            kit.get("a")
            kit.act("Suspend", "a")
        explained = shell("gc", "--explain", "a").ok().splitlines()
        assert [line.partition("/")[0] for line in explained][:3] == ["actor", "snapshot", "snapshot"]
        assert "actor default/a wakes from it" in "".join(explained)
        kit.act("Delete", "a")
        shell("gc").ok()
        history = shell("gc", "--history").ok()
        assert "nothing wakes from it any more" in history and "snapshot store" in history
        figures = metrics(here)
        assert 'greenroom_workers{state="Active"} 1.0' in figures
        assert "greenroom_workers_distrusted 0.0" in figures and "process_resident_memory_bytes" in figures
        assert 'greenroom_garbage_destroyed_total{kind="snapshot"}' in figures
        assert float(figures.partition('greenroom_worker_syncs_total{result="done"} ')[2].split()[0]) >= 1


def metrics(here: Site) -> str:
    (line,) = [line for line in here.kit.live.log_path.read_text().splitlines() if "metrics are served" in line]
    with urllib.request.urlopen(json.loads(line)["address"], timeout=10) as answer:
        text: str = answer.read().decode()
    return text
