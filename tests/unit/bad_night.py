"""The night that docs/bad-night.md tells of, as records with fixed times: three replicas and workers, five actors."""

from __future__ import annotations

from typing import Any

from fake_control import DIGEST, FakeControl
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.records import (
    Actor,
    Durability,
    Endpoint,
    FileDigest,
    Key,
    Operation,
    PhaseTime,
    Pool,
    PoolSpec,
    Replica,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.engine.clock import make_id

#: 2026-02-14 03:12:40 UTC
NOW = 1771038760.0
BEGIN = {"Resume": lc.BeginResume, "Suspend": lc.BeginSuspend}
FINGERPRINT = "runsc-20240729/x86-64-v3"
#: Processes of the control plane, one of which has died a moment ago; and workers.
OWNER, DEAD = "gr-1/4f9b02d1e7aa", "gr-2/7c41b8e09d3f"
NEAR, QUARANTINED, AWAY = "gr-1-default-0", "gr-1-default-1", "gr-3-default-0"


def at(clock: str) -> float:
    """The time of that night."""
    hours, minutes, seconds = map(float, clock.split(":"))
    return NOW - NOW % 86400 + hours * 3600 + minutes * 60 + seconds


class Night:
    def __init__(self, control: FakeControl) -> None:
        self.control, self.store = control, control.store
        self._made = 0

    def new_id(self, now: float) -> str:
        self._made += 1
        return make_id(now, self._made * 0x2545F4914F6CDD1D % 2**74)

    # --- what there is ---

    async def world(self) -> None:
        await self.store.put(Pool(name="default", uid="p", spec=PoolSpec(replicas=3), created_at=at("00:00:00")))
        golden = self.snapshot(self.new_id(at("00:00:05")), "counter", at("00:00:05"), golden=True)
        await self.store.put(golden)
        for name, durability in (("counter", Durability.ACKED_AFTER_UPLOAD), ("quick", Durability.LOCAL)):
            await self.store.put(
                Template(
                    namespace="default",
                    name=name,
                    uid=self.new_id(at("00:00:01")),
                    spec=TemplateSpec(
                        image="registry.example.org/counter:7", durability=durability, worker_selector={"zone": "a"}
                    ),
                    state=TemplateState.READY,
                    created_at=at("00:00:01"),
                    state_since=at("00:00:05"),
                    golden_snapshot=golden.id,
                    image_digest=DIGEST,
                )
            )
        for name in (NEAR, QUARANTINED, AWAY):
            await self.store.put(
                Worker(
                    name=name,
                    pool="default",
                    backend="gvisor",
                    fingerprint=FINGERPRINT,
                    capacity=4,
                    registered_at=at("00:00:00"),
                    last_seen=NOW - 2,
                    labels={"zone": "a"},
                )
            )
        for owner, seen in ((OWNER, NOW - 4), (DEAD, NOW - 22), ("gr-3/c2f0a7b19e55", at("03:09:01"))):
            name = owner.split("/")[0]
            await self.store.put(
                Replica(
                    name=name,
                    incarnation=owner,
                    link=f"{name}.example.org:7070",
                    started_at=at("00:00:00"),
                    seen_at=seen,
                )
            )

    async def worker(self, name: str, **fields: Any) -> None:
        await self.store.put(replace(await self.store.get(Worker, name), **fields))

    def snapshot(self, snapshot_id: str, actor: str, now: float, **fields: Any) -> Snapshot:
        made: dict[str, Any] = {
            "id": snapshot_id,
            "namespace": "default",
            "actor": actor,
            "actor_uid": "",
            "template": "counter",
            "generation": 1,
            "scope": SnapshotScope.MEMORY,
            "backend": "gvisor",
            "fingerprint": FINGERPRINT,
            "image_digest": DIGEST,
            "hostname": actor,
            "created_at": now,
            "files": (FileDigest(name="pages", size_bytes=48 << 20, sha256="0" * 64, upload=f"{snapshot_id}.0"),),
        }
        return Snapshot(**made | fields)

    # --- what happened ---

    async def create(self, name: str, clock: str, template: str = "counter", **fields: Any) -> None:
        await self.store.apply(
            lc.CreateActor(
                key=Key("default", name),
                now=at(clock),
                operation_id=self.new_id(at(clock)),
                uid=self.new_id(at(clock)),
                template=template,
                **fields,
            )
        )

    async def begin(self, kind: str, name: str, clock: str, *, owner: str = OWNER, **fields: Any) -> Operation:
        now = at(clock)
        if kind == "Suspend":
            fields["snapshot_id"] = self.new_id(now)
        change = await self.store.apply(
            BEGIN[kind](key=Key("default", name), now=now, operation_id=self.new_id(now), owner=owner, **fields)
        )
        assert change.operation is not None
        return change.operation

    async def resume(self, name: str, clock: str, **fields: Any) -> None:
        await self.finish_resume(await self.begin("Resume", name, clock, cause="request", **fields))

    async def finish_resume(self, op: Operation, took_s: float = 0.0757) -> None:
        seconds = {"bind": 0.0021, "fetch": 0.0312, "restore": took_s - 0.0352, "commit": 0.0019}
        await self.store.apply(
            lc.FinishResume(
                **self.step(op, op.created_at + took_s),
                endpoint=Endpoint(host="169.254.0.2", port=8080),
                phases=tuple(PhaseTime(name=name, seconds=taken) for name, taken in seconds.items()),
            )
        )

    async def suspend(self, name: str, clock: str, **fields: Any) -> None:
        op = await self.begin("Suspend", name, clock, cause="idle")
        seconds = {"checkpoint": 0.1204, "publish": 0.1881, "commit": 0.0031}
        made = self.snapshot(op.snapshot, name, op.created_at + 0.1, worker=op.worker, actor_uid=op.uid, **fields)
        await self.store.apply(
            lc.FinishSuspend(
                **self.step(op, op.created_at + 0.3116),
                snapshot=made,
                phases=tuple(PhaseTime(name=name, seconds=taken) for name, taken in seconds.items()),
            )
        )

    async def rebind(self, op: Operation, clock: str, why: str, **fields: Any) -> Operation:
        change = await self.store.apply(lc.Rebind(**self.step(op, at(clock)), why=why, **fields))
        assert change.operation is not None
        return change.operation

    async def crash(self, name: str, clock: str, message: str) -> None:
        actor = await self.store.get(Actor, f"default/{name}")
        await self.store.apply(
            lc.Crash(
                key=actor.key,
                now=at(clock),
                operation_id=self.new_id(at(clock)),
                uid=actor.uid,
                worker=actor.worker,
                generation=actor.generation,
                reason="WorkerLost",
                message=message,
            )
        )

    def step(self, op: Operation, now: float) -> dict[str, Any]:
        return {"key": op.key, "now": now, "operation_id": op.id, "generation": op.generation}


async def furnish(control: FakeControl) -> None:
    """``alice`` was lost with her worker. ``bob`` wakes, and nothing moves. ``carol`` needs what no worker has. Only
    ``dave`` is awake. ``erin`` sleeps on the disk of a worker that is away."""
    night = Night(control)
    await night.world()
    for minute, name in enumerate(("alice", "bob", "dave", "erin"), 10):
        await night.create(name, f"00:{minute}:00", "quick" if name == "erin" else "counter")
    await night.create("carol", "00:14:00", worker_selector={"gpu": "a100"})
    await night.resume("bob", "01:00:00", prefer=(NEAR,))
    await night.suspend("bob", "01:30:00")
    await night.resume("alice", "02:01:17", prefer=(QUARANTINED,))
    await night.suspend("alice", "02:50:30")
    op = await night.begin("Resume", "alice", "02:58:11", cause="request")
    why = "restore failed: no space left on device"
    await night.finish_resume(await night.rebind(op, "02:58:12", why, avoid=(NEAR, QUARANTINED)), 1.4)
    await night.worker(QUARANTINED, failures=3, quarantined_until=NOW + 24)
    await night.resume("dave", "03:00:00", prefer=(NEAR,))
    await night.resume("erin", "03:01:00", prefer=(AWAY,))
    await night.suspend("erin", "03:07:40", state=SnapshotState.LOCAL)
    await night.worker(AWAY, state=WorkerState.STALLED, last_seen=at("03:09:02"))
    await night.crash("alice", "03:09:17", f"worker {AWAY} went away and did not come back within 15 s")

    op = await night.begin("Resume", "bob", "03:10:55", owner=DEAD, cause="request", lease_ttl_s=113.0)
    control.stuck.add(op.id)
    change = await control.store.apply(
        lc.Advance(**night.step(op, at("03:11:24")), phase="fetch", done_bytes=12 << 20, total_bytes=48 << 20)
    )
    assert change.operation is not None
    control.drive(change.operation)
