"""Whatever the bytes: archives and manifests are read, or refused by an error that is meant for people.

Bounded here; ``make fuzz`` looks for longer.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hostile_archives import CORPUS, archive, info
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from isal import igzip
from test_images_hostile import Yard

from greenroom.core.errors import DataLoss, FailedPrecondition
from greenroom.images import tar
from greenroom.images.config import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_LAYERS,
    Descriptor,
    Index,
    Manifest,
    choose,
    parse_config,
    parse_manifest,
)
from greenroom.images.stream import Malformed, ReadAhead, Source

#: Examples per test; ``make fuzz EXAMPLES=...`` sets it.
EXAMPLES = int(os.environ.get("GREENROOM_FUZZ_EXAMPLES", "150"))
#: No deadlines: how long one takes depends on what else the machine does.
bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- archives -----------------------------------------------------------------------------------------------------

#: Few names, so that entries meet; among them what leads elsewhere.
_PARTS = st.sampled_from(
    ["a", "b", "d", "..", ".", "", ".wh.a", ".wh.b", ".wh..wh..opq", ".wh..", "dev", "outside", "\xe9"]
)
_NAMES = st.lists(_PARTS, min_size=1, max_size=4).map("/".join)
_TARGETS = _NAMES | st.sampled_from(["../outside", "/outside/secret", "/", "..", "../outside/secret", "x" * 200])
_KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE] * 3 + [tarfile.SYMTYPE] * 3 + [tarfile.LNKTYPE] * 2
    + [tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"]
)  # fmt: skip
_HEADERS = st.dictionaries(
    st.sampled_from(["SCHILY.xattr.user.a", "SCHILY.xattr.trusted.overlay.opaque", "comment", "mtime", "size", "path"]),
    st.sampled_from(["", "y", "1", "-1", "1.5", "../outside/secret"]),
    max_size=2,
)


@st.composite
def members(draw: st.DrawFn, headers: st.SearchStrategy[dict[str, str]]) -> tuple[tarfile.TarInfo, bytes]:
    kind = draw(_KINDS)
    data = draw(st.binary(max_size=700)) if kind == tarfile.REGTYPE else b""
    member = info(draw(_NAMES), kind, mode=draw(st.integers(0, 0o7777)), linkname=draw(_TARGETS), size=len(data))
    member.uid, member.gid = draw(st.sampled_from([(0, 0), (1000, 5), (2**32 - 1, 0)]))
    member.pax_headers = draw(headers)
    return member, data


_FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@st.composite
def archives(draw: st.DrawFn, headers: st.SearchStrategy[dict[str, str]] = _HEADERS) -> bytes:
    form = draw(_FORMS)
    found = draw(st.lists(members(headers), max_size=8))
    try:
        return archive(*found, form=form)
    except ValueError:  # a name that ustar has no room for
        return archive(*found, form=tarfile.PAX_FORMAT)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """With bytes changed, left out, or put in; a header changed has its checksum made to fit."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "cut", "insert", "header"])):
            case "change" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 600))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=600))
            case "header" if len(data) >= 512:
                start = at // 512 * 512
                block = bytearray(data[start : start + 512].ljust(512, b"\0"))
                field = draw(st.sampled_from([0, 100, 108, 116, 124, 136, 156, 157, 257, 345, 386, 482, 483]))
                new = draw(st.binary(max_size=12) | st.just(b"\xff" * 12) | st.just(b"\x80" + b"\xff" * 7))
                block[field : field + len(new)] = new
                block = block[:512]
                block[148:156] = b" " * 8
                block[148:156] = b"%06o\0 " % sum(block)
                data[start : start + 512] = block
    return bytes(data)


_HOSTILE = st.sampled_from(
    [layer for case in CORPUS.values() for layer in case.layers(Path("/outside")) if len(layer) < 50_000]
)


def _packed(data: bytes, how: str) -> bytes:
    return {"gzip": lambda: igzip.compress(data, 1), "zstd": lambda: zstandard.compress(data), "none": lambda: data}[
        how
    ]()


@bounded
@given(damaged(archives() | _HOSTILE | st.binary(max_size=2000)))
def test_tar_parser(data: bytes) -> None:
    """It ends, with entries or with the one error that it may raise; what it says of an entry can be worked with."""
    with ReadAhead(io.BytesIO(data), lambda piece: None) as ahead, contextlib.suppress(Malformed):
        for entry, body in tar.entries(Source(ahead.more)):
            assert entry.stored >= 0 and entry.mtime_ns >= 0
            os.fsencode(entry.name), os.fsencode(entry.linkname)
            read = sum(len(piece) for piece in body)
            if entry.fragments is not None:
                assert read == sum(length for _, length in entry.fragments)
                assert all(0 <= offset <= offset + length <= entry.size for offset, length in entry.fragments)


