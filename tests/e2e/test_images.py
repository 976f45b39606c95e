"""Images through the real command line: what is fetched, how often, how far it is, and what is said when it fails."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from kit import Kit, until
from shell import Shell, template

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.core.records import Operation, OperationKind, OperationState
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, Manifest
from greenroom.testing import counter_app
from greenroom.testing.live import GREENROOM, LiveServer
from greenroom.testing.oci_layout import Layout, push_layout
from greenroom.testing.python_image import build_python_image

sys.path.append(str(Path(__file__).parents[1] / "integration"))
from registry_kit import docker_registry, find_registry, find_tool, put_manifest

pytestmark = [
    pytest.mark.xdist_group("sandboxes"),
    pytest.mark.gvisor,
    pytest.mark.root,
    pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test"),
]

#: So that the image of some 25 MB takes several seconds.
SLOW_BITS_PER_S = 40e6


@contextmanager
def link(upstream: str, bits_per_s: float) -> Iterator[str]:
    """A slow link to a registry; yields ``host:port``."""
    command = [sys.executable, "-m", "greenroom.testing.fault_proxy", "--upstream", upstream]
    process = subprocess.Popen([*command, "--bits-per-s", str(bits_per_s)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def passed(host: str) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{host}/-/counts", timeout=10) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


class Pushed:
    """Two images in a registry that share their large layer, and how large their layers are."""

    def __init__(self, registry: str, root: Path) -> None:
        self.registry = registry
        self.sizes: dict[str, int] = {}
        for name in ("one", "two"):
            app = root / f"{name}.py"
            app.write_text(f"# {name}\n" + Path(counter_app.__file__).read_text())
            build_python_image(root / name, app=app, compression="zstd")
            push_layout(root / name, f"{registry}/app/{name}:1")
            layout = Layout(root / name)
            manifest = msgspec.json.decode(layout.blob(layout.index().manifests[0]).read_bytes(), type=Manifest)
            self.sizes |= {layer.digest: layer.size for layer in (*manifest.layers, manifest.config)}
        self.layout = root / "one"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    root = tmp_path_factory.mktemp("pushed")
    with docker_registry(root) as registry:
        yield Pushed(registry, root)


@pytest.fixture
def served() -> Iterator[tuple[Kit, Shell]]:
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    options = ("--operation-deadline=resume=4", "--images-high=2Gi")
    kit = Kit(LiveServer(directory, workers=2, slots=6, options=options), "")
    kit.live.start()
    until(kit.workers, lambda workers: len(workers) == 2)
    yield kit, Shell(directory)
    kit.live.stop()
    shutil.rmtree(directory)


def test_two_templates_fetch_a_shared_layer_once_and_tell_how_far_they_are(
    served: tuple[Kit, Shell], pushed: Pushed
) -> None:
    kit, shell = served
    with link(pushed.registry, SLOW_BITS_PER_S) as host:
        watching = shell.start("get", "templates", "-w")  # it may begin later than the next does
        for name in ("one", "two"):
            shell("apply", "--no-wait", "-f", "-", stdin=template(name, f"{host}/app/{name}:1")).ok()
        under_way = until(lambda: kit.template("one"), lambda t: any(la.done_bytes > 0 for la in t.layers))
        assert (under_way.state, under_way.phase) == ("Preparing", "download")
        _says(watching, "download", "% of")
        for name in ("one", "two"):
            shell("wait", "template", name).ok()
        assert passed(host)["blob_bytes"] <= sum(pushed.sizes.values()) + (1 << 20)
    _says(watching, "Ready")
    watching.terminate()
    watching.communicate()
    ready = kit.template("one")
    assert (ready.phase, ready.layers) == ("", ())


def _says(process: subprocess.Popen[str], *words: str) -> None:
    """Reads until there is a line with all of them."""
    assert process.stdout is not None
    assert any(all(word in line for word in words) for line in process.stdout), process.communicate()[1]


def _resuming(kit: Kit) -> list[str]:
    """Phases of the resumes that are under way."""
    answer = kit.client.operations.ListOperations(pb.ListOperationsRequest())
    operations = [convert.from_message(Operation, message) for message in answer.operations]
    return [
        operation.phase
        for operation in operations
        if operation.kind is OperationKind.RESUME and operation.state is OperationState.RUNNING
    ]


def test_resumes_of_a_cold_image_wait_for_one_pull(served: tuple[Kit, Shell], pushed: Pushed) -> None:
    """Ten at once, of an image that takes longer than an operation may, as long as nothing comes."""
    kit, shell = served
    with link(pushed.registry, SLOW_BITS_PER_S / 2) as host:
        reference = f"{host}/app/one:1"
        shell("apply", "-f", "-", stdin=template("one", reference)).ok()
        kit.create(*(f"a{n}" for n in range(10)), template="one")
        assert "removed" in shell("images", "rm", reference).ok()
        before = passed(host)["blob_bytes"]
        with ThreadPoolExecutor(10) as pool:
            waking = [pool.submit(kit.act, "Resume", f"a{n}") for n in range(10)]
            until(lambda: _resuming(kit), lambda phases: phases == ["prepare/download"] * 10)
            until(
                lambda: shell("get", "operations", "--state=running").ok(),
                lambda text: "prepare/download" in text and "% of" in text,
            )
            operations = [future.result() for future in waking]  # all of them DONE
        longest = max(op.finished_at - op.created_at for op in operations if op.finished_at)
        assert longest > 4, "the image took longer than an operation may"
        assert passed(host)["blob_bytes"] - before <= sum(pushed.sizes.values()) + (1 << 20)
        assert kit.get("a0")["ram"] == 1
        users = json.loads(shell("images", "list", "-o", "json").ok())["items"][0]["status"]["images"][0]["users"]
        assert {f"default/a{n}" for n in range(10)} <= {user.partition(" on ")[0] for user in users}


def test_a_preparation_is_cancelled_and_done_again(served: tuple[Kit, Shell], pushed: Pushed) -> None:
    kit, shell = served
    with link(pushed.registry, SLOW_BITS_PER_S / 4) as host:
        shell("apply", "--no-wait", "-f", "-", stdin=template("one", f"{host}/app/one:1")).ok()
        half = until(lambda: kit.template("one"), lambda t: sum(la.done_bytes for la in t.layers) > 5 << 20)
        shell("cancel", f"operation/{half.operation}").ok()
        failed = until(lambda: kit.template("one"), lambda t: t.state == "Failed")
        assert failed.reason == "OPERATION_CANCELLED"
    with link(pushed.registry, 1e9) as host2:
        assert host2  # another address is another image; the blobs are the same
        shell("apply", "-f", "-", stdin=template("two", f"{host2}/app/one:1")).ok()
        assert passed(host2)["blob_bytes"] < sum(pushed.sizes.values()) - (4 << 20)


def test_commands(served: tuple[Kit, Shell], pushed: Pushed, tmp_path: Path) -> None:
    kit, shell = served
    reference = f"{pushed.registry}/app/one:1"
    pulled = shell("images", "pull", reference)
    assert "on default-0 (" in pulled.ok()
    assert "phase download" in pulled.err
    listed = shell("images", "list")
    assert reference in listed.ok() and "default-0,default-1" in listed.out and "of 2.0 GiB" in listed.err
    assert "/usr/bin/python3" in shell("images", "inspect", reference).ok()
    assert "would be removed" in shell("images", "prune", "--dry-run").ok()
    shell("images", "pin", reference).ok()
    shell("images", "rm", reference).failed(4, "pinned: unpin it first")
    assert "kept" in shell("images", "prune").err
    shell("images", "unpin", reference).ok()

    shell("apply", "-f", "-", stdin=template("one", reference)).ok()
    kit.create("a", template="one")
    kit.act("Resume", "a")
    shell("images", "rm", reference).failed(4, "is used by default/a on default-")
    kit.act("Suspend", "a")
    assert "removed" in shell("images", "prune").ok()
    assert "no images" in shell("images", "list").err
    kit.act("Resume", "a")  # it is fetched again
    kit.act("Suspend", "a")
    shell("images", "rm", reference).ok()

    archive = tmp_path / "one.tar.gz"
    subprocess.run(["tar", "-C", pushed.layout, "-czf", archive, "."], check=True)
    for path in (str(pushed.layout), str(archive)):
        assert "imported on default-0,default-1" in shell("images", "import", path, "--name=imported/one:1").ok()
        assert "Pinned" in shell("images", "list").ok()
        shell("images", "rm", "--unpin", "imported/one:1").ok()
    for name in ("imported/one:1", "imported/again:1"):
        shell("images", "import", str(archive), f"--name={name}").ok()
    assert "imported/again:1, imported/one:1" in shell("images", "list").ok()
    said = shell("images", "rm", "--unpin", "imported/one:1").failed(4, "is also called imported/again:1")
    shell("images", "rm", "--unpin", said.rpartition(" ")[2].strip()).ok()
    shell("images", "import", str(archive), "--name=imported/one:1").ok()
    shell("apply", "-f", "-", stdin=template("imported", "imported/one:1")).ok()
    kit.create("b", template="imported")
    assert kit.get("b")["ram"] == 1


def test_an_image_that_is_there_costs_a_wake_nothing(served: tuple[Kit, Shell], pushed: Pushed) -> None:
    kit, shell = served
    shell("apply", "-f", "-", stdin=template("one", f"{pushed.registry}/app/one:1")).ok()
    kit.create("a", template="one")
    took = []
    for _ in range(5):
        operation = kit.act("Resume", "a")
        took.append(sum(phase.seconds for phase in operation.phases if phase.name == "prepare"))
        kit.act("Suspend", "a")
    print("image phase of five wakes (ms):", [round(seconds * 1000, 2) for seconds in took])
    assert 0 < min(took) <= 0.005


def test_what_can_not_be_done(served: tuple[Kit, Shell], tmp_path: Path) -> None:
    _, shell = served
    shell("images", "rm", "nope").failed(3, "no worker has image nope", "greenroom images list")
    shell("images", "inspect", "nope").failed(3, "no worker has image nope")
    shell("images", "pull", "No/Capitals").failed(2, "no repository name")
    shell("images", "list", "--worker=w9").failed(1, "worker w9 is not connected", "greenroom get workers")
    shell("images", "import", str(tmp_path), "--name=a/b:1").failed(2, "no index.json")
    shell("images", "import", str(tmp_path / "nothing"), "--name=a/b:1").failed(2, "No such file")
    (tmp_path / "text").write_text("no archive at all " * 100)
    shell("images", "import", str(tmp_path / "text"), "--name=a/b:1").failed(
        4, "the archive can't be read as an archive"
    )
    shell("images", "import", str(tmp_path / "text"), "--name=oci:/x").failed(2, "can't be called 'oci:/x'")
    assert "no images" in shell("images", "list").err


def test_bad_images(served: tuple[Kit, Shell], pushed: Pushed, tmp_path: Path) -> None:
    """What is said on the template is said by the command that waits for it, and by the operation."""
    kit, shell = served
    foreign = tmp_path / "foreign"
    shutil.copytree(pushed.layout, foreign)
    layout = Layout(foreign)
    index = layout.index()
    platform = {"os": "linux", "architecture": "riscv64"}
    entries = [msgspec.to_builtins(one) | {"platform": platform, "annotations": {}} for one in index.manifests]
    nested = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
    document = layout.add_blob(msgspec.json.encode(nested), nested["mediaType"])  # type: ignore[arg-type]
    layout.tag(document, "foreign")
    bad = {
        f"{pushed.registry}/app/none:1": (3, "IMAGE_NOT_FOUND", f"{pushed.registry}/app/none"),
        "127.0.0.1:1/app/one:1": (1, "REGISTRY_UNAVAILABLE", "127.0.0.1:1"),
        f"oci:{foreign}:foreign": (4, "IMAGE_INVALID", "it has linux/riscv64"),
    }
    for reference, (code, reason, says) in bad.items():
        shell("apply", "-f", "-", stdin=template("bad", reference)).failed(code, says)
        failed = kit.template("bad")
        assert (failed.state, failed.reason, failed.phase) == ("Failed", reason, "")
        assert says in failed.message
        assert says in shell("describe", "template", "bad").ok()
        shell("delete", "template", "bad").ok()
    shell("apply", "-f", "-", stdin=template("good", f"{pushed.registry}/app/one:1")).ok()


def push_index(pushed: Pushed) -> str:
    """An image that is not for this machine; returns its reference."""
    one = Layout(pushed.layout).index().manifests[0]
    entry = {"mediaType": MANIFEST_TYPES[0], "digest": one.digest, "size": one.size}
    foreign = entry | {"platform": {"os": "linux", "architecture": "riscv64"}}
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": [foreign]}
    put_manifest(pushed.registry, "app/one:foreign", msgspec.json.encode(index), INDEX_TYPES[0])
    return f"{pushed.registry}/app/one:foreign"


@contextmanager
def registry_that_answers(status: int, headers: dict[str, str], body: bytes = b"") -> Iterator[str]:
    """The same to every request; yields ``host:port``."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_registries_that_refuse(served: tuple[Kit, Shell], pushed: Pushed) -> None:
    """A clear error on the template and in its operation, whatever is wrong; and what is asked for next works."""
    kit, shell = served
    schema_1 = {"Content-Type": "application/vnd.docker.distribution.manifest.v1+prettyjws"}
    with (
        registry_that_answers(401, {"WWW-Authenticate": 'Basic realm="test"'}) as private,
        registry_that_answers(429, {"Retry-After": "3600"}) as limited,
        registry_that_answers(200, schema_1, b'{"schemaVersion": 1, "name": "app/one"}') as old,
    ):
        bad = {
            f"{private}/app/one:1": (4, "REGISTRY_AUTH", f"registry {private} wants a login for app/one"),
            f"{limited}/app/one:1": (6, "REGISTRY_RATE_LIMIT", f"{limited} wants to be left alone for 3600 s"),
            f"{old}/app/one:1": (4, "IMAGE_INVALID", f"{old}/app/one:1 has a manifest of Docker's old schema 1"),
            push_index(pushed): (4, "IMAGE_INVALID", "app/one:foreign is not made for linux/"),
        }
        for reference, (code, reason, says) in bad.items():
            shell("apply", "-f", "-", stdin=template("bad", reference)).failed(code, says)
            failed = kit.template("bad")
            assert (failed.state, failed.reason, failed.phase) == ("Failed", reason, "")
            assert says in failed.message
            operations = shell("get", "operations", "-o", "json").ok()
            assert reason in operations and says in operations
            shell("delete", "template", "bad").ok()
    shell("apply", "-f", "-", stdin=template("good", f"{pushed.registry}/app/one:1")).ok()


