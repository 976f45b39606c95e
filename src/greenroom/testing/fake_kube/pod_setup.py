"""What a pod's containers find when they begin: volumes and environment."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from greenroom.testing.fake_kube.objects import Object

#: Where a word refers to the environment. Source: Kubernetes documentation, "Define Dependent Environment Variables".
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
#: Of this machine's environment, what a program needs to run at all.
_KEPT = ("LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV")


class Unready(Exception):
    """Something that the pod needs is not there yet. ``reason``: as a kubelet calls it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Setup:
    """``secret``: entries of a secret by name, in base64; None when there is none."""

    def __init__(
        self, pod: Object, directory: Path, address: str, secret: Callable[[str], Mapping[str, str] | None]
    ) -> None:
        self._pod = pod
        self._directory = directory
        self._address = address
        self._secret = secret

    def make_volumes(self) -> None:
        """Raises `Unready`."""
        for volume in self._pod["spec"].get("volumes") or ():
            self._where(volume["name"]).mkdir(exist_ok=True)
        self.write_secrets()
        self.environment(self._pod["spec"]["containers"][0])

    def write_secrets(self) -> None:
        """Also of a secret that has changed: each file is replaced as a whole. Raises `Unready`."""
        for volume in self._pod["spec"].get("volumes") or ():
            if "secret" in volume:
                self._write_secret(self._where(volume["name"]), volume["secret"])

    def _write_secret(self, directory: Path, source: Object) -> None:
        entries = self._entries(source["secretName"])
        items = source.get("items") or [{"key": key, "path": key} for key in entries]
        for item in items:
            if item["key"] not in entries:
                raise Unready("FailedMount", f"references non-existent secret key: {item['key']}")
            path = directory / item["path"]
            content = base64.b64decode(entries[item["key"]])
            if path.exists() and path.read_bytes() == content:
                continue
            spare = path.with_suffix(".new")
            spare.write_bytes(content)
            spare.chmod(int(source.get("defaultMode", 0o644)))
            spare.replace(path)

    def _entries(self, name: str) -> Mapping[str, str]:
        entries = self._secret(name)
        if entries is None:
            raise Unready("CreateContainerConfigError", f'secret "{name}" not found')
        return entries

    def _where(self, volume: str) -> Path:
        return self._directory / volume

    # --- words ---

    def words(self, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        return [self._placed(_expanded(word, environment)) for word in words]

    def environment(self, container: Object) -> dict[str, str]:
        """Raises `Unready`."""
        found = {name: os.environ[name] for name in _KEPT if name in os.environ}
        found |= {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._directory)}
        for source in container.get("envFrom") or ():
            entries = self._entries(source["secretRef"]["name"])
            found |= {key: base64.b64decode(value).decode() for key, value in entries.items()}
        for entry in container.get("env") or ():
            value = self._value(entry, found)
            if entry["name"] == "PATH":  # the machine's programs stay: there is no image
                value = f"{value}:{found['PATH']}"
            found[entry["name"]] = value
        return found

    def _value(self, entry: Object, before: Mapping[str, str]) -> str:
        source: Any = entry.get("valueFrom") or {}
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            return base64.b64decode(self._entries(reference["name"])[reference["key"]]).decode()
        raw = str(entry.get("value") or "")

        return self._placed(_expanded(raw, before))

    def _field(self, path: str) -> str:
        metadata = self._pod["metadata"]
        known = {
            "metadata.name": metadata["name"],
            "metadata.namespace": metadata["namespace"],
            "metadata.uid": metadata["uid"],
            "status.podIP": self._address,
            "spec.nodeName": "node-1",
        }
        return str(known[path])

    def _placed(self, word: str) -> str:
        """With volumes' real directories for the paths that they are mounted at, also within a list like PATH."""
        real: dict[str, str] = {}
        for container in (*(self._pod["spec"].get("initContainers") or ()), *self._pod["spec"]["containers"]):
            for mount in container.get("volumeMounts") or ():
                real[mount["mountPath"]] = str(self._where(mount["name"]) / str(mount.get("subPath", "")))
        if not real:
            return word
        paths = "|".join(re.escape(path) for path in sorted(real, key=len, reverse=True))
        # In one go: what is put in may begin as another path does.
        return re.sub(rf"(?<![^:=])({paths})(?=/|:|$)", lambda found: real[found[1]], word)


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    def put(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return _REFERENCE.sub(put, word)
