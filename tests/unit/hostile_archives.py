"""Archives that want to do harm, or to be read in two ways: each with what must be said of it.

Written byte by byte where the standard library is too well-behaved to write them.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zstandard

Member = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]
#: Given the directory that must not be touched, the layers, lowest first.
Layers = Callable[[Path], list[bytes]]


class Case(NamedTuple):
    """``says``: a regular expression that the message matches. ``limits``: those of the job."""

    layers: Layers
    says: str
    limits: dict[str, int] = {}


# --- well-formed members ----------------------------------------------------------------------------------------


def info(name: str, kind: bytes = tarfile.REGTYPE, **attributes: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in attributes.items():
        setattr(member, key, value)
    return member


def file(name: str, data: bytes = b"data", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, size=len(data), **attributes), data


def directory(name: str, **attributes: object) -> tarfile.TarInfo:
    return info(name, tarfile.DIRTYPE, **attributes)


def symlink(name: str, target: str, **attributes: object) -> tarfile.TarInfo:
    return info(name, tarfile.SYMTYPE, linkname=target, **attributes)


def link(name: str, target: str, **attributes: object) -> tarfile.TarInfo:
    return info(name, tarfile.LNKTYPE, linkname=target, **attributes)


def archive(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tuple):
                tar.addfile(member[0], io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return out.getvalue()


# --- bytes ------------------------------------------------------------------------------------------------------

END = bytes(1024)


def header(
    name: bytes = b"x",
    flag: bytes = b"0",
    size: int | bytes = 0,
    *,
    uid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    linkname: bytes = b"",
    checksum: bytes = b"",
    rest: bytes = b"",
) -> bytes:
    """One block. ``rest``: from byte 345 on (prefix, or GNU's fields)."""
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    magic = b"ustar  \0" if rest else b"ustar\00000"
    fields = [name.ljust(100, b"\0"), b"0000644\0", uid, b"0000000\0", size_field, mtime, b" " * 8, flag]
    fields += [linkname.ljust(100, b"\0"), magic, bytes(80), rest.ljust(167, b"\0")]
    block = b"".join(fields)
    assert len(block) == 512, len(block)
    return block[:148] + (checksum or b"%06o\0 " % sum(block)) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def extended(text: bytes, flag: bytes = b"x") -> bytes:
    return header(b"extended", flag, len(text)) + padded(text)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while length != len(b"%d" % length) + len(key) + len(value) + 3:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def pax(**values: bytes) -> bytes:
    """An extended header; ``__`` in a key is a dot."""
    return extended(b"".join(record(key.replace("__", ".").encode(), value) for key, value in values.items()))


def _sparse_1_0(numbers: bytes, *, data: bytes = b"") -> bytes:
    body = padded(numbers) + data
    head = pax(
        GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__name=b"holes", GNU__sparse__realsize=b"9999"
    )
    return head + header(size=len(body)) + padded(body) + END


def _sparse_0_1(numbers: bytes, size: bytes = b"9999", *, data: bytes = b"") -> bytes:
    head = pax(GNU__sparse__map=numbers, GNU__sparse__size=size, GNU__sparse__name=b"holes")
    return head + header(size=len(data)) + padded(data) + END


def _endless_old_sparse() -> bytes:
    block = b"00000000000\0" * 42 + b"\1" + bytes(7)
    return header(b"holes", b"S", rest=bytes(41) + b"00000000000\0" * 8 + b"\1") + block * 4000 + END


def _plain(*layers: bytes) -> Layers:
    return lambda outside: list(layers)


def _members(*layers: list[Member]) -> Layers:
    return lambda outside: [archive(*members) for members in layers]


def _chain(length: int) -> list[Member]:
    return [symlink(f"l{n}", f"l{n + 1}") for n in range(length)]


def _wide_zstd() -> bytes:
    """A frame that asks for a window of 2 GiB. Source: RFC 8878, section 3.1.1.1.2."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b00000000, (31 - 10) << 3]) + b"\x01\x00\x00"


_BIG = bytes(2_000_000)
_BYTES = {"max_unpacked_bytes": 1_000_000}
_UP = r"its path leads upwards \(\.\.\)"
_NO_FILE = r"hard link to '.*', which is no file of the image"

CORPUS: dict[str, Case] = {
    # Names
    "parent": Case(_members([file("../outside/secret")]), _UP),
    "parent in the middle": Case(_members([directory("a"), file("a/../../outside/secret")]), _UP),
    "absolute parent": Case(_members([file("/../outside/secret")]), _UP),
    "nothing but a parent": Case(_members([directory("..")]), _UP),
    "parent in a PAX header": Case(
        _plain(pax(path=b"../outside/secret") + header() + END), r"'\.\./outside/secret'.*" + _UP
    ),
    "parent in a global PAX header": Case(
        _plain(extended(record(b"path", b"../outside/secret"), b"g") + header() + END), r"'\.\./outside/secret'.*" + _UP
    ),
    "parent in a GNU long name": Case(
        _plain(extended(b"../outside/secret\0", b"L") + header() + END), r"'\.\./outside/secret'.*" + _UP
    ),
    "parent in a ustar prefix": Case(
        _plain(header(b"secret")[:257] + b"ustar\00000" + bytes(80) + b"../outside".ljust(167, b"\0")), "checksum"
    ),
    "file as the root": Case(_members([file("./")]), "only a directory can be the root"),
    "link as the root": Case(_members([symlink(".", "../outside")]), "only a directory can be the root"),
    "hard link as the root": Case(_members([file("f"), link("./", "f")]), "only a directory can be the root"),
    "no name": Case(_plain(header(b"") + END), "only a directory can be the root"),
    "NUL in a name": Case(_plain(pax(path=b"a\0b") + header() + END), "NUL"),
    "name too long for the disk": Case(_members([file("n" * 256)]), "File name too long"),
    "path too long": Case(_members([file("/".join(["n" * 100] * 50))]), "more than 4096 bytes"),
    "too deep": Case(_members([directory("/".join("d" * 257))]), "more than 256 directories deep"),
    "below a file": Case(_members([file("f"), file("f/x")]), "'f/x'.*Not a directory"),
    "below a file of a lower layer": Case(_members([file("f")], [file("f/x")]), "'f/x'.*Not a directory"),
    "below a FIFO": Case(_members([info("f", tarfile.FIFOTYPE), file("f/x")]), "'f/x'.*Not a directory"),
    # Whiteouts
    "whiteout of a parent": Case(_members([file("d/x")], [file("d/.wh...", b"")]), "whiteout of no name"),
    "whiteout of itself": Case(_members([file("d/x")], [file("d/.wh..", b"")]), "whiteout of no name"),
    "whiteout of nothing": Case(_members([file("d/x")], [file("d/.wh.", b"")]), "whiteout of no name"),
    "whiteout outside": Case(_members([file("d/x")], [file("../outside/.wh.secret", b"")]), _UP),
    "opaque outside": Case(_members([file("d/x")], [file("../outside/.wh..wh..opq", b"")]), _UP),
    # Links
    "hard link to a parent": Case(_members([link("x", "../outside/secret")]), _UP),
    "hard link to a parent in a PAX header": Case(
        _plain(pax(linkpath=b"../outside/secret") + header(flag=b"1", linkname=b"fine") + END), _UP
    ),
    "hard link to nothing": Case(_members([link("x", "/etc/shadow")]), _NO_FILE),
    "hard link to an absolute path outside": Case(lambda o: [archive(link("x", f"{o}/secret"))], _NO_FILE),
    "hard link to a directory": Case(_members([directory("d"), link("x", "d")]), _NO_FILE),
    "hard link to the root": Case(_members([link("x", "./")]), "hard link to the root"),
    "hard link to itself": Case(_members([link("x", "x")]), _NO_FILE),
    "hard link through a link": Case(_members([symlink("out", "../outside"), link("x", "out/secret")]), _NO_FILE),
    "hard link through an absolute link": Case(
        lambda o: [archive(symlink("out", str(o)), link("x", "out/secret"))], _NO_FILE
    ),
    "hard link through a link of a lower layer": Case(
        lambda o: [archive(symlink("out", str(o))), archive(link("x", "out/secret"))], _NO_FILE
    ),
    "hard link to what is whited out": Case(_members([file("a")], [file(".wh.a", b""), link("x", "a")]), _NO_FILE),
    "hard link below its own target": Case(_members([file("a"), link("a/b", "a")]), "'a/b'"),
    "hard link whose place holds its target": Case(_members([file("d/a"), link("d", "d/a")]), "'d'"),
    "link loop": Case(_members([symlink("a", "b"), symlink("b", "a"), file("a/x")]), "too many symbolic links"),
    "link to itself": Case(_members([symlink("a", "a"), file("a/x")]), "too many symbolic links"),
    "long chain of links": Case(_members([*_chain(60), file("l0/x")]), "too many symbolic links"),
    "empty link": Case(_members([symlink("x", "")]), "'x'"),
    "NUL in a link": Case(_plain(pax(linkpath=b"a\0b") + header(flag=b"2") + END), "NUL"),
    "link too long": Case(_members([symlink("x", "t" * 5000)]), "more than 4096 bytes"),
    # Kinds
    "block device": Case(
        _members([info("sda", tarfile.BLKTYPE, devmajor=8, devminor=0)]), "device node outside of /dev"
    ),
    "character device": Case(_members([info("mem", tarfile.CHRTYPE, devmajor=1, devminor=1)]), "device node"),
    "device in another dev": Case(_members([info("usr/dev/mem", tarfile.CHRTYPE, devmajor=1)]), "device node"),
    "device behind a link to dev": Case(
        _members([directory("dev"), symlink("d", "dev"), info("d/mem", tarfile.CHRTYPE, devmajor=1)]), "device node"
    ),
    "unknown type": Case(_members([info("x", b"Z")]), "unknown type"),
    "part of a file of another volume": Case(_plain(header(flag=b"M", size=4) + padded(b"data") + END), "unknown type"),
    # Numbers
    "impossible owner": Case(_members([file("x", pax_headers={"uid": "4294967295"})]), "owner 4294967295:0 can't be"),
    "negative owner": Case(_plain(header(uid=b"\xff" * 8) + END), "owner -1:0 can't be"),
    "owner that is no number": Case(_plain(header(uid=b"root\0\0\0\0") + END), "where a number should be"),
    "negative size": Case(_plain(pax(size=b"-5") + header() + END), "'x'.*size is negative"),
    "negative size in base 256": Case(_plain(header(size=b"\xff" * 12) + END), "'x'.*size is negative"),
    "size that only Python reads": Case(_plain(header(size=b"00000001_00\0") + END), "where a number should be"),
    "size of a thousand digits": Case(_plain(pax(size=b"9" * 1000) + header() + END), "where a number should be"),
    "size in floating point": Case(_plain(pax(size=b"1e3") + header() + END), "where a number should be"),
    "larger than the archive": Case(_plain(header(size=1 << 30) + padded(b"data") + END), "'x'.*ends too early"),
    "larger than any disk": Case(_plain(header(size=b"\x80" + b"\xff" * 11) + padded(b"data") + END), "ends too early"),
    "time that is none": Case(_plain(pax(mtime=b"--5") + header() + END), "where a time should be"),
    # Headers
    "checksum": Case(_plain(header(checksum=b"000123\0 ") + END), "checksum is wrong"),
    "checksum after an entry": Case(
        _plain(header(b"first") + header(checksum=b"000123\0 ") + END),
        "'first'.*checksum is wrong.*in a header after it",
    ),
    "record longer than its header": Case(_plain(extended(b"99 path=x\n") + header() + END), "can't be read"),
    "record of no length": Case(_plain(extended(b"0 path=x\n") + header() + END), "can't be read"),
    "record of negative length": Case(_plain(extended(b"-9 path=x\n") + header() + END), "can't be read"),
    "record without a key": Case(_plain(extended(b"8 pathx\n") + header() + END), "can't be read"),
    "huge extended header": Case(_plain(header(flag=b"x", size=1 << 30) + bytes(4096)), "at most 1048576 are read"),
    "huge long name": Case(_plain(header(flag=b"L", size=1 << 30) + bytes(4096)), "at most 1048576 are read"),
    "negative extended header": Case(_plain(header(flag=b"x", size=b"\xff" * 12) + END), "at most 1048576 are read"),
    "nothing but extended headers": Case(_plain(pax(a=b"b") * 20 + header() + END), "more than 16 extended headers"),
    "huge global headers": Case(
        _plain(
            *[b"".join(extended(record(b"k%d" % n, b"v" * 9000), b"g") + header(b"f%d" % n) for n in range(3)) + END]
        ),
        "global headers have more than 16384 bytes",
    ),
    "attribute too large": Case(
        _plain(pax(SCHILY__xattr__user__large=b"v" * 70_000) + header() + END), "'x'.*attribute 'user.large'"
    ),
    "attribute with a long name": Case(
        _plain(extended(record(b"SCHILY.xattr.user." + b"n" * 300, b"v")) + header() + END), "'x'.*attribute 'user.n"
    ),
    "attribute with a NUL in its name": Case(
        _plain(extended(record(b"SCHILY.xattr.user.a\0b", b"v")) + header() + END), "'x'.*attribute 'user.a"
    ),
    "link with data": Case(
        _plain(header(b"l", b"2", 512, linkname=b"x") + b"d" * 512 + END), "'l'.*no tar archive.*in a header after it"
    ),
    # Sparse files
    "fragments that overlap": Case(_plain(_sparse_0_1(b"0,4,2,4", data=b"datadata")), "'holes'.*overlap"),
    "fragments before the file": Case(_plain(_sparse_0_1(b"-4,4", data=b"data")), "'holes'.*overlap"),
    "fragments of negative length": Case(_plain(_sparse_0_1(b"0,-4,0,8", data=b"data")), "'holes'.*overlap"),
    "fragments past the end": Case(_plain(_sparse_0_1(b"9998,4", data=b"data")), "'holes'.*does not fit its data"),
    "fragments of other data": Case(_plain(_sparse_0_1(b"0,100", data=b"data")), "'holes'.*does not fit its data"),
    "half a fragment": Case(_plain(_sparse_0_1(b"0,4,9", data=b"data")), "'holes'.*map can't be read"),
    "fragments that are no numbers": Case(_plain(_sparse_0_1(b"0,four", data=b"data")), "where a number should be"),
    "sparse beyond any disk": Case(_plain(_sparse_0_1(b"0,4", b"9" * 18, data=b"data")), "sparse file of 9{18} bytes"),
    "map larger than its data": Case(_plain(_sparse_1_0(b"50\n0\n4\n")), "'holes'.*larger than its data"),
    "map of a million fragments": Case(_plain(_sparse_1_0(b"1000000\n")), "'holes'.*map can't be read"),
    "map of negative fragments": Case(_plain(_sparse_1_0(b"-1\n")), "'holes'.*map can't be read"),
    "map without an end": Case(_plain(_endless_old_sparse()), "'holes'.*more than 65536 fragments"),
    # Bombs, and streams that are none
    "directories that no entry speaks of": Case(
        _members([file("/".join("d" * 200), b"")]), "more than 100 files", {"max_entries": 100}
    ),
    "too many entries": Case(
        _members([file(f"f{n}", b"") for n in range(20)]), "more than 10 files", {"max_entries": 10}
    ),
    "too many entries in all layers": Case(
        _members(*([file(f"f{n}", b"") for n in range(4)] for _ in range(4))), "more than 10 files", {"max_entries": 10}
    ),
    "gzip bomb": Case(_plain(gzip.compress(archive(file("zeros", _BIG)))), "more than 1000000 bytes", _BYTES),
    "zstd bomb": Case(_plain(zstandard.compress(archive(file("zeros", _BIG)))), "more than 1000000 bytes", _BYTES),
    "bomb after the end": Case(_plain(gzip.compress(archive(file("x")) + _BIG)), "more than 1000000 bytes", _BYTES),
    "bomb in a whiteout": Case(_members([file(".wh.x", _BIG)]), "more than 1000000 bytes", _BYTES),
    "zstd window of 2 GiB": Case(_plain(_wide_zstd()), "can't be decompressed"),
    "gzip cut off": Case(_plain(gzip.compress(archive(file("x", _BIG)))[:-20]), "can't be decompressed|too early"),
    "gzip with damaged data": Case(
        _plain(gzip.compress(bytes(range(256)) * 40)[:200] + b"\xff" * 100), "can't be decompressed|no tar archive"
    ),
    "no gzip at all": Case(_plain(b"\x1f\x8b\x08junk"), "can't be decompressed"),
    "bzip2": Case(_plain(b"BZh91AY&SY" * 100), "no tar archive"),
    "text": Case(_plain(b"<html>not found</html>"), "ends too early"),
}
