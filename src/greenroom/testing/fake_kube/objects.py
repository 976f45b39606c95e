"""The log of changes, and the rules by which an object may change.

Every change is one entry with the next resource version; the state is what the entries add up to. Objects in the log
are never changed in place. Source of the rules: Kubernetes documentation, "Kubernetes API Concepts"; k8s.io/apiserver,
registry/generic/registry/store.go (finalizers, graceful deletion, preconditions).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from greenroom.testing.fake_kube import patches, schema
from greenroom.testing.fake_kube.errors import KubeError, already_exists, bad_request, conflict, invalid, not_found
from greenroom.testing.fake_kube.resources import CRD, Registry, Resource, Scale
from greenroom.testing.fake_kube.rules import check_rules
from greenroom.testing.fake_kube.selectors import json_path, set_json_path

Object = dict[str, Any]
#: Namespace ("" of what has none) and name.
Name = tuple[str, str]

#: RFC 1123 subdomain.
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_OBJECT_BYTES = 1_572_864  # etcd's --max-request-bytes
#: Of metadata, what a client can't set.
_SYSTEM_FIELDS = (
    "uid",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "namespace",
    "name",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One change.

    Attributes:
        kind: ``ADDED``, ``MODIFIED`` or ``DELETED``.
        key: of the resource; ``name``: of the object.
        object: after it, or of one that was deleted the last that there was, with this version.
        before: the object before; None when there was none.
        verb: ``create``, ``update``, ``patch``, ``delete``; ``subresource``: which part it was addressed to.
        client: who did it.
        precondition_uid: of a delete, the uid that it was for.
        at: the server's clock.
        sent_at: when its request was sent, by the server's clock; earlier than ``at`` when it was late.
    """

    rv: int
    kind: str
    key: tuple[str, str]
    name: Name
    object: Object
    before: Object | None
    verb: str
    client: str
    at: float
    subresource: str = ""
    precondition_uid: str = ""
    sent_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how. ``manager``: its field manager; ``sent_at``: when it sent the request."""

    client: str = "test"
    manager: str = "unknown"
    sent_at: float | None = None


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), tz=UTC).isoformat().replace("+00:00", "Z")


@dataclass
class Objects:
    """See the module. ``clock``: seconds since the epoch. ``admit``: asked before something is created; may raise."""

    clock: Callable[[], float] = time.time
    admit: list[Callable[[Resource, Object], None]] = field(default_factory=list)
    registry: Registry = field(default_factory=Registry)
    log: list[Entry] = field(default_factory=list)
    state: dict[tuple[str, str], dict[Name, Object]] = field(default_factory=dict)
    on_change: list[Callable[[Entry], None]] = field(default_factory=list)
    _uids: int = 0

    def __post_init__(self) -> None:
        for name in ("default", "kube-system"):
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            resource = self.registry.get("", "v1", "namespaces")
            assert resource is not None
            self.create(resource, "", namespace)

    @property
    def rv(self) -> int:
        return self.log[-1].rv if self.log else 0

    # --- reading ---

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        return self.state.get(resource.key, {}).get((namespace, name))

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        found = self.find(resource, namespace, name)
        if found is None:
            raise not_found(resource.plural, resource.group, name)
        return found

    # --- writing ---

    def create(self, resource: Resource, namespace: str, obj: Object, caller: Caller = Caller()) -> Object:
        metadata = dict(obj.get("metadata") or {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + self._uid()[:5]
        name = metadata.get("name", "")
        if not _SUBDOMAIN.fullmatch(name) or len(name) > 253:
            raise invalid(resource.kind, resource.group, name, [("metadata.name", f'Invalid value: "{name}"')])
        if metadata.get("resourceVersion"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        if resource.namespaced:
            given = metadata.setdefault("namespace", namespace)
            if given != namespace:
                raise bad_request(f"the namespace of the object ({given}) does not match that of the request")
            if ("", namespace) not in self.state.get(("", "namespaces"), {}):
                raise not_found("namespaces", "", namespace)
        else:
            metadata.pop("namespace", None)
        if self.find(resource, namespace, name) is not None:
            raise already_exists(resource.plural, resource.group, name)
        obj = {**obj, "metadata": metadata}
        if resource.status:
            obj.pop("status", None)
        obj = self._valid(resource, obj, None)
        for admit in self.admit:
            admit(resource, obj)
        for field_name in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"):
            metadata.pop(field_name, None)
        obj["metadata"] = {
            **obj["metadata"],
            "uid": self._uid(),
            "creationTimestamp": rfc3339(self.clock()),
            "generation": 1,
        }
        if resource.key == ("", "pods"):
            obj = _new_pod(obj)
        return self._commit("ADDED", resource, (namespace, name), obj, None, "create", caller)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        obj: Object,
        caller: Caller = Caller(),
        *,
        subresource: str = "",
        verb: str = "update",
    ) -> Object:
        """PUT. With a resource version in ``obj`` only if that is still the object's; a custom resource needs one."""
        live = self.get(resource, namespace, name)
        given = obj.get("metadata") or {}
        if resource.custom and verb == "update" and subresource != "scale" and not given.get("resourceVersion"):
            missing = [("metadata.resourceVersion", "Invalid value: 0: must be specified for an update")]
            raise invalid(resource.kind, resource.group, name, missing)
        if given.get("name", name) != name:
            raise bad_request(
                f"the name of the object ({given.get('name')}) does not match the name on the URL ({name})"
            )
        if given.get("resourceVersion") and given["resourceVersion"] != live["metadata"]["resourceVersion"]:
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise conflict(resource.plural, resource.group, name, why)
        if given.get("uid") and given["uid"] != live["metadata"]["uid"]:
            raise conflict(
                resource.plural, resource.group, name, _mismatch("UID", given["uid"], live["metadata"]["uid"])
            )
        after = self._merged(resource, live, obj, subresource)
        after = self._valid(resource, after, live)
        if live["metadata"].get("managedFields") and verb != "apply":
            after = patches.own(live, after, caller.manager)
        if after == live:  # makes no entry; source: k8s.io/apiserver, etcd3 store, GuaranteedUpdate
            return live
        if _finished(resource, after):
            return self._remove(resource, (namespace, name), after, verb, caller, subresource)
        return self._commit("MODIFIED", resource, (namespace, name), after, live, verb, caller, subresource)

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        caller: Caller = Caller(),
        *,
        uid: str = "",
        resource_version: str = "",
        grace_s: int | None = None,
    ) -> Object:
        """Gracefully, when it is a pod that runs; and not before its finalizers are taken away."""
        live = self.get(resource, namespace, name)
        metadata = live["metadata"]
        for what, wanted, have in (
            ("UID", uid, metadata["uid"]),
            ("ResourceVersion", resource_version, metadata["resourceVersion"]),
        ):
            if wanted and wanted != have:
                raise conflict(resource.plural, resource.group, name, _mismatch(what, wanted, have))
        grace = _grace(resource, live, grace_s)
        if "deletionTimestamp" in metadata:
            old = metadata.get("deletionGracePeriodSeconds", 0)
            if grace >= old:
                return live
        after = {
            **live,
            "metadata": {
                **metadata,
                "deletionTimestamp": metadata.get("deletionTimestamp") or rfc3339(self.clock() + grace),
                "deletionGracePeriodSeconds": grace,
            },
        }
        if _finished(resource, after):
            return self._remove(resource, (namespace, name), after, "delete", caller, "", uid)
        return self._commit("MODIFIED", resource, (namespace, name), after, live, "delete", caller, "", uid)

    # --- inside ---

    def _uid(self) -> str:
        self._uids += 1
        text = hashlib.sha256(f"uid {self._uids}".encode()).hexdigest()
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:32]}"

    def _merged(self, resource: Resource, live: Object, obj: Object, subresource: str) -> Object:
        """The object as this request may make it: each subresource writes its own part."""
        if subresource == "scale":
            assert resource.scale is not None
            replicas = (obj.get("spec") or {}).get("replicas", 0)
            changed = set_json_path(live, resource.scale.spec_path, replicas)
            return _generation(live, changed)
        given = obj.get("metadata") or {}
        if subresource == "status":
            after = {**live}
            after.pop("status", None)
            return {**after, "status": obj["status"]} if "status" in obj else after
        kept = {name: live["metadata"][name] for name in _SYSTEM_FIELDS if name in live["metadata"]}
        metadata = {k: v for k, v in given.items() if k not in _SYSTEM_FIELDS and k != "resourceVersion"}
        if "managedFields" in live["metadata"]:
            metadata.setdefault("managedFields", live["metadata"]["managedFields"])
        added = set(metadata.get("finalizers") or ()) - set(live["metadata"].get("finalizers") or ())
        if "deletionTimestamp" in kept and added:
            what = (
                f"no new finalizers can be added if the object is being deleted, found new finalizers {sorted(added)}"
            )
            raise invalid(resource.kind, resource.group, kept["name"], [("metadata.finalizers", f"Forbidden: {what}")])
        after = {**obj, "metadata": {**metadata, **kept, "resourceVersion": live["metadata"]["resourceVersion"]}}
        if resource.status:
            after.pop("status", None)
            if "status" in live:
                after["status"] = live["status"]
        return _generation(live, after)

    def _valid(self, resource: Resource, obj: Object, live: Object | None) -> Object:
        obj = {**obj, "apiVersion": resource.api_version, "kind": resource.kind}
        causes = _metadata_causes(obj["metadata"])
        if resource.key == CRD.key and live is not None:
            causes += _version_causes(obj, live)
        if resource.schema is not None:
            obj = schema.default(schema.prune(obj, resource.schema, "", [], root=True), resource.schema)
            causes += schema.check(obj, resource.schema)
            causes += check_rules(resource.schema, obj, live) if not causes else []
        if causes:
            raise invalid(resource.kind, resource.group, obj["metadata"]["name"], causes)
        if len(repr(obj)) > MAX_OBJECT_BYTES:
            raise KubeError(413, "RequestEntityTooLarge", "etcdserver: request is too large")
        return obj

    def _remove(
        self,
        resource: Resource,
        name: Name,
        obj: Object,
        verb: str,
        caller: Caller,
        subresource: str = "",
        precondition_uid: str = "",
    ) -> Object:
        before = self.state[resource.key][name]
        return self._commit("DELETED", resource, name, obj, before, verb, caller, subresource, precondition_uid)

    def _commit(
        self,
        kind: str,
        resource: Resource,
        name: Name,
        obj: Object,
        before: Object | None,
        verb: str,
        caller: Caller,
        subresource: str = "",
        precondition_uid: str = "",
    ) -> Object:
        rv = self.rv + 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(rv)}}
        objects = self.state.setdefault(resource.key, {})
        if kind == "DELETED":
            del objects[name]
        else:
            objects[name] = obj
        if resource.key == CRD.key:
            obj = self._define(kind, name, obj)
        now = self.clock()
        sent_at = now if caller.sent_at is None else caller.sent_at
        entry = Entry(
            rv, kind, resource.key, name, obj, before, verb, caller.client, now, subresource, precondition_uid, sent_at
        )
        self.log.append(entry)
        for listener in self.on_change:
            listener(entry)
        return obj

    def _define(self, kind: str, name: Name, crd: Object) -> Object:
        if kind == "DELETED":
            self.registry.undefine(crd)
            return crd
        self.registry.define(crd)
        storage = [v["name"] for v in crd["spec"]["versions"] if v.get("storage")]
        if (crd.get("status") or {}).get("conditions"):
            # Objects of an earlier storage version stay as they are until each is written again.
            stored = crd["status"].get("storedVersions", [])
            crd["status"] = {**crd["status"], "storedVersions": [*stored, *(v for v in storage if v not in stored)]}
            return crd
        when = rfc3339(self.clock())
        conditions = [
            {"type": t, "status": "True", "reason": r, "message": "", "lastTransitionTime": when}
            for t, r in (("NamesAccepted", "NoConflicts"), ("Established", "InitialNamesAccepted"))
        ]
        crd["status"] = {"conditions": conditions, "acceptedNames": crd["spec"]["names"], "storedVersions": storage}
        self.state[CRD.key][name] = crd
        return crd

    # --- subresources ---

    def scale_of(self, resource: Resource, obj: Object) -> Object:
        assert resource.scale is not None
        return scale_object(resource.scale, obj)


