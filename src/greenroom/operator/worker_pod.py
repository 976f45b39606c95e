"""How a worker's pod is made: one agent container, and one emptyDir for everything that it writes."""

from __future__ import annotations

import math
from typing import Any

from greenroom.core.ledger.records import Slot
from greenroom.core.quantity import format_bytes, format_cpus
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


def make(pool: Meta, spec: WorkerPoolSpec, slot: Slot, name: str) -> dict[str, Any]:
    """The pod of this slot, the same whenever it is made from the same spec."""
    worker = spec.worker
    resources = {"cpu": format_cpus(worker.cpus), "memory": format_bytes(worker.memory_bytes)}
    environment = [
        {"name": "GREENROOM_POOL", "value": pool.name},
        {"name": "GREENROOM_BACKEND", "value": spec.backend},
        {"name": "GREENROOM_SLOTS", "value": str(spec.slots)},
        {"name": "GREENROOM_EPOCH", "value": str(slot.epoch)},
        {"name": "GREENROOM_ORDINAL", "value": str(slot.ordinal)},
        {"name": "GREENROOM_POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": "GREENROOM_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "GREENROOM_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    container = {
        "name": "agent",
        "image": worker.image,
        "args": ["agent", name],
        "env": environment,
        "resources": {"requests": resources, "limits": {"memory": resources["memory"]}},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "health"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": "health"}, "periodSeconds": 10, "failureThreshold": 6},
        "ports": [{"name": "health", "containerPort": 9090}],
        # Its actors are suspended before it is told to end: a drain that takes longer than SIGTERM's handler may.
        "lifecycle": {"preStop": {"exec": {"command": ["greenroom", "agent", "--drain", name]}}},
        "volumeMounts": [{"name": "data", "mountPath": DATA}],
    }
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": pool.namespace,
            "labels": labels(pool, slot),
            "annotations": dict(worker.annotations),
            "ownerReferences": owners(pool),
            "finalizers": [FINALIZER],
        },
        "spec": {
            "serviceAccountName": worker.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": math.ceil(spec.grace_s) + KILL_AFTER_S,
            "nodeSelector": dict(worker.node_selector),
            "containers": [container],
            "volumes": [{"name": "data", "emptyDir": {"sizeLimit": format_bytes(worker.storage_bytes)}}],
        },
    }
    if worker.runtime_class:
        pod["spec"]["runtimeClassName"] = worker.runtime_class
    if worker.priority_class:
        pod["spec"]["priorityClassName"] = worker.priority_class
    return pod
