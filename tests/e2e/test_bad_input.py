"""Bad input, and a machine that lets one down: a clear error with its exit code, and nothing is lost."""

from __future__ import annotations

import functools
import http.client
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kit import Kit, until
from shell import Result, Shell, document, template

from greenroom.core.errors import ResourceExhausted
from greenroom.store.sqlite_file import DATABASE_FILE
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer

sys.path.append(str(Path(__file__).parents[1] / "integration"))
from registry_kit import docker_registry, find_registry

pytestmark = pytest.mark.xdist_group("sandboxes")

#: What a snapshot of the counter takes is about 7 MiB: this little room is enough for records, and not for it.
LITTLE_ROOM = 3 << 20


@contextmanager
def server(image: str, **options: object) -> Iterator[Kit]:
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    kit = Kit(LiveServer(directory, workers=1, slots=2, **options), image)  # type: ignore[arg-type]
    kit.live.start()
    try:
        yield kit
    finally:
        kit.live.stop()
        assert leftovers(directory) == []
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def sim() -> Iterator[tuple[Kit, Shell]]:
    """For what has nothing to do with sandboxes."""
    with server("none", backend="sim") as kit:
        shell = Shell(kit.live.data_dir)
        shell("apply", "-f", "-", stdin=template("counter", "none")).ok()
        yield kit, shell


@pytest.fixture(scope="module")
def real(counter_image: str) -> Iterator[tuple[Kit, Shell]]:
    """Two slots, and half a second of patience when both are taken."""
    with server(counter_image, options=("--capacity-wait=0.5",)) as kit:
        assert kit.apply().state == "Ready"
        yield kit, Shell(kit.live.data_dir)


@pytest.fixture
def slots(real: tuple[Kit, Shell]) -> Iterator[None]:
    """Every slot is free, before and after."""
    yield
    kit = real[0]
    for actor in kit.actors():
        kit.act("Delete", actor.name)
    assert [w.used for w in kit.workers()] == [0]


# --- names and manifests ----------------------------------------------------------------------------------------


def test_things_that_are_not_there(sim: tuple[Kit, Shell]) -> None:
    kit, shell = sim
    refused = shell("create", "actor", "a", "--template=nope")
    refused.failed(3, "template default/nope does not exist", "greenroom get templates")
    shell("resume", "nobody").failed(3, "actor default/nobody does not exist")
    shell("wait", "actor", "nobody", "--timeout=1s").failed(3, "actor default/nobody does not exist")
    assert kit.actors() == []


@pytest.mark.parametrize("name", ["A_b", "x" * 64])
def test_names_are_dns_labels(sim: tuple[Kit, Shell], name: str) -> None:
    kit, shell = sim
    refused = shell("create", "actor", name, "--template=counter")
    refused.failed(2, f"actor name {name!r} is not a DNS label: use 1 to 63 lower-case letters")
    assert kit.actors() == []


@pytest.mark.parametrize(
    "bad, says",
    [
        (document("Template", "b", "{image: x, comand: [a]}"), ":10: spec.comand: unknown field; known are:"),
        (document("Template", "b", "{image: x, readyz: {path: 7}}"), ":10: spec.readyz.path: must be a string"),
        (document("Template", "b", "{image: x, ports: eighty}"), ":10: spec.ports: must be a list"),
        (document("Template", "b", "{image: x, idleTimeout: 5}"), ":10: spec.idleTimeout: needs a unit: write 5s"),
        (document("Deployment", "b", "{}"), ":8: kind: must be one of Template, WorkerPool, not 'Deployment'"),
        (document("Template", "B_", "{image: x}"), ":9: metadata.name: resource name 'B_' is not a DNS label"),
        (document("WorkerPool", "b", "{backend: nope}"), ":7: spec.backend: there is no sandbox backend 'nope'"),
        ("---\nkind: [\n", ":8: is not YAML:"),
    ],
    ids=["unknown-field", "wrong-type", "no-list", "no-unit", "unknown-kind", "name", "backend", "no-yaml"],
)
def test_one_bad_document_and_nothing_is_applied(sim: tuple[Kit, Shell], tmp_path: Path, bad: str, says: str) -> None:
    kit, shell = sim
    file = tmp_path / "all.yaml"
    file.write_text(template("good", "x") + bad)
    shell("apply", "-f", str(file)).failed(2, f"{file}{says}", "nothing was applied")
    assert [t.name for t in kit.templates()] == ["counter"]
    assert [p.name for p in kit.pools()] == ["default"]