def scale_object(scale: Scale, obj: Object) -> Object:
    """The ``Scale`` that an object with this subresource shows. Source: k8s.io/apiextensions-apiserver,
    registry/customresource (`scaleFromCustomResource`)."""
    replicas = json_path(obj, scale.spec_path)
    if replicas is None:
        raise KubeError(500, "InternalError", f'the spec replicas field "{scale.spec_path}" does not exist')
    metadata = {k: obj["metadata"][k] for k in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": {"replicas": replicas},
        "status": {
            "replicas": json_path(obj, scale.status_path) or 0,
            "selector": json_path(obj, scale.selector_path) or "" if scale.selector_path else "",
        },
    }


def _version_causes(crd: Object, live: Object) -> list[tuple[str, str]]:
    """A version in which objects may be stored can't go. Source: k8s.io/apiextensions-apiserver, validation of an
    update's ``status.storedVersions``."""
    there = {version["name"] for version in crd["spec"]["versions"]}
    stored = (live.get("status") or {}).get("storedVersions", [])
    return [
        (
            f"status.storedVersions[{i}]",
            f'Invalid value: "{name}": missing from spec.versions; was previously a storage version',
        )
        for i, name in enumerate(stored)
        if name not in there
    ]


def _metadata_causes(metadata: Object) -> list[schema.Cause]:
    causes = []
    for owner in metadata.get("ownerReferences") or ():
        if not all(owner.get(name) for name in ("apiVersion", "kind", "name", "uid")):
            causes.append(("metadata.ownerReferences", "apiVersion, kind, name and uid are required"))
    for name in ("labels", "annotations"):
        values = metadata.get(name) or {}
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            causes.append((f"metadata.{name}", "must be a map of strings"))
    return causes


