"""The same tree comes out of every layer format, and it is the one that `umoci unpack` makes of the gzip form."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_kit import docker_registry, find_registry, find_tool
from tree_kit import Node, make_odd_image, tree

import greenroom.testing
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import COMPRESSIONS
from greenroom.testing.oci_layout import Compression, Layout, push_layout
from greenroom.testing.python_image import build_python_image

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and capabilities need root"),
    pytest.mark.skipif(
        not (find_registry() and find_tool("skopeo") and find_tool("umoci")),
        reason="no docker-registry, skopeo or umoci: run scripts/setup.sh --test",
    ),
]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def oracle(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, Node]:
    """What other people's tools fetch and unpack of the gzip form."""
    directory = tmp_path_factory.mktemp("oracle")
    make_odd_image(Layout(directory / "pushed"), directory, "gzip")
    push_layout(directory / "pushed", f"{upstream}/oracle:gzip")
    skopeo, umoci = find_tool("skopeo"), find_tool("umoci")
    assert skopeo is not None and umoci is not None
    copy = ["copy", "--src-tls-verify=false", f"docker://{upstream}/oracle:gzip", f"oci:{directory}/pulled:latest"]
    subprocess.run([skopeo, "--insecure-policy", *copy], check=True, stdout=subprocess.DEVNULL)
    bundle = directory / "bundle"
    subprocess.run([umoci, "unpack", "--image", f"{directory}/pulled:latest", str(bundle)], check=True)
    return _comparable(tree(bundle / "rootfs"))


def _comparable(found: dict[bytes, Node]) -> dict[bytes, Node]:
    """Without what no layer says: the times of the root, which each layer changes, and of directories that are only
    implied by what is in them (the present in umoci, the epoch here)."""
    said = {b"etc", b"modes", b"kept", b"usr/lib", b"owners/dir", b"xattrs/dir", b"replaced/file-by-dir"}
    said |= {path for path in found if path.startswith((b"modes/d", b"sparse-"))}
    return {
        path: node._replace(mtime_ns=0) if stat.S_ISDIR(node.mode) and path not in said else node
        for path, node in found.items()
    }


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_layer_format(
    upstream: str, oracle: dict[bytes, Node], tmp_path: Path, compression: Compression, docker: bool
) -> None:
    make_odd_image(Layout(tmp_path / "layout"), tmp_path, compression, docker=docker)
    name = f"{upstream}/odd:{compression}-{'docker' if docker else 'oci'}"
    push_layout(tmp_path / "layout", name)
    image = asyncio.run(DiskImageStore(tmp_path / "store").prepare(name))
    found = _comparable(tree(image.rootfs))
    assert sorted(found) == sorted(oracle)
    different = {path: (found[path], oracle[path]) for path in oracle if found[path] != oracle[path]}
    assert not different
    # Not empty for a silly reason: a few of what must be in it.
    assert found[b"links/from-above"].links == (b"links/from-above", b"links/one", b"links/three", b"links/two")
    assert found[b"opaque/dir"].mode and b"opaque/dir/old" not in found and b"gone/file" not in found
    assert dict(found[b"xattrs/both"].xattrs).keys() == {"security.capability"}
    assert stat.S_IMODE(found[b"xattrs/both"].mode) == 0o4755
    blocks = sum((image.rootfs / f"sparse-1.0/{n}").stat().st_blocks * 512 for n in ("many", "hole", "ends"))
    assert blocks < 1 << 20, "holes stay holes"


def test_what_a_python_image_is(upstream: str, tmp_path: Path) -> None:
    """A whole image of real files, through every format."""
    umoci = find_tool("umoci")
    assert umoci is not None
    app = Path(greenroom.testing.__file__).with_name("counter_app.py")
    build_python_image(tmp_path / "gzip", app=app, compression="gzip")
    subprocess.run([umoci, "unpack", "--image", f"{tmp_path}/gzip:latest", str(tmp_path / "bundle")], check=True)
    expected = tree(tmp_path / "bundle/rootfs")
    for compression in COMPRESSIONS:
        reference = build_python_image(tmp_path / compression, app=app, compression=compression)
        image = asyncio.run(DiskImageStore(tmp_path / f"store-{compression}").prepare(reference))
        found = tree(image.rootfs)
        assert {p: n._replace(mtime_ns=0) for p, n in found.items()} == {
            p: n._replace(mtime_ns=0) for p, n in expected.items()
        }
