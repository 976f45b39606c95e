"""What one replica of the server shows: the log up to some point, which only moves forward.

A real API server answers reads "at any version", and watches, from a cache that follows etcd; each replica's cache is
somewhere else, and a client that connects anew may get to one that is further behind. A `View` is such a cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from greenroom.testing.fake_kube.errors import KubeError, gone
from greenroom.testing.fake_kube.objects import Entry, Name, Object, Objects
from greenroom.testing.fake_kube.resources import Resource
from greenroom.testing.fake_kube.selectors import Test

#: How long a read waits for a view to get to the version that it names. Source: k8s.io/apiserver, watch cache.
CATCH_UP_S = 3.0


@dataclass(eq=False)
class View:
    """One replica's cache.

    Args:
        live: it follows each change at once; otherwise it goes forward only by `advance`.
    """

    objects: Objects
    live: bool = True
    #: Versions before this one are not kept for watches any more.
    oldest: int = 0
    rv: int = 0
    state: dict[tuple[str, str], dict[Name, Object]] = field(default_factory=dict)
    _at: int = 0
    _watches: list[Watch] = field(default_factory=list)
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.advance()
        self.objects.on_change.append(lambda _: self.advance() if self.live else None)

    @property
    def behind(self) -> int:
        """How many changes it does not show yet."""
        return len(self.objects.log) - self._at

    def advance(self, changes: int | None = None) -> None:
        """Shows that many more changes; None: all."""
        end = len(self.objects.log) if changes is None else min(len(self.objects.log), self._at + changes)
        for entry in self.objects.log[self._at : end]:
            found = self.state.setdefault(entry.key, {})
            if entry.kind == "DELETED":
                found.pop(entry.name, None)
            else:
                found[entry.name] = entry.object
            self.rv = entry.rv
            for watch in self._watches:
                watch.show(entry)
        self._at = max(self._at, end)
        self._moved.set()
        self._moved.clear()

    def compact(self) -> None:
        """Forgets all history: watches that start earlier are told 410, running ones go on."""
        self.oldest = self.rv

    def drop_watches(self, error: KubeError | None = None) -> None:
        """Ends all watches: silently, or with an error event."""
        for watch in self._watches:
            watch.end(error)

    async def reach(self, rv: int) -> None:
        """Waits until it shows this version. Raises `KubeError` (504) when it does not in time."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                while self.rv < rv:
                    await self._moved.wait()
        except TimeoutError:
            message = f"Too large resource version: {rv}, current: {self.rv}"
            details = {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]}
            raise KubeError(504, "Timeout", message, details, retry_after_s=1) from None

    def watch(self, resource: Resource, namespace: str, matches: Test, since: int | None, *, initial: bool) -> Watch:
        """From ``since`` on; None: from what it shows now, which is told first (also with ``initial``).

        Raises:
            KubeError: 410, that is not kept any more.
        """
        if since is not None and since < self.oldest and not initial:
            raise gone(f"too old resource version: {since} ({self.oldest})")
        watch = Watch(self, resource, namespace, matches)
        if since is None or initial:
            watch.show_state(self.state.get(resource.key, {}))
        else:
            for entry in self.objects.log[: self._at]:
                if entry.rv > since:
                    watch.show(entry)
        self._watches.append(watch)
        return watch


class Watch:
    """One watch. Iterate over `events`; then `close`."""

    def __init__(self, view: View, resource: Resource, namespace: str, matches: Test) -> None:
        self._view = view
        self._resource = resource
        self._namespace = namespace
        self._matches = matches
        self._waiting: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._ended = False

    def show(self, entry: Entry) -> None:
        if entry.key != self._resource.key or (self._namespace and entry.name[0] != self._namespace):
            return
        was = entry.before is not None and self._matches(entry.before)
        now = entry.kind != "DELETED" and self._matches(entry.object)
        if now:
            self._tell("MODIFIED" if was else "ADDED", entry.object)
        elif was:
            # One that is selected no more looks deleted, with the version at which that came to be.
            self._tell("DELETED", entry.object)

    def show_state(self, found: dict[Name, Object]) -> None:
        for (namespace, _), obj in sorted(found.items()):
            if (not self._namespace or namespace == self._namespace) and self._matches(obj):
                self._tell("ADDED", obj)

    def end(self, error: KubeError | None) -> None:
        if error is not None:
            self._tell("ERROR", error.status())
        self._ended = True
        self._news.set()

    def bookmark(self, *, initial_end: bool = False) -> None:
        metadata: dict[str, Any] = {"resourceVersion": str(self._view.rv)}
        if initial_end:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj = {"apiVersion": self._resource.api_version, "kind": self._resource.kind, "metadata": metadata}
        self._tell("BOOKMARK", obj)

    def _tell(self, kind: str, obj: Object) -> None:
        if not self._ended:
            self._waiting.append({"type": kind, "object": obj})
            self._news.set()

    async def events(self, timeout_s: float, bookmark_every_s: float) -> AsyncIterator[list[dict[str, Any]]]:
        """Events as they come, several at a time; ends after ``timeout_s``. ``bookmark_every_s``: 0 for none."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        mark = loop.time() + bookmark_every_s if bookmark_every_s else end
        while True:
            if self._waiting:
                events, self._waiting = self._waiting, []
                yield events
                continue
            if self._ended or loop.time() >= end:
                return
            self._news.clear()
            try:
                async with asyncio.timeout_at(min(mark, end)):
                    await self._news.wait()
            except TimeoutError:
                if bookmark_every_s:
                    self.bookmark()
                    mark = loop.time() + bookmark_every_s

    def close(self) -> None:
        if self in self._view._watches:
            self._view._watches.remove(self)
