"""`AsyncActor`: the client for asyncio; `greenroom.sdk.blocking` with ``await``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.api.execution import execute_aio
from greenroom.cli.paths import default_server
from greenroom.core.errors import AlreadyExists, GreenroomError, NotFound
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.records import Actor as ActorRecord
from greenroom.core.records import Key
from greenroom.sdk import common
from greenroom.sdk.common import Command, CommandResult


class AsyncActor:
    """One actor of a running server; see `greenroom.Actor`, of which this is the asyncio form.

    Belongs to the event loop that it was made in. A call that is cancelled stops waiting; what it started goes on.

    >>> import asyncio
    >>> from greenroom import AsyncActor
    >>> async def main():
    ...     async with await AsyncActor.create("counter") as actor:
    ...         result = await actor.commands.run("echo hello")
    ...     await actor.kill()
    ...     await actor.close()
    ...     return result.stdout
    >>> asyncio.run(main())
    'hello\\n'
    """

    def __init__(self, key: Key, client: AioClient) -> None:
        self._key = key
        self._client = client
        self._gone = False
        self.commands = AsyncCommands(key, client)

    @classmethod
    async def create(
        cls,
        template: str,
        name: str | None = None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        server: str | None = None,
    ) -> AsyncActor:
        """As `greenroom.Actor.create`."""
        key = Key(namespace, name or common.random_name(template))
        async with _closed_on_error(AioClient(server or default_server())) as client:
            await client.actors.CreateActor(common.create_request(key, template, labels, worker_selector))
        return cls(key, client)

    @classmethod
    async def connect(cls, name: str, *, namespace: str = DEFAULT_NAMESPACE, server: str | None = None) -> AsyncActor:
        """As `greenroom.Actor.connect`."""
        key = Key(namespace, name)
        async with _closed_on_error(AioClient(server or default_server())) as client:
            await client.actors.GetActor(common.get_request(key))
        return cls(key, client)

    @classmethod
    async def get_or_create(
        cls,
        name: str,
        template: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        server: str | None = None,
    ) -> AsyncActor:
        """As `greenroom.Actor.get_or_create`."""
        with contextlib.suppress(NotFound):
            return await cls.connect(name, namespace=namespace, server=server)
        try:
            return await cls.create(
                template, name, namespace=namespace, labels=labels, worker_selector=worker_selector, server=server
            )
        except AlreadyExists:
            return await cls.connect(name, namespace=namespace, server=server)

    @property
    def name(self) -> str:
        return self._key.name

    @property
    def namespace(self) -> str:
        return self._key.namespace

    async def info(self) -> ActorRecord:
        """State, worker, snapshot, labels and more, as of now."""
        return convert.from_message(ActorRecord, await self._client.actors.GetActor(common.get_request(self._key)))

    async def resume(self) -> None:
        """Wakes it; returns when it runs."""
        common.check_done(await self._client.actors.ResumeActor(common.actor_request(self._key)))

    async def suspend(self) -> None:
        """Saves memory and files and frees its place on the worker."""
        common.check_done(await self._client.actors.SuspendActor(common.actor_request(self._key)))

    async def pause(self) -> None:
        """Freezes it where it is."""
        common.check_done(await self._client.actors.PauseActor(common.actor_request(self._key)))

    async def kill(self) -> None:
        """Deletes the actor and its snapshots, for good."""
        common.check_done(await self._client.actors.DeleteActor(common.actor_request(self._key)))
        self._gone = True

    async def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[str]:
        """Lines of stdout and stderr; as `greenroom.Actor.logs`."""
        async with self._client.actors.Logs(common.logs_request(self._key, tail, follow)) as stream:
            lines = common.Lines()
            async for message in stream:
                for line in lines.feed(message.data):
                    yield line
            for line in lines.end():
                yield line

    async def url(self, port: int | None = None) -> str:
        """Where HTTP requests for the actor go; they wake it."""
        return common.actor_url(await self._client.system.GetServerInfo(pb.GetServerInfoRequest()), self._key, port)

    def request_headers(self, port: int | None = None) -> dict[str, str]:
        """As `greenroom.Actor.request_headers`."""
        return common.request_headers(self._key, port)

    async def close(self) -> None:
        """Closes the connection and leaves the actor as it is."""
        await self._client.close()

    async def __aenter__(self) -> AsyncActor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Suspends the actor unless it was killed. An error of the block is not hidden by one of suspending."""
        try:
            if not self._gone:
                await self.suspend()
        except GreenroomError as failure:
            if error is None:
                raise
            error.add_note(f"actor {self._key} could not be suspended: {failure}")

    def __repr__(self) -> str:
        return f"AsyncActor({str(self._key)!r})"


@contextlib.asynccontextmanager
async def _closed_on_error(client: AioClient) -> AsyncIterator[AioClient]:
    try:
        yield client
    except BaseException:
        await client.close()
        raise


class AsyncCommands:
    """``actor.commands``: further processes inside the actor."""

    def __init__(self, key: Key, client: AioClient) -> None:
        self._key, self._client = key, client

    async def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = False,
    ) -> CommandResult:
        """As `greenroom.Actor`'s ``commands.run``. Cancelling it kills the command."""
        running = Command.of(command)

        async def given() -> AsyncIterator[bytes]:
            yield common.encode(stdin)

        frames = execute_aio(self._client, running.start(self._key, env, cwd, timeout), given())
        async with contextlib.aclosing(frames):
            async for frame in frames:
                code = running.take(frame)
                if code is not None:
                    return running.result(code, check)
        raise AssertionError("exec ended without an exit code")
