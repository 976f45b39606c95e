"""A good session: every command of the command line and both SDKs against a real server with real sandboxes."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kit import Kit
from shell import Shell, template

from greenroom import Actor, AsyncActor
from greenroom.core.errors import FailedPrecondition
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer

pytestmark = [pytest.mark.gvisor, pytest.mark.root, pytest.mark.xdist_group("sandboxes")]

#: The image has Python and no other program.
ECHO = ["python3", "-c", "import sys; sys.stdout.write(sys.stdin.read())"]
SHOW_COUNT = ["python3", "-c", "print(open('/data/count.txt').read(), end='')"]
KUBECTL_PLUGIN = [str(Path(sys.executable).with_name("kubectl-greenroom"))]


@pytest.fixture(scope="module")
def kit(counter_image: str) -> Iterator[Kit]:
    directory = Path(tempfile.mkdtemp(prefix="gr-"))
    kit = Kit(LiveServer(directory, workers=1, slots=2), counter_image)
    kit.live.start()
    assert kit.apply().state == "Ready"
    yield kit
    kit.live.stop()
    assert leftovers(directory) == []
    shutil.rmtree(directory)


@pytest.fixture
def shell(kit: Kit) -> Shell:
    return Shell(kit.live.data_dir)


def test_from_apply_to_delete(kit: Kit, shell: Shell) -> None:
    said = shell("apply", "-f", "-", stdin=template("mine", kit.image))
    assert said.ok() == "template/mine applied\ntemplate/mine ready\n"
    assert "phase boot" in said.err
    assert shell("apply", "-f", "-", stdin=template("mine", kit.image)).ok() == (
        "template/mine unchanged\ntemplate/mine ready\n"
    )
    assert shell("create", "actor", "a", "--template=mine", "--label=team=x").ok() == "actor/a created\n"
    assert re.fullmatch(r"actor/a resumed \(\d+ ms\)\n", shell("resume", "a").ok())
    assert shell("resume", "a").ok() == "actor/a running already\n"
    assert kit.get("a")["ram"] == 1
    assert re.fullmatch(r"actor/a suspended \(\d+ ms\)\n", shell("suspend", "a").ok())
    assert shell("wait", "actor", "a", "--for=state=Suspended").ok() == "actor/a suspended\n"
    assert shell("exec", "a", "--", *SHOW_COUNT).ok() == "1", "it wakes"
    assert re.fullmatch(r"actor/a paused \(\d+ ms\)\n", shell("pause", "a").ok())
    assert kit.get("a")["ram"] == 2
    shown = shell("describe", "actor", "a").ok()
    assert re.search(r"state: +Running\n", shown) and "labels:" in shown
    for kind in ("Create", "Resume", "Suspend", "Pause"):
        assert re.search(rf" {kind} +Done +(api|request) +\d+ ms", shown), shown
    assert re.search(r"restore \d+\.\d", shown) and re.search(r"publish \d+\.\d", shown)
    assert re.fullmatch(r"actor/a deleted \(\d+ ms\)\n", shell("delete", "actor", "a").ok())
    assert shell("wait", "actor/a", "--for=delete").ok() == "actor/a deleted\n"
    assert shell("delete", "template/mine").ok() == "template/mine deleted\n"
    assert [t.name for t in kit.templates()] == ["counter"]


def test_every_output_format(kit: Kit, shell: Shell) -> None:
    kit.create("a", "b")
    kit.get("a")
    title, *rows = shell("get", "actors").ok().splitlines()
    assert title.split() == ["NAME", "STATE", "TEMPLATE", "WORKER", "WAKES", "AGE"]
    assert [row.split()[:5] for row in rows] == [
        ["a", "Running", "counter", "default-0", "1"],
        ["b", "Suspended", "counter", "-", "0"],
    ]
    one = json.loads(shell("get", "actor", "a", "-o", "json").ok())
    assert (one["kind"], one["metadata"]["name"], one["status"]["state"]) == ("Actor", "a", "Running")
    both = list(yaml.safe_load_all(shell("get", "actors", "-o", "yaml").ok()))
    assert [d["metadata"]["name"] for d in both] == ["a", "b"]
    assert shell("get", "actors", "-o", "name").ok() == "actor/a\nactor/b\n"
    spec = shell("get", "template", "counter", "-o", "yaml").ok()
    assert shell("apply", "-f", "-", stdin=spec).ok() == "template/counter unchanged\ntemplate/counter ready\n"
    for name in ("a", "b"):
        kit.act("Delete", name)


def test_exec_and_logs(kit: Kit, shell: Shell) -> None:
    kit.create("a")
    code = "import sys; sys.stderr.write('careful\\n'); print(sys.stdin.read().upper(), end=''); raise SystemExit(3)"
    ran = shell("exec", "-i", "a", "--", "python3", "-c", code, stdin="hello\n")
    assert (ran.code, ran.out, ran.err) == (3, "HELLO\n", "careful\n")
    ran = shell(
        "exec", "-e", "X=42", "-w", "/app", "a", "--", "python3", "-c", "import os; print(os.environ['X'], os.getcwd())"
    )
    assert ran.ok() == "42 /app\n"
    shell("exec", "a", "--", "nosuch").failed(4, "the sandbox has no program 'nosuch'")
    shell("exec", "a", "--", "sh").failed(4, "the sandbox has no program 'sh'")
    assert shell("exec", "--timeout=300ms", "a", "--", "python3", "-c", "import time; time.sleep(60)").code == 137
    shell("exec", "a", "--", "python3", "-c", "open('/proc/1/fd/1', 'w').write('from inside\\n')").ok()
    assert shell("logs", "a", "--tail=1").ok() == "from inside\n"
    kit.act("Suspend", "a")
    assert "from inside" in shell("logs", "a").ok(), "asleep or not"
    kit.act("Delete", "a")


def test_watch_shows_what_happens(kit: Kit, shell: Shell) -> None:
    watching = shell.start("watch", "actors", "-o", "json")
    assert watching.stdout and watching.stderr
    try:
        assert "watching" in watching.stderr.readline()
        kit.create("w")
        kit.act("Resume", "w")
        kit.act("Delete", "w")
        seen = []
        for line in watching.stdout:
            change = json.loads(line)
            seen.append(change["status"]["state"])
            if change.get("deleted"):
                break
    finally:
        watching.kill()
        watching.communicate()
    assert [s for s in dict.fromkeys(seen) if s in ("Suspended", "Resuming", "Running", "Deleting")] == [
        "Suspended",
        "Resuming",
        "Running",
        "Deleting",
    ]


def test_as_a_plugin_of_kubectl(kit: Kit, shell: Shell) -> None:
    # Without --server it goes to a cluster: tests/e2e/test_kubectl_greenroom.py.
    here = ("--server", kit.live.address)
    assert shell("get", "templates", "-o", "name", *here, program=KUBECTL_PLUGIN).ok() == "template/counter\n"
    shell("get", "nosuch", *here, program=KUBECTL_PLUGIN).failed(2, "there is no type 'nosuch'")
    shell("frobnicate", program=KUBECTL_PLUGIN).failed(
        2, "there is no command 'frobnicate'", "kubectl-greenroom --help"
    )


def test_sdk(kit: Kit, shell: Shell) -> None:
    with Actor.get_or_create("sdk", "counter", server=kit.live.address) as actor:
        assert actor.commands.run(["python3", "-c", "print(6 * 7)"]).stdout == "42\n"
        assert actor.commands.run(ECHO, stdin="hi").stdout == "hi"
        assert actor.commands.run(["python3", "-c", "raise SystemExit(3)"]).exit_code == 3
        with pytest.raises(FailedPrecondition, match="no program 'nosuch'"):
            actor.commands.run(["nosuch"])
        assert actor.info().state == "Running"
        assert actor.url() == shell("url", "sdk").ok().strip()
        assert ask(kit, actor.url())["ram"] == 1
    assert actor.info().state == "Suspended", "leaving the block suspends"
    assert ask(kit, actor.url())["ram"] == 2
    actor.kill()
    actor.close()
    assert kit.actors() == []


async def test_async_sdk(kit: Kit) -> None:
    async with await AsyncActor.create("counter", server=kit.live.address) as actor:
        assert (await actor.commands.run(ECHO, stdin="hi")).stdout == "hi"
        assert ask(kit, await actor.url())["ram"] == 1
    assert (await actor.info()).state == "Suspended"
    assert (await actor.commands.run(SHOW_COUNT)).stdout == "1"
    await actor.kill()
    await actor.close()
    assert kit.actors() == []


def ask(kit: Kit, url: str) -> dict[str, object]:
    """A request to an actor's URL, without asking anybody for the address of its host name."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rstrip("/").rpartition(":")
    assert (scheme, int(port)) == ("http", kit.live.gateway[1])
    request = urllib.request.Request(f"http://{kit.live.gateway[0]}:{port}/inc", headers={"Host": f"{host}:{port}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)  # type: ignore[no-any-return]
