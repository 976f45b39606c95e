"""Manifests, indexes and configs: the JSON of an image, decoded and checked.

Source: OCI image spec v1.1 (manifest, image index, config, descriptor); Docker image manifest v2 schema 2.
"""

from __future__ import annotations

import errno
import os
import platform
import posixpath
import signal
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record
from greenroom.core.words import MAX_ARGUMENT_BYTES, MAX_ARGUMENTS, is_too_long
from greenroom.images.port import ImageConfig
from greenroom.images.tree import Refused, Tree

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
#: How the bytes of a layer are packed is told by their first bytes, not by these: registries mix them up.
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_LAYER_SUFFIXES = ("", "+gzip", "+zstd", ".gzip", ".zstd")

#: Source: OCI distribution spec ("SHOULD reject manifests over 4 MiB"). Configs are held to the same.
MAX_JSON_BYTES = 4 << 20
#: No layer is larger; a manifest that says so is wrong, or wants to hurt.
MAX_BLOB_BYTES = 1 << 40
#: Docker stops at 127 layers, overlayfs at 500.
MAX_LAYERS = 500
#: No user data base of an image is larger.
_MAX_PASSWD_BYTES = 1 << 20
#: What comes of names, links and modes, which an image brings; anything else is the disk's.
_IMAGES_FAULT = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)
#: Source: Linux: (uid_t)-1 means "no change" to chown and setuid.
_MAX_ID = 2**32 - 2

#: Of what an image says and an error quotes.
_MAX_SHOWN = 100

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x"}


_Shaped = TypeVar("_Shaped")


