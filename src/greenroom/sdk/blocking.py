"""`Actor`: the blocking client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import Client
from greenroom.api.execution import execute
from greenroom.cli.paths import default_server
from greenroom.core.errors import AlreadyExists, GreenroomError, NotFound
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.records import Actor as ActorRecord
from greenroom.core.records import Key
from greenroom.sdk import common
from greenroom.sdk.common import Command, CommandResult


class Actor:
    """One actor of a running server. Make it with `create`, `connect` or `get_or_create`.

    Leaving a ``with`` block suspends the actor: nothing it has in memory or on disk is lost, and it costs nothing
    until it is used again. It need not be resumed first: running a command or sending a request wakes it.

    >>> from greenroom import Actor
    >>> with Actor.create("counter") as actor:
    ...     result = actor.commands.run("echo hello from $((40 + 2))")
    >>> result.stdout
    'hello from 42\\n'
    >>> actor.info().state
    <ActorState.SUSPENDED: 'Suspended'>
    >>> actor.kill()

    ``server`` is an address as ``unix:/path`` or ``host:port``; by default ``$GREENROOM_SERVER`` or this machine's.
    Every method raises `greenroom.core.errors.GreenroomError`; `ResourceExhausted` and `Unavailable` say with
    ``retry_after_s`` when trying again may help.
    """

    def __init__(self, key: Key, client: Client) -> None:
        self._key = key
        self._client = client
        self._gone = False
        self.commands = Commands(key, client)

    @classmethod
    def create(
        cls,
        template: str,
        name: str | None = None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        server: str | None = None,
    ) -> Actor:
        """Makes a new actor, asleep; without ``name`` it gets a random one. ``worker_selector``: labels that its worker
        must have, beside those that the template asks for.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: there is no such template.
        """
        key = Key(namespace, name or common.random_name(template))
        with _closed_on_error(Client(server or default_server())) as client:
            client.actors.CreateActor(common.create_request(key, template, labels, worker_selector))
        return cls(key, client)

    @classmethod
    def connect(cls, name: str, *, namespace: str = DEFAULT_NAMESPACE, server: str | None = None) -> Actor:
        """An actor that exists; it is not woken.

        Raises:
            NotFound: it does not.
        """
        key = Key(namespace, name)
        with _closed_on_error(Client(server or default_server())) as client:
            client.actors.GetActor(common.get_request(key))
        return cls(key, client)

    @classmethod
    def get_or_create(
        cls,
        name: str,
        template: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        server: str | None = None,
    ) -> Actor:
        """The actor of that name, made from ``template`` if there is none yet. Any number of callers may race.

        >>> Actor.get_or_create("mine", "counter").name
        'mine'
        """
        try:
            return cls.connect(name, namespace=namespace, server=server)
        except NotFound:
            pass
        try:
            return cls.create(
                template, name, namespace=namespace, labels=labels, worker_selector=worker_selector, server=server
            )
        except AlreadyExists:
            return cls.connect(name, namespace=namespace, server=server)

    @property
    def name(self) -> str:
        return self._key.name

    @property
    def namespace(self) -> str:
        return self._key.namespace

    def info(self) -> ActorRecord:
        """State, worker, snapshot, labels and more, as of now."""
        return convert.from_message(ActorRecord, self._client.actors.GetActor(common.get_request(self._key)))

    def resume(self) -> None:
        """Wakes it; returns when it runs. From ``Crashed`` it goes back to its last snapshot."""
        common.check_done(self._client.actors.ResumeActor(common.actor_request(self._key)))

    def suspend(self) -> None:
        """Saves memory and files and frees its place on the worker; returns when the snapshot is safe."""
        common.check_done(self._client.actors.SuspendActor(common.actor_request(self._key)))

    def pause(self) -> None:
        """Freezes it where it is: quick to wake, but it keeps its memory and its place."""
        common.check_done(self._client.actors.PauseActor(common.actor_request(self._key)))

    def kill(self) -> None:
        """Deletes the actor and its snapshots, for good."""
        common.check_done(self._client.actors.DeleteActor(common.actor_request(self._key)))
        self._gone = True

    def logs(self, *, tail: int | None = None, follow: bool = False) -> Iterator[str]:
        """Lines of stdout and stderr, the last ``tail`` (all that are kept if None); with ``follow`` it goes on.

        >>> for line in Actor.connect("mine").logs(tail=2):
        ...     print(line, end="")
        two
        three
        """
        with self._client.actors.Logs(common.logs_request(self._key, tail, follow)) as stream:
            lines = common.Lines()
            for message in stream:
                yield from lines.feed(message.data)
            yield from lines.end()

    def url(self, port: int | None = None) -> str:
        """Where HTTP requests for the actor go; they wake it. ``port`` other than the template's first one.

        >>> Actor.connect("mine").url()
        'http://mine.default.actors.localhost:8880'
        """
        return common.actor_url(self._client.system.GetServerInfo(pb.GetServerInfoRequest()), self._key, port)

    def request_headers(self, port: int | None = None) -> dict[str, str]:
        """Headers that route a request to the actor when it is sent to the gateway's own address, for clients that
        can't resolve the host name of `url`.

        >>> Actor.connect("mine").request_headers(9000)
        {'Greenroom-Actor': 'default/mine', 'Greenroom-Port': '9000'}
        """
        return common.request_headers(self._key, port)

    def close(self) -> None:
        """Closes the connection and leaves the actor as it is."""
        self._client.close()

    def __enter__(self) -> Actor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Suspends the actor unless it was killed. An error of the block is not hidden by one of suspending."""
        try:
            if not self._gone:
                self.suspend()
        except GreenroomError as failure:
            if error is None:
                raise
            error.add_note(f"actor {self._key} could not be suspended: {failure}")

    def __repr__(self) -> str:
        return f"Actor({str(self._key)!r})"


@contextlib.contextmanager
def _closed_on_error(client: Client) -> Iterator[Client]:
    try:
        yield client
    except BaseException:
        client.close()
        raise


class Commands:
    """``actor.commands``: further processes inside the actor."""

    def __init__(self, key: Key, client: Client) -> None:
        self._key, self._client = key, client

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = False,
    ) -> CommandResult:
        """Runs a command to its end; wakes the actor if it sleeps. At most 64 MiB of output.

        Args:
            command: a line for ``/bin/sh``, or a list of program and arguments.
            stdin: its input; empty by default.
            timeout: seconds after which it is killed (``exit_code`` 137); None for never.
            env: added to the actor's environment.
            cwd: absolute path; by default the actor's working directory.
            check: raise if it does not exit with 0.

        Raises:
            CommandFailed: with ``check``; the error's ``result`` has the output.
            FailedPrecondition: there is no such program (reason ``COMMAND_NOT_FOUND``).

        >>> actor = Actor.connect("mine")
        >>> actor.commands.run(["cat"], stdin="hi").stdout
        'hi'
        >>> actor.commands.run("exit 3").exit_code
        3
        """
        running = Command.of(command)
        start = running.start(self._key, env, cwd, timeout)
        for frame in execute(self._client, start, [common.encode(stdin)]):
            code = running.take(frame)
            if code is not None:
                return running.result(code, check)
        raise AssertionError("exec ended without an exit code")
