"""SandboxConfigs: what the workers of a pool run actors with, and which pools that is said of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from greenroom.core.assets import Asset
from greenroom.core.errors import Conflict, FailedPrecondition, NotFound
from greenroom.operator import forms
from greenroom.operator.client import Kube
from greenroom.operator.failures import message_of
from greenroom.operator.objects import API_VERSION, Key, Meta, Named
from greenroom.operator.reflector import Reflector
from greenroom.operator.specs import SandboxConfigSpec, WorkerPoolSpec

#: After a failure it is tried again after this long.
AGAIN_S = 2.0
#: News within this time are told together: a new leader looks at all pools at once.
GATHER_S = 1.0
PATH = f"/apis/{API_VERSION}/sandboxconfigs"

_log = structlog.get_logger("greenroom.operator")


class SandboxConfigObject(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}


def choose(found: Mapping[Key, SandboxConfigObject], spec: WorkerPoolSpec) -> tuple[str, SandboxConfigSpec] | None:
    """The configuration of a pool, by name; None: none, and its workers use what their image has.

    Raises:
        FailedPrecondition: it names one that is not there or is of another backend, or names none while several are of
            its backend.
        InvalidArgument: its spec can't be read.
    """
    configs = {config.metadata.name: forms.read(SandboxConfigSpec, config.spec) for config in found.values()}
    if spec.sandbox_config:
        config = configs.get(spec.sandbox_config)
        if config is None:
            raise FailedPrecondition(
                f"there is no SandboxConfig {spec.sandbox_config!r}, which the pool names; there are: "
                f"{', '.join(sorted(configs)) or 'none'}"
            )
        if config.backend != spec.backend:
            raise FailedPrecondition(
                f"SandboxConfig {spec.sandbox_config!r} is of backend {config.backend!r}, and the pool of "
                f"{spec.backend!r}; name another one"
            )
        return spec.sandbox_config, config
    fitting = sorted(name for name, config in configs.items() if config.backend == spec.backend)
    if len(fitting) > 1:
        raise FailedPrecondition(
            f"there are several SandboxConfigs of backend {spec.backend!r} ({', '.join(fitting)}); say which one with "
            "spec.sandboxConfig"
        )
    return (fitting[0], configs[fitting[0]]) if fitting else None


class Uses:
    """Which pools use which configuration, in the status of each. Of pools in other namespaces others speak. Run `run`
    as a task.

    Args:
        may_act: raises `LeaseLost` when this process may not act any more.
        found: the cache of SandboxConfigs.
        pools: the cache of pools. What was said of one that is there, and that nobody has looked at yet, stays.
        namespace: whose pools; "" for all.
    """

    def __init__(
        self,
        kube: Kube,
        may_act: Callable[[], None],
        found: Callable[[], Mapping[Key, SandboxConfigObject]],
        pools: Reflector[Named],
        namespace: str,
        wall: Callable[[], float],
    ) -> None:
        self._kube = kube
        self._may_act = may_act
        self._found = found
        self._pools = pools
        self._wall = wall
        self._of_pool: dict[Key, str] = {}
        self._news = asyncio.Event()
        self._namespaces: set[str] = {namespace} - {""}

    def assets(self, spec: WorkerPoolSpec) -> Sequence[Asset]:
        """Raises as `choose`."""
        chosen = choose(self._found(), spec)
        return chosen[1].assets if chosen is not None else ()

    def note(self, pool: Key, spec: WorkerPoolSpec) -> str:
        """Notes what the pool uses; returns the name, "" for none. Raises as `choose`."""
        self._namespaces.add(pool[0])
        name = ""
        try:
            chosen = choose(self._found(), spec)
            name = chosen[0] if chosen is not None else ""
        finally:
            if self._of_pool.get(pool) != name:
                self._of_pool[pool] = name
                self._news.set()
        return name

    def forget(self, pool: Key) -> None:
        self._namespaces.add(pool[0])
        self._of_pool.pop(pool, None)
        self._news.set()

    def look_again(self) -> None:
        """A configuration has changed."""
        self._news.set()

    async def run(self) -> None:
        """Writes what is not said yet, until it is cancelled."""
        await self._pools.synced.wait()
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER_S)
            self._news.clear()
            try:
                await self._tell()
            except Exception as error:
                self._may_act()
                _log.info("use of a configuration is told later", error=message_of(error))
                self._news.set()
                await asyncio.sleep(AGAIN_S)

    async def _tell(self) -> None:
        for config in list(self._found().values()):
            body = self._status(config)
            if body is None:
                continue
            meta = config.metadata
            named = {"name": meta.name, "uid": meta.uid, "resourceVersion": meta.resourceVersion}
            whole = {"apiVersion": API_VERSION, "kind": "SandboxConfig", "metadata": named, "status": body}
            self._may_act()
            with contextlib.suppress(Conflict, NotFound):  # it has changed: the cache shows it soon
                await self._kube.send_raw("PUT", f"{PATH}/{meta.name}/status", whole)

    def _is_anothers(self, pool: str) -> bool:
        """Whether somebody else speaks of it, or we do later."""
        namespace, _, name = pool.partition("/")
        if namespace not in self._namespaces:
            return True
        key = (namespace, name)
        return key in self._pools.found and key not in self._of_pool

    def _status(self, config: SandboxConfigObject) -> dict[str, Any] | None:
        meta, before = config.metadata, config.status
        said = [str(pool) for pool in before.get("pools") or ()]
        others = [pool for pool in said if self._is_anothers(pool)]
        ours = ["/".join(pool) for pool, name in self._of_pool.items() if name == meta.name]
        pools = sorted({*others, *ours})
        last: dict[str, Any] = next(iter(before.get("conditions") or ()), {})
        used = "True" if pools else "False"
        if pools == said and before.get("observedGeneration") == meta.generation and last.get("status") == used:
            return None
        when = datetime.fromtimestamp(int(self._wall()), tz=UTC).isoformat().replace("+00:00", "Z")
        condition = {
            "type": "InUse",
            "status": used,
            "reason": "PoolsUseIt" if pools else "Unused",
            "message": f"{len(pools)} pools use it; workers that are there keep what they were made with",
            "observedGeneration": meta.generation,
            "lastTransitionTime": last.get("lastTransitionTime") if last.get("status") == used else when,
        }
        return {"observedGeneration": meta.generation, "pools": pools, "conditions": [condition]}
