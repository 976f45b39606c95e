"""Where the API server is, and who we are there: a kubeconfig's context, or the service account of a pod.

Source: Kubernetes documentation, "Organizing Cluster Access Using kubeconfig Files" and "Accessing the Kubernetes API
from a Pod"; client.authentication.k8s.io (exec plugins).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from greenroom.core.errors import FailedPrecondition, InvalidArgument

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: A program that fetches a token may ask somebody for it over a network.
EXEC_TIMEOUT_S = 60.0
MAX_CONFIG_BYTES = 4 << 20
#: What such a program answers with, and what a user of a kubeconfig has it as.
_CREDENTIALS = (
    ("token", "token"),
    ("clientCertificateData", "client-certificate-data"),
    ("clientKeyData", "client-key-data"),
)


@dataclass(frozen=True)
class Connection:
    """``ssl``: None for plain HTTP. ``fingerprint``: of what the credentials are, to see whether they have changed."""

    server: str
    namespace: str = "default"
    headers: Mapping[str, str] = field(default_factory=dict)
    ssl: ssl.SSLContext | None = None
    fingerprint: str = ""


def load(context: str = "", path: str = "") -> Connection:
    """By ``path``, else ``$KUBECONFIG``, else a pod's service account, else ``~/.kube/config``.

    Args:
        context: of the kubeconfig; "" is its current one.

    Raises:
        FailedPrecondition: there is no configuration (reason ``NO_KUBECONFIG``).
        InvalidArgument: it can't be used; says which part of it.
    """
    if path or os.environ.get("KUBECONFIG"):
        return from_files([Path(p) for p in (path or os.environ["KUBECONFIG"]).split(os.pathsep) if p], context)
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not context:
        return in_cluster()
    home = Path.home() / ".kube" / "config"
    if home.exists():
        return from_files([home], context)
    raise FailedPrecondition(
        "no cluster to talk to: this is no pod, and there is no ~/.kube/config; set KUBECONFIG", reason="NO_KUBECONFIG"
    )


def in_cluster(directory: Path = SERVICE_ACCOUNT) -> Connection:
    """As the service account of the pod that this runs in. Its token is replaced about every hour."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    try:
        token = (directory / "token").read_text().strip()
        namespace = (directory / "namespace").read_text().strip()
        authority = (directory / "ca.crt").read_text()
    except OSError as error:
        raise FailedPrecondition(
            f"this pod has no service account: {error}; set automountServiceAccountToken"
        ) from error
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Connection(
        server=server,
        namespace=namespace,
        headers={"Authorization": f"Bearer {token}"},
        ssl=ssl.create_default_context(cadata=authority),
        fingerprint=_digest(server, token, authority),
    )