@bounded
@given(archives(st.just({})))
def test_tar_parser_reads_what_the_standard_library_reads(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as other:
        try:
            expected = [(m.name.rstrip("/"), m.linkname, m.uid, m.mode & 0o7777) for m in other]
        except (tarfile.TarError, ValueError):
            return
    with ReadAhead(io.BytesIO(data), lambda piece: None) as ahead, contextlib.suppress(Malformed):
        found = [(e.name.rstrip("/"), e.linkname, e.uid, e.mode & 0o7777) for e, _ in tar.entries(Source(ahead.more))]
        assert found == expected


@bounded
@given(
    st.lists(
        st.tuples(damaged(archives()) | _HOSTILE, st.sampled_from(["none", "gzip", "zstd"])), min_size=1, max_size=3
    )
)
@example([(b"", "none")])
def test_unpacker(layers: list[tuple[bytes, str]]) -> None:
    """Nothing outside of the target changes, and there is no third way between a tree and an error for people."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yard = Yard(Path(directory))
        with contextlib.suppress(FailedPrecondition, DataLoss):
            yard.unpack([_packed(data, how) for data, how in layers], max_entries=100, max_unpacked_bytes=1 << 20)


# --- manifests ----------------------------------------------------------------------------------------------------

_DIGEST = "sha256:" + "ab" * 32
_SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False)
    | st.sampled_from(
        [_DIGEST, "sha256:x", "", "amd64", "linux", "a\0b", "A=1", "../..", "80/tcp", *MANIFEST_TYPES, *INDEX_TYPES]
    )
    | st.text(max_size=8)
)
_JSON: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_PLATFORM = {"os": "linux", "architecture": "amd64"}
_LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 7}
_DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPES[0],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _DIGEST, "size": 7},
        "layers": [_LAYER, _LAYER],
    },
    {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPES[0],
        "manifests": [
            {"mediaType": MANIFEST_TYPES[0], "digest": _DIGEST, "size": 7, "platform": _PLATFORM},
            {"mediaType": INDEX_TYPES[0], "digest": _DIGEST, "size": 7, "annotations": {"a": "b"}},
        ],
    },
    {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [_DIGEST, _DIGEST]},
        "config": {
            "Entrypoint": ["/a"],
            "Cmd": ["b"],
            "Env": ["A=1"],
            "WorkingDir": "/w",
            "User": "1:2",
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGINT",
        },
    },
)  # fmt: skip


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A document with something else in places, and then perhaps with bytes damaged."""
    document = json.loads(json.dumps(draw(st.sampled_from(_DOCUMENTS) | _JSON)))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = document
        for _ in range(draw(st.integers(0, 3))):
            inner = [
                v
                for v in (place.values() if isinstance(place, dict) else place if isinstance(place, list) else ())
                if isinstance(v, dict | list) and v
            ]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        if isinstance(place, dict) and place:
            place[draw(st.sampled_from(sorted(place)) | st.text(max_size=8))] = draw(_JSON)
        elif isinstance(place, list) and place:
            place[draw(st.integers(0, len(place) - 1))] = draw(_JSON)
        if not isinstance(document, dict | list):
            break
    data = bytearray(json.dumps(document).encode())
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def _sound(descriptor: Descriptor) -> None:
    assert descriptor.digest.startswith("sha256:") and len(descriptor.digest) == 71
    assert descriptor.size >= 0


@bounded
@given(documents() | st.binary(max_size=300), st.sampled_from(["", *MANIFEST_TYPES, *INDEX_TYPES, "text/html"]))
def test_manifest_parser(data: bytes, media_type: str) -> None:
    try:
        found = parse_manifest("image", data, media_type)
        match found:
            case Index():
                _sound(choose("image", found))
            case Manifest():
                assert len(found.layers) <= MAX_LAYERS
                for descriptor in (found.config, *found.layers):
                    _sound(descriptor)
    except FailedPrecondition as error:
        assert error.reason == "IMAGE_INVALID" and len(error.message) < 2000
        error.message.encode()


def test_documents_nested_without_end() -> None:
    for document in (b'{"manifests": ' + b'{"a": [' * 300_000, b'{"config": {"ExposedPorts": {"1": ' + b"[" * 300_000):
        for parse in (lambda data: parse_manifest("image", data), lambda data: parse_config("image", data, 1)):
            with pytest.raises(FailedPrecondition, match="can't be read"):
                parse(document)


@bounded
@given(documents() | st.binary(max_size=300))
def test_config_parser(data: bytes) -> None:
    """What comes through can be run: nothing in it that no program could be given."""
    try:
        config, diff_ids = parse_config("image", data, 2)
    except FailedPrecondition as error:
        assert error.reason == "IMAGE_INVALID" and len(error.message) < 2000
        error.message.encode()
        return
    assert len(diff_ids) == 2
    assert config.workdir.startswith("/")
    for text in (
        *config.entrypoint,
        *config.cmd,
        config.workdir,
        config.user,
        *(x for pair in config.env for x in pair),
    ):
        assert "\0" not in text
        text.encode()
    assert all("=" not in key and key for key, _ in config.env)
    assert all(0 < port < 65536 for port in config.exposed_ports)
