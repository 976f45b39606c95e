"""A cache of objects that follows the server: a list, and then what changes.

Source: k8s.io/client-go, tools/cache/reflector.go; Kubernetes documentation, "Efficient detection of changes".

The list is made by the server itself (without a ``resourceVersion``), never from what some replica has in memory, so a
process that begins anew does not begin with something old. While it follows, the cache may lag behind the server as far
as it likes: whoever uses it has to be right all the same (`greenroom.core.ledger`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import structlog

from greenroom.core.errors import FailedPrecondition, GreenroomError, ResourceExhausted, Unavailable
from greenroom.operator.client import Kube
from greenroom.operator.objects import Key, Meta
from greenroom.operator.transport import EXPIRED, refusal

#: A watch is begun anew after this long at least and at most, so that many processes do not do so at once.
WATCH_S = (300.0, 600.0)
#: A watch that ends before this, with nothing said, is one that nobody serves (a proxy, an API server on its way out).
SHORT_S = 1.0
#: Pauses after a failure double from the first to the second of these, each shortened by up to a half at random.
PAUSE_S = (0.5, 30.0)


class HasMeta(Protocol):
    @property
    def metadata(self) -> Meta: ...


T = TypeVar("T", bound=HasMeta)
#: What it was (None: new) and what it is (None: gone).
OnChange = Callable[[T | None, T | None], None]

_log = structlog.get_logger("greenroom.operator")


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Mark(msgspec.Struct, frozen=True):
    """The part of a bookmark that matters."""

    metadata: _MarkMeta


class _MarkMeta(msgspec.Struct, frozen=True):
    resourceVersion: str = ""


class Reflector(Generic[T]):
    """See the module. Run `run` as a task.

    Args:
        kind: to decode objects as.
        on_change: called for each change, in order; must not block.
        chance: draws jitter.

    Attributes:
        found: the cache.
        synced: set once it has been filled.
        heard_at: when the server last said anything about it (the loop's clock).
        lists: how often everything was listed.
    """

    def __init__(
        self,
        kube: Kube,
        path: str,
        kind: type[T],
        on_change: OnChange[T],
        *,
        query: Mapping[str, str] | None = None,
        chance: random.Random | None = None,
    ) -> None:
        self._kube = kube
        self._path = path
        self._kind = kind
        self._on_change = on_change
        self._query = dict(query or {})
        self._chance = chance or random.Random()
        self._events = msgspec.json.Decoder(_Event)
        self._objects = msgspec.json.Decoder(kind)
        self.found: dict[Key, T] = {}
        self.synced = asyncio.Event()
        self.heard_at = 0.0
        self.lists = 0
        self._version = ""
        #: The highest version that was ever seen, as far as versions are numbers.
        self._highest = 0
        self._failures = 0

    async def run(self) -> None:
        """Follows until it is cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                self._failures = 0
            except GreenroomError as error:
                await self._after(error)

    async def _after(self, error: GreenroomError) -> None:
        if isinstance(error, FailedPrecondition) and error.reason == EXPIRED:
            self._version = ""
        first, most = PAUSE_S
        pause = min(first * 2.0 ** min(self._failures, 10), most) * (1 - self._chance.random() / 2)
        if isinstance(error, ResourceExhausted | Unavailable):
            pause = max(pause, min(error.retry_after_s, most))
        self._failures += 1
        _log.info("following is interrupted", path=self._path, error=error.message, again_in_s=round(pause, 1))
        await asyncio.sleep(pause)

    async def _list(self) -> None:
        listed = await self._kube.list(self._path, self._kind, self._query)
        self.lists += 1
        number = _number(listed.version)
        if number is not None and number < self._highest:
            raise Unavailable(
                f"the API server listed {self._path} as of version {number}, but was at {self._highest} before: it is "
                "behind, or was restored from a backup; asking again"
            )
        before, self.found = self.found, {item.metadata.key: item for item in listed.items}
        self._at(listed.version)
        for key in sorted(before.keys() | self.found.keys()):
            old, new = before.get(key), self.found.get(key)
            if old is None or new is None or old.metadata.resourceVersion != new.metadata.resourceVersion:
                self._on_change(old, new)
        self.synced.set()

    async def _follow(self) -> None:
        """Until the server ends the watch, which it does now and then."""
        query = {
            **self._query,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(self._chance.uniform(*WATCH_S))),
        }
        clock = asyncio.get_running_loop().time
        began, silent = clock(), True
        async with self._kube.watch(self._path, query) as lines:
            async for line in lines:
                if line.strip():
                    silent = False
                    self._failures = 0
                    self._take(line)
        if silent and clock() < began + SHORT_S:
            raise Unavailable(f"the watch of {self._path} was ended at once")

    def _take(self, line: bytes) -> None:
        try:
            event = self._events.decode(line)
            match event.type:
                case "BOOKMARK":
                    self._at(msgspec.json.decode(event.object, type=_Mark).metadata.resourceVersion)
                case "ADDED" | "MODIFIED" | "DELETED":
                    self._change(event.type, self._objects.decode(event.object))
                case "ERROR":
                    status: Any = msgspec.json.decode(event.object)
                    code = status.get("code") if isinstance(status, dict) else None
                    raise refusal(code if isinstance(code, int) else 500, bytes(event.object))
        except msgspec.DecodeError as error:
            self._version = ""
            raise Unavailable(f"an event of {self._path} can't be read: {error}; listing again") from error

    def _change(self, kind: str, obj: T) -> None:
        key = obj.metadata.key
        old = self.found.get(key)
        new = None if kind == "DELETED" else obj
        if new is None:
            self.found.pop(key, None)
        else:
            self.found[key] = new
        self._at(obj.metadata.resourceVersion)
        if old is not None or new is not None:
            self._on_change(old, new)

    def _at(self, version: str) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self._version = version
        self._highest = max(self._highest, _number(version) or 0)


def _number(version: str) -> int | None:
    """Versions of one kind can be compared as numbers since Kubernetes 1.35, and on etcd always could; where they are
    no numbers they are only what a watch goes on from."""
    return int(version) if version.isascii() and version.isdigit() else None
