"""A small root file system with this machine's own Python in it: no network, no container tools, no root.

Tests, the demo and the benchmarks need an image with a real program in it. This makes one out of what is certainly
there: the interpreter that is running, its standard library and the shared libraries both are linked to. About 40 MB,
under two seconds, starts in a few milliseconds because every module is compiled in advance.
"""

from __future__ import annotations

import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

#: Parts of the standard library that no server needs; two thirds of its size.
_LEFT_OUT = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
#: As above, by the start of the name: the static library, test modules and the Tk and example extension modules.
_LEFT_OUT_PREFIXES = ("config-", "_test", "_ctypes_test", "_tkinter", "_xx", "xx")

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = """\
root:x:0:
nogroup:x:65534:
"""
_DIRECTORIES = {
    "data": 0o1777,
    "dev": 0o755,
    "proc": 0o755,
    "root": 0o700,
    "run": 0o755,
    "sys": 0o755,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
#: Merged /usr, as in every current distribution: libraries are looked for in /lib and in /usr/lib.
_MERGED = ("bin", "lib", "lib64", "sbin")


def build_python_rootfs(dest: Path, files: Mapping[str, Path] | None = None) -> None:
    """Fills the absent or empty directory ``dest`` with a root file system that runs ``/usr/bin/python3``.

    Works for an interpreter of a distribution, of pyenv or any other prefix, and from inside a virtual environment
    (whose own packages are left out). Contains ``/etc/passwd`` and ``group`` (root, nobody), ``/tmp`` and ``/data``
    that everybody may write to, and mount points for ``/proc``, ``/dev``, ``/sys`` and ``/run``. No shell.

    Args:
        dest: the directory to fill.
        files: further files, absolute path inside -> file on this machine; copied with their permissions.

    Raises:
        FileExistsError: ``dest`` is not empty.
        FileNotFoundError: a file of ``files`` is missing, or this machine has no ``ldd``.
    """
    dest.mkdir(parents=True, exist_ok=True)
    if any(dest.iterdir()):
        raise FileExistsError(f"{dest} is not empty: give a new directory")
    for name in _MERGED:
        (dest / "usr" / name).mkdir(parents=True)
        (dest / name).symlink_to(f"usr/{name}")
    for name, mode in _DIRECTORIES.items():
        (dest / name).mkdir(parents=True)
        (dest / name).chmod(mode)
    etc = dest / "etc"
    etc.mkdir()
    (etc / "passwd").write_text(_PASSWD)
    (etc / "group").write_text(_GROUP)
    (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = dest / "usr/bin" / version
    shutil.copy2(_interpreter(), interpreter)
    for alias in ("python3", "python"):
        (dest / "usr/bin" / alias).symlink_to(version)
    stdlib = dest / "usr" / sys.platlibdir / version
    _copy_stdlib(Path(sysconfig.get_path("stdlib")), stdlib)
    extensions = sorted((stdlib / "lib-dynload").glob("*.so"))
    _copy_libraries([_interpreter(), *extensions], dest)

    for inside, source in (files or {}).items():
        target = dest / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _interpreter() -> Path:
    """The real binary behind this interpreter, also from within a virtual environment."""
    # _base_executable is what venv itself goes by; a virtual environment's own is a link to it or a small copy.
    return Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


def _copy_stdlib(source: Path, target: Path) -> None:
    def left_out(_directory: str, names: list[str]) -> set[str]:
        return {n for n in names if n in _LEFT_OUT or n.startswith(_LEFT_OUT_PREFIXES)}

    shutil.copytree(source, target, ignore=left_out, ignore_dangling_symlinks=True)
    for module in target.rglob("*.py"):
        _compile(source / module.relative_to(target), module)


def _compile(source: Path, module: Path) -> None:
    """Puts the compiled form beside ``module``, never to be checked against it (PEP 552), so that neither time stamps
    nor a read-only file system can slow a start down."""
    cached = Path(importlib.util.cache_from_source(str(module)))
    theirs = Path(importlib.util.cache_from_source(str(source)))
    code = _code_if_current(source, theirs)
    if code is None:
        try:
            py_compile.compile(
                str(module), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
        except py_compile.PyCompileError:
            pass  # the library holds templates and test data that were never meant to compile
        return
    cached.parent.mkdir(exist_ok=True)
    # Header: magic, flags (1: by hash, unchecked), hash of the source, which an unchecked file's reader ignores.
    cached.write_bytes(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + code)


def _code_if_current(source: Path, cached: Path) -> bytes | None:
    """The code in a compiled file of this machine, if it belongs to ``source``: compiling anew takes ten times as
    long. The path inside does not matter, the import system corrects it.

    Source: PEP 552 (header: magic, flags, modification time, size; 4 bytes each, little endian).
    """
    try:
        raw = cached.read_bytes()
    except OSError:
        return None
    stat = source.stat()
    stamp = (int(stat.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + (stat.st_size & 0xFFFFFFFF).to_bytes(4, "little")
    return raw[16:] if raw[:16] == importlib.util.MAGIC_NUMBER + bytes(4) + stamp else None


def _copy_libraries(binaries: Iterable[Path], dest: Path) -> None:
    """Copies every shared library that ``binaries`` need. Those from outside the system's directories go where libc is:
    the dynamic loader always looks there, while a path that was built in or configured is not there inside."""
    libraries = _libraries(binaries)
    libc = next(p for p in libraries if p.name.startswith(("libc.so", "ld-musl", "libc.musl")))
    # Not listed because the C library opens it by itself when a thread ends early.
    unwinder = libc.parent / "libgcc_s.so.1"
    if unwinder.exists():
        libraries.add(unwinder)
    for library in libraries:
        inside = library.parent.relative_to("/")
        if inside.parts[0] != "usr":
            inside = "usr" / inside
        if inside.parts[1] not in ("lib", "lib64"):
            inside = "usr" / libc.parent.relative_to("/usr" if libc.is_relative_to("/usr") else "/")
        (dest / inside).mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, dest / inside / library.name)  # follows links: the name that is asked for stays


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    listing = subprocess.run(
        ["ldd", *map(str, binaries)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout
    found: set[Path] = set()
    for line in listing.splitlines():
        if not line[:1].isspace():
            continue  # "file:" before each file's list
        words = line.split()
        path = words[words.index("=>") + 1] if "=>" in words else words[0]
        if path.startswith("/"):
            found.add(Path(os.path.normpath(path)))
    return found
