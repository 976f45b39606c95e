"""What else a cluster does: nodes that run pods, and the garbage collector. Each step is a call, so that a test says
when it happens; `Cluster.follow` does all of them as soon as there is a cause."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Caller, Entry, Name, Object, Objects
from greenroom.testing.fake_kube.resources import Resource

PODS = ("", "pods")
_NODE = Caller("node", "kubelet")
_COLLECTOR = Caller("garbage-collector", "kube-controller-manager")


@dataclass
class Cluster:
    """``lost``: pods whose node does not answer any more: nothing happens to them. ``unready``: pods (by name) that
    start but don't get ready."""

    objects: Objects
    lost: set[Name] = field(default_factory=set)
    unready: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        pods = self.objects.registry.get("", "v1", "pods")
        assert pods is not None
        self._pods: Resource = pods
        self._news = asyncio.Event()
        #: Pods that have changed, and whether something was deleted that may have been an owner, since `follow` looked.
        self._changed: set[Name] = set()
        self._orphaned = True
        self.objects.on_change.append(self._heard)

    def _heard(self, entry: Entry) -> None:
        if entry.kind == "DELETED":
            self._orphaned = True
        elif entry.key == PODS:
            self._changed.add(entry.name)
        self._news.set()

    # --- pods ---

    def pods(self) -> dict[Name, Object]:
        return dict(self.objects.state.get(PODS, {}))

    def run(self, name: Name) -> None:
        """A node takes the pod and starts it."""
        pod = self.objects.find(self._pods, *name)
        if pod is None or "deletionTimestamp" in pod["metadata"] or pod["status"].get("phase") != "Pending":
            return
        if not pod["spec"].get("nodeName"):
            spec = {**pod["spec"], "nodeName": "node-1"}
            pod = self.objects.update(self._pods, *name, {**pod, "spec": spec}, _NODE)
        ready = "False" if name[1] in self.unready else "True"
        self.set_status(name, {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]})

    def fail(self, name: Name, phase: str = "Failed") -> None:
        """The pod ends by itself, or is evicted."""
        self.set_status(name, {"phase": phase, "conditions": [{"type": "Ready", "status": "False"}]})

    def set_status(self, name: Name, status: Object) -> None:
        pod = self.objects.find(self._pods, *name)
        if pod is not None and pod["status"].get("phase") not in ("Failed", "Succeeded"):
            self.objects.update(self._pods, *name, {**pod, "status": status}, _NODE, subresource="status")

    def end(self, name: Name) -> None:
        """The node has ended a pod that is being deleted."""
        pod = self.objects.find(self._pods, *name)
        if pod is not None and "deletionTimestamp" in pod["metadata"]:
            self.objects.delete(self._pods, *name, _NODE, uid=pod["metadata"]["uid"], grace_s=0)

    def step(self) -> None:
        """Everything that is due at all pods and owners."""
        for name in self.pods():
            self._tend(name)
        self.collect()

    def _tend(self, name: Name) -> None:
        pod = self.objects.find(self._pods, *name)
        if pod is None or name in self.lost:
            return
        if "deletionTimestamp" not in pod["metadata"]:
            self.run(name)
        elif pod["metadata"].get("deletionGracePeriodSeconds"):
            self.end(name)

    # --- owners ---

    def collect(self) -> None:
        """Deletes what has owners of which none is there any more."""
        uids = {obj["metadata"]["uid"] for found in self.objects.state.values() for obj in found.values()}
        for key, found in list(self.objects.state.items()):
            for (namespace, name), obj in list(found.items()):
                owners = obj["metadata"].get("ownerReferences") or ()
                if not owners or any(o["uid"] in uids for o in owners) or "deletionTimestamp" in obj["metadata"]:
                    continue
                resource = next(r for r in self.objects.registry.found.values() if r.key == key)
                try:
                    self.objects.delete(resource, namespace, name, _COLLECTOR, uid=obj["metadata"]["uid"])
                except KubeError:  # changed meanwhile: next time
                    continue

    async def follow(self, pause_s: float = 0.05) -> None:
        """Does every step as soon as something has changed, until it is cancelled. ``pause_s``: how long that takes."""
        self._changed |= set(self.pods())
        while True:
            self._news.clear()
            changed, self._changed = self._changed, set()
            for name in sorted(changed):
                self._tend(name)
            if self._orphaned:
                self._orphaned = False
                self.collect()
            await self._news.wait()
            await asyncio.sleep(pause_s)
