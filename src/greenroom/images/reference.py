"""Image references: what people write to name an image."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from greenroom.core.errors import InvalidArgument
from greenroom.core.records import Record

#: Source: OCI distribution spec, "Pulling manifests" (name and reference grammars).
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?")

#: Longer references are nobody's.
MAX_REFERENCE_LENGTH = 1024

DEFAULT_TAG = "latest"


class LayoutReference(Record, frozen=True, kw_only=True):
    """An image in an OCI layout directory; without a tag it is the only one there, or ``latest``."""

    directory: Path
    tag: str = ""
    digest: str = ""


class RegistryReference(Record, frozen=True, kw_only=True):
    """An image in a registry. ``digest`` wins over ``tag``."""

    host: str
    repository: str
    tag: str = DEFAULT_TAG
    digest: str = ""


def parse(reference: str) -> LayoutReference | RegistryReference:
    """Parses ``oci:<directory>[:<tag>][@sha256:...]`` or ``[host[:port]/]repository[:tag][@sha256:...]``. Without a
    host it is Docker Hub.

    Raises:
        InvalidArgument: it is neither; the message says which part is wrong.
    """
    if len(reference) > MAX_REFERENCE_LENGTH:
        raise _malformed(reference[:64] + "...", f"it is longer than {MAX_REFERENCE_LENGTH} characters")
    rest, at, digest = reference.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _malformed(reference, "after @ must come sha256: and 64 lower-case hex digits")
    if rest.startswith("oci:"):
        return _parse_layout(reference, rest.removeprefix("oci:"), digest)
    if rest.startswith(("/", ".")):
        raise _malformed(reference, f"for an OCI layout directory write oci:{Path(rest).absolute()}")
    host, slash, path = rest.partition("/")
    if slash and ("." in host or ":" in host or host == "localhost"):
        rest = path
    else:
        host = "docker.io"  # as everywhere: a name without a registry is Docker Hub's
    if not _HOST.fullmatch(host):
        raise _malformed(reference, f"{host!r} is no host name")
    repository, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _malformed(reference, f"{tag!r} is no tag")
    if not _REPOSITORY.fullmatch(repository):
        raise _malformed(reference, f"{repository!r} is no repository name (lower case)")
    if host == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    return RegistryReference(host=host, repository=repository, tag=tag or DEFAULT_TAG, digest=digest)


def pinned(reference: str, digest: str) -> str:
    """``reference`` with the digest that it was resolved to, so that it means the same for ever, whatever becomes of
    the tag.

    Raises:
        InvalidArgument: one of them is malformed.
    """
    parse(reference)
    return f"{reference.partition('@')[0]}@{check_digest(digest)}"


def check_digest(digest: str) -> str:
    """Returns ``digest`` if it is ``sha256:`` and 64 hex digits.

    Raises:
        InvalidArgument: it is not.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument(f"{digest!r} is no image digest: sha256: and 64 lower-case hex digits are")
    return digest


def is_loopback(host: str) -> bool:
    """Whether ``host[:port]`` is this machine."""
    name = host
    if host.startswith("[") or host.count(":") < 2:  # else it is a bare IPv6 address
        name = re.sub(r":[0-9]*$", "", host).strip("[]")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _parse_layout(reference: str, rest: str, digest: str) -> LayoutReference:
    directory, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:  # a colon inside the path
        directory, tag = rest, ""
    elif not _TAG.fullmatch(tag):
        raise _malformed(reference, f"{tag!r} is no tag")
    if not Path(directory).is_absolute():
        raise _malformed(reference, "after oci: comes the layout's directory as an absolute path")
    return LayoutReference(directory=Path(directory), tag=tag, digest=digest)


def _malformed(reference: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"image reference {reference!r}: {why}", reason="INVALID_IMAGE_REFERENCE")