class Platform(Record, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(Record, frozen=True, kw_only=True, rename={"media_type": "mediaType"}):
    """A reference to a blob: its SHA-256 digest and exact size."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(Record, frozen=True, kw_only=True, rename={"media_type": "mediaType"}):
    manifests: tuple[Descriptor, ...] = ()
    media_type: str = ""


class Manifest(Record, frozen=True, kw_only=True, rename={"media_type": "mediaType"}):
    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    media_type: str = ""


class _Shape(Record, frozen=True, kw_only=True, rename={"media_type": "mediaType", "schema_version": "schemaVersion"}):
    media_type: str = ""
    schema_version: int = 2
    manifests: Any = None


class _RootFs(Record, frozen=True, kw_only=True):
    diff_ids: tuple[str, ...] = ()


class _Run(Record, frozen=True, kw_only=True, rename="pascal"):
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    stop_signal: str | None = None


class _Config(Record, frozen=True, kw_only=True):
    config: _Run | None = None
    rootfs: _RootFs = _RootFs()
    architecture: str = ""
    os: str = ""


def invalid(message: str) -> FailedPrecondition:
    """The error of an image that can't be used as it is."""
    return FailedPrecondition(message, reason="IMAGE_INVALID")


def this_platform() -> Platform:
    machine = platform.machine()
    return Platform(architecture=_MACHINES.get(machine, machine), os="linux")


def decode(what: str, data: bytes, kind: type[_Shaped]) -> _Shaped:
    """Decodes JSON of which nothing is known yet.

    Raises:
        FailedPrecondition: ``what`` can't be read (reason ``IMAGE_INVALID``).
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError) as error:
        raise invalid(f"{what} can't be read: {error}") from error
    except RecursionError as error:
        raise invalid(f"{what} can't be read: it is nested too deeply") from error


def parse_manifest(name: str, data: bytes, media_type: str = "") -> Manifest | Index:
    """Decodes a manifest or an index and checks what it names.

    Raises:
        FailedPrecondition: it is neither, or names what can't be used (reason ``IMAGE_INVALID``).
    """
    what = f"the manifest of image {name}"
    shape = decode(what, data, _Shape)
    media_type = shape.media_type or media_type.partition(";")[0].strip()
    if shape.schema_version != 2 or media_type.startswith("application/vnd.docker.distribution.manifest.v1+"):
        raise invalid(f"image {name} has a manifest of Docker's old schema 1: push it again with a current tool")
    if media_type in INDEX_TYPES or (not media_type and shape.manifests is not None):
        return decode(what, data, Index)
    if media_type and media_type not in MANIFEST_TYPES:
        raise invalid(f"image {name} has a manifest of unknown media type {_shown(media_type)}")
    manifest = decode(what, data, Manifest)
    _check_manifest(name, manifest)
    return manifest


def choose(name: str, index: Index) -> Descriptor:
    """The index's entry for this machine.

    Raises:
        FailedPrecondition: there is none (reason ``IMAGE_INVALID``); the message lists what there is.
    """
    here = this_platform()
    usable = [
        d for d in index.manifests if d.media_type in (*MANIFEST_TYPES, *INDEX_TYPES, "") and not _is_attestation(d)
    ]
    for descriptor in usable:
        there = descriptor.platform
        # An entry without a platform, or an index inside the index, may be anything: taken, and its config decides.
        if there is None or (there.os, there.architecture) == (here.os, here.architecture):
            check_descriptor(name, descriptor)
            return descriptor
    offered = _listed(f"{d.platform.os}/{d.platform.architecture}" for d in usable if d.platform)
    raise invalid(f"image {name} is not made for {here.os}/{here.architecture}; it has {offered}")


def check_descriptor(name: str, descriptor: Descriptor) -> None:
    digest = descriptor.digest
    if not (digest.startswith("sha256:") and len(digest) == 71 and set(digest[7:]) <= set("0123456789abcdef")):
        raise invalid(f"image {name} names a blob by {_shown(digest)}: only sha256 digests are supported")
    if not 0 <= descriptor.size <= MAX_BLOB_BYTES:
        raise invalid(f"image {name}: blob {digest} has the impossible size {descriptor.size}")


def parse_config(name: str, data: bytes, layers: int) -> tuple[ImageConfig, tuple[str, ...]]:
    """Decodes an image config; returns it and the diff_ids (digests of the unpacked layers, lowest first).

    Raises:
        FailedPrecondition: it can't be read, is for another platform, does not fit the manifest's ``layers``, or has a
            command that no template could have.
    """
    config = decode(f"the config of image {name}", data, _Config)
    here = this_platform()
    if (config.os or "linux", config.architecture or here.architecture) != (here.os, here.architecture):
        there = _shown(f"{config.os}/{config.architecture}")
        raise invalid(f"image {name} is for {there}, this is {here.os}/{here.architecture}")
    if len(config.rootfs.diff_ids) != layers:
        raise invalid(f"image {name} has {layers} layers but {len(config.rootfs.diff_ids)} diff_ids")
    run = config.config or _Run()
    _check_words(name, run)
    return (
        ImageConfig(
            entrypoint=run.entrypoint or (),
            cmd=run.cmd or (),
            env=tuple((key, value) for key, _, value in (entry.partition("=") for entry in run.env or ()) if key),
            # As Docker takes it: a relative one begins at the root, and none leads above it.
            workdir=posixpath.normpath("/" + (run.working_dir or "").lstrip("/")),
            user=run.user or "",
            exposed_ports=_tcp_ports(name, run.exposed_ports or {}),
            stop_signal=run.stop_signal or "",
        ),
        config.rootfs.diff_ids,
    )


def diff_ids(what: str, data: bytes) -> tuple[str, ...]:
    """Of an image config of which nothing else matters. Raises as `decode` does."""
    return decode(what, data, _Config).rootfs.diff_ids


class User(NamedTuple):
    """Whom a program runs as, and the home directory of that account."""

    uid: int
    gid: int
    home: str


def signal_number(text: str) -> int | None:
    """The signal that ``SIGTERM``, ``TERM``, ``15`` or ``SIGRTMIN+3`` means on this machine; None if it is none.

    Source: OCI image spec v1.1, config, ``StopSignal``.
    """
    if text.isascii() and text.isdigit():
        return int(text) if len(text) <= 2 and 0 < int(text) < signal.NSIG else None
    name, sign, offset = text.upper().removeprefix("SIG").partition("+")
    found = signal.Signals.__members__.get(f"SIG{name}")
    if found is None:
        return None
    if not sign:
        return int(found)
    if name != "RTMIN" or not (offset.isascii() and offset.isdigit() and len(offset) <= 2):
        return None
    number = found + int(offset)
    return number if number <= signal.SIGRTMAX else None


def resolve_user(rootfs: Path, user: str) -> User:
    """Whom ``user`` means inside the image.

    ``user`` is as in an image config: ``""`` (root), ``uid``, ``name``, ``uid:gid``, ``name:group`` and mixtures. Names
    are looked up in the image's own ``/etc/passwd`` and ``/etc/group``, which are read without ever leaving
    ``rootfs`` and only when they are plain files. Without a group it is the user's own, or 0 for a bare unknown uid.
    The home of an unknown uid is ``/``, or ``/root`` for 0.

    Blocks: links may lead a long way through the image.

    Raises:
        FailedPrecondition: no such user or group in the image (reason ``USER_NOT_FOUND``); its links lead nowhere
            (``IMAGE_INVALID``).
    """
    name, colon, group = user.partition(":")
    accounts = _read_accounts(rootfs, "etc/passwd", fields=7)
    if not name or (name.isascii() and name.isdigit()):
        uid = _bounded_id(user, name or "0")
        account = next((a for a in accounts if int(a[2]) == uid), None)
    else:
        account = next((a for a in accounts if a[0] == name), None)
        if account is None:
            raise _no_such("user", name, "/etc/passwd")
        uid = int(account[2])
    gid = int(account[3]) if account and name else 0
    home = account[5] if account and account[5].startswith("/") and "\0" not in account[5] else ""
    if colon and group:
        if group.isascii() and group.isdigit():
            gid = _bounded_id(user, group)
        else:
            groups = _read_accounts(rootfs, "etc/group", fields=4)
            entry = next((g for g in groups if g[0] == group), None)
            if entry is None:
                raise _no_such("group", group, "/etc/group")
            gid = int(entry[2])
    return User(uid, gid, home or ("/root" if uid == 0 else "/"))


def _check_manifest(name: str, manifest: Manifest) -> None:
    if manifest.config.media_type not in _CONFIG_TYPES:
        raise invalid(f"{name} is no container image but an artifact of type {_shown(manifest.config.media_type)}")
    if len(manifest.layers) > MAX_LAYERS:
        raise invalid(f"image {name} has {len(manifest.layers)} layers; at most {MAX_LAYERS} are supported")
    if manifest.config.size > MAX_JSON_BYTES:
        raise invalid(f"the config of image {name} has {manifest.config.size} bytes; at most {MAX_JSON_BYTES} are read")
    check_descriptor(name, manifest.config)
    for layer in manifest.layers:
        check_descriptor(name, layer)
        if not any(layer.media_type == prefix + suffix for prefix in _LAYER_PREFIXES for suffix in _LAYER_SUFFIXES):
            raise invalid(f"image {name}: layer {layer.digest} has the unknown media type {_shown(layer.media_type)}")


def _check_words(name: str, run: _Run) -> None:
    words = {"Entrypoint": run.entrypoint or (), "Cmd": run.cmd or (), "Env": run.env or ()}
    words |= {"WorkingDir": (run.working_dir or "",), "User": (run.user or "",)}
    for field, texts in words.items():
        if len(texts) > MAX_ARGUMENTS:
            raise invalid(
                f"image {name} has {len(texts)} entries in its {field}; at most {MAX_ARGUMENTS} are supported"
            )
        for text in texts:
            if "\0" in text:
                raise invalid(f"the config of image {name} has a NUL character where none can be, in its {field}")
            if is_too_long(text):
                raise invalid(f"image {name} has an entry of more than {MAX_ARGUMENT_BYTES} bytes in its {field}")


def _shown(text: str) -> str:
    """What an image says, for an error: bounded, and without what moves a terminal's cursor."""
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")


def _listed(texts: Iterable[str]) -> str:
    found = sorted(set(texts))
    return _shown(", ".join(found))[1:-1] or "none"


def _is_attestation(descriptor: Descriptor) -> bool:
    """BuildKit keeps provenance in the index as images of an unknown platform."""
    return descriptor.platform is not None and descriptor.platform.os == "unknown"


def _tcp_ports(name: str, exposed: dict[str, Any]) -> tuple[int, ...]:
    ports = set()
    for entry in exposed:
        port, _, protocol = entry.partition("/")
        if protocol in ("", "tcp"):
            if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
                raise invalid(f"image {name} exposes the impossible port {_shown(entry)}")
            ports.add(int(port))
    return tuple(sorted(ports))


def _read_accounts(rootfs: Path, path: str, fields: int) -> list[list[str]]:
    with Tree(rootfs) as tree:
        try:
            fd = tree.open_file(path)
        except Refused as error:
            raise invalid(f"the image's /{path} can't be read: {error}") from error
        except OSError as error:
            if error.errno not in _IMAGES_FAULT:
                raise
            raise invalid(f"the image's /{path} can't be read: {error.strerror}") from error
        if fd is None:
            return []
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return []
            text = file.read(_MAX_PASSWD_BYTES).decode(errors="replace")
    rows = [line.strip().split(":") for line in text.splitlines()]
    # A row whose ids are no numbers is no account; other tools skip it as well.
    return [row for row in rows if len(row) >= fields and all(map(_is_id, row[2 : max(3, fields - 3)]))]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_ID


def _bounded_id(user: str, digits: str) -> int:
    if not _is_id(digits):
        raise FailedPrecondition(
            f"user {_shown(user)}: {_shown(digits)} is no user or group id", reason="USER_NOT_FOUND"
        )
    return int(digits)


def _no_such(kind: str, name: str, file: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the image's {file} has no {kind} {_shown(name)}: use a number, or one that it has", reason="USER_NOT_FOUND"
    )
