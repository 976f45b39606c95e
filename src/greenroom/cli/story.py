"""An `Explanation` in words: where the actor is and why, where it could wake, what happened to it. Pure.

Times are this machine's local ones; ages are counted by the store's clock, so that they are right also where this
machine's clock is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import assert_never

from greenroom.cli.kinds import pairs_text, progress
from greenroom.core import placement
from greenroom.core.explanation import HOMELESS, Explanation
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.quantity import format_duration, human_age, human_bytes
from greenroom.core.records import (
    Actor,
    ActorState,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    TemplateState,
)

#: (what the line is about, what it says)
Line = tuple[str, str]

#: Who asked for an operation, by `Operation.cause`.
CAUSES = {
    "request": "a request asked",
    "api": "asked by command or API",
    "idle": "it was idle",
    "capacity": "to make room",
    "recovery": "recovery",
    "shutdown": "its server shut down",
    "drain": "its worker was drained",
    "template": "for its template",
}
#: Reasons of an actor that say nothing beyond its state.
_PLAIN = ("", "Created")


def summary(told: Explanation) -> list[Line]:
    """How things stand, the most urgent first."""
    return [
        *(("now", text) for text in _now(told)),
        *(("held by", text) for text in _held(told)),
        *(("wakes", text) for text in _wakes(told)),
        *(("snapshot", text) for text in _snapshot(told)),
        *(("survives", text) for text in _survives(told)),
        *(("policy", text) for text in _policy(told)),
        *(("next", text) for text in _next(told)),
    ]


# --- now --------------------------------------------------------------------------------------------------------


def _now(told: Explanation) -> Iterator[str]:
    actor, since = told.actor, _moment(told, told.actor.state_since)
    because = f"{actor.reason}: {actor.message}" if actor.reason not in _PLAIN else ""
    match actor.state:
        case ActorState.SUSPENDED:
            yield f"asleep since {since}" + ("" if actor.wakes else ", never awake yet")
        case ActorState.RUNNING:
            yield f"awake on {actor.worker} since {since}"
        case ActorState.PAUSED:
            yield f"frozen in the memory of {actor.worker} since {since}; a request wakes it there, and nowhere else"
        case ActorState.CRASHED:
            yield f"crashed at {since}"
            if actor.unsaved_since is not None:
                yield f"what it did after {_moment(told, actor.unsaved_since)} is lost"
        case ActorState.RESUMING | ActorState.SUSPENDING | ActorState.PAUSING | ActorState.DELETING:
            yield f"{actor.state.lower()} since {since}"
            yield from _under_way(told)
        case _:
            assert_never(actor.state)
    if because:  # of a crash, of what failed last, or of a snapshot that was no good
        yield because


def _under_way(told: Explanation) -> Iterator[str]:
    operation = _current(told)
    if operation is None:
        yield f"operation {told.actor.operation or 'none'} has no record here"
        return
    words = [f"operation {operation.id}: phase {operation.phase or 'none yet'}"]
    words += [f"on {operation.worker}"] if operation.worker else []
    words += [progress(operation)] if progress(operation) else []
    words.append(f"last moved {human_age(told.read_at - operation.updated_at)} ago")
    left = operation.deadline_at - told.read_at
    words.append(f"deadline in {human_age(left)}" if left > 0 else f"past its deadline by {human_age(-left)}")
    yield ", ".join(words)
    if operation.cancel_requested:
        yield "somebody has asked to give it up; it is being backed out"


def _current(told: Explanation) -> Operation | None:
    return next((op for op in reversed(told.operations) if op.id == told.actor.operation), None)


def _held(told: Explanation) -> Iterator[str]:
    lease, now = told.lease, told.read_at
    if lease is None:
        if told.actor.operation:
            yield "nobody: whoever drove the operation has let go; some replica takes it over within seconds"
        return
    if lease.expires_at > now:
        until = f"{stamp(lease.expires_at)} (in {human_age(lease.expires_at - now)})"
        yield f"{lease.owner} until {until}, and longer if it renews; other replicas keep off until then"
    else:
        over = human_age(now - lease.expires_at)
        yield f"{lease.owner} until {over} ago, and no more: the next replica that looks takes the operation over"


# --- waking -----------------------------------------------------------------------------------------------------


def _wakes(told: Explanation) -> Iterator[str]:
    actor, template, snapshot = told.actor, told.template, told.snapshot
    if actor.state not in HOMELESS:
        return
    if template is None:
        yield f"nowhere: its template {actor.template} is gone; apply it again"
    elif snapshot is None and actor.snapshot:
        yield f"nowhere: the record of its snapshot {actor.snapshot} is missing; delete it"
    elif snapshot is None:
        detail = f": {template.message}" if template.state is TemplateState.FAILED and template.message else ""
        yield f"nowhere yet: its template {actor.template} is {template.state}{detail}"
    elif snapshot.state is SnapshotState.CONDEMNED:
        yield f"nowhere: its snapshot {snapshot.id} is being deleted"
    else:
        yield from _places(told, template.spec.pool)


def _places(told: Explanation, pool: str) -> Iterator[str]:
    held_back = _is_held_back(told)
    if told.wakes_on:
        first, *others = told.wakes_on
        who = "resume" if held_back else "a request"
        yield f"{who} wakes it on {first}" + (f", or on {', '.join(others)}" if others else "")
    elif told.no_worker_fits:
        refused = "" if held_back else "; a request is refused at once"
        yield f"nowhere: no worker of pool {pool} could ever take it{refused}"
    elif told.rejected:
        waits = ": a request waits for a place, and is answered 503 when there is none in time"
        yield "nowhere now" + ("" if held_back else waits)
    else:
        yield f"nowhere: pool {pool} has no workers; `greenroom get pools` shows how many it is to have"
    if held_back:
        yield "a request does not wake it: it is answered 503, because onCrash is hold"
    for rejection in told.rejected:
        yield f"not on {rejection.worker}: {rejection.why}"


def _is_held_back(told: Explanation) -> bool:
    crashed = told.actor.state is ActorState.CRASHED
    return crashed and told.template is not None and told.template.spec.on_crash is OnCrash.HOLD


# --- what is kept -----------------------------------------------------------------------------------------------


def _snapshot(told: Explanation) -> Iterator[str]:
    snapshot = told.snapshot
    if snapshot is None:
        return
    if snapshot.id != told.actor.snapshot:
        why = "onCrash is boot" if told.actor.snapshot else "it has none of its own yet"
        yield f"its template's, {snapshot.id}: {why}, so it begins anew"
        return
    what = "memory and files" if snapshot.scope is SnapshotScope.MEMORY else "files only"
    size = human_bytes(snapshot.size_bytes)
    yield f"{snapshot.id} of {_moment(told, snapshot.created_at)}, {size}, {what}, {_place(snapshot)}"


def _place(snapshot: Snapshot) -> str:
    match snapshot.state:
        case SnapshotState.LOCAL:
            return f"only on the disk of {snapshot.worker} until it is uploaded"
        case SnapshotState.PRESENT:
            return "in the snapshot store" + (f", made on {snapshot.worker}" if snapshot.worker else "")
        case SnapshotState.CORRUPT:
            return "corrupt: the wake-up goes back to the one before, and says so"
        case SnapshotState.CONDEMNED:
            return "being deleted"
        case _:
            assert_never(snapshot.state)


def _survives(told: Explanation) -> Iterator[str]:
    """What the loss of every worker would cost."""
    actor, snapshot = told.actor, told.snapshot
    if actor.state is ActorState.DELETING:
        return
    whole = actor.state is ActorState.SUSPENDED and snapshot is not None and snapshot.state is SnapshotState.PRESENT
    if whole and (actor.snapshot or not actor.wakes):
        yield "if every worker died now, nothing of it would be lost"
    elif actor.durable_at is None:
        yield "if every worker died now, it would begin anew, as it was created"
    else:
        yield f"if every worker died now, it would go back to how it was at {_moment(told, actor.durable_at)}"


def _policy(told: Explanation) -> Iterator[str]:
    if told.template is None:
        return
    spec = told.template.spec
    timeout = format_duration(spec.idle_timeout_s)
    idle = f"suspended after {timeout} idle" if spec.idle_timeout_s else "not suspended when idle"
    words = [f"onCrash {spec.on_crash}", f"durability {spec.durability}", idle]
    words.append("evictable" if spec.evictable else "not evictable")
    words.append(f"pool {spec.pool}")
    if wanted := placement.selector(spec.worker_selector, told.actor.worker_selector):
        words.append(f"workers with {pairs_text(wanted)}")
    yield ", ".join(words)


def _next(told: Explanation) -> Iterator[str]:
    """What somebody would type now."""
    actor = told.actor
    where = "" if actor.namespace == DEFAULT_NAMESPACE else f" -n {actor.namespace}"
    if _is_held_back(told) and told.wakes_on:
        yield f"greenroom resume {actor.name}{where}"
    if actor.operation:
        yield f"greenroom wait operation {actor.operation}"
        if actor.state is not ActorState.DELETING:
            yield f"greenroom cancel operation {actor.operation}"
    if actor.state in HOMELESS and told.snapshot is not None and not told.wakes_on:
        yield "greenroom get workers"
    if actor.state in HOMELESS and told.snapshot is None and told.template is not None and not actor.snapshot:
        yield f"greenroom describe template {actor.template}{where}"


# --- what happened ----------------------------------------------------------------------------------------------


def history(told: Explanation) -> Iterator[tuple[str, list[str]]]:
    """For each operation, oldest first: when it began, and lines about it."""
    for index, operation in enumerate(told.operations):
        yield stamp(operation.created_at), [_headline(told, operation), *_details(told, index)]


def _headline(told: Explanation, operation: Operation) -> str:
    parts = [f"{operation.kind!s:<8}"]
    parts.append(_course(operation))
    if operation.worker:
        parts.append(f"on {operation.worker}")
    if operation.kind is OperationKind.CRASH:
        pass  # it takes no time and nobody asked for it
    elif operation.finished_at is None:
        parts.append(f"under way for {human_age(told.read_at - operation.created_at)}")
    elif operation.finished_at > operation.created_at:
        parts.append(f"in {_took(operation.finished_at - operation.created_at)}")
    return " ".join(parts)


def _course(operation: Operation) -> str:
    before = str(operation.from_state or "")
    if operation.state is OperationState.RUNNING:
        return f"{before} -> ..."
    after = str(operation.to_state or ("gone" if operation.kind is OperationKind.DELETE else "?"))
    failed = operation.state is OperationState.FAILED
    if failed and operation.to_state is None:
        after = "not done"
    return (f"{before} -> {after}" if before else after) + (", FAILED" if failed else "")


def _details(told: Explanation, index: int) -> Iterator[str]:
    operation = told.operations[index]
    if operation.error is not None:
        yield f"{operation.error.reason}: {operation.error.message}"
    if is_crash(operation):
        lost = _unsaved_since(told, index)
        yield f"what it did after {stamp(lost)} was lost" if lost is not None else "what it had not saved was lost"
    who = [] if operation.kind is OperationKind.CRASH else [CAUSES.get(operation.cause, operation.cause)]
    who += [f"decided by {operation.owner}"] if operation.owner else []
    who += [f"{operation.attempts} workers tried"] if operation.attempts > 1 else []
    who += [f"taken over {_times(operation.takeovers)}"] if operation.takeovers else []
    who += ["cancelled by command or API"] if operation.cancel_requested else []
    if operation.state is OperationState.RUNNING:
        who += [f"phase {operation.phase}"] if operation.phase else []
        who += [progress(operation)] if progress(operation) else []
    if who:
        yield ", ".join(who)
    for rejection in operation.rejected:
        yield f"not on {rejection.worker}: {rejection.why}"
    if operation.phases:
        yield "ms: " + ", ".join(f"{phase.name} {phase.seconds * 1000:.1f}" for phase in operation.phases)


def is_crash(operation: Operation) -> bool:
    """Whether it tells of a live incarnation, or of what it had saved, that was lost."""
    return operation.to_state is ActorState.CRASHED and operation.from_state is not ActorState.CRASHED


def _unsaved_since(told: Explanation, index: int) -> float | None:
    """From when on what the actor did was lost by the crash ``index``; None when the operations that are shown do not
    tell: it ran since a wake-up before them, or what was lost is a snapshot."""
    actor: Actor = told.actor
    crash = told.operations[index]
    latest = not any(is_crash(op) for op in told.operations[index + 1 :])
    if latest and actor.state is ActorState.CRASHED and actor.unsaved_since is not None:
        return actor.unsaved_since
    if crash.error is not None and crash.error.reason == "SnapshotLost":
        return None
    for operation in reversed(told.operations[:index]):
        woke = operation.kind is OperationKind.RESUME and operation.to_state is ActorState.RUNNING
        if woke and operation.from_state is not ActorState.PAUSED:
            return operation.finished_at
    return None


# --- words ------------------------------------------------------------------------------------------------------


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def zone(seconds: float) -> str:
    """Of the stamps, as ``UTC`` or ``CEST``."""
    return time.strftime("%Z", time.localtime(seconds))


def _moment(told: Explanation, seconds: float) -> str:
    return f"{stamp(seconds)} ({human_age(told.read_at - seconds)} ago)"


def _took(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
