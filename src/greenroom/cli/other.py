"""``version`` and ``completion``."""

from __future__ import annotations

import json
from importlib.metadata import version as installed

import click

from greenroom.cli.app import common, program_name, settings, with_output
from greenroom.cli.output import complain
from greenroom.core.errors import GreenroomError

#: `version` is also asked where no server runs: it does not wait for one.
SERVER_TIMEOUT_S = 2.0


@click.command()
@with_output("text", "json", default="text")
@click.option("--client", "client_only", is_flag=True, help="Only this program's.")
@common
def version(output: str, client_only: bool) -> None:
    """Shows the versions of this program and of the server that answers."""
    found = {"client": installed("greenroom")}
    if not client_only:
        from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb

        with settings().connect() as client:
            try:
                info = client.system.GetServerInfo(pb.GetServerInfoRequest(), timeout=SERVER_TIMEOUT_S)
                found["server"] = info.version
            except GreenroomError as error:
                if output == "text":
                    complain(f"server: {error.message}")
    if output == "json":
        click.echo(json.dumps(found))
    else:
        for name, value in found.items():
            click.echo(f"{name}: {value}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Prints a completion script.

    \b
    bash: source <(greenroom completion bash)
    zsh:  source <(greenroom completion zsh)
    fish: greenroom completion fish | source
    """
    from click.shell_completion import get_completion_class

    from greenroom.cli.main import cli

    name = program_name()
    found = get_completion_class(shell)
    assert found is not None
    complete = found(cli, {}, name, f"_{name.upper().replace('-', '_')}_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())
