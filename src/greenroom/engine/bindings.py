"""Which running actor is where: the table between the engine, which fills it, and the gateway, which routes by it.

A binding is one live incarnation of an actor: (uid, generation, endpoint). The engine binds after the commit that makes
an actor RUNNING and revokes *before* it asks the worker to freeze, move or destroy it; whoever routes through a
binding is told at once, by callback, and must close what it has open. Since an endpoint is never given to two actors,
even a connection that is made through a binding revoked a moment ago can't reach another one.

Everything here is synchronous and belongs to one event loop, so a check and the act that follows it can't be separated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from greenroom.core.records import Endpoint, Key, PhaseTime
from greenroom.engine import clock


@dataclass(eq=False, slots=True)
class Binding:
    """One live incarnation. ``last_used`` (by any replica, as far as this one knows) and ``used_here`` are loop time;
    ``in_flight`` counts open requests and streams here; when it falls to 0, ``on_idle`` is called."""

    key: Key
    uid: str
    generation: int
    worker: str
    endpoint: Endpoint
    idle_timeout_s: float
    evictable: bool = True
    last_used: float = field(default_factory=clock.monotonic)
    used_here: float = field(default_factory=clock.monotonic)
    in_use_elsewhere_until: float = 0.0
    in_flight: int = 0
    revoked: bool = False
    on_idle: Callable[[], None] | None = None
    _closers: set[Callable[[], None]] = field(default_factory=set)
    _idle: asyncio.Event | None = None

    def acquire(self) -> None:
        """One more request uses the actor. Only on a binding that is not revoked."""
        assert not self.revoked, "a revoked binding must not be used"
        self.in_flight += 1

    def release(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0
        self.last_used = self.used_here = clock.monotonic()
        if self.in_flight == 0:
            if self._idle is not None:
                self._idle.set()
            if self.on_idle is not None and not self.revoked:
                self.on_idle()

    def on_revoke(self, closer: Callable[[], None]) -> None:
        """``closer`` is called once, synchronously, when the binding is revoked; it must not raise."""
        self._closers.add(closer)

    def forget(self, closer: Callable[[], None]) -> None:
        self._closers.discard(closer)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is open; False when that took longer than ``timeout_s``."""
        if self.in_flight == 0:
            return True
        self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._idle = None


@dataclass(frozen=True, slots=True)
class Wake:
    """What a wake-up came to: the binding, and, when this call had to wait for an operation, that operation's id and
    its phases."""

    binding: Binding
    operation_id: str = ""
    phases: tuple[PhaseTime, ...] = ()


class BindingTable:
    def __init__(self, trusted: Callable[[str], bool] = lambda worker: True) -> None:
        """``trusted``: whether what runs on a worker is sure to be what is to run (see `greenroom.engine.census`)."""
        self._trusted = trusted
        self._by_key: dict[Key, Binding] = {}
        self._by_uid: dict[str, Binding] = {}
        self._draining: dict[Key, asyncio.Event] = {}

    def get(self, key: Key) -> Binding | None:
        """The binding to route by, unless there is none, it is being drained (then wake: it waits its turn), or its
        worker may count as lost by now."""
        binding = self._by_key.get(key)
        if binding is None or key in self._draining or not self._trusted(binding.worker):
            return None
        return binding

    def peek(self, key: Key) -> Binding | None:
        """As `get`, draining or not."""
        return self._by_key.get(key)

    def bind(self, binding: Binding) -> None:
        """Replaces (and revokes) an older binding of the key; never goes back to an older generation (another replica
        may have woken the actor again before this one heard how its own operation ended). The same incarnation again
        changes nothing."""
        old = self._by_key.get(binding.key)
        if old is not None:
            if old.uid == binding.uid and old.generation >= binding.generation:
                return
            self.revoke(binding.key)
        self._by_key[binding.key] = self._by_uid[binding.uid] = binding

    def drain(self, key: Key) -> Binding | None:
        """No new request is routed to it from now on; ends with `revoke` or `undrain`."""
        if key in self._by_key:
            self._draining.setdefault(key, asyncio.Event())
        return self._by_key.get(key)

    def undrain(self, key: Key) -> None:
        if (over := self._draining.pop(key, None)) is not None:
            over.set()

    async def drained(self, key: Key) -> None:
        """Returns when the key is not being drained: at once, or after `revoke` or `undrain`."""
        while (over := self._draining.get(key)) is not None:
            await over.wait()

    def revoke(self, key: Key) -> None:
        """Takes the binding away and has everything that is open through it closed. Unknown is fine."""
        self.undrain(key)
        binding = self._by_key.pop(key, None)
        if binding is None:
            return
        if self._by_uid.get(binding.uid) is binding:
            del self._by_uid[binding.uid]
        binding.revoked = True
        for closer in list(binding._closers):
            closer()
        binding._closers.clear()

    def used_elsewhere(self, uid: str, at: float, until: float) -> None:
        """Another replica has used the actor at ``at``, and may be using it until ``until`` (loop time)."""
        if (binding := self._by_uid.get(uid)) is not None:
            binding.last_used = max(binding.last_used, at)
            binding.in_use_elsewhere_until = until

    def longest_idle(self, workers: Iterable[str] | None = None) -> list[Binding]:
        """Bindings without an open request anywhere, as far as is known, the longest idle first; on the given workers
        only."""
        among = None if workers is None else set(workers)
        now = clock.monotonic()
        idle = [
            b
            for b in self._by_key.values()
            if b.in_flight == 0
            and b.in_use_elsewhere_until <= now
            and b.key not in self._draining
            and (among is None or b.worker in among)
        ]
        return sorted(idle, key=lambda b: b.last_used)

    def all(self) -> list[Binding]:
        return list(self._by_key.values())
