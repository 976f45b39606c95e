"""Whether a sandbox is frozen, by what the goroutines of its kernel do: gVisor does not say it in any other way.

No program has to run in the sandbox for it, and it is as quick when that is frozen as when it runs. Each thread of the
actor is a goroutine, and one that gVisor has paused stands in ``doStop``. So does one that got a SIGSTOP: an actor all
of whose threads have looks frozen too, and to be thawed would end it, and nobody else. The names are gVisor's own
(pkg/sentry/kernel, runsc/boot); a worker's self-test proves them before they are used.
"""

from __future__ import annotations

_THREAD = "kernel.(*Task).run("
_STOPPED = "kernel.(*Task).doStop("
_CHANGES = ("boot.(*containerManager).Pause(", "boot.(*containerManager).Resume(")


def is_frozen(stacks: str) -> bool:
    """``stacks``: of all goroutines, as Go prints them."""
    threads = [stack for stack in stacks.split("\n\n") if _THREAD in stack]
    return bool(threads) and all(_STOPPED in stack for stack in threads)


def is_changing(stacks: str) -> bool:
    """Whether it is just being frozen or thawed."""
    return any(change in stacks for change in _CHANGES)
