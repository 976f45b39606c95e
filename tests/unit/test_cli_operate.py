"""The command line of whoever looks after a Greenroom: operations, workers, replicas, explanations, progress."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import yaml
from cli_kit import Shell, Terminal, process
from click.testing import CliRunner
from msgspec.structs import replace

from greenroom.cli import decommission, operate
from greenroom.cli.main import cli
from greenroom.core.commands import Advance
from greenroom.core.errors import Unavailable
from greenroom.core.records import Actor, Key, Operation, Replica, Worker, WorkerState

MINE = Key("default", "mine")


def begin(shell: Shell, verb: str = "resume") -> str:
    """An operation of actor ``mine`` that is under way and stays so; its id."""
    shell.server.call(shell.control.gate.clear)
    shell(verb, "mine", "--no-wait")
    return shell.actor("mine").operation


def go_on(shell: Shell) -> None:
    shell.server.call(shell.control.gate.set)


def advance(shell: Shell, phase: str, done: int, total: int) -> None:
    async def write() -> None:
        store = shell.control.store
        actor = await store.get(Actor, str(MINE))
        step: dict[str, Any] = {"operation_id": actor.operation, "generation": actor.generation}
        await store.apply(Advance(key=MINE, now=store.clock(), phase=phase, done_bytes=done, total_bytes=total, **step))

    shell.server.run(write())


def change_worker(shell: Shell, name: str, **fields: Any) -> None:
    async def write() -> None:
        store = shell.control.store
        await store.put(replace(await store.get(Worker, name), **fields))

    shell.server.run(write())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["get", "actors", "--state=sleeping"],
            "there is no state 'sleeping'; states of actors are: Suspended, Resuming",
        ),
        (["get", "pools", "--state=Ready"], "there is no state 'Ready'; pools have no states"),
        (["get", "actor", "x", "--state=running"], "--state is for lists"),
        (["get", "replicas", "-w"], "replicas can't be watched"),
        (["watch", "replicas"], "replicas can't be watched"),
        (["wait", "replica", "x"], "replicas can't be waited for"),
        (["cancel", "actor", "x"], "only operations can be cancelled"),
        (["cancel", "operation"], "say which operation; `greenroom get operations` lists them"),
        (["drain", "pool/x"], "only workers can be drained"),
        (["drain", "worker", "x", "--undo", "--wait"], "--undo has nothing to wait for"),
        (["retire", "pool/x"], "only workers can be retired"),
        (["forget", "actor", "x"], "only workers can be forgotten"),
        (["acknowledge", "worker"], "say which worker; `greenroom get workers` lists them"),
        (["gc", "--dry-run", "--history"], "each ask for something else"),
        (["gc", "--explain", "x", "--images"], "--images is about a round"),
        (["up", "--metrics=9464"], "'9464' is not host:port, for example 127.0.0.1:9464"),
        (["explain"], "Missing argument 'ACTOR...'"),
        (["explain", "template/x"], "is not an actor"),
        (["explain", "x", "--last=101"], "101 is not in the range"),
        (["create", "actor", "x", "-t", "y", "--worker-selector=gpu"], "'gpu' is not key=value"),
    ],
)
def test_usage_errors(args: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2 and says in result.stderr
    assert len(result.stderr.splitlines()) <= 2


# --- operations -------------------------------------------------------------------------------------------------


def test_operations_with_what_they_are_at(mine: Shell) -> None:
    operation = begin(mine)
    advance(mine, "fetch", 12 << 20, 48 << 20)
    titles, row = mine("get", "operations", "--state=RUNNING").stdout.splitlines()
    assert titles.split() == (["ID", "KIND", "NAME", "STATE", "PHASE", "PROGRESS", "WORKER", "OWNER", "TOOK", "AGE"])
    assert row.split()[:10] == [
        operation,
        "Resume",
        "mine",
        "Running",
        "fetch",
        "25%",
        "of",
        "48.0",
        "MiB",
        "default-0",
    ]
    assert row.split()[10:12] == ["me", "-"]
    wide = mine("get", "operations", "-o", "wide").stdout.splitlines()[0].split()
    assert wide[-4:] == ["CAUSE", "ATTEMPTS", "TAKEOVERS", "ERROR"]
    shown = mine("describe", "operation", operation).stdout
    assert "progress:     25% of 48.0 MiB" in shown and "owner:        me" in shown and "name:         mine" in shown
    advance(mine, "restore", 5 << 20, 0)
    assert " 5.0 MiB " in mine("get", "operation", operation).stdout
    go_on(mine)
    mine("wait", "operation", operation)
    assert mine("get", "operations", "--state=running").stderr == "no operations in namespace default\n"


def test_an_operation_is_cancelled(mine: Shell) -> None:
    operation = begin(mine)
    assert mine("cancel", "operation", operation).stdout == (
        f"operation/{operation} cancelled (Resume of default/mine; default/mine is Suspended)\n"
    )
    again = mine("cancel", f"operation/{operation}")
    assert again.stderr == f"operation/{operation} (Resume of default/mine) had ended already: Failed\n"
    late = mine("wait", "operation", operation, code=4)
    assert "is Failed, so it will not be Done: Resume of default/mine was given up" in late.stderr
    assert mine("cancel", "operation", "op-none", code=3).stderr.startswith("error: operation op-none does not exist")


def test_cancelling_without_waiting(mine: Shell) -> None:
    operation = begin(mine)
    asked = mine("cancel", "operation", operation, "--no-wait")
    assert asked.stdout == (
        f"operation/{operation} is being given up; watch it with `greenroom wait operation {operation}`\n"
    )


def test_what_ended_otherwise_than_cancelled(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    done = begin(mine)
    go_on(mine)
    mine("wait", "operation", done)
    assert "had ended already: Done" in mine("cancel", "operation", done, code=4).stderr
    delete = begin(mine, "suspend")

    async def too_late(operation_id: str) -> Operation:
        operation = await mine.control.store.get(Operation, operation_id)
        mine.control.gate.set()
        return operation

    monkeypatch.setattr(mine.control, "cancel_operation", too_late)
    assert "was done before it could be cancelled" in mine("cancel", "operation", delete, code=4).stderr


def test_a_delete_can_not_be_cancelled(mine: Shell) -> None:
    mine.server.call(mine.control.gate.clear)
    mine("delete", "actor", "mine", "--no-wait")
    refused = mine("cancel", "operation", mine.actor("mine").operation, code=4)
    assert "which can't be taken back" in refused.stderr


def test_a_cancelled_operation_that_takes_its_time(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = begin(mine)

    async def not_yet(operation_id: str) -> Operation:
        return await mine.control.store.get(Operation, operation_id)

    monkeypatch.setattr(mine.control, "cancel_operation", not_yet)
    late = mine("cancel", "operation", operation, "--timeout=100ms", code=124)
    assert "is not backed out after 0.1 s; it will be" in late.stderr


# --- progress on a terminal -------------------------------------------------------------------------------------


def test_what_takes_longer_is_shown_on_a_terminal(mine: Shell) -> None:
    mine.server.call(mine.control.gate.clear)
    terminal = Terminal("resume", "mine", "gone")
    terminal.until("actor/mine  Resume: bind on default-0")
    assert "gone does not exist" not in terminal.shown, "reported in order"
    advance(mine, "fetch", 12 << 20, 48 << 20)
    terminal.until("actor/mine  Resume: fetch on default-0")
    terminal.until("12.0 MiB of 48.0 MiB")
    go_on(mine)
    out = terminal.end(3)
    assert out.startswith("actor/mine resumed (") and "gone does not exist" in terminal.shown


def test_what_is_quick_shows_nothing(mine: Shell) -> None:
    terminal = Terminal("resume", "mine")
    assert terminal.end().startswith("actor/mine resumed (") and "Resume" not in terminal.shown


def test_waiting_for_a_turn_is_shown_too(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(key: Key, **_: object) -> Operation:
        await mine.control.gate.wait()
        raise Unavailable("no turn came")

    monkeypatch.setattr(mine.control, "resume", waits)
    mine.server.call(mine.control.gate.clear)
    terminal = Terminal("resume", *(f"a{n}" for n in range(12)))
    terminal.until("actor/a9  waits for its turn")
    terminal.until("and 2 more")
    assert "actor/a10 " not in terminal.shown
    go_on(mine)
    terminal.end(1)


def test_waiting_for_an_operation_shows_it(mine: Shell) -> None:
    operation = begin(mine)
    terminal = Terminal("wait", "operation", operation)
    terminal.until("Resume: bind on default-0")
    advance(mine, "fetch", 12 << 20, 48 << 20)
    terminal.until("12.0 MiB of 48.0 MiB")
    go_on(mine)
    assert terminal.end() == f"operation/{operation} done\n"


def test_operations_are_followed_on_a_terminal(mine: Shell) -> None:
    operation = begin(mine)
    terminal = Terminal("get", "operations", "-w", whole=True)
    terminal.until(operation)
    assert "PROGRESS" in terminal.shown and "Create" in terminal.shown
    advance(mine, "fetch", 12 << 20, 48 << 20)
    terminal.until("25% of 48.0 MiB")
    mine("cancel", "operation", operation)
    terminal.until("Failed")
    mine("create", "actor", "another", "-t", "counter")
    terminal.until("another")
    terminal.interrupt()
    terminal.end(130)


def test_a_narrow_screen_shows_less_and_says_so(mine: Shell) -> None:
    operation = begin(mine)
    advance(mine, "fetch", 12 << 20, 48 << 20)
    terminal = Terminal("get", "operations", "-w", whole=True, columns=66)
    terminal.until("on a wider screen also: OWNER, TOOK, WORKER, ID")
    assert "mine      Running   fetch   25% of 48.0 MiB" in terminal.shown and operation not in terminal.shown
    terminal.interrupt()
    terminal.end(130)


def test_operations_are_followed_elsewhere_too(mine: Shell) -> None:
    running = process("get", "operations", "--state=running", "-w")
    assert running.stderr is not None and running.stderr.readline() == "no operations in namespace default\n"
    operation = begin(mine)
    assert running.stdout is not None
    begun = running.stdout.readline().split()
    go_on(mine)  # what it has shown it follows to its end
    ended = running.stdout.readline().split()
    assert [(line[0], line[3]) for line in (begun, ended)] == [(operation, "Running"), (operation, "Done")]
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)


# --- workers and replicas ---------------------------------------------------------------------------------------


def test_workers_with_labels_and_failures(mine: Shell) -> None:
    change_worker(mine, "default-0", labels={"zone": "a", "gpu": "a100"}, failures=3, quarantined_until=4e9)
    titles, first, second = mine("get", "workers").stdout.splitlines()
    assert titles.split() == ["NAME", "POOL", "STATE", "USED", "BACKEND", "FAILURES", "SEEN", "LABELS"]
    assert "3, quarantine " in first and first.endswith("gpu=a100,zone=a")
    assert second.split()[5] == "0" and second.endswith("-")
    shown = mine("describe", "worker", "default-0").stdout
    assert "quarantined until:   2096-" in shown and "labels:              gpu=a100, zone=a" in shown
    mine("create", "actor", "picky", "-t", "counter", "--worker-selector", "gpu=a100")
    assert mine.actor("picky").worker_selector == {"gpu": "a100"}
    assert "worker selector:   gpu=a100" in mine("describe", "actor", "picky").stdout


def test_drain(mine: Shell) -> None:
    mine("resume", "mine")
    done = mine("drain", "worker", "default-0", "--wait")
    assert done.stdout == "worker/default-0 draining, 1 of 4 slots taken\nworker/default-0 is empty\n"
    assert mine("get", "worker", "default-0").stdout.splitlines()[1].split()[2] == "Draining"
    assert mine.actor("mine").state == "Suspended"
    assert mine("drain", "worker/default-0", "--undo").stdout == "worker/default-0 takes actors again\n"
    assert "does not exist" in mine("drain", "worker", "none", code=3).stderr


def test_a_drain_that_is_waited_for(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "POLL_S", 0.05)
    mine("resume", "mine")
    mine.server.call(mine.control.gate.clear)
    late = mine("drain", "worker", "default-0", "--wait", "--timeout=0.1", code=124)
    assert "worker/default-0: 1 of 4 slots taken after 0.1 s; it goes on" in late.stderr
    terminal = Terminal("drain", "worker", "default-0", "--wait")
    terminal.until("actor/default/mine  Suspend: checkpoint on default-0")
    change_worker(mine, "default-0", state=WorkerState.ACTIVE)
    terminal.end(4)
    assert "somebody has undone the drain" in terminal.shown


def test_retire(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "POLL_S", 0.05)
    monkeypatch.setattr(decommission, "POLL_S", 0.05)
    mine("resume", "mine")
    done = mine("retire", "worker", "default-0", "--wait")
    assert done.stdout == "worker/default-0 retiring, 1 of 4 slots taken\nworker/default-0 has retired\n"
    assert mine.actor("mine").state == "Suspended"
    assert "does not exist" in mine("retire", "worker", "default-0", code=3).stderr


def test_a_retirement_that_does_not_come_to_its_end(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decommission, "POLL_S", 0.05)
    mine.server.call(mine.control.gate.clear)
    late = mine("retire", "worker", "default-0", "--wait", "--timeout=0.1", code=124)
    assert (
        "worker/default-0 is empty and has not ended after 0.1 s; it goes on, and `greenroom gc --expl" in late.stderr
    )
    assert mine("get", "worker", "default-0").stdout.splitlines()[1].split()[2] == "Retiring"


def test_forget(mine: Shell) -> None:
    mine("resume", "mine")
    assert "it is heard" in mine("forget", "worker", "default-0", code=4).stderr
    change_worker(mine, "default-0", state=WorkerState.STALLED)
    assert "say --yes" in mine("forget", "worker", "default-0", code=4).stderr
    gone = mine("forget", "worker", "default-0", "--yes")
    assert gone.stdout == "worker/default-0 is gone; should it come back, it wipes itself\n"
    assert gone.stderr.splitlines() == [
        "actor/default/mine lost what it did since it woke",
        "snapshot/snap-1 lost: it was nowhere else",
    ]
    assert mine("get", "workers", "--state=gone").stdout.splitlines()[1].split()[0] == "default-0"
    assert mine("forget", "worker", "default-0").stdout == "worker/default-0 forgotten\n"
    assert "does not exist" in mine("forget", "worker", "default-0", code=3).stderr


def test_acknowledge(mine: Shell) -> None:
    change_worker(mine, "default-0", distrust="it was in epoch 3, and the database does not know that", epoch=4)
    _, first = mine("get", "worker", "default-0").stdout.splitlines()
    assert "Active, distrusted" in first
    shown = mine("describe", "worker", "default-0").stdout
    assert "distrust:           it was in epoch 3" in shown and "epoch:              4" in shown
    assert mine("acknowledge", "worker", "default-0").stdout == (
        "worker/default-0 acknowledged: what the database does not know there goes now\n"
    )
    assert mine("acknowledge", "worker/default-0").stdout == "worker/default-0 is trusted already; nothing to do\n"


def test_a_watch_shows_slots_that_are_taken(mine: Shell) -> None:
    running = process("get", "workers", "-w")
    assert running.stdout is not None
    first = [running.stdout.readline() for _ in range(3)]
    assert first[1].split()[3] == "0/4"
    mine("resume", "mine")
    assert running.stdout.readline().split()[:4] == ["default-0", "default", "Active", "1/4"]
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)


def test_replicas(mine: Shell) -> None:
    assert mine("get", "replicas").stderr == "no replicas\n"

    async def write() -> None:
        await mine.control.store.put(
            Replica(name="gr-1", incarnation="gr-1/7c41", link="unix:/x", started_at=1.0, seen_at=2.0)
        )

    mine.server.run(write())
    titles, row = mine("get", "replicas").stdout.splitlines()
    assert titles.split() == ["NAME", "INCARNATION", "LINK", "STARTED", "SEEN"]
    assert row.split()[:3] == ["gr-1", "gr-1/7c41", "unix:/x"]
    assert json.loads(mine("get", "replica", "gr-1", "-o", "json").stdout)["status"]["link"] == "unix:/x"
    assert "link:" in mine("describe", "replica", "gr-1").stdout
    assert "replica two does not exist" in mine("get", "replica", "two", code=3).stderr


# --- explain ----------------------------------------------------------------------------------------------------


def test_explain(mine: Shell) -> None:
    mine("resume", "mine")
    mine.server.run(mine.control.crash(MINE))
    told = mine("explain", "actor/mine").stdout
    assert "WorkerLost: worker default-0 went away" in told and "what it did after" in told
    assert "next       greenroom resume mine\n" in told
    mine("create", "actor", "two", "-t", "counter")
    both = mine("explain", "mine", "two").stdout
    assert both.startswith(told.split("(")[0]) and "\n\nactor default/two of template counter" in both
    assert "actor default/none does not exist" in mine("explain", "none", code=3).stderr


def test_explain_for_programs(mine: Shell) -> None:
    mine("resume", "mine")
    mine("suspend", "mine")
    told = json.loads(mine("explain", "mine", "-o", "json", "--last=2").stdout)
    assert told["kind"] == "Explanation" and told["metadata"]["name"] == "mine"
    assert told["actor"]["state"] == "Suspended" and told["olderOperations"] == 1
    assert [op["kind"] for op in told["operations"]] == ["Resume", "Suspend"]
    assert told["wakesOn"] == ["default-0", "default-1"] and "rejected" not in told
    assert told["template"]["policy"]["onCrash"] == "hold"
    assert "survives: if every worker died now, nothing of it would be lost" in told["summary"]
    assert yaml.safe_load(mine("explain", "mine", "-o", "yaml", "--last=2").stdout)["actor"] == told["actor"]
    mine("create", "actor", "two", "-t", "counter")
    many = json.loads(mine("explain", "mine", "two", "-o", "json").stdout)
    assert [one["metadata"]["name"] for one in many["items"]] == ["mine", "two"]


def test_what_a_sandbox_says_does_not_steer_the_terminal(mine: Shell) -> None:
    mine.fail_next("DATA_LOSS", "X", "bad \x1b[2J\x07 bytes\nnext")
    mine("resume", "mine", code=1)
    told = mine("explain", "mine").stdout
    assert "\x1b" not in told and told.count("X: bad ?[2J? bytes next\n") == 2
