"""Records <-> messages, and that the generated code is that of the .proto files."""

from __future__ import annotations

import filecmp
import os
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import greenroom.api
from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import resources_pb2 as pb
from greenroom.core import quantity
from greenroom.core.agentapi import ActorStats
from greenroom.core.errors import InvalidArgument
from greenroom.core.explanation import Explanation
from greenroom.core.records import (
    Actor,
    ActorState,
    Durability,
    Endpoint,
    Failure,
    FileDigest,
    LayerProgress,
    Lease,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Pool,
    PoolSpec,
    Probe,
    Record,
    Rejection,
    Replica,
    Resources,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)

times = st.floats(0, 4e9).map(lambda seconds: round(seconds, 6))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
texts = st.dictionaries(words, words, max_size=3)
ACTOR = Actor(namespace="n", name="a", uid="u", template="t", state=ActorState.RUNNING, created_at=1.0, state_since=2.0)
OPERATION = Operation(
    id="o",
    kind=OperationKind.CRASH,
    namespace="n",
    name="a",
    uid="u",
    created_at=1.0,
    updated_at=1.0,
    deadline_at=1.0,
    to_state=ActorState.CRASHED,
)
strategies = st.one_of(
    st.builds(
        Actor,
        state=st.sampled_from(ActorState),
        endpoint=st.none() | st.builds(Endpoint, port=st.integers(0, 65535), path=words),
        resumed_at=st.none() | times,
        unsaved_since=st.none() | times,
        durable_at=st.none() | times,
        worker_selector=texts,
        created_at=times,
        state_since=times,
        labels=texts,
        generation=st.integers(0, 2**60),
        golden=st.booleans(),
        **dict.fromkeys(("namespace", "name", "uid", "template", "reason", "message", "worker"), words),
    ),
    st.builds(
        Template,
        spec=st.builds(
            TemplateSpec,
            image=words,
            command=st.lists(words, max_size=3).map(tuple),
            env=texts,
            ports=st.lists(st.integers(1, 65535), max_size=3).map(tuple),
            readyz=st.builds(Probe, path=words, port=st.integers(0, 65535), timeout_s=times),
            resources=st.builds(Resources, memory_bytes=st.integers(0, 2**60), cpus=times, pids=st.integers(0, 2**40)),
            idle_timeout_s=times,
            on_crash=st.sampled_from(OnCrash),
            durability=st.sampled_from(Durability),
            evictable=st.booleans(),
            worker_selector=texts,
            pool=words,
        ),
        state=st.sampled_from(TemplateState),
        created_at=times,
        state_since=times,
        **dict.fromkeys(("namespace", "name", "uid"), words),
    ),
    st.builds(
        Pool,
        name=words,
        uid=words,
        created_at=times,
        spec=st.builds(PoolSpec, replicas=st.integers(0, 64), slots=st.integers(1, 10_000), backend=words),
    ),
    st.builds(
        Worker,
        name=words,
        pool=words,
        backend=words,
        fingerprint=words,
        capacity=st.integers(0, 10_000),
        state=st.sampled_from(WorkerState),
        memory_snapshots=st.booleans(),
        last_seen=times,
        labels=texts,
        images=st.lists(words, max_size=2).map(tuple),
        failures=st.integers(0, 1000),
        quarantined_until=times,
    ),
    st.builds(
        Replica,
        name=words,
        incarnation=words,
        link=words,
        started_at=times,
        seen_at=times,
        uses=st.dictionaries(words, times, max_size=2),
    ),
    st.builds(
        Explanation,
        actor=st.just(ACTOR),
        read_at=times,
        operations=st.just((OPERATION,)),
        older_operations=st.integers(0, 10_000),
        lease=st.none()
        | st.builds(Lease, uid=words, owner=words, operation=words, generation=st.integers(0, 2**60), expires_at=times),
        wakes_on=st.lists(words, max_size=2).map(tuple),
        rejected=st.lists(st.builds(Rejection, worker=words, why=words), max_size=2).map(tuple),
    ),
    st.builds(
        Snapshot,
        scope=st.sampled_from(SnapshotScope),
        state=st.sampled_from(SnapshotState),
        created_at=times,
        generation=st.integers(0, 2**60),
        files=st.lists(
            st.builds(FileDigest, name=words, size_bytes=st.integers(0, 2**40), sha256=words), max_size=2
        ).map(tuple),
        **dict.fromkeys(
            ("id", "namespace", "actor", "actor_uid", "template", "backend", "fingerprint", "image_digest", "hostname"),
            words,
        ),
    ),
    st.builds(
        Operation,
        kind=st.sampled_from(OperationKind),
        state=st.sampled_from(OperationState),
        from_state=st.none() | st.sampled_from(ActorState),
        error=st.none() | st.builds(Failure, code=words, reason=words, message=words, metadata=texts),
        phases=st.lists(st.builds(PhaseTime, name=words, seconds=times), max_size=2).map(tuple),
        layers=st.lists(st.builds(LayerProgress, digest=words, phase=words), max_size=2).map(tuple),
        attempts=st.integers(0, 100),
        to_state=st.none() | st.sampled_from(ActorState),
        owner=words,
        takeovers=st.integers(0, 100),
        rejected=st.lists(st.builds(Rejection, worker=words, why=words), max_size=2).map(tuple),
        done_bytes=st.integers(0, 2**60),
        total_bytes=st.integers(0, 2**60),
        cancel_requested=st.booleans(),
        request_digest=words,
        held_until=times,
        created_at=times,
        updated_at=times,
        deadline_at=times,
        finished_at=st.none() | times,
        cause=words,
        **dict.fromkeys(("id", "namespace", "name", "uid"), words),
    ),
)


