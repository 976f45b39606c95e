"""The command line against a real server: what it prints, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_kit import Shell, Terminal, process
from click.testing import CliRunner

from greenroom.api import service
from greenroom.cli.main import COMMANDS, cli
from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Actor, ActorState, Key, Operation, OperationState, Template, Worker

TEMPLATE = """\
apiVersion: greenroom.dev/v1alpha1
kind: Template
metadata: {name: web}
spec: {image: "example.org/web:1", resources: {memory: 256Mi}}
---
apiVersion: greenroom.dev/v1alpha1
kind: WorkerPool
metadata: {name: extra}
spec: {replicas: 1, backend: sim}
"""


# --- without a server -------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from greenroom.cli.main import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'grpc', 'rich', 'google.protobuf', 'yaml', 'msgspec', 'asyncio', 'structlog'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, (_, line, section) in COMMANDS.items():
        assert not section or (f"  {name}" in done.stdout and line in done.stdout)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("up", "agent")])
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0 and "Usage: " in result.output and "--help" in result.output


def test_help_shows_the_name_of_the_kubectl_plugin(tmp_path: Path) -> None:
    plugin = tmp_path / "kubectl-greenroom"
    plugin.write_text(f"#!{sys.executable}\nfrom greenroom.cli.main import main\nmain()\n")
    plugin.chmod(0o755)
    done = subprocess.run([plugin, "get", "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: kubectl-greenroom get ")


def test_no_server_says_how_to_start_one(tmp_path: Path) -> None:
    running = process("get", "actors", "--server", f"unix:{tmp_path}/none.sock")
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert err == f"error: no Greenroom server answers at unix:{tmp_path}/none.sock; start one with: greenroom up\n"


def test_where_the_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from greenroom.cli.paths import data_dir, default_server

    monkeypatch.delenv("GREENROOM_SERVER", raising=False)
    monkeypatch.setenv("GREENROOM_HOME", "/x/y")
    assert data_dir() == Path("/x/y") and default_server() == "unix:/x/y/run/api.sock"
    monkeypatch.setenv("GREENROOM_SERVER", "localhost:1")
    assert default_server() == "localhost:1"
    monkeypatch.delenv("GREENROOM_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert data_dir() == Path("/var/lib/greenroom")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert data_dir() == Path("~/.local/share/greenroom").expanduser()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["gett"], "did you mean 'get'?"),
        (["get", "cows"], "there is no type 'cows'; types are: actors, templates"),
        (["get", "actor/a", "b"], "'b' is not TYPE/NAME"),
        (["get", "templates", "-l", "a=b"], "only actors have labels"),
        (["delete", "worker", "x"], "workers can't be deleted"),
        (["delete", "actor"], "say which"),
        (["suspend", "template/x"], "is not an actor"),
        (["create", "actor", "x"], "Missing option '-t'"),
        (["create", "actor", "x", "-t", "y", "-l", "z"], "'z' is not key=value"),
        (["wait", "actor", "x", "--for=state=Sleeping"], "use state=Suspended"),
        (["wait", "actor", "x", "--timeout", "5parsecs"], "is not a duration"),
        (["exec", "x", "--timeout=99999999999999999999999", "--", "ls"], "is too long: at most 87600h"),
        (["wait", "actor", "x", f"--timeout={'9' * 400}"], "is too long"),
        (["get", "actors", "--request-timeout=87601h"], "87601h is too long: at most 87600h"),
        (["exec", "x"], "Missing argument"),
        (["completion", "csh"], "'csh' is not one of"),
        (["apply"], "Missing option '-f'"),
    ],
)
def test_usage_errors(args: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2 and says in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("users: 5", "users is no list of mappings"),
        ("users: [{name: u, user: 5}]", "users: u: user is no mapping"),
        ("users: [{name: u, user: {tokenFile: gone}}]", "tokenFile can't be read: [Errno 2] No such file"),
        ("users: [{name: u, user: {exec: 5}}]", "exec is no mapping"),
        ("users: [{name: u, user: {exec: {command: 'true', args: 5}}}]", "program true has args that are no list"),
        ("users: [{name: u, user: {client-certificate-data: 5}}]", "client-certificate-data can't be read"),
        ("users: !!int five", "config can't be read: invalid literal"),
    ],
)
def test_a_kubeconfig_that_makes_no_sense(tmp_path: Path, user: str, says: str) -> None:
    context, cluster = "{name: c, context: {cluster: k, user: u}}", "{name: k, cluster: {server: 'https://nowhere'}}"
    config = tmp_path / "config"
    config.write_text(f"current-context: c\ncontexts: [{context}]\nclusters: [{cluster}]\n{user}\n")
    result = CliRunner().invoke(cli, ["get", "actors", "--kubeconfig", str(config)])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_completion() -> None:
    for shell in ("bash", "zsh", "fish"):
        result = CliRunner().invoke(cli, ["completion", shell])
        assert result.exit_code == 0 and "_GREENROOM_COMPLETE" in result.output


# --- actors -----------------------------------------------------------------------------------------------------


def test_life_of_an_actor(mine: Shell) -> None:
    assert mine("resume", "mine").stdout.startswith("actor/mine resumed (")
    assert mine("resume", "mine").stdout == "actor/mine running already\n"
    table = mine("get", "actors").stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "TEMPLATE", "WORKER", "WAKES", "AGE"]
    assert table[1].split()[:5] == ["mine", "Running", "counter", "default-0", "1"]
    assert mine("get", "ac", "-A").stdout.splitlines()[1].split()[:2] == ["default", "mine"]
    mine("pause", "actor/mine")
    mine("suspend", "mine")
    shown = mine("describe", "actor", "mine").stdout
    assert "restore 40.5" in shown and "48.0 MiB" in shown and "team=x" in shown and "snapshot:" in shown
    assert mine("delete", "actor/mine").stdout.startswith("actor/mine deleted")
    missing = mine("get", "actor", "mine", code=3)
    assert "mine" in missing.stderr and len(missing.stderr.splitlines()) <= 2
    assert mine("get", "actors").stderr == "no actors in namespace default\n"


def test_a_name_that_is_no_text(mine: Shell) -> None:
    for command in (["get", "actor"], ["resume"], ["create", "actor", "x", "-t"], ["exec", "mine", "--"]):
        refused = process("--server", mine.server.address, *command, b"a\xff")  # type: ignore[arg-type]
        out, err = refused.communicate(timeout=60)
        assert (refused.returncode, out) == (2, "")
        assert err == "error: 'a\\udcff' can't be written as utf-8; use UTF-8\n"


def test_several_at_once_and_what_failed(mine: Shell) -> None:
    mine("create", "actor", "two", "--template", "counter")
    done = mine("resume", "mine", "gone", "two", code=3)
    assert "actor/mine resumed" in done.stdout and "actor/two resumed" in done.stdout
    assert "gone does not exist" in done.stderr


def test_output_formats(mine: Shell) -> None:
    one = json.loads(mine("get", "actor", "mine", "-o", "json").stdout)
    assert one["kind"] == "Actor" and one["metadata"]["labels"] == {"team": "x"}
    assert one["status"]["state"] == "Suspended" and one["metadata"]["creationTimestamp"].endswith("Z")
    many = json.loads(mine("get", "actors", "-o", "json").stdout)
    assert [i["metadata"]["name"] for i in many["items"]] == ["mine"]
    assert yaml.safe_load(mine("get", "actor", "mine", "-o", "yaml").stdout) == one
    assert mine("get", "actors", "-o", "name").stdout == "actor/mine\n"
    assert "UID" in mine("get", "actors", "-o", "wide").stdout
    assert mine("get", "actors", "-l", "team=y").stderr == "no actors in namespace default\n"
    for kind in ("templates", "pools", "workers", "snapshots", "operations"):
        assert len(mine("get", kind).stdout.splitlines()) >= 2
        json.loads(mine("get", kind, "-o", "json").stdout)


def test_describe_every_kind(mine: Shell) -> None:
    mine("resume", "mine")
    operation = mine("get", "operations", "-o", "name").stdout.splitlines()[-1]
    assert "restore:" in mine("describe", operation).stdout and "40.5 ms" in mine("describe", operation).stdout
    assert "memory: 512Mi" in mine("describe", "template/counter").stdout
    assert "default-1" in mine("describe", "pool", "default").stdout
    assert "mine" in mine("describe", "worker", "default-0").stdout
    assert "pages" in mine("describe", "snapshot", "golden-counter").stdout


def test_a_crash_is_explained(mine: Shell) -> None:
    mine("resume", "mine")
    mine.server.run(mine.control.crash(Key("default", "mine")))
    shown = mine("describe", "actor", "mine").stdout
    assert "WorkerLost" in shown and "went away" in shown and "what it did after that is lost" in shown
    mine("resume", "mine")


def test_a_sandbox_can_not_steer_the_terminal(mine: Shell) -> None:
    mine.fail_next("DATA_LOSS", "X", "bad \x1b[2J\x07 bytes\nnext")
    said = mine("resume", "mine", code=1).stderr
    assert said == "error: actor/mine: bad ?[2J? bytes\nnext\n", "its lines stay lines"
    mine.control.refuse = FailedPrecondition("\x1b]0;mine\x07 of a call\nnext")
    assert mine("suspend", "mine", code=4).stderr == "error: ?]0;mine? of a call\nnext\n"
    assert "\x1b" not in mine("describe", "actor", "a\x1b[2J", code=3).stderr
    shown = mine("describe", "actor", "mine").stdout + mine("get", "actors", "-o", "wide").stdout
    assert "\x1b" not in shown and "bad ?[2J? bytes next" in shown


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        ("NOT_FOUND", "TEMPLATE_NOT_FOUND", 3),
        ("FAILED_PRECONDITION", "TEMPLATE_NOT_READY", 4),
        ("ABORTED", "LEASE_LOST", 4),
        ("RESOURCE_EXHAUSTED", "NO_CAPACITY", 6),
        ("DEADLINE_EXCEEDED", "OPERATION_DEADLINE", 124),
        ("DATA_LOSS", "SNAPSHOT_CORRUPT", 1),
    ],
)
def test_the_exit_code_is_that_of_the_operations_error(mine: Shell, code: str, reason: str, exit_code: int) -> None:
    mine.fail_next(code, reason, "it went wrong")
    assert mine("resume", "mine", code=exit_code).stderr == "error: actor/mine: it went wrong\n"


def test_waiting_and_not_waiting(mine: Shell) -> None:
    mine.server.call(mine.control.gate.clear)
    late = mine("resume", "mine", "--timeout", "100ms", code=124)
    assert "still in phase 'bind' and going on" in late.stderr and "greenroom wait operation" in late.stderr
    begun = mine("resume", "mine", "--no-wait")
    assert begun.stdout.startswith("actor/mine begun; watch it with `greenroom wait operation op-")
    operation = mine.actor("mine").operation
    late = mine("wait", "operation", operation, "--timeout=0.2", code=124)
    assert "was not Done after 0.2 s" in late.stderr
    mine.server.call(mine.control.gate.set)
    assert mine("wait", "operation", operation).stdout == f"operation/{operation} done\n"
    assert mine("wait", "actor/mine", "--for=state=running").stdout == "actor/mine running\n"


def test_ctrl_c_leaves_the_operation_running(mine: Shell) -> None:
    mine.server.call(mine.control.gate.clear)
    running = process("resume", "mine")

    async def begun() -> str:
        events = mine.control.store.watch()
        while not (actor := await mine.control.store.get(Actor, "default/mine")).operation:
            await anext(events)
        return actor.operation

    operation = mine.server.run(begun())
    mine.server.pause(3.0)  # a busy server is asked all the same
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "Traceback" not in err
    assert f"the operation goes on, watch it with `greenroom wait operation {operation}`" in err
    mine.server.call(mine.control.gate.set)
    done = mine.server.run(mine.control.wait_operation(operation, 5))
    assert done.state is OperationState.DONE


# --- apply ------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_preparation_running(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(TEMPLATE)
    shell.server.call(shell.control.gate.clear)
    applying = process("apply", "-f", str(path))
    assert applying.stderr is not None
    assert applying.stderr.readline() == "template/web: phase pull\n"
    applying.send_signal(signal.SIGINT)
    _, err = applying.communicate(timeout=30)
    assert applying.returncode == 130 and "Traceback" not in err
    template = shell.server.run(shell.control.store.get(Template, "default/web"))
    assert "goes on: watch it with `greenroom wait template web -n default`" in err
    assert f"give it up with `greenroom cancel operation/{template.operation}`" in err
    shell.server.call(shell.control.gate.set)
    assert shell("wait", "template", "web").stdout == "template/web ready\n"


def test_apply(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(TEMPLATE)
    done = shell("apply", "-f", str(path))
    assert done.stdout.splitlines() == ["pool/extra created", "template/web applied", "template/web ready"]
    assert "pull 100% of 3.0 MiB" in done.stderr and "pull 1500 ms" in done.stderr
    again = shell("apply", "-f", "-", stdin=TEMPLATE)
    assert again.stdout.splitlines() == ["pool/extra unchanged", "template/web unchanged", "template/web ready"]
    shown = shell("get", "template", "web", "-o", "yaml").stdout
    assert "memory: 256Mi" in shown
    assert "template/web unchanged" in shell("apply", "-f", "-", stdin=shown).stdout
    assert len(shell.server.run(shell.control.store.list(Worker, where={"pool": "extra"}))) == 1
    changed = shell("apply", "-f", "-", stdin=TEMPLATE.replace("web:1", "web:2"), code=4)
    assert "exists with another spec" in changed.stderr
    shell("create", "actor", "a", "-t", "web")
    assert "used by actors" in shell("delete", "template", "web", code=4).stderr
    shell("delete", "actor/a")
    assert shell("delete", "template/web", "pool/extra").stdout == "template/web deleted\npool/extra deleted\n"


def test_nothing_is_applied_when_a_document_is_wrong(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(
        TEMPLATE + "---\n" + TEMPLATE.split("---")[0].replace("name: web", "name: other").replace("256Mi", "x")
    )
    done = shell("apply", "-f", str(path), code=2)
    assert f"{path}:14: spec.resources.memory: 'x' is not a quantity" in done.stderr
    assert len(shell.server.run(shell.control.store.list(Template))) == 1  # the one that was there


def test_a_template_that_fails(shell: Shell) -> None:
    shell.fail_next("NOT_FOUND", "IMAGE_NOT_FOUND", "no such image example.org/web:1")
    done = shell("apply", "-f", "-", stdin=TEMPLATE, code=3)
    assert "error: template/web: no such image" in done.stderr
    assert "will not be Ready: no such image" in shell("wait", "template", "web", code=4).stderr
    assert "template/web ready" in shell("apply", "-f", "-", stdin=TEMPLATE).stdout


def test_apply_gives_up_waiting_but_not_the_preparation(shell: Shell) -> None:
    shell.server.call(shell.control.gate.clear)
    assert shell("apply", "-f", "-", "--no-wait", stdin=TEMPLATE).stdout.endswith("template/web applied\n")
    late = shell("apply", "-f", "-", "--timeout=200ms", stdin=TEMPLATE, code=124)
    assert "its preparation goes on" in late.stderr
    shell.server.call(shell.control.gate.set)
    assert shell("wait", "template", "web").stdout == "template/web ready\n"


def test_bars_on_a_terminal(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(TEMPLATE)
    shell.server.call(shell.control.gate.clear)
    terminal = Terminal("apply", "-f", str(path))
    terminal.until("3.0 MiB of 3.0 MiB")
    assert "abababababab" in terminal.shown
    shell.server.call(shell.control.gate.set)
    assert terminal.end().endswith("template/web ready\n")


# --- exec, logs and the rest ------------------------------------------------------------------------------------


def test_exec(mine: Shell) -> None:
    done = mine("exec", "mine", "--", "sh", "-c", "echo $X; echo err >&2; exit 7", "-e", code=7)
    assert (done.stdout, done.stderr) == ("\n", "err\n")
    assert mine("exec", "-e", "X=1", "mine", "--", "sh", "-c", "echo $X").stdout == "1\n"
    assert "no-such" in mine("exec", "mine", "--", "no-such", code=4).stderr
    assert "does not exist" in mine("exec", "gone", "--", "true", code=3).stderr


def test_exec_passes_input_on(mine: Shell) -> None:
    running = process("exec", "-i", "mine", "--", "wc", "-c", stdin=subprocess.PIPE)
    out, _ = running.communicate("x" * 300_000, timeout=30)
    assert (running.returncode, out.strip()) == (0, "300000")
    running = process("exec", "mine", "--", "cat", stdin=subprocess.PIPE)  # without -i: no input
    assert running.communicate("ignored", timeout=30) == ("", "")


def test_exec_ends_though_nobody_types(mine: Shell) -> None:
    running = process("exec", "-i", "mine", "--", "sh", "-c", "exit 9", stdin=subprocess.PIPE)
    assert running.wait(timeout=30) == 9
    running.communicate()


def test_ctrl_c_kills_the_command(mine: Shell) -> None:
    running = process("exec", "mine", "--", "sh", "-c", "echo ready; sleep 60")
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 130
    mine.server.run(asyncio.wait_for(mine.control.kills.wait(), 60))


def test_logs(mine: Shell) -> None:
    assert mine("logs", "mine").stdout == "one\ntwo\nthree\n"
    assert mine("logs", "actor/mine", "--tail", "1").stdout == "three\n"
    running = process("logs", "-f", "mine", "--tail=1")
    assert running.stdout is not None and running.stdout.readline() == "three\n"
    mine.server.call(lambda: (mine.control.log_lines.append(b"new\n"), mine.control.more_logs.set()))
    assert running.stdout.readline() == "new\n"
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 130


def test_stats_url_version(mine: Shell) -> None:
    assert mine("top").stderr == "no actor is running\n"
    assert "it has no stats" in mine("stats", "mine", code=4).stderr
    mine("resume", "mine")
    assert mine("top").stdout.splitlines()[1].split() == ["mine", "64.0", "MiB", "1.25", "s", "3"]
    assert json.loads(mine("stats", "mine", "-o", "json").stdout)[0]["memoryBytes"] == 64 << 20
    assert mine("url", "mine").stdout == "http://mine.default.actors.localhost:8880\n"
    assert mine("url", "mine", "--port=9000").stdout == "http://9000--mine.default.actors.localhost:8880\n"
    mine("url", "gone", code=3)
    assert mine("version").stdout == "client: 0.1.0\nserver: 0.1.0\n"
    assert mine("version", "--client").stdout == "client: 0.1.0\n"


def test_wait_for_states(mine: Shell) -> None:
    assert mine("wait", "actor", "mine", "--for=state=Suspended").stdout == "actor/mine suspended\n"
    mine("wait", "actor", "gone", code=3)
    assert mine("wait", "actor", "gone", "--for=delete").stdout == "actor/gone deleted\n"
    assert "was not Running after" in mine("wait", "actor/mine", "--timeout=100ms", code=124).stderr
    running = process("wait", "actor", "mine", "--for=delete")
    mine("delete", "actor", "mine")
    assert running.communicate(timeout=30)[0] == "actor/mine deleted\n"


def test_watching(mine: Shell) -> None:
    running = process("get", "actors", "-w")
    assert running.stdout is not None
    running.stdout.readline()
    assert running.stdout.readline().split()[1] == "Suspended"
    everything = process("watch")
    assert everything.stderr is not None and everything.stderr.readline() == "watching; Ctrl-C ends\n"
    mine("resume", "mine")
    assert running.stdout.readline().split()[1] == "Resuming"
    assert running.stdout.readline().split()[1] == "Running"
    mine("delete", "actor", "mine")
    while (line := running.stdout.readline().split())[1] != "(deleted)":
        assert line[1] == "Deleting"
    assert everything.stdout is not None
    out = ""
    while "actor/mine  deleted" not in out:
        out += everything.stdout.readline()
    for one in (running, everything):
        one.send_signal(signal.SIGINT)
        one.communicate(timeout=30)
        assert one.returncode == 130
    assert "actor/mine  Running  on default-0" in out and "Resume  mine  Done" in out


def test_options_before_and_after_the_command(mine: Shell) -> None:
    assert mine("-n", "elsewhere", "get", "actors").stderr == "no actors in namespace elsewhere\n"
    assert mine("get", "actors", "-n", "elsewhere").stderr == "no actors in namespace elsewhere\n"
    assert mine("get", "actors", "-n", "default", "--request-timeout=5s").stdout.count("mine") == 1


def test_request_timeout(mine: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DEADLINE_MARGIN_S", 20.0)
    mine.server.call(mine.control.gate.clear)
    late = mine("resume", "mine", "--request-timeout=20.5s", code=124)  # the server answers before it
    assert "still in phase" in late.stderr
    assert isinstance(mine.server.run(mine.control.store.list(Operation)), list)
    assert mine.actor("mine").state is ActorState.RESUMING


def test_the_reader_may_have_enough(mine: Shell) -> None:
    for index in range(40):
        mine.server.run(mine.control.create_actor(Key("default", f"a{index:02}"), "counter"))
    command = f"{sys.executable} -c 'from greenroom.cli.main import main; main()' get actors -o json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{\n", "")


# --- doctor -----------------------------------------------------------------------------------------------------


def test_doctor(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(cli, ["doctor", "-o", "json"])
    report = json.loads(result.stdout)
    checks = {c["name"]: c for c in report["checks"]}
    assert {"python", "root", "network namespaces", "user namespaces", "cgroups", "disk", "server"} <= set(checks)
    assert checks["server"]["ok"] and checks["python"]["ok"] and checks["data directory"]["ok"]
    works = [b["name"] for b in report["backends"] if b["available"] and b["name"] != "sim"]
    assert result.exit_code == (0 if works else 1) and report["ok"] == bool(works)
    assert not (tmp_path / "home").exists()  # it changes nothing


def test_doctor_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from greenroom.cli import doctor
    from greenroom.core.errors import InvalidArgument
    from greenroom.sandbox import registry

    def load(name: str) -> object:
        raise InvalidArgument("broken plug-in")

    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path))
    monkeypatch.setenv("GREENROOM_SERVER", f"unix:{tmp_path}/none.sock")
    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert "no    backend gvisor" in result.stdout and "broken plug-in" in result.stdout
    assert "way out: free some space" in result.stdout and "without it: no images and snapshots" in result.stdout
    assert "start one with: greenroom up" in result.stdout
    assert result.stdout.endswith("No backend works here; the ways out are above.\n")
