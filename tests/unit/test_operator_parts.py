"""Queue, reflector and election by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import pytest

from greenroom.core.errors import AlreadyExists, Conflict, GreenroomError, LeaseLost, NotFound, Unavailable
from greenroom.core.ledger import naming
from greenroom.core.ledger.notes import Notes
from greenroom.core.ledger.records import Effect, Ledger, Release, Repair, Slot, SlotState
from greenroom.core.records import Key as TemplateKey
from greenroom.core.records import Template, TemplateSpec, TemplateState
from greenroom.operator import client
from greenroom.operator.actuator import Actuator
from greenroom.operator.client import Kube
from greenroom.operator.election import LEASE_S, MARGIN_S, Election
from greenroom.operator.objects import FINALIZER, Meta, PodObject
from greenroom.operator.plane import Change
from greenroom.operator.queue import WorkQueue
from greenroom.operator.reflector import Reflector
from greenroom.operator.specs import WorkerPoolSpec
from greenroom.operator.templates import Templates
from greenroom.operator.transport import EXPIRED, refusal
from greenroom.testing.fake_kube.api import Api
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Object, Objects
from greenroom.testing.pool_world.transport import SimTransport
from greenroom.testing.simloop import SimLoop

PODS = "/api/v1/namespaces/default/pods"


def in_virtual_time(work: Callable[[SimLoop], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        loop = SimLoop(1)
        try:
            loop.run_until_complete(work(loop))
        finally:
            loop.close()

    test.__name__ = work.__name__
    return test


# --- queue ------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_thing_is_there_once_and_with_one_at_a_time(loop: SimLoop) -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert await queue.get() == "a"
    queue.add("a")  # while somebody looks at it: afterwards
    assert await queue.get() == "b" and len(queue) == 1
    waiting = asyncio.ensure_future(queue.get())
    await asyncio.sleep(1)
    assert not waiting.done()
    queue.done("b")
    queue.done("a")
    assert await waiting == "a"
    queue.done("a")
    assert queue.idle


@in_virtual_time
async def test_later_is_the_earliest_of_several(loop: SimLoop) -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 10)
    queue.add_after("a", 5)
    queue.add_after("a", 20)
    assert await queue.get() == "a" and loop.time() == 5
    queue.done("a")
    queue.add_after("a", 10)
    queue.add("a")
    assert await queue.get() == "a" and loop.time() == 5
    queue.done("a")
    await asyncio.sleep(20)
    assert queue.idle


# --- reflector --------------------------------------------------------------------------------------------


class Place:
    """A server, and a reflector of its pods."""

    def __init__(self, loop: SimLoop) -> None:
        self.objects = Objects(clock=loop.time)
        self.api = Api(self.objects)
        self.changes: list[tuple[str, str]] = []
        self.kube = Kube(SimTransport(self.api.handle, "test", random.Random(1), loop.create_task, loop.time))
        self.reflector: Reflector[PodObject] = Reflector(
            self.kube, PODS, PodObject, self._changed, query={"labelSelector": "a=b"}, chance=random.Random(1)
        )
        resource = self.objects.registry.get("", "v1", "pods")
        assert resource is not None
        self.pods = resource

    def _changed(self, old: PodObject | None, new: PodObject | None) -> None:
        kind = "new" if old is None else "gone" if new is None else "changed"
        changed = new or old
        assert changed is not None
        self.changes.append((kind, changed.metadata.name))

    def make(self, name: str) -> Object:
        pod = {"metadata": {"name": name, "labels": {"a": "b"}}, "spec": {"containers": []}}
        return self.objects.create(self.pods, "default", pod)

    def names(self) -> list[str]:
        return sorted(name for _, name in self.reflector.found)


def reflecting(work: Callable[[Place], Awaitable[None]]) -> Callable[[], None]:
    async def run(loop: SimLoop) -> None:
        place = Place(loop)
        task = asyncio.ensure_future(place.reflector.run())
        await work(place)
        task.cancel()

    run.__name__ = work.__name__  # type: ignore[attr-defined]
    return in_virtual_time(run)


@reflecting
async def test_lists_and_then_follows(place: Place) -> None:
    place.make("x")
    await place.reflector.synced.wait()
    place.make("y")
    await asyncio.sleep(1)
    place.objects.delete(place.pods, "default", "x")
    await asyncio.sleep(1)
    assert place.names() == ["y"] and place.reflector.lists == 1
    assert place.changes == [("new", "x"), ("new", "y"), ("gone", "x")]


@reflecting
async def test_what_is_selected_no_more_is_gone(place: Place) -> None:
    made = place.make("x")
    await place.reflector.synced.wait()
    await asyncio.sleep(1)
    place.objects.update(place.pods, "default", "x", {**made, "metadata": {**made["metadata"], "labels": {}}})
    await asyncio.sleep(1)
    assert place.names() == []


@in_virtual_time
async def test_a_long_list_is_read_in_pieces_and_anew_when_its_version_is_kept_no_more(loop: SimLoop) -> None:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(client, "PAGE", 3)
        place = Place(loop)
        for number in range(10):
            place.make(f"x{number}")
        listed = await place.kube.list(PODS, PodObject, {})
        assert [pod.metadata.name for pod in listed.items] == [f"x{n}" for n in range(10)]
        call, calls = place.kube.transport.call, 0

        async def changes(method: str, path: str, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # nobody keeps the version of the first piece any longer
                place.api._pages.clear()
                place.make("y")
            return await call(method, path, **more)

        place.kube.transport.call = changes  # type: ignore[method-assign]
        task = asyncio.ensure_future(place.reflector.run())
        await place.reflector.synced.wait()
        assert place.names() == [*(f"x{n}" for n in range(10)), "y"] and place.reflector.lists == 1
        task.cancel()


@reflecting
async def test_a_watch_that_is_ended_at_once_is_begun_again_more_and_more_slowly(place: Place) -> None:
    """As by a proxy that has nobody behind it."""
    watches = 0
    lines = place.kube.transport.lines

    @contextlib.asynccontextmanager
    async def none(path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterable[bytes]]:
        async def nothing() -> AsyncIterator[bytes]:
            return
            yield

        nonlocal watches
        watches += 1
        await asyncio.sleep(0.002)
        yield nothing()

    place.make("x")
    place.kube.transport.lines = none  # type: ignore[method-assign]
    await place.reflector.synced.wait()
    await asyncio.sleep(60)
    assert 2 <= watches < 10
    place.kube.transport.lines = lines  # type: ignore[method-assign]
    place.make("y")
    await asyncio.sleep(60)
    assert place.names() == ["x", "y"] and place.reflector.lists == 1


@reflecting
async def test_history_that_is_not_kept_is_listed_again_and_only_differences_are_told(place: Place) -> None:
    place.make("x")
    place.make("y")
    await place.reflector.synced.wait()
    await asyncio.sleep(1)
    place.api.view.live = False
    place.make("z")
    place.objects.delete(place.pods, "default", "y")
    place.api.view.advance()
    place.api.view.drop_watches(KubeError(410, "Expired", "too old"))
    place.changes.clear()
    await asyncio.sleep(5)
    assert place.names() == ["x", "z"] and place.reflector.lists == 2
    assert ("new", "z") in place.changes and ("gone", "y") in place.changes and ("new", "x") not in place.changes


@reflecting
async def test_a_watch_that_ends_goes_on_where_it_was(place: Place) -> None:
    await place.reflector.synced.wait()
    for name in ("x", "y", "z"):
        place.api.view.drop_watches()
        place.make(name)
        await asyncio.sleep(40)
    assert place.names() == ["x", "y", "z"] and place.reflector.lists == 1
    assert [kind for kind, _ in place.changes] == ["new"] * 3


@reflecting
async def test_bookmarks_keep_it_fresh(place: Place) -> None:
    await place.reflector.synced.wait()
    await asyncio.sleep(200)
    assert asyncio.get_running_loop().time() - place.reflector.heard_at < 61


@reflecting
async def test_a_list_that_is_older_than_what_was_seen_is_not_believed(place: Place) -> None:
    place.make("x")
    await place.reflector.synced.wait()
    await asyncio.sleep(1)
    place.reflector._version, place.reflector._highest = "", 10**6
    place.api.view.drop_watches()
    lists = place.reflector.lists
    await asyncio.sleep(60)
    assert place.names() == ["x"] and place.reflector.lists > lists + 2
    place.reflector._highest = 0
    await asyncio.sleep(60)
    place.make("y")
    await asyncio.sleep(1)
    assert place.names() == ["x", "y"]


# --- election ---------------------------------------------------------------------------------------------


def electing(place: Place, name: str) -> Election:
    return Election(place.kube, "default", "lease", name, random.Random(name))


@in_virtual_time
async def test_one_leads_and_the_next_when_its_lease_is_over(loop: SimLoop) -> None:
    place = Place(loop)
    one, two = electing(place, "one"), electing(place, "two")
    first = asyncio.ensure_future(one.run())
    await one.wait()
    second = asyncio.ensure_future(two.run())
    await asyncio.sleep(60)
    assert one.holds and not two.holds and one.term == 1
    first.cancel()
    at = loop.time()
    await two.wait()
    assert not one.holds and two.holds and two.term == 2
    assert LEASE_S - 5 < loop.time() - at < LEASE_S + 10
    with pytest.raises(LeaseLost, match="stops acting"):
        one.check()
    second.cancel()


@in_virtual_time
async def test_who_can_not_renew_stops_before_another_can_begin(loop: SimLoop) -> None:
    place = Place(loop)
    one, two = electing(place, "one"), electing(place, "two")
    cut = False
    whole = place.kube.transport

    class Cut:
        async def call(self, *args: Any, **kwargs: Any) -> Any:
            if cut:
                raise Unavailable("cut off")
            return await whole.call(*args, **kwargs)

    one.kube = Kube(Cut())  # type: ignore[arg-type]
    first = asyncio.ensure_future(one.run())
    await one.wait()
    second = asyncio.ensure_future(two.run())
    await asyncio.sleep(20)
    cut = True
    held_until = loop.time()
    while not two.holds:
        if one.holds:
            held_until = loop.time()
        await asyncio.sleep(0.05)
    assert loop.time() - held_until >= MARGIN_S - 0.1
    await asyncio.wait_for(first, 30)  # its term is over: whoever runs it begins another
    second.cancel()


@in_virtual_time
async def test_a_lease_that_is_given_back_is_taken_at_once(loop: SimLoop) -> None:
    place = Place(loop)
    one, two = electing(place, "one"), electing(place, "two")
    first = asyncio.ensure_future(one.run())
    await one.wait()
    second = asyncio.ensure_future(two.run())
    await asyncio.sleep(10)
    first.cancel()
    await one.resign()
    at = loop.time()
    await two.wait()
    assert loop.time() - at < 5
    second.cancel()


@in_virtual_time
async def test_a_lease_is_also_given_back_when_a_renewal_is_on_its_way(loop: SimLoop) -> None:
    place = Place(loop)
    one = electing(place, "one")
    first = asyncio.ensure_future(one.run())
    await one.wait()
    first.cancel()
    whole, renewals = place.kube.transport, 1

    class Late:
        async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal renewals
            if method == "PUT" and renewals:
                renewals -= 1
                lease = await place.kube.get_raw(one._path)
                assert lease is not None
                later = {**lease["spec"], "renewTime": "2000-01-01T00:00:00.000000Z"}
                await place.kube.send_raw("PUT", one._path, {**lease, "spec": later})
            return await whole.call(method, *args, **kwargs)

    one.kube = Kube(Late())  # type: ignore[arg-type]
    await one.resign()
    lease = await place.kube.get_raw(one._path)
    assert lease is not None and lease["spec"]["holderIdentity"] == ""


# --- templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["told", "told of the others"])
def test_an_answer_that_is_late_does_not_bring_a_template_back(ends: str) -> None:
    async def work(loop: SimLoop) -> None:
        key, spec = ("default", "t"), TemplateSpec(image="none")
        template = Template(
            namespace="default", name="t", uid="u", spec=spec, state=TemplateState.READY, created_at=0, state_since=0
        )
        changes: asyncio.Queue[Change] = asyncio.Queue()
        may_answer, asked = asyncio.Event(), 0

        class Plane:
            async def apply_template(self, key: TemplateKey, spec: TemplateSpec) -> Template:
                nonlocal asked
                asked += 1
                await may_answer.wait()
                return template

            async def templates(self) -> AsyncIterator[Change]:
                while True:
                    yield await changes.get()

        kube = Place(loop).kube
        followed = Templates(kube, Plane(), lambda: None, "default", loop.time, random.Random(1))  # type: ignore[arg-type]
        following = asyncio.ensure_future(followed._follow())
        changes.put_nowait(Change())
        await asyncio.sleep(1)
        first = asyncio.ensure_future(followed._apply(key, spec))
        await asyncio.sleep(1)
        if ends == "told":
            for told in (template, None):
                changes.put_nowait(Change(key=template.key, template=told))
        else:
            changes.put_nowait(Change())
        await asyncio.sleep(1)
        may_answer.set()
        assert await first == template
        await followed._apply(key, spec)
        assert asked == 2, "it is made again"
        await followed._apply(key, spec)
        assert asked == 2, "and is known then"
        following.cancel()

    in_virtual_time(work)()


# --- actuator ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_pod_that_is_put_right_keeps_its_name_occupied_also_while_it_is_deleted(loop: SimLoop) -> None:
    place = Place(loop)
    name = naming.pod_name("pool", "uid", 1, 0)
    made = {"metadata": {"name": name, "finalizers": [FINALIZER, "other/one"]}, "spec": {"containers": []}}
    uid = place.objects.create(place.pods, "default", made)["metadata"]["uid"]
    place.objects.delete(place.pods, "default", name)
    slot = Slot(epoch=1, ordinal=0, term=1, state=SlotState.LIVE, pod_uid=uid)
    ledger = Ledger(pool_uid="uid", term=1, next_ordinal=1, slots=(slot,))
    actuator = Actuator(place.kube, lambda: None, loop.time)
    meta = Meta(name="pool", namespace="default", uid="uid")

    async def act(effect: Effect) -> Object | None:
        await actuator.act(meta, WorkerPoolSpec(), ledger, Notes(term=1), [effect])
        return place.objects.find(place.pods, "default", name)

    pod = await act(Repair(slot_id="1-0", name=name, uid=uid))
    assert pod is not None and pod["metadata"]["finalizers"] == [FINALIZER, "other/one"]
    assert pod["metadata"]["labels"]["greenroom.dev/pool-uid"] == "uid"
    pod = await act(Release(slot_id="1-0", name=name, uid="another"))
    assert pod is not None and pod["metadata"]["finalizers"] == [FINALIZER, "other/one"]
    pod = await act(Release(slot_id="1-0", name=name, uid=uid))
    assert pod is not None and pod["metadata"]["finalizers"] == ["other/one"]


# --- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, b"{}", NotFound),
        (409, b'{"reason": "AlreadyExists"}', AlreadyExists),
        (409, b'{"reason": "Conflict"}', Conflict),
        (500, b"", Unavailable),
        (504, b"[", Unavailable),
        (302, b"", Unavailable),
    ],
)
def test_what_an_answer_means(status: int, body: bytes, kind: type[GreenroomError]) -> None:
    error = refusal(status, body)
    assert type(error) is kind and error.metadata["status"] == str(status)


def test_what_is_too_old_is_told_apart() -> None:
    assert refusal(410, b'{"message": "too old"}').reason == EXPIRED
