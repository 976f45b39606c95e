"""``kubectl greenroom``: the same commands at the Greenroom of a cluster, by a kubeconfig's context.

The control plane's Service is looked up, a ready pod of it taken, and a connection forwarded to it through the API
server; token and certificate authority are read from the installation's secrets. All of it with the rights of whoever
runs the command: Greenroom gives nobody any that the cluster does not.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.api.access import Access
from greenroom.api.client import Client
from greenroom.core.errors import FailedPrecondition, GreenroomError, NotFound, Unavailable
from greenroom.operator import kubeconfig
from greenroom.operator.client import Kube, pods_path
from greenroom.operator.kubeconfig import Connection
from greenroom.operator.portforward import Forward, Target
from greenroom.operator.transport import HttpTransport

#: What an installation is called: its namespace, its Service, the Service's port, its secrets.
SYSTEM_NAMESPACE = "greenroom"
SERVICE = "greenroom"
PORT_NAME = "api"
TOKENS_SECRET, TOKEN_KEY = "greenroom-tokens", "api"
TLS_SECRET, AUTHORITY_KEY = "greenroom-tls", "ca.crt"
#: A few requests to an API server, and perhaps a program that fetches a token for it.
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Place:
    """Which installation.

    Args:
        connection: to its API server, as it is now.
        context: of the kubeconfig at ``path``, from where credentials are read again; "" for the current one, and the
            usual place.
        namespace: where Greenroom is installed.
    """

    connection: Connection
    context: str = ""
    path: str = ""
    namespace: str = SYSTEM_NAMESPACE


class ClusterClient(Client):
    """A `Client` with the way to it; closing it ends that too."""

    def __init__(self, place: Place) -> None:
        self._tunnel = Tunnel(place)
        access = self._tunnel.start()
        try:
            super().__init__(self._tunnel.address, access)
        except BaseException:
            self._tunnel.stop()
            raise

    @property
    def trouble(self) -> GreenroomError | None:
        return self._tunnel.trouble

    def close(self) -> None:
        super().close()
        self._tunnel.stop()


class Tunnel:
    """`Forward` on an event loop of its own, in a thread, so that blocking clients may use it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._directory = tempfile.mkdtemp(prefix="greenroom-")  # only its owner may enter it
        self._socket = Path(self._directory) / "api.sock"
        self._ready = threading.Event()
        self._access: Access | None = None
        self._failure: BaseException | None = None
        self._forward: Forward | None = None
        self._thread = threading.Thread(target=self._run, name="port-forward", daemon=True)

    @property
    def address(self) -> str:
        return f"unix:{self._socket}"

    @property
    def trouble(self) -> GreenroomError | None:
        return self._forward.trouble if self._forward is not None else None

    def start(self) -> Access:
        """Returns when connections are taken.

        Raises:
            GreenroomError: the cluster, the installation or the rights to it are not there; says which.
        """
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise Unavailable(f"the cluster did not answer for {START_TIMEOUT_S:g} s; is its API server reachable?")
        if self._failure is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise self._failure
        assert self._access is not None
        return self._access

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(STOP_TIMEOUT_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with installation(self._place) as found:
            token, authority = await found.credentials()
            certificate = self._socket.with_name("ca.crt")
            certificate.write_text(authority)
            self._access = Access(ca=certificate, token=token, server_name=SERVICE, tunnel=True)
            await found.target()  # so that what is missing is said at once
            self._forward = Forward(found.transport, found.target)
            async with self._forward.listening(self._socket):
                self._ready.set()
                await self._end.wait()


@contextlib.asynccontextmanager
async def installation(place: Place) -> AsyncIterator[Installation]:
    ready = [place.connection]

    def connect() -> Connection:
        return ready.pop() if ready else kubeconfig.load(place.context, place.path)

    async with HttpTransport(connect, "kubectl-greenroom") as transport:
        yield Installation(transport, place.namespace, place.connection.server)


@dataclass(frozen=True)
class Installation:
    """A Greenroom in a namespace of a cluster."""

    transport: HttpTransport
    namespace: str
    server: str

    async def target(self) -> Target:
        """A pod of the control plane that is ready, and the port of its API.

        Raises:
            NotFound: there is no Greenroom.
            Unavailable: none of its pods is ready.
        """
        service = await self._get("services", SERVICE)
        if service is None:
            raise NotFound(
                f"there is no Service {self.namespace}/{SERVICE} at {self.server}: Greenroom is not installed there, "
                "or in another namespace (--system-namespace), or this is the wrong cluster (--context)"
            )
        port = next((p for p in service["spec"].get("ports") or () if p.get("name") == PORT_NAME), None)
        selector = service["spec"].get("selector") or {}
        if port is None or not selector:
            raise FailedPrecondition(
                f"Service {self.namespace}/{SERVICE} has no port {PORT_NAME!r} or no selector: another program's?"
            )
        pods = await self._pods(",".join(f"{name}={value}" for name, value in sorted(selector.items())))
        ready = [pod for pod in pods if _is_ready(pod)]
        if not ready:
            shown = ", ".join(_shown(pod) for pod in pods[:5]) or "it has none"
            raise Unavailable(
                f"no pod of the control plane is ready in namespace {self.namespace}: {shown}; see `kubectl -n "
                f"{self.namespace} describe pods` and `kubectl -n {self.namespace} logs deploy/{SERVICE}`",
                reason="NO_READY_POD",
            )
        pod = ready[0]
        return self.namespace, pod["metadata"]["name"], _number(port, pod)

    async def credentials(self) -> tuple[str, str]:
        """Token and authority (PEM): what the environment says of them, else what the installation's secrets do."""
        given = Access.from_environment()
        token, authority = given.token, ""
        if not token and given.token_file is not None:
            token = _first_line(_read(given.token_file))
        if given.ca is not None:
            authority = _read(given.ca)
        return (
            token or _first_line(await self._secret(TOKENS_SECRET, TOKEN_KEY)),
            authority or await self._secret(TLS_SECRET, AUTHORITY_KEY),
        )

    async def _secret(self, name: str, key: str) -> str:
        secret = await self._get("secrets", name)
        data = (secret or {}).get("data") or {}
        if key not in data:
            missing = "does not exist" if secret is None else f"has no key {key!r}"
            raise NotFound(
                f"secret {self.namespace}/{name} {missing}, and with it what lets clients in; install Greenroom there "
                "(docs/kubernetes.md), or name its namespace with --system-namespace"
            )
        try:
            return base64.b64decode(data[key], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise FailedPrecondition(f"key {key!r} of secret {self.namespace}/{name} is no text: {error}") from error

    async def _get(self, plural: str, name: str) -> dict[str, Any] | None:
        with self._explained(f"read {plural}/{name}"):
            return await Kube(self.transport).get_raw(f"/api/v1/namespaces/{self.namespace}/{plural}/{name}")

    async def _pods(self, selector: str) -> list[dict[str, Any]]:
        with self._explained("list pods"):
            found = await Kube(self.transport).list(
                pods_path(self.namespace), dict[str, Any], {"labelSelector": selector}
            )
        return found.items

    @contextlib.contextmanager
    def _explained(self, what: str) -> Any:
        try:
            yield
        except FailedPrecondition as error:
            if error.metadata.get("status") not in ("401", "403"):
                raise
            raise FailedPrecondition(
                f"you may not {what} in namespace {self.namespace}: {error.message}; whoever runs the cluster can "
                f"allow it: `kubectl -n {self.namespace} create rolebinding NAME --role=greenroom-client --user=YOU`",
                reason="NO_RIGHTS",
            ) from error


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def _shown(pod: dict[str, Any]) -> str:
    """Its name and what it waits for, as kubectl's STATUS column."""
    status = pod.get("status") or {}
    waits = (c.get("state", {}).get("waiting", {}).get("reason") for c in status.get("containerStatuses") or ())
    state = "Terminating" if "deletionTimestamp" in pod["metadata"] else status.get("phase", "Pending")
    return f"{pod['metadata']['name']} is {next((reason for reason in waits if reason), state)}"


def _number(port: dict[str, Any], pod: dict[str, Any]) -> int:
    """Of the pod's port that the Service's leads to, which may be given by name."""
    target = port.get("targetPort") or port["port"]
    if isinstance(target, int):
        return target
    for container in pod["spec"].get("containers") or ():
        for one in container.get("ports") or ():
            if one.get("name") == target:
                return int(one["containerPort"])
    raise FailedPrecondition(f"pod {pod['metadata']['name']} has no port {target!r}, which its Service leads to")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"can't read {path}: {error}", reason="FILE_UNREADABLE") from error


def _first_line(text: str) -> str:
    """A file of tokens may hold several, while one replaces another; the first is the newest."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
