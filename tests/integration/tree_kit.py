"""Trees of files as values that can be compared, names as bytes; and layers with everything that a tar can say."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

from greenroom.images.config import MANIFEST_TYPES
from greenroom.testing.oci_layout import Compression, Layout

#: Source: Linux, linux/capability.h: version 2, effective, CAP_NET_BIND_SERVICE (bit 10) permitted.
_NET_BIND = bytes([1, 0, 0, 2]) + (1 << 10).to_bytes(4, "little") + bytes(12)


class Node(NamedTuple):
    """What is at one path. ``links``: all its names, when it has several."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    size: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[bytes, ...]


def tree(root: Path, *, without: tuple[bytes, ...] = ()) -> dict[bytes, Node]:
    """Every path below ``root``, itself as ``b""``; what is below the top-level names ``without`` is left out."""
    top = os.fsencode(root)
    found: dict[bytes, tuple[os.stat_result, bytes]] = {}
    names: dict[int, list[bytes]] = {}

    def walk(path: bytes) -> None:
        info = os.lstat(os.path.join(top, path))  # noqa: PTH118 - bytes
        found[path] = info, os.path.join(top, path)  # noqa: PTH118
        names.setdefault(info.st_ino, []).append(path)
        if stat.S_ISDIR(info.st_mode):
            for name in sorted(os.listdir(os.path.join(top, path))):  # noqa: PTH118, PTH208
                if path or name not in without:
                    walk(os.path.join(path, name))  # noqa: PTH118

    walk(b"")
    return {path: _node(info, full, names[info.st_ino]) for path, (info, full) in found.items()}


def _node(info: os.stat_result, path: bytes, names: list[bytes]) -> Node:
    mode = info.st_mode
    content = ""
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(mode):
        content = repr(os.readlink(path))  # noqa: PTH115
    return Node(
        mode=mode,
        owner=(info.st_uid, info.st_gid),
        mtime_ns=info.st_mtime_ns,
        size=info.st_size if stat.S_ISREG(mode) else 0,
        content=content,
        xattrs=tuple(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        ),
        links=tuple(sorted(names)) if len(names) > 1 else (),
    )


# --- layers ---------------------------------------------------------------------------------------------------


def info(name: str | bytes, kind: bytes = tarfile.REGTYPE, **attributes: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(os.fsdecode(name))
    member.type = kind
    member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    member.mtime = 1_700_000_000
    for key, value in attributes.items():
        setattr(member, key, value)
    return member


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _file(name: str | bytes, data: bytes = b"data", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, **attributes), data


def _dir(name: str, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, tarfile.DIRTYPE, **attributes), b""


def _sym(name: str, target: str, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, tarfile.SYMTYPE, linkname=target, mode=0o777, **attributes), b""


def _fifo(name: str, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, tarfile.FIFOTYPE, **attributes), b""


def _link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, tarfile.LNKTYPE, linkname=target), b""


def _xattrs(**values: bytes) -> dict[str, str]:
    return {
        f"SCHILY.xattr.{name.replace('__', '.')}": value.decode("utf-8", "surrogateescape")
        for name, value in values.items()
    }