# --- starting a server ------------------------------------------------------------------------------------------


def test_no_server(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell("get", "actors").failed(1, f"no Greenroom server answers at unix:{tmp_path}/run/api.sock", "greenroom up")
    shell("resume", "a").failed(1, "greenroom up")


def test_an_unknown_backend(tmp_path: Path) -> None:
    home = tmp_path / "data"
    up(home, "--backend=nope").failed(2, "no sandbox backend 'nope'; installed are: gvisor, process, sim")
    assert not home.exists()


def test_a_data_directory_in_use_says_by_whom(sim: tuple[Kit, Shell]) -> None:
    kit, _ = sim
    assert kit.live.process is not None
    holder = f"data directory {kit.live.data_dir} is in use by process {kit.live.process.pid} "
    up(kit.live.data_dir, "--backend=sim").failed(4, holder, "use another data directory")
    assert kit.workers()[0].state == "Active"


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shell = Shell(tmp_path)
        result = shell("up", f"--data={tmp_path}", "--backend=sim", f"--listen=127.0.0.1:{port}")
    result.failed(4, f"port {port} of 127.0.0.1 is in use by another program", "--listen")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "run" / "api.sock").exists()
    with started(tmp_path, backend="sim") as kit:
        assert kit.actors() == []


def test_a_database_of_a_newer_program(tmp_path: Path) -> None:
    database = tmp_path / DATABASE_FILE
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    before = database.read_bytes()
    up(tmp_path, "--backend=sim").failed(4, f"{database} has schema 999", "a newer Greenroom wrote it")
    assert database.read_bytes() == before


def test_the_backend_of_a_pool_stays(data_dir: Path) -> None:
    with started(data_dir, backend="sim"):
        pass
    up(data_dir, "--backend=process").failed(4, "pool default has backend 'sim'", "another data directory")


def test_other_workers_and_slots_on_the_same_data(data_dir: Path) -> None:
    """More and fewer: actors keep what they have, and workers that are too much are forgotten."""
    with shaped(data_dir, workers=1, slots=2) as kit:
        assert kit.apply(image="none").state == "Ready"
        kit.create("a", "b", "c")
        assert [kit.get(name)["count"] for name in "abc"] == [1, 1, 1]
    with shaped(data_dir, workers=3, slots=1) as kit:
        assert [kit.get(name)["count"] for name in "abc"] == [2, 2, 2]
    with shaped(data_dir, workers=1, slots=1) as kit:
        assert [kit.get(name)["count"] for name in "abc"] == [3, 3, 3]


@contextmanager
def shaped(data_dir: Path, workers: int, slots: int) -> Iterator[Kit]:
    """A server that has workers of just this shape."""
    wanted = [(f"default-{n}", "Active", slots) for n in range(workers)]
    with started(data_dir, backend="sim", workers=workers, slots=slots) as kit:
        until(lambda: [(w.name, w.state, w.capacity) for w in kit.workers()], lambda found: found == wanted)
        yield kit


def test_waiting_ends(sim: tuple[Kit, Shell]) -> None:
    kit, shell = sim
    kit.create("w")
    shell("wait", "actor/w", "--for=state=Running", "--timeout=300ms").failed(
        124, "actor/w was not Running after 0.3 s", "greenroom describe actor w"
    )
    kit.act("Delete", "w")


