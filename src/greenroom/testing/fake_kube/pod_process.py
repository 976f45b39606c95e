"""One pod of `greenroom.testing.fake_kube.kubelet`: its containers, from the first to the last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from greenroom.testing.fake_kube.objects import Name, Object
from greenroom.testing.fake_kube.pod_setup import Setup, Unready

if TYPE_CHECKING:
    from greenroom.testing.fake_kube.kubelet import Kubelet

#: Pauses of a real kubelet, before `Kubelet.speed`: between tries of what is not there yet, and between restarts.
RETRY_S = 2.0
BACKOFF_S = (10.0, 300.0)
#: What is shorter than this after `Kubelet.speed` would be a busy loop.
LEAST_S = 0.05


class PodProcess:
    """Attributes:
    directory: of its volumes and its log; removed when it has ended.
    """

    def __init__(self, kubelet: Kubelet, name: Name, pod: Object, directory: Path, address: str) -> None:
        self._kubelet = kubelet
        self.name = name
        self.uid = str(pod["metadata"]["uid"])
        self.directory = directory
        self.log = directory / "log"
        self._setup = Setup(pod, directory, address, lambda secret: kubelet.secret(name[0], secret))
        self._pod = pod
        self._address = address
        self._ending = asyncio.Event()
        self._grace_s = 30.0
        self._process: asyncio.subprocess.Process | None = None
        self._restarts = 0
        self._ready = False

    # --- what it is told ---

    def wanted(self, pod: Object) -> None:
        """The pod as it is now: it may be being deleted."""
        if "deletionTimestamp" in pod["metadata"]:
            self._grace_s = float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
            self._ending.set()

    def secrets_changed(self) -> None:
        """A kubelet renews mounted secrets in place."""
        with contextlib.suppress(Unready):
            self._setup.write_secrets()

    def kill(self) -> None:
        """Everything of it, now: with the first of its PID namespace all others die, and its parent ends after them."""
        if self._process is None or self._process.returncode is not None:
            return
        pid = self.main_pid
        with contextlib.suppress(ProcessLookupError):
            if pid:
                os.kill(pid, signal.SIGKILL)
            else:
                self._process.kill()

    @property
    def main_pid(self) -> int:
        """The container's own first process; what we have started is its parent."""
        if self._process is None or self._process.returncode is not None:
            return 0
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(path.read_text().split()[0])
        return 0

    # --- its life ---

    async def run(self) -> None:
        """From nothing to its end; then nothing of it runs any more."""
        self._kubelet.placed(self.name)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not await self._prepare():
            return
        spec = self._pod["spec"]
        for container in spec.get("initContainers") or ():
            while (code := await self._contain(container, main=False)) != 0:
                if self._ending.is_set() or spec["restartPolicy"] == "Never":
                    self._say("Failed" if code else "Succeeded", "InitFailed")
                    return
                await self._pause()
        await self._run_main(spec["containers"][0], str(spec["restartPolicy"]))

    async def _run_main(self, container: Object, policy: str) -> None:
        while True:
            code = await self._contain(container, main=True)
            self._ready = False
            again = policy == "Always" or (policy == "OnFailure" and code != 0)
            if self._ending.is_set() or not again:
                self._say("Failed" if code else "Succeeded", f"ExitCode{code}")
                return
            self._restarts += 1
            self._say("Running", "CrashLoopBackOff")
            await self._pause()

    async def _prepare(self) -> bool:
        """Volumes and images; waits until there are all of them. False: it is to end before."""
        while not self._ending.is_set():
            try:
                images = [c["image"] for c in self._containers()]
                missing = [image for image in images if image not in self._kubelet.images]
                if missing:
                    raise Unready("ImagePullBackOff", f'Back-off pulling image "{missing[0]}"')
                self._setup.make_volumes()
                return True
            except Unready as error:
                self._say("Pending", error.reason, error.message)
                await self._wait(RETRY_S)
        return False

    def _containers(self) -> list[Object]:
        spec = self._pod["spec"]
        return [*(spec.get("initContainers") or ()), *spec["containers"]]

    async def _pause(self) -> None:
        first, most = BACKOFF_S
        await self._wait(min(first * 2.0 ** min(self._restarts, 10), most))

    async def _wait(self, seconds: float) -> None:
        """Less when it is to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(LEAST_S, seconds / self._kubelet.speed)):
                await self._ending.wait()

    # --- a container ---

    async def _contain(self, container: Object, *, main: bool) -> int:
        """Runs it to its end; its exit code."""
        environment = self._setup.environment(container)
        command, args = (self._setup.words(container.get(key) or (), environment) for key in ("command", "args"))
        program = command or self._kubelet.images[container["image"]]  # that is a path of this machine, not the pod's
        with self.log.open("ab") as log:
            process = self._process = await asyncio.create_subprocess_exec(
                *_ISOLATED,
                *program,
                *args,
                env=environment,
                cwd=self.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._say("Running" if main else "Pending", "Started")
        tasks = [asyncio.create_task(self._end())]
        if main:
            tasks.append(asyncio.create_task(self._probe(container)))
        try:
            return await process.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.kill()
            await process.wait()

    async def _end(self) -> None:
        """SIGTERM when the pod is to go, SIGKILL after its grace."""
        await self._ending.wait()
        self._ready = False
        self._signal(signal.SIGTERM)
        await asyncio.sleep(self._grace_s)
        self.kill()

    def _signal(self, number: int) -> None:
        pid = self.main_pid
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def _probe(self, container: Object) -> None:
        """Startup, then readiness and liveness, for as long as it runs."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
            await self._until_started(session, container)
            failures = 0
            while True:
                ready = await self._ask(session, container, "readinessProbe")
                if ready != self._ready and not self._ending.is_set():
                    self._ready = ready
                    self._say("Running", "Ready" if ready else "NotReady")
                failures = 0 if await self._ask(session, container, "livenessProbe") else failures + 1
                if failures >= int((container.get("livenessProbe") or {}).get("failureThreshold", 3)):
                    self._signal(signal.SIGTERM)
                    await asyncio.sleep(self._grace_s / self._kubelet.speed)
                    self.kill()
                await asyncio.sleep(self._period(container.get("readinessProbe")))

    async def _until_started(self, session: aiohttp.ClientSession, container: Object) -> None:
        while not await self._ask(session, container, "startupProbe"):  # noqa: ASYNC110 - as a kubelet does
            await asyncio.sleep(self._period(container.get("startupProbe")))

    def _period(self, probe: Object | None) -> float:
        return max(LEAST_S, float((probe or {}).get("periodSeconds", 10)) / self._kubelet.speed)

    async def _ask(self, session: aiohttp.ClientSession, container: Object, kind: str) -> bool:
        probe = container.get(kind)
        if not probe:
            return True
        ports = {p.get("name"): p["containerPort"] for p in container.get("ports") or ()}
        if "tcpSocket" in probe:
            port = probe["tcpSocket"]["port"]
            return await self._listens(int(ports.get(port, port)))
        get = probe["httpGet"]
        url = f"http://{self._address}:{ports.get(get['port'], get['port'])}{get['path']}"
        try:
            async with session.get(url) as answer:
                return 200 <= answer.status < 400
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _listens(self, port: int) -> bool:
        try:
            async with asyncio.timeout(3):
                _, writer = await asyncio.open_connection(self._address, port)
        except (TimeoutError, OSError):
            return False
        writer.close()
        return True

    # --- what is said of it ---

    def _say(self, phase: str, reason: str, message: str = "") -> None:
        ready = "True" if self._ready and phase == "Running" else "False"
        state: Object = {"running": {}} if phase == "Running" else {"waiting": {"reason": reason, "message": message}}
        if phase in ("Failed", "Succeeded"):
            state = {"terminated": {"reason": reason}}
        main = self._pod["spec"]["containers"][0]
        told = {
            "name": main["name"],
            "image": main["image"],
            "ready": ready == "True",
            "restartCount": self._restarts,
            "state": state,
        }
        conditions = [{"type": kind, "status": ready} for kind in ("Ready", "ContainersReady")]
        self._kubelet.set_status(
            self.name,
            {
                "phase": phase,
                "podIP": self._address,
                "conditions": [{"type": "PodScheduled", "status": "True"}, *conditions],
                "containerStatuses": [told],
            },
        )


def _isolated() -> tuple[str, ...]:
    """A PID namespace with its own ``/proc``: all in it dies with its first process, and that with us."""
    ids = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ("unshare", *ids, "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--")


_ISOLATED = _isolated()