@pytest.mark.skipif(find_tool("skopeo") is None, reason="no skopeo: run scripts/setup.sh --test")
def test_an_archive_as_docker_saves_it(served: tuple[Kit, Shell], pushed: Pushed, tmp_path: Path) -> None:
    kit, shell = served
    layout = build_python_image(tmp_path / "layout", app=Path(counter_app.__file__), compression="gzip")
    archive = tmp_path / "saved.tar"
    copy = ("copy", "--insecure-policy", layout, f"docker-archive:{archive}:app/one:1")
    subprocess.run([str(find_tool("skopeo")), *copy], check=True, capture_output=True)
    shell("images", "import", str(archive), "--name=imported/one:1", "--tag=2").failed(
        3, "has no image '2'", "app/one:1"
    )
    piped = f"gzip -1 < {archive} | {shlex.join(GREENROOM)} images import - --name imported/one:1"
    environment = {**os.environ, "GREENROOM_HOME": str(shell.home)}
    said = subprocess.run(piped, shell=True, env=environment, check=True, capture_output=True, text=True)
    assert "imported on default-0,default-1" in said.stdout
    shell("apply", "-f", "-", stdin=template("one", "imported/one:1")).ok()
    kit.create("a", template="one")
    assert kit.get("a")["ram"] == 1


