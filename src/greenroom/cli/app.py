"""What all commands share: options, the connection, how errors and exit codes reach the shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from greenroom.cli.output import complain
from greenroom.cli.paths import default_server
from greenroom.core.errors import GreenroomError, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from greenroom.api.client import AioClient, Client
    from greenroom.operator.kubeconfig import Connection

F = TypeVar("F", bound=Callable[..., Any])

#: How long a call that only reads may take, unless --request-timeout says otherwise.
READ_TIMEOUT_S = 30.0
#: What kubectl looks for on PATH when it is asked for ``kubectl greenroom``.
PLUGIN = "kubectl-greenroom"
#: Of a text that can't be written.
_SHOWN = 100
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Settings:
    """The options that every command takes, before or after its name."""

    def __init__(self) -> None:
        self.server = ""
        self.request_timeout_s: float | None = None
        self.context = ""
        self.kubeconfig = ""
        self.system_namespace = ""
        self.client: Client | None = None
        self._namespace = ""
        self._connection: Connection | None = None

    @property
    def namespace(self) -> str:
        """As given, else in a cluster that of the context, as with kubectl."""
        return self._namespace or (self.connection.namespace if self.in_cluster else "default")

    @namespace.setter
    def namespace(self, name: str) -> None:
        self._namespace = name

    @property
    def connection(self) -> Connection:
        """To the cluster's API server."""
        if self._connection is None:
            from greenroom.operator import kubeconfig

            self._connection = kubeconfig.load(self.context, self.kubeconfig)
        return self._connection

    def connect(self) -> Client:
        if self.in_cluster:
            from greenroom.cli.cluster import SYSTEM_NAMESPACE, ClusterClient, Place

            namespace = self.system_namespace or os.environ.get("GREENROOM_SYSTEM_NAMESPACE") or SYSTEM_NAMESPACE
            self.client = ClusterClient(Place(self.connection, self.context, self.kubeconfig, namespace))
        else:
            from greenroom.api.client import Client

            self.client = Client(self.server or default_server())
        return self.client

    @property
    def in_cluster(self) -> bool:
        """Whether the server is that of a cluster, by a kubeconfig: when one is named, and for kubectl's plugin, unless
        there is a word of another server."""
        named = bool(self.context or self.kubeconfig or self.system_namespace)
        if named and self.server:
            raise click.UsageError("--server and the options of a cluster contradict each other: leave one of them out")
        plugin = program_name() == PLUGIN
        return named or (plugin and not self.server and not os.environ.get("GREENROOM_SERVER"))

    def explain(self, error: GreenroomError) -> GreenroomError:
        """What a failed call comes from, when that is the way to the server."""
        trouble = getattr(self.client, "trouble", None)
        return trouble if isinstance(error, Unavailable) and trouble is not None else error

    def connect_async(self) -> AioClient:
        from greenroom.api.client import AioClient

        return AioClient(self.server or default_server())

    @property
    def read_timeout_s(self) -> float:
        return self.request_timeout_s or READ_TIMEOUT_S


def settings() -> Settings:
    return click.get_current_context().find_root().ensure_object(Settings)


def duration(value: str | float) -> float:
    """The type of options like ``--timeout``: ``90``, ``30s`` or ``5m``, in seconds."""
    from greenroom.api.validate import MAX_DURATION_S
    from greenroom.core.quantity import format_duration, parse_duration

    if isinstance(value, (int, float)):
        return float(value)
    try:
        found = float(value) if value.replace(".", "", 1).isdecimal() else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if found > MAX_DURATION_S:
        raise click.BadParameter(f"{value} is too long: at most {format_duration(MAX_DURATION_S)}, or leave it out")
    return found


def pair(value: str | tuple[str, str]) -> tuple[str, str]:
    """The type of options like ``--label``: ``key=value``."""
    if isinstance(value, tuple):
        return value
    key, equals, text = value.partition("=")
    if not key or not equals:
        raise click.BadParameter(f"{value!r} is not key=value")
    return key, text


def common(command: F) -> F:
    """Adds the options that all commands have."""
    for option in (
        click.option("--request-timeout", type=duration, metavar="DURATION", help="Limit of one call to the server."),
        click.option("--server", metavar="ADDRESS", help="unix:/path or host:port [env: GREENROOM_SERVER]."),
        click.option("-n", "--namespace", metavar="NAME", help="Namespace [default: default]."),
        click.option("--context", metavar="NAME", help="Use the cluster of this context of your kubeconfig."),
        click.option("--kubeconfig", metavar="FILE", help="Use a cluster of this kubeconfig."),
        click.option("--system-namespace", metavar="NAME", help="Where that has Greenroom [default: greenroom]."),
    ):
        command = _stored(option)(command)
    return command


def _stored(option: Callable[[F], F]) -> Callable[[F], F]:
    def apply(command: F) -> F:
        command = option(command)
        parameters: list[click.Parameter] = getattr(command, "__click_params__", None) or command.params  # type: ignore[attr-defined]
        parameters[-1].expose_value = False
        parameters[-1].callback = _store
        return command

    return apply


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        name = "request_timeout_s" if param.name == "request_timeout" else str(param.name)
        setattr(ctx.find_root().ensure_object(Settings), name, value)


def with_output(*choices: str, default: str = "table") -> Callable[[F], F]:
    return click.option(
        "-o", "--output", type=click.Choice(choices), default=default, show_default=True, help="Output format."
    )


# --- the root command -------------------------------------------------------------------------------------------


class LazyGroup(click.Group):
    """Knows its commands by name and one line of help, and imports a command's module when it runs.

    ``lazy``: name -> (``module:attribute``, help, section).
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, (_, line, section) in self._lazy.items():
            if section:
                sections.setdefault(section, []).append((name, line))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows, col_max=14)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self._lazy:
            import difflib

            near = difflib.get_close_matches(args[0], self._lazy, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"see `{ctx.command_path} --help`"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]  # it never returns, in either mode
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Runs and exits; errors become one or two lines on stderr and an exit code."""
        extra["standalone_mode"] = False
        shared = extra["obj"] = Settings()
        try:
            result = super().main(args, prog_name or program_name(), **extra)
            sys.stdout.flush()
            code = result if isinstance(result, int) else 0
        except click.exceptions.Exit as exit_:
            code = exit_.exit_code
        except click.ClickException as error:
            complain(f"error: {error.format_message()}")
            if isinstance(error, click.UsageError) and error.ctx is not None:
                click.echo(f"try: {error.ctx.command_path} --help", err=True)
            code = error.exit_code
        except GreenroomError as error:
            error = shared.explain(error)
            complain(f"error: {error.message}")
            code = error.exit_code
        except (
            UnicodeEncodeError
        ) as error:  # bytes of the command line that are no text, or a terminal that is not UTF-8
            click.echo(f"error: {error.object[:_SHOWN]!r} can't be written as {error.encoding}; use UTF-8", err=True)
            code = InvalidArgument.exit_code
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            code = INTERRUPTED
        except BrokenPipeError:  # the reader has enough, as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        sys.exit(code)


def program_name() -> str:
    """``greenroom``, or ``kubectl-greenroom`` when it is called as the plugin of kubectl."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119
    return name if name == PLUGIN else "greenroom"