def _generation(live: Object, after: Object) -> Object:
    """It counts the changes of everything but metadata and status."""

    def asked(obj: Object) -> Object:
        return {k: v for k, v in obj.items() if k not in ("metadata", "status", "apiVersion", "kind")}

    if asked(live) == asked(after):
        return after
    generation = live["metadata"].get("generation", 1) + 1
    return {**after, "metadata": {**after["metadata"], "generation": generation}}


def _mismatch(what: str, wanted: str, have: str) -> str:
    return f"Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {have}"


def _new_pod(pod: Object) -> Object:
    spec = dict(pod.get("spec") or {})
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    return {**pod, "spec": spec, "status": {"phase": "Pending"}}


def _grace(resource: Resource, live: Object, asked: int | None) -> int:
    if resource.key != ("", "pods"):
        return 0
    phase = (live.get("status") or {}).get("phase")
    if phase in ("Succeeded", "Failed") or not live["spec"].get("nodeName"):
        return 0  # nobody would confirm that it has ended
    return int(live["spec"]["terminationGracePeriodSeconds"] if asked is None else max(0, asked))


def _finished(resource: Resource, obj: Object) -> bool:
    """Whether an object that is being deleted is to be removed now."""
    metadata = obj["metadata"]
    if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
        return False
    return not metadata.get("deletionGracePeriodSeconds")
