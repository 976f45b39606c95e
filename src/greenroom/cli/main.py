"""``greenroom`` (also as ``kubectl greenroom``): the list of commands."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

import click

from greenroom.cli.app import LazyGroup, common, settings

_SERVER, _DECLARE, _ACT, _LOOK, _OPERATE, _OTHER = (
    "Run a server",
    "Describe what you want",
    "Use actors",
    "Look",
    "Operate",
    "Other",
)

COMMANDS = {
    "up": ("greenroom.cli.up:up", "Start a server with its workers on this machine.", _SERVER),
    "agent": ("greenroom.cli.agent:agent", "Run one worker (`up` starts these itself).", _SERVER),
    "assets": ("greenroom.cli.assets:assets", "", ""),
    "operator": ("greenroom.cli.operator:operator", "Keep worker pools and templates of a cluster.", _SERVER),
    "doctor": ("greenroom.cli.doctor:doctor", "Check what this machine can run, and what is missing.", _SERVER),
    "apply": ("greenroom.cli.apply:apply", "Create or change templates and pools from YAML.", _DECLARE),
    "create": ("greenroom.cli.act:create", "Make an actor from a template.", _DECLARE),
    "delete": ("greenroom.cli.act:delete", "Delete actors, templates or pools.", _DECLARE),
    "exec": ("greenroom.cli.inside:exec_", "Run a command in an actor.", _ACT),
    "logs": ("greenroom.cli.inside:logs", "Show what an actor has written.", _ACT),
    "url": ("greenroom.cli.inside:url", "Show where an actor answers HTTP requests.", _ACT),
    "resume": ("greenroom.cli.act:resume", "Wake actors.", _ACT),
    "suspend": ("greenroom.cli.act:suspend", "Save actors and free their place.", _ACT),
    "pause": ("greenroom.cli.act:pause", "Freeze actors where they are.", _ACT),
    "explain": ("greenroom.cli.explain:explain", "Tell what happened to an actor, and why it sleeps.", _LOOK),
    "get": ("greenroom.cli.look:get", "List things, or show one in a line.", _LOOK),
    "describe": ("greenroom.cli.describe:describe", "Show everything about one thing.", _LOOK),
    "wait": ("greenroom.cli.wait:wait", "Wait until a thing is in a state.", _LOOK),
    "watch": ("greenroom.cli.look:watch", "Show changes as they happen.", _LOOK),
    "top": ("greenroom.cli.inside:stats", "Show memory and CPU of running actors.", _LOOK),
    "stats": ("greenroom.cli.inside:stats", "", ""),
    "cancel": ("greenroom.cli.operate:cancel", "Give operations up.", _OPERATE),
    "drain": ("greenroom.cli.operate:drain", "Empty workers, before their machine is serviced.", _OPERATE),
    "retire": ("greenroom.cli.decommission:retire", "End workers for good: empty, wipe and forget them.", _OPERATE),
    "forget": ("greenroom.cli.decommission:forget", "Say that workers will not come back.", _OPERATE),
    "acknowledge": (
        "greenroom.cli.decommission:acknowledge",
        "Say that the database is right, after it was restored.",
        _OPERATE,
    ),
    "gc": ("greenroom.cli.gc:gc", "Collect garbage now, or tell what would go and why.", _OPERATE),
    "tag": ("greenroom.cli.operate:tag", "Keep a snapshot, under a name.", _OPERATE),
    "untag": ("greenroom.cli.operate:untag", "Keep it no longer.", _OPERATE),
    "images": ("greenroom.cli.images:images", "List, pull, import, pin and remove images on workers.", _OPERATE),
    "version": ("greenroom.cli.other:version", "Show the versions of client and server.", _OTHER),
    "completion": ("greenroom.cli.other:completion", "Print a completion script for your shell.", _OTHER),
}

EXAMPLES = """\b
Examples:
  greenroom up                                  start a server here
  greenroom apply -f counter.yaml               make a template
  greenroom create actor mine -t counter        make an actor, asleep
  curl $(greenroom url mine)                    it wakes, answers, and sleeps again
  greenroom explain mine                        where it is and why, and what happened to it
"""


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@common
def cli() -> None:
    """Very many stateful, sandboxed, mostly idle actors on a few warm workers."""
    settings()


def main() -> None:
    # gRPC writes lines of its own to stderr when a process that uses it starts another one; nothing here forks without
    # exec, so its fork handlers are not needed.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        cli.main()
    except SystemExit as end:
        _leave(end.code)


def _leave(code: int | str | None) -> NoReturn:
    """As `sys.exit`, at once. A thread of gRPC that the interpreter stops while it ends may hold what the end of its
    channel waits for: one command of some thousand had said all, and did not end (grpc issue 20026 is of that kind)."""
    if isinstance(code, str):
        click.echo(code, err=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it is closed
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