def test_what_runs_keeps_its_image_whoever_dies(served: tuple[Kit, Shell], pushed: Pushed) -> None:
    """Server and agents are killed; the sandbox lives on, and so does what it runs from."""
    kit, shell = served
    reference = f"{pushed.registry}/app/one:1"
    shell("apply", "-f", "-", stdin=template("one", reference)).ok()
    kit.create("a", template="one")
    kit.act("Resume", "a")
    assert kit.get("a")["ram"] == 1
    kit.live.kill()
    kit.live.start()
    until(kit.workers, lambda workers: [w.state for w in workers] == ["Active"] * 2)
    shell("images", "rm", reference).failed(4, "is used by default/a on default-")
    assert kit.get("a")["ram"] == 2
    kit.act("Delete", "a")
    shell("images", "rm", reference).ok()


def test_a_worker_elsewhere_gets_it_from_the_first(pushed: Pushed) -> None:
    """A worker with an image store of its own joins: the image does not cross the link to the registry again."""
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    kit = Kit(LiveServer(directory, workers=1, slots=2, options=("--peers=127.0.0.1:0",)), "")
    kit.live.start()
    shell = Shell(directory)
    options = {
        "worker": "elsewhere",
        "pool": "default",
        "backend": "gvisor",
        "slots": "2",
        "state-dir": str(directory / "elsewhere"),
        "images": str(directory / "elsewhere-images"),
        "snapshots": str(directory / "snapshots"),
        "control": f"unix:{directory}/run/agents.sock",
        "peers": "127.0.0.1:0",
    }
    with link(pushed.registry, 1e9) as host:
        shell("apply", "-f", "-", stdin=template("one", f"{host}/app/one:1")).ok()
        first = passed(host)["blob_bytes"]
        agent = shell.start("agent", *(f"--{name}={value}" for name, value in options.items()))
        try:
            digest = kit.template("one").image_digest
            until(kit.workers, lambda workers: any(w.name == "elsewhere" and digest in w.images for w in workers))
            assert passed(host)["blob_bytes"] == first
            listed = json.loads(shell("images", "list", "-o", "json").ok())["items"]
            assert sorted(item["status"]["workers"] for item in listed) == [["default-0"], ["elsewhere"]]
        finally:
            agent.send_signal(signal.SIGUSR1)  # ends with all that runs there
            agent.communicate(timeout=30)
            kit.live.stop()
            shutil.rmtree(directory)


def test_full_disk(pushed: Pushed) -> None:
    """Too small for the image unpacked: it says how much is missing, and what fits still works."""
    directory, small = Path(tempfile.mkdtemp(prefix="gr-")), Path(tempfile.mkdtemp(prefix="gr-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m,mode=755", "greenroom-test", small], check=True)
    kit = Kit(LiveServer(directory, workers=1, slots=2, options=(f"--images={small / 'images'}",)), "")
    try:
        kit.live.start()
        shell = Shell(directory)
        reference = f"{pushed.registry}/app/one:1"
        shell("apply", "-f", "-", stdin=template("one", reference)).failed(
            6, f"image {reference} does not fit", "greenroom images rm", "add space"
        )
        assert kit.template("one").reason == "DISK_FULL"
        assert not list((small / "images/unpacking").iterdir())
        subprocess.run(["mount", "-o", "remount,size=400m", small], check=True)
        shell("apply", "-f", "-", stdin=template("one", reference)).ok()
    finally:
        kit.live.stop()
        subprocess.run(["umount", small], check=True)
        shutil.rmtree(directory)
        small.rmdir()
