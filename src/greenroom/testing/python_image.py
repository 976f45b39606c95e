"""An OCI image of this machine's own Python with a program in it: what the demo, tests and benchmarks run."""

from __future__ import annotations

import stat
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from greenroom.testing import counter_app
from greenroom.testing.oci_layout import Compression, Layer, Layout
from greenroom.testing.python_rootfs import build_python_rootfs

_PORT = 8080


def build_python_image(
    layout: Path,
    *,
    app: Path,
    tag: str = "latest",
    compression: Compression = "zstd",
    env: dict[str, str] | None = None,
    ballast: Iterable[Layer] = (),
) -> str:
    """Adds an image to the layout in the directory ``layout`` (made if it is not there).

    Two layers: the interpreter with its library, and the program. The entry point runs the program as root in
    ``/``; port 8080 is exposed. Times are 0, owners 0:0 and entries sorted, so that the same Python and program make
    the same digest.

    Args:
        app: the program's file; becomes ``/app/<its name>``.
        env: further environment of the image.
        ballast: further layers, which are in the layout already; they come last.

    Returns:
        The reference, ``oci:<layout>:<tag>``.
    """
    target = Layout(layout)
    with tempfile.TemporaryDirectory(prefix="greenroom-image-") as temporary:
        base, program = Path(temporary, "base"), Path(temporary, "program")
        build_python_rootfs(base)
        (program / "app").mkdir(parents=True)
        copy = program / "app" / app.name
        copy.write_bytes(app.read_bytes())
        copy.chmod(0o644)
        layers = [add_tree(target, tree, compression) for tree in (base, program)]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", **(env or {})}
    config = {
        "Entrypoint": ["/usr/bin/python3", f"/app/{app.name}"],
        "Env": [f"{key}={value}" for key, value in environment.items()],
        "WorkingDir": "/",
        "ExposedPorts": {f"{_PORT}/tcp": {}},
    }
    target.add_image([*layers, *ballast], config, tag)
    return f"oci:{layout}:{tag}"


def add_tree(layout: Layout, root: Path, compression: Compression = "none") -> Layer:
    """Adds the file tree below ``root`` as a layer; reproducible, owned by 0:0."""
    with tempfile.TemporaryFile(dir=layout.directory) as archive:
        write_tree(archive, root)
        archive.seek(0)
        return layout.add_layer(archive, compression)


def write_tree(archive: IO[bytes], root: Path) -> None:
    """Writes the files below ``root`` as a tar archive, sorted, with time 0 and owner 0:0."""
    seen: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            info = tarfile.TarInfo(path.relative_to(root).as_posix())
            found = path.lstat()
            info.mode = stat.S_IMODE(found.st_mode)
            if stat.S_ISDIR(found.st_mode):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif stat.S_ISLNK(found.st_mode):
                info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
                tar.addfile(info)
            elif (first := seen.setdefault((found.st_dev, found.st_ino), info.name)) != info.name:
                info.type, info.linkname = tarfile.LNKTYPE, first
                tar.addfile(info)
            else:
                info.size = found.st_size
                with path.open("rb") as file:
                    tar.addfile(info, file)


def main() -> None:
    """``python -m greenroom.testing.python_image DIRECTORY [APP]``: prints the reference."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python -m greenroom.testing.python_image DIRECTORY [APP.py]")
    app = sys.argv[2] if len(sys.argv) == 3 else counter_app.__file__
    print(build_python_image(Path(sys.argv[1]).absolute(), app=Path(app)))


if __name__ == "__main__":
    main()
