"""What a worker's container may do, by backend: as little as its sandboxes can be made with.

Each starts from nothing (all capabilities dropped, no privilege, nothing of the node) and adds what is named here with
its reason. Measured by running the backends with that bounding set alone (`tests/integration/test_worker_rights.py`).

Both make mount and PID namespaces with a file system and a ``/proc`` of their own, which the seccomp and AppArmor
profiles that container runtimes use by default refuse; the boundary around an actor is the sandbox, not the container.
"""

from __future__ import annotations

from typing import Any

from greenroom.core.records import Record


class Rights(Record, frozen=True, kw_only=True):
    """``root``: whether the agent runs as root, in its container. ``capabilities``: as Kubernetes writes them.
    ``unconfined``: without the runtime's seccomp and AppArmor profiles."""

    root: bool
    capabilities: tuple[str, ...] = ()
    unconfined: bool = False


#: Files of images have many owners, and are unpacked, changed and removed as what they are.
_FILES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP")
#: An actor's processes run as the user that its image names, and are ended by the agent.
_USERS = ("KILL", "SETGID", "SETUID", "SETPCAP")
#: Namespaces, and mounts in them. And a view of the container's own control groups that is not read-only.
_NAMESPACES = ("SYS_ADMIN",)
RIGHTS: dict[str, Rights] = {
    # NET_BIND_SERVICE: what an image's program may do that listens on port 80.
    "process": Rights(root=True, capabilities=(*_FILES, *_USERS, *_NAMESPACES, "NET_BIND_SERVICE"), unconfined=True),
    # NET_ADMIN: an interface for each sandbox, in a network namespace of the pod, and its routes. NET_RAW: gVisor's
    # network stack takes packets from that interface. Not SYS_PTRACE: a sandbox traces its own children only.
    "gvisor": Rights(
        root=True,
        capabilities=(*_FILES, *_USERS, *_NAMESPACES, "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"),
        unconfined=True,
    ),
    # It simulates, and makes nothing.
    "sim": Rights(root=False),
}
#: A backend that is not ours: as little as there is; its own image or admission gives it what it needs.
UNKNOWN = Rights(root=False)
#: "nobody", for agents that need not be root.
USER = 65_534


def container(backend: str) -> dict[str, Any]:
    """The ``securityContext`` of the agent's container."""
    rights = RIGHTS.get(backend, UNKNOWN)
    profile = {"type": "Unconfined" if rights.unconfined else "RuntimeDefault"}
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if rights.capabilities:
        capabilities["add"] = sorted(rights.capabilities)
    context: dict[str, Any] = {
        "privileged": False,
        # Kubernetes refuses "false" together with SYS_ADMIN.
        "allowPrivilegeEscalation": "SYS_ADMIN" in rights.capabilities,
        "readOnlyRootFilesystem": True,
        "capabilities": capabilities,
        "seccompProfile": profile,
        "runAsNonRoot": not rights.root,
    }
    return {**context, "runAsUser": 0 if rights.root else USER, "runAsGroup": 0 if rights.root else USER}


def pod(backend: str) -> dict[str, Any]:
    """The ``securityContext`` of the pod: who else may read its volumes."""
    return {} if RIGHTS.get(backend, UNKNOWN).root else {"fsGroup": USER}


def apparmor(backend: str, container: str) -> dict[str, str]:
    """AppArmor by annotation, which all servers take: the field is new in 1.30."""
    if not RIGHTS.get(backend, UNKNOWN).unconfined:
        return {}
    return {f"container.apparmor.security.beta.kubernetes.io/{container}": "unconfined"}