def test_the_state_does_not_allow_it(sim: tuple[Kit, Shell]) -> None:
    kit, shell = sim
    kit.create("s")
    shell("pause", "s").failed(4, "actor default/s is Suspended and can't become Pausing")
    shell("create", "actor", "s", "--template=counter").failed(4, "actor default/s exists already")
    shell("delete", "template", "counter").failed(4, "template default/counter is in use by actor default/s")
    assert kit.actor("s").state == "Suspended"
    kit.act("Delete", "s")


# --- templates that fail ----------------------------------------------------------------------------------------


@pytest.mark.gvisor
@pytest.mark.root
@pytest.mark.parametrize(
    "more, code, reason, says",
    [
        ("command: [/opt/nothing, -x]", 4, "COMMAND_NOT_FOUND", ["the image has no program '/opt/nothing'"]),
        (
            "command: [python3, -uc, 'print(\"deaf on purpose\"); import time; time.sleep(99)'], readyz: {timeout: 1s}",
            124,
            "NOT_READY",
            ["on port 8080 did not answer within 1 s", "raise readyz.timeout", "deaf on purpose"],
        ),
        (
            "command: [python3, -uc, 'raise SystemExit(\"no config file\")']",
            4,
            "ACTOR_EXITED",
            ["the actor's process ended with status 1 before it was ready", "no config file"],
        ),
    ],
    ids=["no-command", "never-ready", "exits"],
)
def test_a_template_that_can_not_start(
    real: tuple[Kit, Shell], slots: None, more: str, code: int, reason: str, says: list[str]
) -> None:
    kit, shell = real
    shell("apply", "-f", "-", stdin=template("bad", kit.image, more)).failed(code, *says)
    failed = kit.template("bad")
    assert (failed.state, failed.reason) == ("Failed", reason)
    assert all(part in failed.message for part in says)
    shell("create", "actor", "a", "--template=bad").failed(4, "template default/bad is Failed", says[0])
    assert kit.actors() == []
    shell("delete", "template", "bad").ok()


@pytest.mark.gvisor
@pytest.mark.root
def test_images_that_are_not_there(real: tuple[Kit, Shell], tmp_path: Path) -> None:
    kit, shell = real
    assert find_registry(), "docker-registry is missing; `make setup` installs it"
    missing = tmp_path / "nothing"
    with docker_registry(tmp_path) as registry:
        references = [
            (f"oci:{missing}:latest", 3, [f"{missing} is no directory", "OCI image layout"]),
            (f"{kit.image.removesuffix(':latest')}:v9", 3, ["has no image 'v9'; it has latest"]),
            (f"{registry}/team/app:v9", 3, [f"{registry}/team/app:v9"]),
        ]
        for reference, code, says in references:
            shell("apply", "-f", "-", stdin=template("bad", reference)).failed(code, *says)
            assert (kit.template("bad").state, kit.template("bad").reason) == ("Failed", "IMAGE_NOT_FOUND")
            shell("delete", "template", "bad").ok()
    shell("apply", "-f", "-", stdin=template("bad", f"{registry}/team/app:v9")).failed(
        1, f"{registry} does not answer", "check name and network"
    )
    assert kit.template("bad").reason == "REGISTRY_UNAVAILABLE"
    shell("delete", "template", "bad").ok()


# --- damage, and too little of everything -----------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.gvisor
@pytest.mark.root
def test_a_damaged_snapshot_is_refused_and_the_one_before_used(real: tuple[Kit, Shell], slots: None) -> None:
    kit, shell = real
    kit.create("a")
    for count in (1, 2):
        assert kit.get("a")["ram"] == count
        kit.act("Suspend", "a")
    bad, good = kit.actor("a").snapshot, kit.actor("a").previous_snapshot
    flip_a_byte(kit.stored(bad)["pages.img"])
    says = [f"snapshot {bad} is corrupt", "pages.img has SHA-256", f"went back to {good}"]

    woken = shell("resume", "a")
    woken.ok()
    assert all(part in woken.err for part in says), woken
    shown = shell("describe", "actor", "a").ok()
    assert "SnapshotCorrupt" in shown and all(part in shown for part in says)
    assert f"{bad}   a       counter    Corrupt" in shown
    assert kit.get("a")["ram"] == 2, "it had counted to 1 then"
    kit.act("Suspend", "a")
    assert kit.get("a")["ram"] == 3


