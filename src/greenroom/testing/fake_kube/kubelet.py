"""A node of the fake cluster that really runs pods: each container is a process tree of its own.

As a kubelet: volumes, environment (fields of the pod, entries of secrets, ``$(NAME)``), init containers, probes over
HTTP, restarts with growing pauses, SIGTERM and SIGKILL after the grace period, and what became of it in the status.
Each pod has an address of its own on loopback, so that all of them may use the same ports. A PID namespace makes sure
that nothing outlives a container.

What a container sees of its file system is the machine's: there is no image, only the program that `images` says. Where
a mount path begins a word of its environment or arguments, the volume's real directory is put there instead. Security
contexts and resources are not enforced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from greenroom.testing.fake_kube.cluster import Cluster
from greenroom.testing.fake_kube.errors import KubeError
from greenroom.testing.fake_kube.objects import Entry, Name, Object
from greenroom.testing.fake_kube.pod_process import PodProcess

GREENROOM = (sys.executable, "-m", "greenroom")
SECRETS = ("", "secrets")
#: Of 127.0.0.0/8, which is all loopback, those that pods get: others than those of tests that run beside this one.
NETWORK = f"127.{64 + os.getpid() % 128}"


@dataclass
class Kubelet(Cluster):
    """An async context manager; run `follow` in it. What still runs when it is left is killed.

    Args:
        directory: of its pods; short, because sockets' paths are limited.
        images: what can be pulled, and the program of each; others stay in ``ImagePullBackOff``.
        speed: how much faster than a real one it probes and restarts.
        network: from which pods get their addresses; two kubelets at a time need two.
    """

    directory: Path = Path("/nonexistent")
    images: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"greenroom-agent:latest": GREENROOM})
    speed: float = 10.0
    network: str = NETWORK

    def __post_init__(self) -> None:
        super().__post_init__()
        self._running: dict[str, tuple[PodProcess, asyncio.Task[None]]] = {}
        self._addresses = 0
        secrets = self.objects.registry.get("", "v1", "secrets")
        assert secrets is not None
        self._secrets = secrets

    async def __aenter__(self) -> Kubelet:
        return self

    async def __aexit__(self, *_: object) -> None:
        for pod, task in self._running.values():
            pod.kill()
            task.cancel()
        await asyncio.gather(*(task for _, task in self._running.values()), return_exceptions=True)

    # --- what it is told ---

    def _heard(self, entry: Entry) -> None:
        super()._heard(entry)
        if entry.key == SECRETS:
            for pod, _ in self._running.values():
                pod.secrets_changed()

    def _tend(self, name: Name) -> None:
        pod = self.objects.find(self._pods, *name)
        if pod is None or name in self.lost:
            return
        uid = pod["metadata"]["uid"]
        known = self._running.get(uid)
        if known is not None:
            known[0].wanted(pod)
        elif "deletionTimestamp" in pod["metadata"]:
            if pod["metadata"].get("deletionGracePeriodSeconds"):
                self.end(name)  # it never began
        elif pod["status"].get("phase") == "Pending":
            self._begin(name, pod)

    def _begin(self, name: Name, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        self._addresses += 1
        address = f"{self.network}.{self._addresses >> 8}.{self._addresses & 255}"
        directory = self.directory / str(self._addresses)
        process = PodProcess(self, name, pod, directory, address)
        self._running[uid] = process, asyncio.create_task(self._live(process), name=f"pod {name[1]}")

    async def _live(self, process: PodProcess) -> None:
        try:
            await process.run()
            await asyncio.to_thread(shutil.rmtree, process.directory, True)
            with contextlib.suppress(KubeError):
                self.end(process.name)  # and from now on nobody finds anything of it
        finally:
            shutil.rmtree(process.directory, ignore_errors=True)
            self._running.pop(process.uid, None)

    # --- what pods ask ---

    def secret(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """Its entries, in base64; None: there is none."""
        found = self.objects.find(self._secrets, namespace, name)
        return None if found is None else dict(found.get("data") or {})

    def placed(self, name: Name) -> None:
        """The pod is on this node."""
        pod = self.objects.find(self._pods, *name)
        if pod is not None and not pod["spec"].get("nodeName"):
            self.objects.update(self._pods, *name, {**pod, "spec": {**pod["spec"], "nodeName": "node-1"}})

    def log(self, pod: str) -> str:
        """What the containers of the pod of this name have written, while it is there."""
        found = [p for p, _ in self._running.values() if p.name[1] == pod]
        return "".join(p.log.read_text(errors="replace") for p in found if p.log.exists())

    def main_pid(self, pod: str) -> int:
        """Of the pod's container, as the machine knows it; 0 while there is none."""
        found = [p for p, _ in self._running.values() if p.name[1] == pod]
        return found[0].main_pid if found else 0
