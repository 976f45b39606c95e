"""One replica of the control plane: the real engine in a process that can die, stand still, and be started again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from greenroom.core.errors import GreenroomError, Unavailable
from greenroom.core.records import Key
from greenroom.engine.config import EngineConfig
from greenroom.engine.engine import Engine
from greenroom.testing.simulation.database import Database, SimStore
from greenroom.testing.simulation.links import SimHub
from greenroom.testing.simulation.machine import Sandbox
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.oracle import Answer, Oracle
from greenroom.testing.simulation.snapshots import Bucket, SimSnapshots
from greenroom.testing.simulation.trace import Trace

T = TypeVar("T")

#: How long a gateway waits for an actor's answer.
ANSWER_S = 5.0


class _Closer:
    """What a gateway has open through a binding; closed when that is revoked."""

    def __init__(self, number: int, answer: asyncio.Future[Answer]) -> None:
        self._number = number
        self._answer = answer

    def __call__(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(Unavailable("the connection was closed: the actor is being moved"))

    def __hash__(self) -> int:
        return self._number


class Replica:
    """One process of the replica ``name``; a restart makes another one of the same name."""

    def __init__(
        self,
        name: str,
        network: Network,
        database: Database,
        bucket: Bucket,
        config: EngineConfig,
        skew_s: float,
        sandboxes: Mapping[str, Sandbox],
        oracle: Oracle,
        trace: Trace,
    ) -> None:
        self.name = name
        self.network = network
        self.loop = network.loop
        self.process = self.loop.process(name)
        self.store = SimStore(database, self.process, skew_s)
        self.hub = SimHub(network, self.process, trace)
        self.trace = trace
        self.sandboxes = sandboxes
        self.oracle = oracle
        #: Whether it takes requests, and whether its process has ended.
        self.alive, self.dead = True, False
        self.started = False
        self.requests = 0
        #: Who waits for this process: told when it dies.
        self._waiting: list[asyncio.Future[Any]] = []
        self.engine = self.process.context.copy().run(
            lambda: Engine(self.store, self.hub, SimSnapshots(bucket), config)
        )

    async def start(self) -> None:
        await self.engine.start()
        self.started = True

    async def stop(self) -> None:
        self.alive = False  # nobody gets to it any more
        await self.engine.close()

    def left_behind(self) -> list[str]:
        """What runs in a process whose engine has been closed, beside what people wait for."""
        return sorted(
            t.get_name()
            for t in asyncio.all_tasks(self.loop)
            if self.loop.process_of(t) is self.process and not t.get_name().startswith(("ask-", "start-", "stop-"))
        )

    def die(self) -> None:
        """From this instant nothing of it runs. What it has sent arrives all the same."""
        self.alive, self.dead = False, True
        self.trace(self.name, "dies")
        self.loop.kill(self.process)
        self.hub.shut()
        self.store.feed.close()
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_exception(Unavailable("the replica died"))
                future.exception()

    # --- what people and gateways do ----------------------------------------------------------------------

    async def ask(self, what: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a client has a replica do. A client that goes away stops nothing.

        Raises:
            Unavailable: the replica is not there, or died before it had answered.
        """
        if not self.alive:
            raise Unavailable("the replica does not run")
        answer: asyncio.Future[T] = self.loop.create_future()
        self._waiting.append(answer)
        client = self.loop.current()

        async def serve() -> None:
            result: T
            try:
                result = await work()
            except GreenroomError as error:
                self.loop.call_later(self.network.latency(), _settle, answer, None, error, context=client.context)
            else:
                self.loop.call_later(self.network.latency(), _settle, answer, result, None, context=client.context)

        def arrive() -> None:
            if self.alive:
                self.loop.start(self.process, serve(), f"ask-{what}")

        self.loop.call_later(self.network.latency(), arrive, context=self.loop.main.context)
        try:
            return await answer
        finally:
            if answer in self._waiting:
                self._waiting.remove(answer)

    async def request(self, key: Key) -> Answer:
        """One request through the engine's table, as the gateway makes it; wakes the actor. To be called in the process
        of the replica."""
        binding = (await self.engine.wake(key)).binding
        self.requests += 1
        answer: asyncio.Future[Answer] = self.loop.create_future()
        closer = _Closer(self.requests, answer)
        binding.acquire()
        binding.on_revoke(closer)
        try:
            sandbox = self.sandboxes.get(binding.endpoint.path)
            if sandbox is None:
                raise Unavailable(f"no connection to actor {key}")
            context = sandbox.machine.process.context
            self.loop.call_later(self.network.latency(), self._arrive, sandbox, answer, context=context)
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            raise Unavailable(f"actor {key} does not answer") from None
        finally:
            binding.forget(closer)
            binding.release()

    def _arrive(self, sandbox: Sandbox, answer: asyncio.Future[Answer]) -> None:
        """At the sandbox."""
        if not self.network.reaches(self.name, sandbox.machine.process.name):
            return

        def answered(count: int) -> None:
            said = self.oracle.counted(sandbox, count)
            self.trace(sandbox.machine.name, sandbox.identity.name, "counts", count)
            if self.network.reaches(self.name, sandbox.machine.process.name):
                self.loop.call_later(self.network.latency(), _settle, answer, said, None, context=self.process.context)

        sandbox.request(answered)


def _settle(answer: asyncio.Future[Any], result: Any, error: GreenroomError | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
        answer.exception()
    else:
        answer.set_result(result)