def from_files(paths: list[Path], context: str = "") -> Connection:
    """From kubeconfig files; of several the first that names a thing decides."""
    merged: dict[str, dict[str, tuple[dict[str, Any], Path]]] = {"clusters": {}, "users": {}, "contexts": {}}
    current = context
    for path in paths:
        config = _read(path)
        current = current or str(config.get("current-context") or "")
        for section, found in merged.items():
            for entry in _entries(config, section):
                name = str(entry.get("name"))
                found.setdefault(name, (_mapping(entry, section[:-1], f"{section}: {name}"), path.parent))
    chosen, _ = _pick(merged, "contexts", current)
    cluster, cluster_base = _pick(merged, "clusters", str(chosen.get("cluster")))
    user, user_base = _pick(merged, "users", str(chosen.get("user"))) if chosen.get("user") else ({}, Path())
    return _connection(cluster, cluster_base, user, user_base, str(chosen.get("namespace") or "default"))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text()[:MAX_CONFIG_BYTES])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidArgument(f"kubeconfig {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"kubeconfig {path} is no mapping")
    return config


def _entries(section: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The mappings in a list; none when it is not given."""
    found = section.get(name) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InvalidArgument(f"the kubeconfig's {name} is no list of mappings")
    return found


def _mapping(section: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """An empty one when it is not given."""
    found = section.get(name) or {}
    if not isinstance(found, dict):
        raise InvalidArgument(f"the kubeconfig's {where}: {name} is no mapping")
    return found


def _pick(
    merged: dict[str, dict[str, tuple[dict[str, Any], Path]]], section: str, name: str
) -> tuple[dict[str, Any], Path]:
    if name not in merged[section]:
        there = ", ".join(sorted(merged[section])) or "none"
        raise InvalidArgument(f"the kubeconfig has no {section[:-1]} {name!r}; there are: {there}")
    return merged[section][name]


def _connection(
    cluster: dict[str, Any], cluster_base: Path, user: dict[str, Any], user_base: Path, namespace: str
) -> Connection:
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise InvalidArgument(f"the kubeconfig's server {server!r} is no http or https address")
    if cluster.get("proxy-url") or cluster.get("tls-server-name"):
        raise InvalidArgument("the kubeconfig's proxy-url and tls-server-name are not supported; use a direct address")
    if plugin := _mapping(user, "exec", "user"):
        user = {**user, **_run(plugin, user_base)}
    token = str(user.get("token") or "") or _file(user, "tokenFile", user_base).strip()
    headers = {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    elif user.get("username"):
        pair = base64.b64encode(f"{user['username']}:{user.get('password', '')}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    authority = _data(cluster, "certificate-authority", cluster_base)
    certificate, key = _data(user, "client-certificate", user_base), _data(user, "client-key", user_base)
    context = None
    if server.startswith("https://"):
        context = _tls(authority, certificate, key, insecure=bool(cluster.get("insecure-skip-tls-verify")))
    fingerprint = _digest(server, repr(headers), authority, certificate, key)
    return Connection(server, namespace, headers, context, fingerprint)


def _tls(authority: str, certificate: str, key: str, *, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=authority or None)
        if insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate:
            # The ssl module takes them from a file only.
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
                file.write(certificate + "\n" + key)
                file.flush()
                context.load_cert_chain(file.name)
    except (OSError, ValueError, TypeError) as error:  # TypeError: not ASCII
        raise InvalidArgument(f"the kubeconfig's certificates can't be used: {error}") from error
    return context


def _data(section: dict[str, Any], name: str, base: Path) -> str:
    """PEM, given in place (base64) or as a file; "" when it is not given."""
    try:
        if section.get(f"{name}-data"):
            return base64.b64decode(str(section[f"{name}-data"]), validate=True).decode()
    except ValueError as error:
        raise InvalidArgument(f"the kubeconfig's {name}-data can't be read: {error}") from error
    return _file(section, name, base)


def _file(section: dict[str, Any], name: str, base: Path) -> str:
    """What is in a file; "" when it is not given."""
    try:
        return (base / str(section[name])).read_text() if section.get(name) else ""
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"the kubeconfig's {name} can't be read: {error}") from error


def _run(plugin: dict[str, Any], base: Path) -> dict[str, Any]:
    """Credentials from the program that the kubeconfig names."""
    command = str(plugin.get("command"))
    if "/" in command and not command.startswith("/"):
        command = str(base / command)
    args = plugin.get("args") or []
    if not isinstance(args, list):
        raise InvalidArgument(f"the kubeconfig's program {command} has args that are no list")
    extra = {str(e.get("name")): str(e.get("value")) for e in _entries(plugin, "env")}
    asked = {
        "apiVersion": str(plugin.get("apiVersion") or ""),
        "kind": "ExecCredential",
        "spec": {"interactive": False},
    }
    environment = {**os.environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    try:
        done = subprocess.run(
            [command, *map(str, args)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=EXEC_TIMEOUT_S,
        )
        status = json.loads(done.stdout)["status"]
        found = {ours: str(status[theirs]) for theirs, ours in _CREDENTIALS if status.get(theirs)}
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = getattr(error, "stderr", b"") or b""
        raise FailedPrecondition(
            f"the kubeconfig's program {command} gave no credentials: {error} {told.decode(errors='replace')[:500]}"
        ) from error
    for name in ("client-certificate-data", "client-key-data"):
        if name in found:  # in a kubeconfig these are base64, from a program they are not
            found[name] = base64.b64encode(found[name].encode()).decode()
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
