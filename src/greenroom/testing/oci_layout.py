"""Writes OCI image layouts and pushes them to a registry, with nothing but Python.

Source: OCI image spec v1.1 ("Image Layout", "Image Manifest"); OCI distribution spec v1.1 ("Pushing").
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

import msgspec
import zstandard
from isal import igzip

from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Index, Manifest, this_platform
from greenroom.images.reference import RegistryReference, is_loopback, parse

Compression = Literal["none", "gzip", "zstd"]

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_SUFFIX: dict[Compression, str] = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}
_CONFIG = "application/vnd.oci.image.config.v1+json"
_REF_NAME = "org.opencontainers.image.ref.name"
_CHUNK = 1 << 20
#: zstd's own default: the Python image packs in 0.2 s to a third of its size.
_ZSTD_LEVEL = 3
_GZIP_LEVEL = 1  # of isal's 0 to 3


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in a layout: what a manifest and a config say about it."""

    descriptor: Descriptor
    diff_id: str


class Layout:
    """An OCI image layout directory, made if it is not there; images can be added to one that is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs" / "sha256"
        self.blobs.mkdir(parents=True, exist_ok=True)
        _replace(directory / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')

    def blob(self, descriptor: Descriptor) -> Path:
        return self.blobs / descriptor.digest.removeprefix("sha256:")

    def add_blob(self, data: bytes, media_type: str) -> Descriptor:
        digest = hashlib.sha256(data).hexdigest()
        _replace(self.blobs / digest, data)
        return Descriptor(digest=f"sha256:{digest}", size=len(data), media_type=media_type)

    def add_layer(self, tar: IO[bytes], compression: Compression) -> Layer:
        """Compresses the tar stream into a blob, hashing both sides, in constant memory."""
        diff, packed = hashlib.sha256(), hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.blobs, prefix=".new-", delete=False) as out:
            sink = _Hashed(out, packed)
            writer = _compressor(sink, compression)
            while data := tar.read(_CHUNK):
                diff.update(data)
                writer.write(data)
            if writer is not sink:
                writer.close()
        staged = Path(out.name)
        size = staged.stat().st_size
        staged.chmod(0o644)
        staged.rename(self.blobs / packed.hexdigest())
        descriptor = Descriptor(
            digest=f"sha256:{packed.hexdigest()}", size=size, media_type=_LAYER + _SUFFIX[compression]
        )
        return Layer(descriptor=descriptor, diff_id=f"sha256:{diff.hexdigest()}")

    def add_image(self, layers: Iterable[Layer], config: Mapping[str, Any], tag: str) -> Descriptor:
        """Adds an image with this ``config`` object (``Entrypoint``, ``Env`` and so on) for this machine, and lets
        ``tag`` mean it."""
        layers = tuple(layers)
        here = this_platform()
        document = {
            "architecture": here.architecture,
            "os": here.os,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        described = self.add_blob(msgspec.json.encode(document), _CONFIG)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPES[0],
            "config": described,
            "layers": [layer.descriptor for layer in layers],
        }
        descriptor = self.add_blob(msgspec.json.encode(manifest), MANIFEST_TYPES[0])
        self.tag(descriptor, tag)
        return descriptor

    def tag(self, descriptor: Descriptor, tag: str) -> None:
        named = msgspec.structs.replace(descriptor, annotations={_REF_NAME: tag})
        others = [d for d in self.index().manifests if (d.annotations or {}).get(_REF_NAME) != tag]
        document = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": [*others, named]}
        _replace(self.directory / "index.json", msgspec.json.format(msgspec.json.encode(document)))

    def index(self) -> Index:
        try:
            return msgspec.json.decode((self.directory / "index.json").read_bytes(), type=Index)
        except FileNotFoundError:
            return Index()


def push_layout(layout: Path, registry_ref: str, tag: str = "latest") -> None:
    """Pushes one image of a layout (a manifest, no index) to an open registry; blobs that are there are not sent.

    Args:
        layout: the layout directory.
        registry_ref: ``host:port/repository:tag``.
        tag: which image of the layout.

    Raises:
        OSError: the registry refuses something; says what.
    """
    target = parse(registry_ref)
    assert isinstance(target, RegistryReference), f"{registry_ref!r} names no registry"
    source = Layout(layout)
    found = next(d for d in source.index().manifests if (d.annotations or {}).get(_REF_NAME) == tag)
    manifest = source.blob(found).read_bytes()
    parts = msgspec.json.decode(manifest, type=Manifest)
    is_plain = is_loopback(target.host)
    connection_type = http.client.HTTPConnection if is_plain else http.client.HTTPSConnection
    connection = connection_type(target.host, timeout=60)
    try:
        base = f"/v2/{target.repository}"
        for descriptor in (parts.config, *parts.layers):
            _push_blob(connection, base, descriptor, source.blob(descriptor))
        headers = {"Content-Type": found.media_type}
        _request(connection, "PUT", f"{base}/manifests/{target.tag}", (201,), body=manifest, headers=headers)
    finally:
        connection.close()


def _push_blob(connection: http.client.HTTPConnection, base: str, descriptor: Descriptor, file: Path) -> None:
    status, _ = _request(connection, "HEAD", f"{base}/blobs/{descriptor.digest}", (200, 404))
    if status == 200:
        return
    _, location = _request(connection, "POST", f"{base}/blobs/uploads/", (202,))
    where = urlsplit(location)
    query = f"{where.query}&" if where.query else ""
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
    with file.open("rb") as body:
        _request(
            connection, "PUT", f"{where.path}?{query}digest={descriptor.digest}", (201,), body=body, headers=headers
        )


def _request(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    expected: tuple[int, ...],
    *,
    body: bytes | IO[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    connection.request(method, path, body=body, headers=dict(headers or {}))
    response = connection.getresponse()
    said = response.read()
    if response.status not in expected:
        raise OSError(f"the registry answers {response.status} to {method} {path}: {said[:300]!r}")
    return response.status, response.headers.get("Location", "")


class _Hashed:
    """A writer that hashes what goes through it."""

    def __init__(self, out: IO[bytes], digest: Any) -> None:
        self._out = out
        self._digest = digest

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._out.write(data)

    def flush(self) -> None:
        self._out.flush()


def _compressor(sink: _Hashed, compression: Compression) -> Any:
    match compression:
        case "gzip":
            # No time and no name in the header: the same input gives the same digest.
            return igzip.IGzipFile(filename="", mode="wb", fileobj=sink, mtime=0, compresslevel=_GZIP_LEVEL)  # type: ignore[no-untyped-call]
        case "zstd":
            return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).stream_writer(sink, closefd=False)  # type: ignore[arg-type]
        case "none":
            return sink


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_bytes(data)
    staged.rename(path)
