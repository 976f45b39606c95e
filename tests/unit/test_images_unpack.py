"""Layers become trees: what the image spec says, and how damage is noticed."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hostile_archives import Member, archive, directory, file, info, link, symlink

from greenroom.core.errors import DataLoss, FailedPrecondition
from greenroom.images.unpack import Job, JobLayer, unpack

IS_ROOT = os.geteuid() == 0

Apply = Callable[..., Path]


@pytest.fixture
def apply(tmp_path: Path) -> Apply:
    """Unpacks layers (tar archives) into a new directory beside which lies a file that must not change."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("untouched")
    target = tmp_path / "target"
    target.mkdir()

    def work(*layers: bytes, **limits: int) -> Path:
        described = []
        for number, data in enumerate(layers):
            blob = tmp_path / f"blob{number}"
            blob.write_bytes(data)
            diff_id = "sha256:" + hashlib.sha256(data).hexdigest()
            described.append(JobLayer(blob=str(blob), digest=f"layer{number}", diff_id=diff_id))
        try:
            unpack(Job(target=str(target), layers=tuple(described), **limits), io.BytesIO())
        finally:
            assert {p.name for p in tmp_path.iterdir()} <= {"outside", "target", *(f"blob{n}" for n in range(9))}
            assert [p.name for p in outside.iterdir()] == ["secret"]
            assert (outside / "secret").read_text() == "untouched"
            assert (outside / "secret").stat().st_nlink == 1
        return target

    return work


def listing(root: Path) -> dict[str, str]:
    """Every path with what it is: the content of a file, the target of a link."""
    return {
        path.relative_to(root).as_posix(): f"-> {path.readlink()}"
        if path.is_symlink()
        else "/"
        if path.is_dir()
        else path.read_text()
        for path in root.rglob("*")
    }


# --- what the spec says ---------------------------------------------------------------------------------------


def test_files_directories_and_links(apply: Apply) -> None:
    root = apply(
        archive(
            directory("./"),
            directory("etc"),
            file("etc/hosts", b"localhost"),
            symlink("etc/link", "/etc/hosts"),
            link("etc/same", "etc/hosts"),
            file("implied/parents/x", b"x"),
            file("/absolute", b"inside"),
            info("fifo", tarfile.FIFOTYPE),
        )
    )
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
    (root / "fifo").unlink()
    assert listing(root) == {
        "etc": "/",
        "etc/hosts": "localhost",
        "etc/link": "-> /etc/hosts",
        "etc/same": "localhost",
        "implied": "/",
        "implied/parents": "/",
        "implied/parents/x": "x",
        "absolute": "inside",
    }
    assert (root / "etc/hosts").samefile(root / "etc/same")


def test_modes_times_and_owners(apply: Apply) -> None:
    root = apply(
        archive(
            directory("readonly", mode=0o555, mtime=1000),
            file("readonly/suid", mode=0o4755, mtime=1_600_000_000.25, uid=12, gid=34),
            directory("sticky", mode=0o1777, mtime=2000, uid=56, gid=78),
            symlink("link", "nowhere"),
        )
    )
    found = (root / "readonly/suid").stat()
    assert stat.S_IMODE(found.st_mode) == 0o4755
    assert found.st_mtime_ns == 1_600_000_000_250_000_000
    assert stat.S_IMODE((root / "readonly").stat().st_mode) == 0o555
    assert (root / "readonly").stat().st_mtime == 1000
    assert stat.S_IMODE((root / "sticky").stat().st_mode) == 0o1777
    if IS_ROOT:
        assert (found.st_uid, found.st_gid) == (12, 34)
        assert ((root / "sticky").stat().st_uid, (root / "sticky").stat().st_gid) == (56, 78)