@pytest.mark.gvisor
@pytest.mark.root
def test_a_manifest_that_is_gone_loses_nothing(real: tuple[Kit, Shell], slots: None) -> None:
    """The record has the digests too; a snapshot whose files are gone as well is a damaged one."""
    kit, shell = real
    kit.create("a")
    for count in (1, 2):
        assert kit.get("a")["ram"] == count
        kit.act("Suspend", "a")
    actor = kit.actor("a")
    kit.stored(actor.snapshot)["manifest"].unlink()
    assert shell("resume", "a").err == ""
    assert kit.get("a", "/info")["ram"] == 2
    kit.act("Suspend", "a")
    last = kit.actor("a").snapshot
    before = kit.stored(kit.actor("a").previous_snapshot).values()
    for path in set(kit.stored(last).values()) - set(before):  # what they share is needed
        path.unlink()
    assert f"snapshot {last} is corrupt" in shell("resume", "a").err
    assert kit.get("a", "/info")["ram"] == 2


@contextmanager
def streaming(kit: Kit, name: str) -> Iterator[Callable[[], bool]]:
    """An open request that lasts until the test closes it: a line each tenth of a second. Gives a look whether a line
    comes that was not sent before the look."""
    connection = http.client.HTTPConnection(*kit.live.gateway, timeout=60)
    began = time.monotonic()
    connection.request("GET", "/stream?n=10000&interval=0.1", headers={"Greenroom-Actor": f"default/{name}"})
    answer = connection.getresponse()
    assert answer.readline() == b"line 0\n"

    def goes_on() -> bool:
        new = int((time.monotonic() - began) / 0.1) + 1  # none is sent early
        return any(line == f"line {new}\n".encode() for line in iter(answer.readline, b""))

    yield goes_on
    connection.close()


@pytest.mark.gvisor
@pytest.mark.root
def test_no_capacity(real: tuple[Kit, Shell], slots: None) -> None:
    kit, shell = real
    kit.create("a", "b", "c")
    for name in ("a", "b"):
        kit.get(name)
    with streaming(kit, "a") as a_goes_on, streaming(kit, "b") as b_goes_on:
        refused = kit.live.request("default/c")
        assert (refused.status, refused.headers["Greenroom-Error"]) == (503, "NO_CAPACITY")
        assert int(refused.headers["Retry-After"]) >= 1
        why = "no free slot in pool 'default': every running actor has open requests"
        shell("resume", "c").failed(6, why, "suspend an actor, or raise the pool's replicas or slots")
        assert a_goes_on() and b_goes_on(), "nobody was cut off to make room"
    woken = until(lambda: kit.live.request("default/c"), lambda answer: answer.status == 200)
    assert json.loads(woken.body)["ram"] == 1