@given(strategies)
def test_there_and_back(record: Record) -> None:
    message = convert.to_message(record)
    wire = type(message).FromString(message.SerializeToString())
    back = convert.from_message(type(record), wire)
    for name in record.__struct_fields__:
        sent, got = getattr(record, name), getattr(back, name)
        # a double at the end of the range has microseconds, so the nearest nanosecond is the same double
        assert got == sent, name


@pytest.mark.parametrize(
    "cls",
    [
        Actor,
        Template,
        TemplateSpec,
        Pool,
        PoolSpec,
        Worker,
        Replica,
        Snapshot,
        Operation,
        Lease,
        Explanation,
        ActorStats,
    ],
)
def test_every_field_of_the_records_has_one_in_the_message(cls: type[Record]) -> None:
    message = getattr(pb, cls.__name__)
    shown = {f.name for f in message.DESCRIPTOR.fields}
    for name in cls.__struct_fields__:
        assert name in shown or name.removesuffix("_s") in shown
    assert convert._plan(cls, message)


def test_what_is_absent_has_its_default() -> None:
    spec = convert.from_message(TemplateSpec, pb.TemplateSpec(image="x", ports=[0]))
    assert spec == TemplateSpec(image="x")
    assert convert.from_message(PoolSpec, pb.PoolSpec(replicas=0)) == PoolSpec(replicas=0)
    zero = pb.TemplateSpec(image="x")
    zero.idle_timeout.SetInParent()
    assert convert.from_message(TemplateSpec, zero).idle_timeout_s == 0.0


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InvalidArgument, match="spec"):
        convert.from_message(Pool, pb.Pool(name="x"))


def test_the_generated_code_is_that_of_the_proto_files(tmp_path: Path) -> None:
    package = Path(greenroom.api.__file__).parent
    script = package.parents[2] / "scripts/proto.py"
    runpy.run_path(str(script))["generate"](tmp_path)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.suffix in (".py", ".pyi"))
    there = sorted(
        p.relative_to(package / "_gen") for p in (package / "_gen").rglob("*") if p.suffix in (".py", ".pyi")
    )
    assert made == there, "run `make proto`"
    different = [os.fspath(p) for p in made if not filecmp.cmp(tmp_path / p, package / "_gen" / p, shallow=False)]
    assert not different, "run `make proto`"


@given(
    st.lists(
        st.tuples(st.decimals(0, 10**6, places=3).map(str), st.sampled_from(["ns", "us", "ms", "s", "m", "h"])),
        min_size=1,
        max_size=3,
    )
)
def test_a_duration_that_somebody_writes_comes_back_as_it_was_read(parts: list[tuple[str, str]]) -> None:
    """Else a template that was sent would always differ from the one that came back."""
    value = quantity.parse_duration("".join(number + unit for number, unit in parts))
    assert convert.seconds(convert.duration(value)) == value


@pytest.mark.parametrize(
    "record",
    [
        TemplateSpec(image="x", resources=Resources(memory_bytes=10 * 10**18)),
        TemplateSpec(image="x", idle_timeout_s=1e300),
        TemplateSpec(image="x", idle_timeout_s=float("inf")),
        PoolSpec(slots=1 << 40),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(record: Record) -> None:
    with pytest.raises(InvalidArgument, match=r"(memory_bytes|idle_timeout_s|slots)") as refused:
        convert.to_message(record)
    assert refused.value.reason == "OUT_OF_RANGE"
