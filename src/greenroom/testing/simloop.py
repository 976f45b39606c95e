"""An event loop on which a whole distributed system runs in virtual time, decided by one seed.

Time does not pass while something can run; when nothing can, it jumps to the next timer. So an hour of leases,
time-outs and pauses takes as long as the Python code in it, and the same seed takes the same course, in every process.

The loop runs several `Process` es at once, each as an event loop of its own would be run: whatever is scheduled from
code of a process (a task, a callback, a timer) belongs to that process, by a context variable that tasks inherit. A
process may be killed (nothing of it ever runs again, not even a ``finally``) and paused (what is due for it waits; then
it goes on as if nothing had happened).

What is drawn from the seed, and what is not:

- which of the processes that could run takes the next step: nothing orders them in the real world either;
- the order of timers that are due at the same instant: asyncio does not define it;
- how long a step keeps its process busy (`Pace`): mostly not at all, rarely long. Without it whatever arrives would
  always find a process at rest, because no time passes while it runs;
- *not* the order of callbacks within one process. That is first in, first out, as `asyncio` promises and as correct
  programs rely on; other orders come from the latencies of the simulated network.

There is no I/O and there are no threads: whoever asks for either gets an error.

To be reproducible, a program must not depend on hashes of strings, on addresses of objects or on clocks. Tasks and
futures of this loop have numbers for hashes, so sets of them are iterated in the same order in every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PROCESS: ContextVar[Process] = ContextVar("process")


class Deadlock(AssertionError):
    """Nothing is scheduled, and the main task has not ended."""


class Runaway(AssertionError):
    """More steps than any run needs: something goes round and round without time passing, or for ever."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long single steps keep a process busy, in seconds of virtual time.

    Attributes:
        often: share of steps that take up to ``short_s``: a few callbacks may run between two steps of a chain.
        short_s: at most this.
        seldom: share of steps that take up to ``long_s``: a collection of garbage, a slow disk, another process's turn.
        long_s: at most this.
    """

    often: float = 0.05
    short_s: float = 0.002
    seldom: float = 0.0005
    long_s: float = 0.2


#: Steps take no time: for tests of the loop itself.
AT_ONCE = Pace(often=0.0, seldom=0.0)


class Process:
    """One operating-system process of the simulation. Made by `SimLoop.process`."""

    __slots__ = ("active", "alive", "context", "corpses", "held_until", "name", "ready")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        #: Nothing of it runs before this time.
        self.held_until = 0.0
        self.ready: deque[_Handle] = deque()
        #: What runs in this context, or in a copy of it, belongs to this process.
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)
        #: Its tasks when it was killed. As long as they are kept, none of their ``finally`` blocks runs.
        self.corpses: list[asyncio.Task[Any]] = []
        #: Something of it is ready.
        self.active = False

    def __repr__(self) -> str:
        return f"<process {self.name}{'' if self.alive else ', dead'}>"

    def __hash__(self) -> int:
        return hash(self.name)


class _SimFuture(asyncio.Future[Any]):
    def __init__(self, loop: SimLoop) -> None:
        self.number = next(loop.numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class _SimTask(asyncio.Task[Any]):
    def __init__(self, coro: Any, loop: SimLoop, name: str | None, context: Context | None) -> None:
        self.number = next(loop.numbers)
        self.process = (copy_context() if context is None else context).get(_PROCESS, loop.main)
        super().__init__(coro, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self.number


class _Handle(asyncio.TimerHandle):
    """What is to be run, now or at a time. Half of all that a simulation makes are these, so it is made here directly
    and not by the constructors of two base classes."""

    __slots__ = ("process",)

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], loop: SimLoop, context: Context
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = context
        self._cancelled = self._scheduled = False
        self._source_traceback = self._repr = None
        self.process: Process = context.get(_PROCESS, loop.main)


_NEVER = float("inf")


class SimLoop(asyncio.BaseEventLoop):
    """See the module docstring.

    Args:
        seed: decides every choice of this loop.
        pace: how long steps take.
        limit: most steps of one run (`Runaway`).
    """

    def __init__(self, seed: int | str, *, pace: Pace = AT_ONCE, limit: int = 200_000) -> None:
        self._running = self._ended = self._stop = False
        super().__init__()
        self._random = random.Random(f"loop {seed}")
        self._pace = pace
        self._limit = limit
        self._now = 0.0
        self._timers: list[tuple[float, float, int, _Handle]] = []
        #: Processes with something ready, running, busy or paused.
        self._active: list[Process] = []
        self.numbers = itertools.count(1)
        self.steps = 0
        #: What was reported to the loop's exception handler: exceptions in callbacks, and those that nobody fetched.
        self.errors: list[dict[str, Any]] = []
        #: What the first callback raised that raised something; it ends the run.
        self.failure: BaseException | None = None
        self.main = Process("main")

    # --- processes ----------------------------------------------------------------------------------------

    def process(self, name: str) -> Process:
        """A new process, in which nothing runs yet: see `start`."""
        return Process(name)

    def start(self, process: Process, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """A task in that process."""
        return process.context.copy().run(self.create_task, work, name=name or process.name)

    def kill(self, process: Process) -> None:
        """From now on nothing of it runs any more. Who waits for one of its futures waits for ever."""
        process.alive = False
        process.corpses = [t for t in asyncio.all_tasks(self) if isinstance(t, _SimTask) and t.process is process]
        process.ready.clear()
        if process.active:
            process.active = False
            self._active.remove(process)

    def pause(self, process: Process, seconds: float) -> None:
        """What is due for it waits that long; then it goes on in order."""
        process.held_until = max(process.held_until, self._now + seconds)

    def resume(self, process: Process) -> None:
        """Ends its pauses."""
        process.held_until = min(process.held_until, self._now)

    @staticmethod
    def process_of(task: asyncio.Task[Any]) -> Process | None:
        return task.process if isinstance(task, _SimTask) else None

    @staticmethod
    def current() -> Process:
        return _PROCESS.get()

    # --- running ------------------------------------------------------------------------------------------

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Runs until ``future`` is done.

        Raises:
            Deadlock: it never will be.
            Runaway: it takes too many steps.
        Exception: what a callback raised.
        """
        assert asyncio.iscoroutine(future), "a simulation begins with a coroutine"
        main = self.start(self.main, future, "main")
        main.add_done_callback(lambda _: self.stop(), context=self.main.context)
        self.run_forever()
        if self.failure is not None:
            raise self.failure
        if not main.done():
            raise RuntimeError("the loop was stopped before its main task had ended")
        result: T = main.result()
        return result

    def run_forever(self) -> None:
        if self._ended or self._running:
            raise RuntimeError("the loop is closed, or runs already")
        self._running, self._stop = True, False
        asyncio._set_running_loop(self)
        try:
            self._run()
        finally:
            asyncio._set_running_loop(None)
            self._running = False

    def _run(self) -> None:
        """Nearly all of the time of a simulation is spent here, in one function for that reason."""
        timers, active, draw = self._timers, self._active, self._random.random
        often, busy_s, seldom, long_s = self._pace.often, self._pace.short_s, 1 - self._pace.seldom, self._pace.long_s
        while not self._stop:
            now = self._now
            while timers and timers[0][0] <= now:
                timer = heapq.heappop(timers)[3]
                if not timer._cancelled:
                    self._enqueue(timer, timer.process)
            free = [p for p in active if p.held_until <= now]
            if not free:
                self._jump()
                continue
            process = free[0] if len(free) == 1 else free[int(draw() * len(free))]
            ready = process.ready
            handle = ready.popleft()
            if not ready:
                process.active = False
                active.remove(process)
            if handle._cancelled:
                continue
            self.steps += 1
            if self.steps > self._limit:
                raise Runaway(f"{self.steps} steps, {now:.3f} s: it does not end; next is {handle!r}")
            try:
                handle._context.run(handle._callback, *handle._args)
            except Exception as error:
                self.call_exception_handler({"message": f"{handle!r} failed", "exception": error, "handle": handle})
            chance = draw()
            if chance < often:
                process.held_until = max(process.held_until, now + draw() * busy_s)
            elif chance > seldom:
                process.held_until = max(process.held_until, now + draw() * long_s)

    def _jump(self) -> None:
        """To the next moment at which something can run."""
        when = self._timers[0][0] if self._timers else _NEVER
        for process in self._active:
            when = min(when, process.held_until)
        if when == _NEVER:
            raise Deadlock(f"at {self._now:.3f} s nothing is scheduled any more; these wait: {self._describe()}")
        self._now = max(self._now, when)

    def _describe(self) -> str:
        waiting = [t for t in asyncio.all_tasks(self) if isinstance(t, _SimTask) and t.process.alive]
        return ", ".join(f"{t.process.name}/{t.get_name()}" for t in sorted(waiting, key=hash)) or "no task"

    def stop(self) -> None:
        self._stop = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._ended

    def close(self) -> None:
        """Throws away what is left. Coroutines that were cut off are closed here, all at once, instead of whenever
        their garbage is collected; what their ``finally`` blocks try to do reaches nothing any more."""
        self._ended = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that were cut off before they began
            for task in asyncio.all_tasks(self):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    coro: Any = task.get_coro()
                    coro.close()
        self._timers.clear()
        self._active.clear()

    # --- scheduling ---------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if context is None:
            context = copy_context()
        handle = _Handle(0.0, callback, args, self, context)
        self._enqueue(handle, handle.process)
        return handle

    def _enqueue(self, handle: _Handle, process: Process) -> None:
        if not process.alive or self._ended:
            return
        process.ready.append(handle)
        if not process.active:
            process.active = True
            self._active.append(process)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if context is None:
            context = copy_context()
        handle = _Handle(when, callback, args, self, context)
        if handle.process.alive and not self._ended:
            heapq.heappush(self._timers, (when, self._random.random(), next(self.numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio calls this; what is cancelled is skipped when it is due."""

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        raise RuntimeError("a simulation has no threads")

    def run_in_executor(self, executor: Any, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        raise RuntimeError("a simulation has no threads")

    # --- what tasks are made of ---------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        return _SimFuture(self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        return _SimTask(coro, self, None if name is None else str(name), context)

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)
        error = context.get("exception")
        if self.failure is None and "handle" in context and error is not None:
            self.failure = error
            self.stop()

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)
