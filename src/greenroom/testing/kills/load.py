"""What people do meanwhile, and what they were told: actors created, woken, suspended and deleted, some of that
cancelled, templates applied and deleted, a pool made smaller and larger."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.core.errors import GreenroomError, NotFound
from greenroom.core.records import (
    Actor,
    Durability,
    Operation,
    OperationState,
    Pool,
    PoolSpec,
    Template,
    TemplateSpec,
    TemplateState,
)
from greenroom.testing.live import LiveServer

#: Whoever waits longer for an answer than this, while parts are killed, learns nothing from it.
ANSWER_S = 30.0
#: Between two things that one actor's client does.
PAUSE_S = 0.15
#: Suspends of one template are answered early, those of the other when the snapshot store has them.
DURABILITIES = {"acked": Durability.ACKED_AFTER_UPLOAD, "local": Durability.LOCAL}
#: Of waking, suspending and deleting.
WEIGHTS = (5, 4, 1)
_POLL_S = 0.05


@dataclass(slots=True)
class Known:
    """What the clients were told of one actor. ``counted``: the highest count that was answered; ``disturbed``: in this
    round somebody asked for it to be suspended or deleted; ``deleted``: was it asked for, and (``gone``) answered;
    ``crashed``: and left so, for people to look at."""

    template: str
    counted: int = 0
    created: bool = False
    deleted: bool = False
    gone: bool = False
    disturbed: bool = False
    crashed: bool = False
    busy: bool = False


@dataclass(slots=True)
class Load:
    """One client of each actor, one of templates, one of the pool. `run` until ``stop`` is set; it has ended when every
    question has its answer."""

    server: LiveServer
    chance: random.Random
    spec: TemplateSpec
    actors: int
    most_workers: int
    known: dict[str, Known] = field(default_factory=dict)
    #: Applied, and not known to be deleted.
    templates: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: int = 0

    async def run(self, stop: asyncio.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with (
            AioClient(self.server.address) as client,
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self.actors):
                group.create_task(self._again(stop, PAUSE_S, lambda: self._one_actor(client, session)))
            group.create_task(self._again(stop, 4 * PAUSE_S, lambda: self._one_template(client, stop)))
            group.create_task(self._again(stop, 6 * PAUSE_S, lambda: self._resize(client)))
            group.create_task(self._again(stop, 2 * PAUSE_S, lambda: self._cancel(client)))

    async def _again(self, stop: asyncio.Event, pause_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while not stop.is_set():
            try:
                async with asyncio.timeout(self.chance.expovariate(1 / pause_s)):
                    await stop.wait()
            except TimeoutError:
                pass
            if not stop.is_set():
                await work()

    async def _asked(self, what: str, question: Awaitable[Any]) -> Any | None:
        """The answer; None for none, or a refusal."""
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await question
        except NotFound:
            self.counts[f"{what}: not found"] += 1
            raise
        except (GreenroomError, TimeoutError, aiohttp.ClientError, OSError) as error:
            self.counts[f"{what}: {getattr(error, 'reason', '') or type(error).__name__}"] += 1
            return None
        self.counts[what] += 1
        return answer

    # --- actors -------------------------------------------------------------------------------------------

    async def _one_actor(self, client: AioClient, session: aiohttp.ClientSession) -> None:
        free = [name for name, known in self.known.items() if not (known.busy or known.deleted or known.crashed)]
        if (len(free) < self.actors and self.chance.random() < 0.5) or not free:
            name = self._name("a")
            self.known[name] = Known(self.chance.choice(sorted(DURABILITIES)))
            work = self._create(client, name)
        else:
            name = self.chance.choice(free)
            kinds = [lambda: self._wake(session, name), lambda: self._suspend(client, name)]
            kinds.append(lambda: self._delete(client, name))
            work = self.chance.choices(kinds, WEIGHTS)[0]()
        known = self.known[name]
        known.busy = True
        try:
            await work
        except NotFound:
            pass  # its creation was never answered, and was none
        finally:
            known.busy = False

    async def _create(self, client: AioClient, name: str) -> None:
        request = pb.CreateActorRequest(namespace="default", name=name, template=self.known[name].template)
        self.known[name].created = await self._asked("created", client.actors.CreateActor(request)) is not None

    async def _wake(self, session: aiohttp.ClientSession, name: str) -> None:
        count = await self.ask(session, name, "/inc")
        if count is not None:
            self.known[name].counted = max(self.known[name].counted, count["file"])

    async def ask(self, session: aiohttp.ClientSession, name: str, path: str) -> dict[str, Any] | None:
        """What the actor says of itself; None without an answer."""

        async def get() -> bytes:
            host, port = self.server.gateway
            headers = {"Greenroom-Actor": f"default/{name}"}
            async with session.get(f"http://{host}:{port}{path}", headers=headers) as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise aiohttp.ClientError(f"http {answer.status} {answer.headers.get('Greenroom-Error', '')}")
                return body

        body = await self._asked(f"GET {path}", get())
        return None if body is None else msgspec.json.decode(body, type=dict[str, Any])

    async def _suspend(self, client: AioClient, name: str) -> None:
        self.known[name].disturbed = True
        request = pb.ActorRequest(namespace="default", name=name)
        message = await self._asked("suspended", client.actors.SuspendActor(request))
        if message is not None:
            operation = convert.from_message(Operation, message)
            if operation.state is OperationState.FAILED and operation.error is not None:
                self.counts[f"suspend failed: {operation.error.reason}"] += 1

    async def _cancel(self, client: AioClient) -> None:
        """Whatever is under way with one of the actors is backed out, if it can be."""
        busy = [name for name, known in self.known.items() if known.busy]
        if not busy:
            return
        name = self.chance.choice(busy)
        read = pb.GetActorRequest(namespace="default", name=name)
        try:
            message = await self._asked("actor read", client.actors.GetActor(read))
            if message is None or not message.operation:
                return
            self.known[name].disturbed = True  # what it does may have begun before this round
            request = pb.GetOperationRequest(id=message.operation)
            await self._asked("cancelled", client.operations.CancelOperation(request))
        except NotFound:
            pass  # it is not made yet, or just gone

    async def _delete(self, client: AioClient, name: str) -> None:
        known = self.known[name]
        known.deleted = known.disturbed = True
        request = pb.ActorRequest(namespace="default", name=name)
        message = await self._asked("deleted", client.actors.DeleteActor(request))
        known.gone = message is not None and convert.from_message(Operation, message).state is OperationState.DONE

    # --- templates and pools ------------------------------------------------------------------------------

    async def _one_template(self, client: AioClient, stop: asyncio.Event) -> None:
        """Made, sometimes waited for, and deleted; and those first whose deletion was not answered."""
        for name in [*self.templates]:
            await self._delete_template(client, name)
        name = self._name("t")
        self.templates.add(name)
        spec = convert.to_message(msgspec.structs.replace(self.spec, env={"NAME": name}))
        request = pb.ApplyTemplateRequest(namespace="default", name=name, spec=spec)
        if await self._asked("template applied", client.templates.ApplyTemplate(request)) is None:
            return
        if self.chance.random() < 0.5:
            await self._prepared(client, name, stop)
        await self._delete_template(client, name)

    async def _delete_template(self, client: AioClient, name: str) -> None:
        request = pb.DeleteTemplateRequest(namespace="default", name=name)
        try:
            if await self._asked("template deleted", client.templates.DeleteTemplate(request)) is None:
                return
        except NotFound:
            pass
        self.templates.discard(name)

    async def _prepared(self, client: AioClient, name: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            request = pb.GetTemplateRequest(namespace="default", name=name)
            message = await self._asked("template read", client.templates.GetTemplate(request))
            if message is None:
                return
            if convert.from_message(Template, message).state in (TemplateState.READY, TemplateState.FAILED):
                return
            await asyncio.sleep(_POLL_S)

    async def _resize(self, client: AioClient) -> None:
        message = await self._asked("pool read", client.pools.GetPool(pb.GetPoolRequest(name="default")))
        if message is None:
            return
        spec: PoolSpec = convert.from_message(Pool, message).spec
        spec = msgspec.structs.replace(spec, replicas=self.chance.randint(0, self.most_workers))
        request = pb.ApplyPoolRequest(name="default", spec=convert.to_message(spec))
        await self._asked(f"pool of {spec.replicas}", client.pools.ApplyPool(request))

    def _name(self, letter: str) -> str:
        self._numbers += 1
        return f"{letter}{self._numbers}"


async def actors_of(client: AioClient) -> dict[str, Actor]:
    """By name, without those that are hidden."""
    answer = await client.actors.ListActors(pb.ListActorsRequest(namespace="default", page_size=1000))
    return {a.name: a for a in (convert.from_message(Actor, message) for message in answer.actors)}


async def templates_of(client: AioClient) -> dict[str, Template]:
    answer = await client.templates.ListTemplates(pb.ListTemplatesRequest(namespace="default", page_size=1000))
    return {t.name: t for t in (convert.from_message(Template, message) for message in answer.templates)}
