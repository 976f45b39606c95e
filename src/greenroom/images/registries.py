"""Which servers stand for a registry, and how they are spoken to: mirrors, certificates, proxies.

All of it is told the way that other tools of containers are told, so that a machine where they work needs nothing more:

- ``registries.conf`` (TOML, version 2): ``[[registry]]`` with ``prefix``, ``location``, ``insecure``, ``blocked``, and
  ``[[registry.mirror]]`` with ``location``, ``insecure`` and ``pull-from-mirror``. Read from
  ``$CONTAINERS_REGISTRIES_CONF``, or ``~/.config/containers/registries.conf``, or ``/etc/containers/registries.conf``.
  Here ``insecure`` means: no TLS.
- ``certs.d/<host[:port]>/`` below ``~/.config/containers``, ``/etc/containers`` and ``/etc/docker``: ``*.crt`` are
  authorities that are trusted as well, ``*.cert`` with ``*.key`` is who we are.
- ``$SSL_CERT_FILE`` and ``$SSL_CERT_DIR`` replace the system's authorities; ``$HTTP_PROXY``, ``$HTTPS_PROXY`` and
  ``$NO_PROXY`` (also in small letters) name proxies. Loopback is never reached through a proxy, and without TLS
  unless it has certificates in ``certs.d``.

Source: containers-registries.conf(5), containers-certs.d(5), OpenSSL SSL_CTX_set_default_verify_paths(3).
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import msgspec
from yarl import URL

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record
from greenroom.images.credentials import CredentialFiles, Credentials, anonymous
from greenroom.images.reference import RegistryReference, is_loopback

#: Docker Hub's API has another name than its images.
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}


class Mirror(Record, frozen=True, kw_only=True, rename={"pull_from_mirror": "pull-from-mirror"}):
    location: str
    insecure: bool = False
    pull_from_mirror: Literal["all", "digest-only", "tag-only"] = "all"


class Registry(Record, frozen=True, kw_only=True, rename={"by_digest_only": "mirror-by-digest-only"}):
    prefix: str = ""
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirror: tuple[Mirror, ...] = ()
    by_digest_only: bool = False


class _Conf(Record, frozen=True, kw_only=True):
    registry: tuple[Registry, ...] = ()


class Endpoint(Record, frozen=True, kw_only=True):
    """A repository on one server. ``host`` is what accounts and certificates are kept under."""

    host: str
    repository: str
    plain: bool
    is_mirror: bool = False

    @property
    def base_url(self) -> str:
        """Of the repository: ``.../v2/<repository>``."""
        scheme = "http" if self.plain else "https"
        return f"{scheme}://{_API_HOSTS.get(self.host, self.host)}/v2/{self.repository}"


class Registries:
    """What is known of registries on this machine. Without arguments: no accounts, no mirrors, the system's
    authorities.

    Args:
        credentials: the accounts.
        registries: the entries of ``registries.conf``.
        certificates: directories that have one for each ``host[:port]``, searched in this order.
        proxies: scheme (``http``, ``https``) -> URL of the proxy; ``no`` -> names that are reached without.
    """

    def __init__(
        self,
        *,
        credentials: Credentials = anonymous,
        registries: Sequence[Registry] = (),
        certificates: Sequence[Path] = (),
        proxies: Mapping[str, str] | None = None,
    ) -> None:
        self.credentials = credentials
        self._registries = tuple(registries)
        self._certificates = tuple(certificates)
        self._proxies = dict(proxies or {})
        #: ``host[:port]`` -> when it may be asked again (the loop's clock), if it wants to be asked less often.
        self.not_before: dict[str, float] = {}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Registries:
        """As the files and variables of this machine say.

        Raises:
            FailedPrecondition: ``registries.conf`` can't be read, or a proxy can't be used (reason
                ``REGISTRY_CONFIG``).
        """
        home = Path(environment.get("HOME") or "/root")
        user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers"
        system = Path("/etc/containers")
        chosen = environment.get("CONTAINERS_REGISTRIES_CONF")
        files = [Path(chosen)] if chosen else [user / "registries.conf", system / "registries.conf"]
        return cls(
            credentials=CredentialFiles.from_environment(environment),
            registries=next((read_conf(path) for path in files if path.exists()), ()),
            certificates=[root / "certs.d" for root in (user, system, Path("/etc/docker"))],
            proxies=_proxies(environment),
        )

    def endpoints(self, reference: RegistryReference) -> list[Endpoint]:
        """Where an image may be had, best first; the last is the registry itself.

        Raises:
            FailedPrecondition: ``registries.conf`` blocks it (reason ``REGISTRY_BLOCKED``).
        """
        name = f"{reference.host}/{reference.repository}"
        entry = max(
            (r for r in self._registries if _matched(r, name) is not None),
            key=lambda r: len(r.prefix or r.location),
            default=Registry(prefix=reference.host, location=reference.host),
        )
        if entry.blocked:
            raise FailedPrecondition(f"image {name} is blocked by registries.conf", reason="REGISTRY_BLOCKED")
        rest = name[_matched(entry, name) or 0 :]
        excluded = "tag-only" if reference.digest else "digest-only"
        found = [
            self._endpoint(mirror.location + rest, mirror.insecure, is_mirror=True)
            for mirror in entry.mirror
            if mirror.pull_from_mirror != excluded and not (entry.by_digest_only and not reference.digest)
        ]
        return [*found, self._endpoint((entry.location or name[: len(name) - len(rest)]) + rest, entry.insecure)]

    def tls(self, host: str) -> ssl.SSLContext:
        """How ``host[:port]`` is known to be itself, from the files as they are now; for "" as any that has no
        certificates of its own. Blocks for some 20 ms.

        Raises:
            FailedPrecondition: a certificate can't be read (reason ``REGISTRY_CONFIG``).
        """
        context = ssl.create_default_context()
        directory = self._directory(host)
        if directory is None:
            return context
        path = directory
        try:
            for path in sorted(directory.glob("*.crt")):
                context.load_verify_locations(path)
            for path in sorted(directory.glob("*.cert")):
                context.load_cert_chain(path, path.with_suffix(".key"))
        except OSError as error:  # ssl.SSLError is one
            raise _config_error(f"certificate {path} of registry {host} can't be read: {error}") from error
        return context

    def has_certificates(self, host: str) -> bool:
        return self._directory(host) is not None

    def proxy(self, url: URL) -> str | None:
        """The proxy that ``url`` is to be reached through."""
        host = url.host or ""
        if is_loopback(host) or proxy_bypass_environment(f"{host}:{url.port}", self._proxies):
            return None
        return self._proxies.get(url.scheme)

    def _endpoint(self, location: str, insecure: bool, *, is_mirror: bool = False) -> Endpoint:
        host, _, repository = location.partition("/")
        plain = insecure or (is_loopback(host) and self._directory(host) is None)
        return Endpoint(host=host, repository=repository, plain=plain, is_mirror=is_mirror)

    def _directory(self, host: str) -> Path | None:
        if not host:
            return None
        with contextlib.suppress(OSError):  # a redirect may name what no file can be called
            return next((root / host for root in self._certificates if (root / host).is_dir()), None)
        return None


def read_conf(path: Path) -> tuple[Registry, ...]:
    """The entries of a ``registries.conf`` in version 2; of version 1 nothing is taken over.

    Raises:
        FailedPrecondition: it can't be read or understood (reason ``REGISTRY_CONFIG``).
    """
    try:
        found = msgspec.convert(tomllib.loads(path.read_text()), type=_Conf).registry
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise _config_error(f"{path} can't be read: {error}") from error
    for entry in found:
        if not (entry.prefix or entry.location):
            raise _config_error(f"{path} has a registry with neither prefix nor location")
    return found


def _proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Small letters count more, as everywhere."""
    found: dict[str, str] = {}
    for scheme in ("http", "https", "no"):
        name = next((n for n in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if environment.get(n)), "")
        if name:
            found[scheme] = environment[name] if scheme == "no" else _proxy(name, environment[name])
    return found


def _proxy(name: str, value: str) -> str:
    """The URL of a proxy; without a scheme it is http. What is wrong is not shown: it may hold a password."""
    url = value if "://" in value else f"http://{value}"
    try:
        parsed = URL(url)
    except ValueError:
        parsed = URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _config_error(f"${name} is no proxy that can be used: write http://host:port (or https://)")
    return url


def _matched(entry: Registry, name: str) -> int | None:
    """How much of ``name`` the entry's prefix stands for, or None if it is about others."""
    prefix = entry.prefix or entry.location
    if prefix.startswith("*."):
        host = name.partition("/")[0]
        return len(host) if host.endswith(prefix[1:]) else None
    return len(prefix) if name == prefix or name.startswith(f"{prefix}/") else None


def _config_error(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="REGISTRY_CONFIG")