def test_extended_attributes(apply: Apply) -> None:
    wanted = {"SCHILY.xattr.user.note": "kept", "SCHILY.xattr.user.overlay.opaque": "y"}
    if IS_ROOT:
        wanted["SCHILY.xattr.trusted.overlay.redirect"] = "/etc"
    root = apply(archive(file("x", pax_headers=wanted), directory("d", pax_headers=wanted)))
    for path in (root / "x", root / "d"):
        assert {n: os.getxattr(path, n) for n in os.listxattr(path)} == {"user.note": b"kept"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(apply: Apply, form: int) -> None:
    deep = "/".join(["directory-number"] * 9) + "/file"
    members: list[Member] = [file(deep, b"deep")]
    if form != tarfile.USTAR_FORMAT:
        members += [file("n" * 255, b"long"), symlink("link", "t" * 1000), link("hard", deep)]
    root = apply(archive(*members, form=form))
    assert (root / deep).read_text() == "deep"
    if form != tarfile.USTAR_FORMAT:
        assert (root / ("n" * 255)).read_text() == "long"
        assert str((root / "link").readlink()) == "t" * 1000
        assert (root / "hard").samefile(root / deep)


def test_large_numbers(apply: Apply) -> None:
    root = apply(
        archive(file("gnu", uid=3_000_000, gid=4_000_000), form=tarfile.GNU_FORMAT),
        archive(file("pax", uid=3_000_000, gid=4_000_000)),
    )
    if IS_ROOT:
        for name in ("gnu", "pax"):
            assert ((root / name).stat().st_uid, (root / name).stat().st_gid) == (3_000_000, 4_000_000)


def test_names_that_are_not_utf8(apply: Apply) -> None:
    root = apply(archive(file(os.fsdecode(b"caf\xe9"), b"latin"), form=tarfile.GNU_FORMAT))
    assert os.listdir(os.fsencode(root)) == [b"caf\xe9"]  # noqa: PTH208 - bytes


@pytest.mark.parametrize("sparse", ["--format=gnu", "--sparse-version=0.1", "--sparse-version=1.0"])
def test_sparse_files(apply: Apply, tmp_path: Path, sparse: str) -> None:
    source = tmp_path / "outside" / "sparse"
    with source.open("wb") as out:
        for offset, data in ((0, b"start"), (1 << 20, b"middle" * 1000), (5 << 20, b"end")):
            out.seek(offset)
            out.write(data)
        out.truncate(8 << 20)
    content = source.read_bytes()
    form = [sparse] if sparse.startswith("--format") else ["--format=posix", sparse]
    data = subprocess.run(
        ["tar", "-c", "--sparse", *form, "-C", source.parent, "sparse"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(data) < 1 << 20
    source.unlink()
    root = apply(data)
    assert (root / "sparse").read_bytes() == content
    assert (root / "sparse").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("form", ["gzip members", "gzip padded", "zstd frames", "zstd skippable", "zstd long"])
def test_streams_in_several_pieces(apply: Apply, tmp_path: Path, form: str) -> None:
    """As eStargz, zstd:chunked and parallel compressors write them."""
    data = archive(file("a", os.urandom(300_000)), file("b", b"b" * 300_000))
    halves = data[:200_000], data[200_000:]
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"table"
    long_window = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    packed = {
        "gzip members": lambda: b"".join(map(gzip.compress, halves)),
        "gzip padded": lambda: gzip.compress(data) + bytes(512),
        "zstd frames": lambda: b"".join(map(zstandard.compress, halves)),
        "zstd skippable": lambda: skippable + zstandard.compress(data) + skippable,
        "zstd long": lambda: zstandard.ZstdCompressor(compression_params=long_window).compress(data),
    }[form]()
    blob = tmp_path / "blob0"
    blob.write_bytes(packed)
    layer = JobLayer(blob=str(blob), digest="layer0", diff_id="sha256:" + hashlib.sha256(data).hexdigest())
    unpack(Job(target=str(apply()), layers=(layer,)), io.BytesIO())
    assert (tmp_path / "target/b").read_bytes() == b"b" * 300_000


def test_upper_layers_replace(apply: Apply) -> None:
    root = apply(
        archive(file("a", b"1"), directory("b"), file("b/x", b"1"), symlink("c", "a"), file("d", b"1")),
        archive(file("a", b"2"), file("b", b"now a file"), directory("c"), file("c/y", b"2"), symlink("d", "a")),
    )
    assert listing(root) == {"a": "2", "b": "now a file", "c": "/", "c/y": "2", "d": "-> a"}


def test_whiteouts(apply: Apply) -> None:
    lower = archive(
        *(file(f"{d}/{f}", b"lower") for d in ("kept", "gone", "opaque", "opaque/sub") for f in ("one", "two"))
    )
    root = apply(
        lower,
        archive(
            file("kept/.wh.one", b""),
            file(".wh.gone", b""),
            file("opaque/new", b"upper"),
            file("opaque/.wh..wh..opq", b""),
            file("opaque/sub/new", b"upper"),
            file(".wh.never-there", b""),
            file(".wh..wh.plnk/12.34", b""),
        ),
    )
    assert listing(root) == {
        "kept": "/",
        "kept/two": "lower",
        "opaque": "/",
        "opaque/new": "upper",
        "opaque/sub": "/",
        "opaque/sub/new": "upper",
        ".wh..wh.plnk": "/",
        ".wh..wh.plnk/12.34": "",
    }


def test_whiteout_and_its_successor_in_one_layer(apply: Apply) -> None:
    """Whatever their order, a whiteout only hides what lower layers brought."""
    lower = archive(file("d/old", b"lower"), file("f", b"lower"))
    for upper in (
        [file(".wh.d", b""), file("d/new", b"upper"), file(".wh.f", b""), file("f", b"upper")],
        [file("d/new", b"upper"), file("f", b"upper"), file(".wh.d", b""), file(".wh.f", b"")],
    ):
        root = apply(lower, archive(*upper))
        assert listing(root) == {"d": "/", "d/new": "upper", "f": "upper"}
        subprocess.run(["rm", "-rf", *root.iterdir()], check=True)


def test_directories_behind_links(apply: Apply) -> None:
    """As on a merged-/usr system: what is written below ``lib`` goes where the link leads, inside."""
    root = apply(
        archive(directory("usr/lib"), symlink("lib", "usr/lib"), symlink("abs", "/usr/lib")),
        archive(file("lib/a", b"a"), file("abs/b", b"b"), link("lib/c", "abs/b")),
    )
    assert listing(root) == {
        "usr": "/",
        "usr/lib": "/",
        "usr/lib/a": "a",
        "usr/lib/b": "b",
        "usr/lib/c": "b",
        "lib": "-> usr/lib",
        "abs": "-> /usr/lib",
    }


def test_device_nodes_below_dev_are_left_out(apply: Apply) -> None:
    root = apply(archive(directory("dev"), info("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3)))
    assert listing(root) == {"dev": "/"}


# --- what is damaged (what is hostile: test_images_hostile.py) --------------------------------------------------


def test_every_truncation_is_noticed(apply: Apply) -> None:
    """At any length it is refused or, cut between two entries, the digest tells: then the job has the wrong diff_id."""
    data = archive(directory("d"), file("d/x", b"x" * 1500), file("n" * 200, b"y"))
    for length in range(1, len(data.rstrip(b"\0")), 128):
        with pytest.raises((FailedPrecondition, DataLoss)):
            _unpack_with_diff_id(apply, data[:length], of=data)


def test_every_flipped_header_byte_is_noticed_or_harmless(apply: Apply) -> None:
    data = bytearray(archive(file("x", b"x" * 600), form=tarfile.USTAR_FORMAT))
    for at in range(0, 512, 3):
        flipped = bytearray(data)
        flipped[at] ^= 0x15
        with pytest.raises((FailedPrecondition, DataLoss)):
            _unpack_with_diff_id(apply, bytes(flipped), of=bytes(data))


def test_no_archive_at_all(apply: Apply) -> None:
    for junk in (b"hello", b"\x1f\x8b\x08junk", b"\x28\xb5\x2f\xfdjunk", os.urandom(4096), b"BZh9" * 200):
        # zstandard takes a frame that is cut off for the end: then the digest tells.
        with pytest.raises((FailedPrecondition, DataLoss)):
            apply(junk)


def _unpack_with_diff_id(apply: Apply, data: bytes, *, of: bytes) -> None:
    """`apply` takes the diff_id from the data; here it must be another's."""
    root = apply()
    blob = root.parent / "blob0"
    blob.write_bytes(data)
    layer = JobLayer(blob=str(blob), digest="layer0", diff_id="sha256:" + hashlib.sha256(of).hexdigest())
    try:
        unpack(Job(target=str(root), layers=(layer,)), io.BytesIO())
    finally:
        subprocess.run(["rm", "-rf", *root.iterdir()], check=True)