@pytest.fixture
def small_disk(data_dir: Path) -> Iterator[Path]:
    """A disk of 256 MiB, of which images take the most."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(data_dir)], check=True)
    yield data_dir
    subprocess.run(["umount", str(data_dir)], check=True)


@contextmanager
def filled(disk: Path, leave: int) -> Iterator[None]:
    """Meanwhile there is no more room than ``leave`` bytes."""
    filler = disk / "filler"
    room = shutil.disk_usage(disk).free - leave
    try:
        with filler.open("wb", buffering=0) as file, suppress(OSError):  # the server writes meanwhile too
            while room > 0:
                room -= file.write(bytes(min(room, 1 << 20)))
        yield
    finally:
        filler.unlink()


@pytest.mark.gvisor
@pytest.mark.root
def test_a_full_disk_loses_nothing(small_disk: Path, counter_image: str) -> None:
    with started(small_disk, backend="gvisor", workers=1, slots=2) as kit:
        kit.image = counter_image
        shell = Shell(small_disk)
        assert kit.apply().state == "Ready"
        kit.create("a", "b", "c")
        for name in ("a", "b"):
            kit.get(name)
            kit.act("Suspend", name)
        kit.get("a")
        last_good = kit.actor("a").snapshot

        with filled(small_disk, leave=LITTLE_ROOM):  # it fails in the middle, on the worker
            shell("suspend", "a").failed(6, "actor/a: the worker's disk is full", "delete actors, or free some space")
            assert (kit.actor("a").state, kit.actor("a").snapshot) == ("Running", last_good)
            assert kit.get("a")["ram"] == 3

        with filled(small_disk, leave=0):  # nothing is begun
            with pytest.raises(ResourceExhausted):  # the database still has some room in its own files
                kit.create(*(f"filler-{n}" for n in range(1000)))
            for command in (("suspend", "a"), ("resume", "b"), ("create", "actor", "d", "--template=counter")):
                shell(*command).failed(6, f"the disk that holds {small_disk}/greenroom.db is full", "delete actors")
            assert kit.live.request("default/b").headers["Greenroom-Error"] == "DISK_FULL"
            assert kit.get("a")["ram"] == 4
            assert kit.actor("b").state == "Suspended"
            shell("delete", "actor", "c").ok()

        with filled(small_disk, leave=0):  # an agent that comes takes over what runs
            (before,) = kit.live.pids()[1:]
            assert kit.live.kill_agent("default-0")
            until(kit.live.pids, lambda pids: len(pids) == 2 and pids[1] != before)
            ask = functools.partial(shell, "exec", "a", "--", "python3", "-c", "print(7)")
            until(lambda: ask().out, lambda said: said == "7\n")
            assert (kit.actor("a").state, kit.get("a")["ram"]) == ("Running", 5)

        shell("suspend", "a").ok()
        assert (kit.get("a")["ram"], kit.get("b")["ram"]) == (6, 2)
        shell("create", "actor", "d", "--template=counter").ok()

        with filled(small_disk, leave=LITTLE_ROOM):  # what can't be suspended does not end with the server
            assert kit.live.stop() == 4
            assert "could not be suspended: default/a, default/b" in kit.live.log_tail()
        kit.live.start()
        until(kit.workers, lambda workers: [w.state for w in workers] == ["Active"])
        assert (kit.get("a")["ram"], kit.get("b")["ram"]) == (7, 3), "the very processes"


@pytest.mark.gvisor
@pytest.mark.root
def test_fewer_workers_after_a_crash_take_over_all_actors(data_dir: Path, counter_image: str) -> None:
    with started(data_dir, backend="gvisor", workers=2, slots=1) as kit:
        kit.image = counter_image
        assert kit.apply().state == "Ready"
        kit.create("a", "b")
        assert {kit.get("a")["ram"], kit.get("b")["ram"]} == {1}
        assert {kit.actor("a").worker, kit.actor("b").worker} == {"default-0", "default-1"}
        kit.live.kill()
        kit.live.workers = 1
        kit.live.start()
        until(kit.workers, lambda workers: [w.name for w in workers] == ["default-0"])
        assert {kit.get("a")["ram"], kit.get("b")["ram"]} == {2}


# --- parts ------------------------------------------------------------------------------------------------------


def up(home: Path, *options: str) -> Result:
    return Shell(home)("up", f"--data={home}", "--listen=127.0.0.1:0", *options)


@contextmanager
def started(data_dir: Path, *, backend: str, workers: int = 1, slots: int = 2) -> Iterator[Kit]:
    """A server on a directory of the caller's; nothing of it may be left."""
    kit = Kit(LiveServer(data_dir, backend, workers, slots), "")
    kit.live.start()
    try:
        yield kit
    finally:
        kit.live.stop()
    assert leftovers(data_dir) == []
