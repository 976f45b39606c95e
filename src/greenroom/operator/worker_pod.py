"""How a worker's pod is made: one agent container, and one emptyDir for everything that it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from greenroom.core.assets import Asset
from greenroom.core.ledger.records import Slot
from greenroom.core.quantity import format_bytes, format_cpus
from greenroom.operator import isolation
from greenroom.operator.installation import Installation
from greenroom.operator.objects import (
    API_VERSION,
    EPOCH_LABEL,
    FINALIZER,
    ORDINAL_LABEL,
    POOL_LABEL,
    POOL_UID_LABEL,
    Meta,
)
from greenroom.operator.specs import WorkerPoolSpec

#: Longest value of a label.
MAX_LABEL_CHARS = 63
#: Between the end of the agent's own drain and the kubelet's kill.
KILL_AFTER_S = 10
DATA = "/var/lib/greenroom"
#: Programs that sandboxes are run with, when a SandboxConfig names them; first on the agent's PATH.
RUNTIME = f"{DATA}/runtime"
SECRETS = "/etc/greenroom"
#: Where gateways reach the worker's actors, and where the kubelet asks how it is. On the pod's own address: whatever
#: else is in its network namespaces has no business there.
ACTORS_PORT, HEALTH_PORT = 7435, 9090
#: What the image's PATH is otherwise.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Parts of the volume: above the first what nobody uses of images goes, and they never take more than the second. The
#: rest is for runtimes, for snapshots on their way, and for what the agent notes. A pod that takes more than its volume
#: may is ended by the kubelet at once, and what was awake is lost; the node's disk has room long after that.
IMAGES_HIGH, IMAGES_LIMIT = 0.5, 0.75
ASSETS_VARIABLE = "GREENROOM_ASSETS"


def labels(pool: Meta, slot: Slot) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "greenroom",
        "app.kubernetes.io/component": "worker",
        "app.kubernetes.io/managed-by": "greenroom-operator",
        POOL_LABEL: pool.name,
        POOL_UID_LABEL: pool.uid,
        EPOCH_LABEL: str(slot.epoch),
        ORDINAL_LABEL: str(slot.ordinal),
    }


def owners(pool: Meta) -> list[dict[str, Any]]:
    reference = {"apiVersion": API_VERSION, "kind": "WorkerPool", "name": pool.name, "uid": pool.uid}
    return [{**reference, "controller": True, "blockOwnerDeletion": True}]


def make(
    pool: Meta,
    spec: WorkerPoolSpec,
    slot: Slot,
    name: str,
    installation: Installation,
    assets: Sequence[Asset] = (),
) -> dict[str, Any]:
    """The pod of this slot, the same whenever it is made from the same.

    Args:
        assets: what its sandboxes are run with, fetched before the agent starts.
    """
    worker = spec.worker
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": pool.namespace,
            "labels": labels(pool, slot),
            "annotations": {**isolation.apparmor(spec.backend, "agent"), **worker.annotations},
            "ownerReferences": owners(pool),
            "finalizers": [FINALIZER],
        },
        "spec": {
            "serviceAccountName": worker.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # One that crashed goes on with what is on its disk; one that ended in order is replaced by another.
            "restartPolicy": "OnFailure",
            "terminationGracePeriodSeconds": math.ceil(spec.grace_s) + KILL_AFTER_S,
            "nodeSelector": dict(worker.node_selector),
            "securityContext": isolation.pod(spec.backend),
            "containers": [_agent(pool, spec, slot, installation, with_runtime=bool(assets))],
            "volumes": _volumes(spec, installation),
        },
    }
    if assets:
        pod["spec"]["initContainers"] = [_fetch(spec, installation, assets)]
    if installation.pull_secrets:
        pod["spec"]["imagePullSecrets"] = [{"name": secret} for secret in installation.pull_secrets]
    if worker.runtime_class:
        pod["spec"]["runtimeClassName"] = worker.runtime_class
    if worker.priority_class:
        pod["spec"]["priorityClassName"] = worker.priority_class
    return pod


def _agent(
    pool: Meta, spec: WorkerPoolSpec, slot: Slot, installation: Installation, *, with_runtime: bool
) -> dict[str, Any]:
    worker = spec.worker
    resources = {"cpu": format_cpus(worker.cpus), "memory": format_bytes(worker.memory_bytes)}
    probe = {"periodSeconds": 5, "timeoutSeconds": 3}
    container: dict[str, Any] = {
        "name": "agent",
        "image": worker.image or installation.image,
        "args": ["agent"],
        "env": _environment(pool, spec, slot, installation, with_runtime=with_runtime),
        "resources": {
            "requests": {**resources, "ephemeral-storage": format_bytes(worker.storage_bytes)},
            "limits": {"memory": resources["memory"]},
        },
        # SIGTERM alone makes it suspend its actors and end; nothing needs to come before that.
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "health"}, **probe},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": "health"}, **probe, "failureThreshold": 6},
        "startupProbe": {"httpGet": {"path": "/livez", "port": "health"}, **probe, "failureThreshold": 24},
        "ports": [
            {"name": "actors", "containerPort": ACTORS_PORT},
            {"name": "health", "containerPort": HEALTH_PORT},
        ],
        "securityContext": isolation.container(spec.backend),
        "volumeMounts": _mounts(spec, installation),
    }
    if installation.snapshots_secret:
        container["envFrom"] = [{"secretRef": {"name": installation.snapshots_secret}}]
    return container


def _environment(
    pool: Meta, spec: WorkerPoolSpec, slot: Slot, installation: Installation, *, with_runtime: bool
) -> list[dict[str, Any]]:
    own = {"NAME": "metadata.name", "UID": "metadata.uid", "IP": "status.podIP"}
    fields = {f"GREENROOM_POD_{key}": path for key, path in own.items()}
    worker = spec.worker
    plain = {
        "GREENROOM_WORKER": "$(GREENROOM_POD_NAME)",
        "GREENROOM_POOL": pool.name,
        "GREENROOM_POOL_UID": pool.uid,
        "GREENROOM_EPOCH": str(slot.epoch),
        "GREENROOM_ORDINAL": str(slot.ordinal),
        "GREENROOM_BACKEND": spec.backend,
        "GREENROOM_SLOTS": str(spec.slots),
        "GREENROOM_STATE_DIR": f"{DATA}/worker",
        "GREENROOM_IMAGES": f"{DATA}/images",
        "GREENROOM_IMAGES_HIGH": str(int(worker.storage_bytes * IMAGES_HIGH)),
        "GREENROOM_IMAGES_LIMIT": str(int(worker.storage_bytes * IMAGES_LIMIT)),
        "GREENROOM_SNAPSHOTS": installation.snapshots,
        "GREENROOM_CONTROL": ",".join(installation.control),
        "GREENROOM_CA": f"{SECRETS}/tls/ca.crt" if installation.tls_secret else "",
        "GREENROOM_TOKEN_FILE": f"{SECRETS}/token/agents" if installation.token_secret else "",
        "GREENROOM_SERVE": f"$(GREENROOM_POD_IP):{ACTORS_PORT}",
        "GREENROOM_HEALTH": f"$(GREENROOM_POD_IP):{HEALTH_PORT}",
        "GREENROOM_DRAIN_TIMEOUT": f"{spec.grace_s:g}",
        # Nothing but the volume can be written to.
        "TMPDIR": DATA,
        "PATH": f"{RUNTIME}:{PATH}" if with_runtime else "",
    }
    from_pod = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    return from_pod + [{"name": name, "value": value} for name, value in plain.items() if value]


def _fetch(spec: WorkerPoolSpec, installation: Installation, assets: Sequence[Asset]) -> dict[str, Any]:
    """Fetches what sandboxes are run with, and does not end well before all of it is what its digests say. The network
    and the volume are all that it needs."""
    context = {**isolation.container(""), "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False}
    if not isolation.RIGHTS.get(spec.backend, isolation.UNKNOWN).root:
        context = isolation.container("")
    return {
        "name": "assets",
        "image": spec.worker.image or installation.image,
        "args": ["assets", "--into", RUNTIME],
        "env": [
            {"name": ASSETS_VARIABLE, "value": msgspec.json.encode(list(assets)).decode()},
            {"name": "TMPDIR", "value": DATA},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": context,
        "volumeMounts": [{"name": "data", "mountPath": DATA}],
    }


def _mounts(spec: WorkerPoolSpec, installation: Installation) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "data", "mountPath": DATA}]
    if spec.backend == "gvisor":  # names of network namespaces: /run/netns, where tools look for them
        mounts.append({"name": "data", "mountPath": "/run", "subPath": "run"})
    if installation.tls_secret:
        mounts.append({"name": "tls", "mountPath": f"{SECRETS}/tls", "readOnly": True})
    if installation.token_secret:
        mounts.append({"name": "token", "mountPath": f"{SECRETS}/token", "readOnly": True})
    return mounts


def _volumes(spec: WorkerPoolSpec, installation: Installation) -> list[dict[str, Any]]:
    """Of the secrets only the entries that an agent needs: not the control plane's key, nor the token of people."""
    volumes: list[dict[str, Any]] = [
        {"name": "data", "emptyDir": {"sizeLimit": format_bytes(spec.worker.storage_bytes)}}
    ]
    for name, secret, entry in (
        ("tls", installation.tls_secret, "ca.crt"),
        ("token", installation.token_secret, "agents"),
    ):
        if secret:
            only = {"secretName": secret, "defaultMode": 0o440, "items": [{"key": entry, "path": entry}]}
            volumes.append({"name": name, "secret": only})
    return volumes
