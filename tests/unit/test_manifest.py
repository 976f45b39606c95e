"""YAML manifests, quantities and durations."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from greenroom.cli import manifest
from greenroom.cli.manifest import ManifestError
from greenroom.core import quantity
from greenroom.core.records import (
    Durability,
    OnCrash,
    Pool,
    PoolSpec,
    Probe,
    Resources,
    Template,
    TemplateSpec,
    TemplateState,
)

FULL = """\
# a comment
apiVersion: greenroom.dev/v1alpha1
kind: Template
metadata:
  name: counter
  namespace: team-a
spec:
  image: docker.io/library/python:3.11-slim
  command: [python, -m, http.server]
  args: ["8000"]
  env:
    MODE: fast
    EMPTY: ""
  workdir: /srv
  user: "1000"
  ports: [8000, 9000]
  readyz: {path: /healthz, port: 8000, timeout: 1m30s}
  resources: {memory: 512Mi, cpu: 500m, pids: 64}
  pool: big
  idleTimeout: 5m
  onCrash: restore-last
  durability: local
  evictable: false
  workerSelector:
    example.org/gpu: a100
    zone: ""
  stopSignal: SIGINT
---
---
kind: WorkerPool
apiVersion: greenroom.dev/v1alpha1
metadata: {name: big}
spec: {replicas: 3, slots: 10, backend: sim}
"""

SPEC = TemplateSpec(
    image="docker.io/library/python:3.11-slim",
    command=("python", "-m", "http.server"),
    args=("8000",),
    env={"MODE": "fast", "EMPTY": ""},
    workdir="/srv",
    user="1000",
    ports=(8000, 9000),
    readyz=Probe(path="/healthz", port=8000, timeout_s=90.0),
    resources=Resources(memory_bytes=512 << 20, cpus=0.5, pids=64),
    pool="big",
    idle_timeout_s=300.0,
    on_crash=OnCrash.RESTORE_LAST,
    durability=Durability.LOCAL,
    evictable=False,
    worker_selector={"example.org/gpu": "a100", "zone": ""},
    stop_signal="SIGINT",
)


def write(tmp_path: Path, text: str, name: str = "x.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def problems(tmp_path: Path, text: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(ManifestError) as caught:
        manifest.load([path])
    assert str(caught.value).endswith("nothing was applied") and caught.value.exit_code == 2
    return [p.removeprefix(path) for p in caught.value.problems]


def template(spec: str, metadata: str = "{name: a}") -> str:
    return f"apiVersion: greenroom.dev/v1alpha1\nkind: Template\nmetadata: {metadata}\nspec:\n  image: x\n{spec}"


def test_everything(tmp_path: Path) -> None:
    pool, one = manifest.load([write(tmp_path, FULL)])
    assert (pool.kind, pool.name, pool.namespace, pool.spec) == (
        "WorkerPool", "big", "", PoolSpec(replicas=3, slots=10, backend="sim")
    )  # fmt: skip
    assert (one.kind, one.name, one.namespace, one.spec) == ("Template", "counter", "team-a", SPEC)
    assert one.source == str(tmp_path / "x.yaml:2")


def test_only_what_is_required(tmp_path: Path) -> None:
    (one,) = manifest.load([write(tmp_path, template("  env:\n"))], "elsewhere")
    assert one.spec == TemplateSpec(image="x") and one.namespace == "elsewhere"


def test_directory_and_json(tmp_path: Path) -> None:
    write(tmp_path, FULL, "b.yml")
    write(tmp_path, "not yaml: [", "ignored.txt")
    write(
        tmp_path,
        '{"apiVersion":"greenroom.dev/v1alpha1","kind":"WorkerPool","metadata":{"name":"j"},"spec":{}}',
        "j.json",
    )
    assert [m.name for m in manifest.load([str(tmp_path)])] == ["big", "j", "counter"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="this directory has no"):
        manifest.load([str(tmp_path / "empty")])
    with pytest.raises(ManifestError, match="No such file"):
        manifest.load([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("spec", "line", "says"),
    [
        ("  imagee: y\n", 6, "spec.imagee: unknown field; known are: args, command"),
        ("  readyz: {timeout: 5, path: /}\n", 6, "spec.readyz.timeout: needs a unit: write 5s"),
        ("  readyz:\n    path: /\n    tiemout: 5s\n", 8, "spec.readyz.tiemout: unknown field"),
        ("  readyz: {path: healthz}\n", 6, "spec.readyz.path: must start with /"),
        ("  readyz: {port: 70000}\n", 6, "spec.readyz.port: must be between 0 and 65535"),
        ("  resources:\n    memory: 1Mi\n", 7, "spec.resources.memory: must be between"),
        ("  resources:\n    memory: lots\n", 7, "spec.resources.memory: 'lots' is not a quantity"),
        ("  resources:\n    cpu: 0\n", 7, "spec.resources.cpu: must be between 0.001"),
        ("  resources: {pids: 1.5}\n", 6, "spec.resources.pids: must be a whole number"),
        ("  env:\n    PORT: 8080\n", 7, 'spec.env.PORT: must be a string: write "8080", not a number'),
        ("  env:\n    A=B: x\n", 7, "spec.env.A=B: is not a name of an environment variable"),
        ("  env: [{name: A}]\n", 6, "spec.env: must be a mapping (name: value), not a list"),
        ("  command: python app.py\n", 6, "spec.command: must be a list, not a string"),
        ("  command: [python, 3]\n", 6, 'spec.command[1]: must be a string: write "3"'),
        ("  ports: [80, 80]\n", 6, "spec.ports[1]: port 80 is there twice"),
        ("  stopSignal: SIGNOT\n", 6, "spec.stopSignal: is no signal: 'SIGNOT'"),
        ("  ports: [80, 0]\n", 6, "spec.ports[1]: must be between 1 and 65535"),
        ("  ports: ['80']\n", 6, "spec.ports[0]: must be a whole number, not a string"),
        ("  idleTimeout: -5m\n", 6, "spec.idleTimeout: '-5m' is not a duration"),
        ("  idleTimeout: yes\n", 6, "spec.idleTimeout: must be a duration, not true or false"),
        ("  onCrash: explode\n", 6, "spec.onCrash: must be one of hold, restore-last, boot, not 'explode'"),
        ("  durability: maybe\n", 6, "spec.durability: must be one of local, acked-after-upload, not 'maybe'"),
        ("  evictable: 'no'\n", 6, "spec.evictable: must be true or false, not a string"),
        ("  workerSelector: [gpu]\n", 6, "spec.workerSelector: must be a mapping (name: value), not a list"),
        ("  workerSelector:\n    gpu: 1\n", 7, 'spec.workerSelector.gpu: must be a string: write "1"'),
        ("  workerSelector:\n    gpu: a b\n", 7, "spec.workerSelector.gpu: label gpu=a b is not valid"),
        ("  pool: Big\n", 6, "spec.pool: pool name 'Big' is not a DNS label"),
        ("  workdir: srv\n", 6, "spec.workdir: must be an absolute path"),
        ('  workdir: "/a\\0b"\n', 6, "spec.workdir: may not hold a NUL character"),
        ("  image: y\n", 6, "spec.image: is there twice"),
        ("  env: {<<: {A: b}}\n", 6, "spec.env.<<: must be a string"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, spec: str, line: int, says: str) -> None:
    (problem,) = problems(tmp_path, template(spec))
    assert problem.startswith(f":{line}: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (template("").replace("v1alpha1", "v2"), ":1: apiVersion: must be greenroom.dev/v1alpha1"),
        (template("").replace("Template", "Pod"), ":2: kind: must be one of Template, WorkerPool, not 'Pod'"),
        (template("", "{}"), ":3: metadata.name: is required"),
        (template("", "{name: Bad}"), ":3: metadata.name: resource name 'Bad' is not a DNS label"),
        (template("", "{name: a, labels: {x: 1}}"), ":3: metadata.labels.x: must be a string"),
        (template("", "{name: a, labels: {x: 'a b'}}"), ":3: metadata.labels: label x=a b is not valid"),
        (template("").replace("  image: x\n", "  args: []\n"), ":5: spec.image: is required"),
        (template("").replace("  image: x\n", "  image: ''\n"), ":5: spec.image: must be an image reference"),
        ("[1, 2]", ":1: document: must be a mapping"),
        ("a: [", ":1: is not YAML"),
        ("a: 'x\n\n", ":3: is not YAML"),
        ("", "there is no document"),
        ("x" * (1 << 20) + "xx", ": is larger than 1 MiB"),
        ("\x00", ": is not YAML"),
        (template("") + "---\n" + template(""), ":7: metadata.name: Template a is there already"),
        ("[" * 20_000, ": is nested too deeply"),
    ],
)
def test_documents_that_are_wrong(tmp_path: Path, text: str, says: str) -> None:
    assert problems(tmp_path, text)[0].startswith(says)


def test_a_pool_has_no_namespace(tmp_path: Path) -> None:
    text = "apiVersion: greenroom.dev/v1alpha1\nkind: WorkerPool\nmetadata: {name: p, namespace: x}\nspec: {}\n"
    assert problems(tmp_path, text) == [":3: metadata.namespace: this kind has no namespace; leave it out"]


def test_all_problems_at_once_but_not_too_many(tmp_path: Path) -> None:
    found = problems(
        tmp_path, template("  a: 1\n  b: 2\n  idleTimeout: x\n") + "---\n" + template("  c: 1\n", "{name: b}")
    )
    assert [p.split(": ")[1] for p in found] == ["spec.a", "spec.b", "spec.idleTimeout", "spec.c"]
    path = write(tmp_path, template("".join(f"  f{n}: 1\n" for n in range(50))))
    with pytest.raises(ManifestError, match="and 30 more problems"):
        manifest.load([path])


def test_what_is_shown_can_be_applied_again(tmp_path: Path) -> None:
    made = Template(
        namespace="team-a", name="counter", uid="u", spec=SPEC, state=TemplateState.READY, created_at=1, state_since=2.0
    )  # fmt: skip
    for record in (made, Pool(name="p", uid="u", spec=PoolSpec(), created_at=0.0)):
        document = manifest.to_document(record)
        (again,) = manifest.load([write(tmp_path, yaml.safe_dump(document))])
        assert again.spec == record.spec
    assert document["kind"] == "WorkerPool"
    assert manifest.to_document(made)["status"] == {
        "state": "Ready",
        "stateSince": "1970-01-01T00:00:02.000Z",
        "generation": 0,
        "version": 0,
    }
    (none,) = manifest.load([write(tmp_path, template("  ports: []\n"))])
    shown = manifest.spec_to_plain(none.spec)
    assert shown["ports"] == [] and none.spec.ports == ()


# --- quantities and durations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("512Mi", 512 << 20), ("1.5Gi", 3 << 29), ("1e3", 1000), ("2k", 2000), ("1G", 10**9), ("100", 100), ("100m", 1)],
)
def test_bytes(text: str, value: int) -> None:
    assert quantity.parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("5m", 300.0), ("1h30m", 5400.0), ("300ms", 0.3), ("0", 0.0), ("1.5s", 1.5), ("10us", 1e-5), ("1m.5s", 60.5)],
)
def test_durations(text: str, value: float) -> None:
    assert quantity.parse_duration(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5 m", "5d", "1h-30m", "inf", "nan", "1e3s"])
def test_not_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        quantity.parse_duration(text)


@pytest.mark.parametrize("text", ["", "x", "5 Mi", "-1", "5KB", "1e", "1e999", "nan", "0x10", "1_000"])
def test_not_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        quantity.parse_quantity(text)


@given(st.integers(0, 1 << 60))
def test_bytes_are_shown_exactly(value: int) -> None:
    assert quantity.parse_bytes(quantity.format_bytes(value)) == value


@given(st.integers(0, 10**9))
def test_durations_are_shown_exactly(ms: int) -> None:
    assert quantity.parse_duration(quantity.format_duration(ms / 1000)) == pytest.approx(ms / 1000)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    manifest.parse(text, "f", "default", [])
