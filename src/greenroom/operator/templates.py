"""ActorTemplates: each is applied to the control plane, and its status follows the template there.

The custom resource says what is wanted; the control plane prepares it (image, first boot, golden snapshot) and tells
what becomes of it by a watch, so nothing here asks again and again. A template leaves the cluster when the control
plane has deleted it, which that refuses while actors are made from it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    InvalidArgument,
    LeaseLost,
    NotFound,
    Unavailable,
)
from greenroom.core.records import Key as TemplateKey
from greenroom.core.records import Template, TemplateSpec, TemplateState
from greenroom.operator import forms, template_status
from greenroom.operator.client import Kube
from greenroom.operator.failures import message_of
from greenroom.operator.objects import API_VERSION, TEMPLATE_FINALIZER, Key, TemplateObject
from greenroom.operator.plane import Plane
from greenroom.operator.queue import WorkQueue
from greenroom.operator.reflector import Reflector

#: Templates that are looked at at once.
WORKERS = 4
#: Pauses after a failure, of calls and of the watch, double from the first to the second of these.
PAUSE_S = (0.5, 30.0)
#: One that failed is prepared again after this long, doubling: a registry may have been away.
PREPARE_AGAIN_S = (60.0, 1800.0)
#: A deletion that is refused because there are actors is tried again after this long, doubling.
DELETE_AGAIN_S = (1.0, 30.0)

_log = structlog.get_logger("greenroom.operator")


class Templates:
    """Run `run` as a task.

    Args:
        may_act: raises `LeaseLost` when this process may not act any more.
        wall: seconds since the epoch, for people to read.
        on_return: called when the control plane answers again after it was away.
    """

    def __init__(
        self,
        kube: Kube,
        plane: Plane,
        may_act: Callable[[], None],
        namespace: str,
        wall: Callable[[], float],
        chance: random.Random,
        on_return: Callable[[], None] = lambda: None,
    ) -> None:
        self._kube = kube
        self._plane = plane
        self._may_act = may_act
        self._wall = wall
        self._chance = chance
        self._on_return = on_return
        self.shown: Reflector[TemplateObject] = Reflector(
            kube, path(namespace), TemplateObject, self._changed, chance=chance
        )
        self._queue: WorkQueue[Key] = WorkQueue()
        #: What the control plane has.
        self._known: dict[Key, Template] = {}
        #: What it is being asked for, and has told nothing of since.
        self._unheard: set[Key] = set()
        self._told = asyncio.Event()
        self._failures: dict[Key, int] = {}
        self._prepared_again: dict[Key, int] = {}
        #: How often a deletion was refused.
        self._held: dict[Key, int] = {}

    async def run(self) -> None:
        """Until it is cancelled. Raises `LeaseLost`."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.shown.run(), name="templates")
            group.create_task(self._follow(), name="templates of the control plane")
            for number in range(WORKERS):
                group.create_task(self._work(), name=f"template worker {number}")

    # --- what is heard ---

    def _changed(self, old: TemplateObject | None, new: TemplateObject | None) -> None:
        changed = new or old
        assert changed is not None
        self._queue.add(changed.metadata.key)

    async def _follow(self) -> None:
        """What the control plane says of templates, for ever."""
        failures = 0
        while True:
            heard: set[Key] = set()
            try:
                async for change in self._plane.templates():
                    failures = 0
                    if change.key is not None:
                        key = (change.key.namespace, change.key.name)
                        heard.add(key)
                        self._hear(key, change.template)
                        continue
                    for gone in self._known.keys() - heard:
                        self._hear(gone, None)
                    self._unheard.clear()  # also of those that are not there it has told by that
                    if self._told.is_set():
                        self._on_return()
                    self._told.set()
                    for key in self.shown.found:
                        self._queue.add(key)
            except Exception as error:
                first, most = PAUSE_S
                pause = min(first * 2.0 ** min(failures, 10), most) * (1 - self._chance.random() / 2)
                failures += 1
                _log.info("templates are followed again", error=message_of(error), again_in_s=round(pause, 1))
                await asyncio.sleep(pause)

    def _hear(self, key: Key, template: Template | None) -> None:
        self._unheard.discard(key)
        if template is None:
            self._known.pop(key, None)
        else:
            self._known[key] = template
        if key in self.shown.found:
            self._queue.add(key)

    # --- what is done ---

    async def _work(self) -> None:
        await self.shown.synced.wait()
        while True:
            key = await self._queue.get()
            try:
                await self._look(key)
                self._failures.pop(key, None)
            except LeaseLost:
                raise
            except (Conflict, NotFound):
                pass  # it has changed: the cache shows it soon, and then there is another look
            except Exception as error:  # also a defect: it is to hold up no other template
                self._may_act()
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                first, most = PAUSE_S
                pause = min(first * 2.0 ** min(failures - 1, 10), most)
                _log.info("template is looked at again", template=key, error=message_of(error), again_in_s=pause)
                self._queue.add_after(key, pause)
            finally:
                self._queue.done(key)

    async def _look(self, key: Key) -> None:
        shown = self.shown.found.get(key)
        if shown is None:
            self._prepared_again.pop(key, None)
            self._held.pop(key, None)
            return
        if shown.metadata.deletionTimestamp is not None:
            await self._end(shown)
            return
        if TEMPLATE_FINALIZER not in (shown.metadata.finalizers or ()):
            self._may_act()
            finalizers = [*(shown.metadata.finalizers or ()), TEMPLATE_FINALIZER]
            await self._kube.patch_metadata(self._path(shown), shown.metadata, {"finalizers": finalizers})
            return  # and the cache shows it
        try:
            spec = forms.read(TemplateSpec, shown.spec)
            template = await self._apply(key, spec)
        except (InvalidArgument, FailedPrecondition, AlreadyExists) as error:
            await self._say(shown, template_status.refused(error))
            return
        await self._say(shown, template_status.following(template))

    async def _apply(self, key: Key, spec: TemplateSpec) -> Template:
        """The template as the control plane has it, which is asked for it when it does not, or has another, or failed
        long ago."""
        known = self._find(key)
        if known is not None and known.spec == spec:
            if known.state is not TemplateState.FAILED:
                self._prepared_again.pop(key, None)
                return known
            times = self._prepared_again.get(key, 0)
            wait_s = known.state_since + min(PREPARE_AGAIN_S[0] * 2.0**times, PREPARE_AGAIN_S[1]) - self._wall()
            if wait_s > 0:
                self._queue.add_after(key, wait_s)
                return known
            self._prepared_again[key] = min(times + 1, 16)
        self._may_act()
        self._unheard.add(key)
        try:
            applied = await self._plane.apply_template(TemplateKey(*key), spec)
            if key in self._unheard:  # else what was told since is newer, also that it is gone
                self._known.setdefault(key, applied)
        finally:
            self._unheard.discard(key)
        return applied

    def _find(self, key: Key) -> Template | None:
        """As the control plane has it. Raises `Unavailable` when nobody knows."""
        if not self._told.is_set():
            raise Unavailable("the control plane has not told yet which templates there are; is it reachable?")
        return self._known.get(key)

    def _is_ours(self, shown: TemplateObject) -> bool:
        """Whether the template of its name is the one that was made from it: somebody else may have made one before."""
        known = self._find(shown.metadata.key)
        if known is None or template_status.is_accepted(shown.status):
            return True
        try:
            return known.spec == forms.read(TemplateSpec, shown.spec)
        except InvalidArgument:
            return False

    async def _end(self, shown: TemplateObject) -> None:
        if TEMPLATE_FINALIZER not in (shown.metadata.finalizers or ()):
            return
        key = shown.metadata.key
        self._may_act()
        try:
            if self._is_ours(shown):
                await self._plane.delete_template(TemplateKey(*key))
            else:
                _log.info("the template of this name is another's, and stays", template=key)
        except FailedPrecondition as error:
            first, most = DELETE_AGAIN_S
            times = self._held[key] = self._held.get(key, 0) + 1
            self._queue.add_after(key, min(first * 2.0 ** min(times - 1, 10), most))
            await self._say(shown, template_status.held(error, shown.status))
            return
        finalizers = [f for f in shown.metadata.finalizers or () if f != TEMPLATE_FINALIZER]
        self._may_act()
        await self._kube.patch_metadata(self._path(shown), shown.metadata, {"finalizers": finalizers})

    async def _say(self, shown: TemplateObject, told: template_status.Told) -> None:
        body = template_status.make(told, shown.status, shown.metadata.generation, self._wall())
        if body == shown.status:
            return
        meta = shown.metadata
        named = {
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
            "resourceVersion": meta.resourceVersion,
        }
        whole = {"apiVersion": API_VERSION, "kind": "ActorTemplate", "metadata": named, "status": body}
        self._may_act()
        await self._kube.send_raw("PUT", f"{self._path(shown)}/status", whole)

    @staticmethod
    def _path(shown: TemplateObject) -> str:
        return f"{path(shown.metadata.namespace)}/{shown.metadata.name}"


def path(namespace: str = "") -> str:
    """Of one namespace, or of all."""
    within = f"namespaces/{namespace}/" if namespace else ""
    return f"/apis/{API_VERSION}/{within}actortemplates"