def odd_layers(scratch: Path) -> list[bytes]:
    """Tar archives, lowest first: names, modes, owners, links, attributes, sparse files, whiteouts, in every format."""
    names = [b"caf\xe9", "caf\u00e9".encode(), "cafe\u0301".encode(), b"new\nline", b"back\\slash", b" spaces ", b"-rf"]
    names += [b"tab\t", b"colon:comma,", b"*?[x]", b"\xff\xfe", b".hidden", b"...", b"quote'\"", b"n" * 255]
    lowest = archive(
        _dir("./", mode=0o755),
        _dir("etc", mode=0o755, mtime=1_000_000_000),
        _file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"),
        *(_file(b"names/" + name, b"named " + name) for name in names),
        _dir("modes", mode=0o711),
        *(_file(f"modes/{mode:04o}", b"m", mode=mode) for mode in (0o4755, 0o2755, 0o1644, 0o6711, 0, 0o777, 0o400)),
        *(_dir(f"modes/d{mode:04o}", mode=mode) for mode in (0o1777, 0o2755, 0o555, 0o700, 0o3770)),
        _file("modes/d0555/inside", b"in a directory that can't be written to"),
        *(_file(f"owners/{uid}", b"o", uid=uid, gid=uid + 1) for uid in (0, 1000, 65534, 2_097_151, 3_000_000)),
        _dir("owners/dir", uid=12, gid=34),
        _sym("owners/link", "1000", uid=56, gid=78),
        _file("times/fraction", b"t", mtime=1_600_000_000.123456789),
        _file("times/epoch", b"t", mtime=0),
        _file("links/one", b"linked"),
        _link("links/two", "links/one"),
        _link("links/three", "links/two"),
        _sym("links/dangling", "/no/such"),
        _sym("links/up", "../../../../etc/passwd"),
        _sym("links/long", "t" * 300),
        _link("links/link-to-link", "links/dangling"),
        _fifo("fifo", mode=0o620, uid=5, gid=6),
        _file("xattrs/plain", b"x", pax_headers=_xattrs(user__note=b"kept", user__empty=b"", user__bytes=b"\xff\x01")),
        _file("xattrs/capable", b"x", mode=0o755, pax_headers=_xattrs(security__capability=_NET_BIND)),
        _file("xattrs/both", b"x", mode=0o4755, uid=7, pax_headers=_xattrs(security__capability=_NET_BIND)),
        _dir("xattrs/dir", pax_headers=_xattrs(user__dir=b"d")),
        _file("empty", b""),
        _file("block", b"b" * 512),
        _file("large", bytes(range(256)) * 20_000),
        _dir("usr/lib"),
        _sym("lib", "usr/lib"),
        _sym("absolute", "/usr/lib"),
        _file("gone/file", b"1"),
        _file("gone/dir/file", b"1"),
        _file("opaque/old", b"1"),
        _file("opaque/dir/old", b"1"),
        _file("replaced/file-by-dir", b"1"),
        _file("replaced/dir-by-file/x", b"1"),
        _file("replaced/file-by-link", b"1"),
        _sym("replaced/link-by-file", "../etc/passwd"),
        _file("replaced/content", b"1" * 1000, mode=0o600, pax_headers=_xattrs(user__old=b"1")),
        _dir("kept", mode=0o700, uid=9, gid=9),
        _file("kept/below", b"1"),
    )
    middle = archive(
        _file("lib/through-link", b"2"),
        _file("absolute/through-absolute", b"2"),
        _link("lib/hard", "usr/lib/through-link"),
        _link("links/from-above", "links/one"),
        _file("gone/.wh.file", b""),
        _file("gone/.wh.dir", b""),
        _file("opaque/new", b"2"),
        _file("opaque/.wh..wh..opq", b""),
        _file("opaque/dir/new", b"2"),
        _dir("replaced/file-by-dir"),
        _file("replaced/file-by-dir/x", b"2"),
        _file("replaced/dir-by-file", b"2"),
        _sym("replaced/file-by-link", "content"),
        _file("replaced/link-by-file", b"2"),
        _file("replaced/content", b"2"),
        _dir("kept", mode=0o750, uid=10, gid=10),
        _file("kept/.wh.never-there", b""),
        form=tarfile.GNU_FORMAT,
    )
    deep = "/".join(["directory-number"] * 8)
    highest = archive(_file(f"{deep}/file", b"3"), _file(".wh.block", b""), _file("gone/dir", b"3"))
    ustar = archive(_file(f"ustar/{deep}/file", b"4"), _sym("ustar/link", "x"), form=tarfile.USTAR_FORMAT)
    return [lowest, middle, highest, ustar, *(_sparse(scratch, version) for version in SPARSE_VERSIONS)]


#: How GNU tar writes sparse files into PAX headers. Its format without them umoci can't read; that one has its test in
#: tests/unit/test_images_unpack.py, against the file itself.
SPARSE_VERSIONS = ("0.0", "0.1", "1.0")


def _sparse(scratch: Path, version: str) -> bytes:
    """A directory with a file of many holes, one that is a hole only, and one that ends in one."""
    directory = scratch / f"sparse-{version}"
    directory.mkdir(exist_ok=True)
    with (directory / "many").open("wb") as out:
        for number in range(40):
            out.seek(number * 300_000)
            out.write(b"%d" % number * 500)
    with (directory / "hole").open("wb") as out:
        out.truncate(3 << 20)
    with (directory / "ends").open("wb") as out:
        out.write(b"x" * 5000)
        out.truncate(2 << 20)
    command = ["tar", "-c", "--format=posix", "--sparse", f"--sparse-version={version}", "--sort=name", "--owner=0:0"]
    command += ["--mtime=@1650000000", "--pax-option=delete=atime,delete=ctime", "-C", str(scratch), directory.name]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def make_odd_image(layout: Layout, scratch: Path, compression: Compression, *, docker: bool = False) -> None:
    """An image ``latest`` of `odd_layers` in ``layout``, with the media types of OCI or of Docker."""
    layers = [layout.add_layer(io.BytesIO(data), compression) for data in odd_layers(scratch)]
    config = {"Entrypoint": ["/start"], "Env": ["A=1"], "User": "app", "WorkingDir": "/srv"}
    made = layout.add_image(layers, config, "latest")
    if docker:
        manifest = layout.blob(made).read_bytes()
        for ours, theirs in _DOCKER_TYPES:
            manifest = manifest.replace(ours, theirs)
        layout.tag(layout.add_blob(manifest, MANIFEST_TYPES[1]), "latest")


_DOCKER_TYPES = (
    (b"application/vnd.oci.image.manifest.v1+json", b"application/vnd.docker.distribution.manifest.v2+json"),
    (b"application/vnd.oci.image.config.v1+json", b"application/vnd.docker.container.image.v1+json"),
    (b"application/vnd.oci.image.layer.v1.tar", b"application/vnd.docker.image.rootfs.diff.tar"),
    (b"diff.tar+", b"diff.tar."),
)
