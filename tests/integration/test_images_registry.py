"""Pulling from a real registry, also when it is slow, breaks off, lies or wants a token."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_kit import docker_registry, find_registry, put_manifest

import greenroom.testing
from greenroom.core.errors import NotFound, Unavailable
from greenroom.images import registry
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, this_platform
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import COMPRESSIONS, contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import Compression, Layout, push_layout
from greenroom.testing.python_image import build_python_image

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")

#: Not compressible, so that a layer is as large as this.
DATA = os.urandom(6 << 20)
SIZE = len(DATA)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def pushed(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``repository:tag`` of an image with one large and one small layer."""
    layout = tmp_path_factory.mktemp("layout")
    make_image(layout, {"large": DATA}, {"small": b"small"}, compression="zstd")
    push_layout(layout, f"{upstream}/test/image:1")
    return "test/image:1"


@pytest.fixture
def store(tmp_path: Path) -> DiskImageStore:
    return DiskImageStore(tmp_path / "store")


def check(image_root: Path) -> None:
    assert contents(image_root) == {"large": DATA, "small": b"small"}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_python_image_runs_after_a_round_trip(upstream: str, tmp_path: Path, compression: Compression) -> None:
    """The same tree comes out of the layout and of the registry, whatever the compression, and it works."""
    app = Path(greenroom.testing.__file__).with_name("counter_app.py")
    reference = build_python_image(tmp_path / "layout", app=app, compression=compression)
    push_layout(tmp_path / "layout", f"{upstream}/python/{compression}:latest")

    async def both() -> tuple[Path, Path]:
        pulled = await DiskImageStore(tmp_path / "pulled").prepare(f"{upstream}/python/{compression}:latest")
        local = await DiskImageStore(tmp_path / "local").prepare(reference)
        assert pulled.digest == local.digest
        assert pulled.config == local.config
        assert pulled.config.entrypoint == ("/usr/bin/python3", "/app/counter_app.py")
        assert pulled.config.exposed_ports == (8080,)
        return pulled.rootfs, local.rootfs

    pulled, local = asyncio.run(both())
    assert _tree(pulled) == _tree(local)
    assert len(_tree(pulled)) > 500
    if os.geteuid() == 0:
        code = "import json, socket, sys; print(sys.version_info[:2])"
        ran = subprocess.run(
            ["chroot", pulled, "/usr/bin/python3", "-c", code], stdout=subprocess.PIPE, check=True, text=True
        )
        assert ran.stdout.strip() == str(sys.version_info[:2])


def _tree(root: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, size and target of everything."""
    found = {}
    for path in root.rglob("*"):
        info = path.lstat()
        target = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (info.st_mode, info.st_size if path.is_file() else 0, target)
    return found


def test_python_image_is_reproducible(tmp_path: Path) -> None:
    app = Path(greenroom.testing.__file__).with_name("counter_app.py")
    for directory in ("one", "two"):
        build_python_image(tmp_path / directory, app=app, compression="none")
    one, two = (sorted(p.name for p in (tmp_path / d / "blobs/sha256").iterdir()) for d in ("one", "two"))
    assert one == two


async def test_by_digest(upstream: str, pushed: str, store: DiskImageStore) -> None:
    image = await store.prepare(f"{upstream}/{pushed}")
    check(image.rootfs)
    again = await store.prepare(f"{upstream}/test/image@{image.digest}")
    assert again.digest == image.digest


async def test_what_is_not_there(upstream: str, pushed: str, store: DiskImageStore) -> None:
    for name in ("test/image:2", "test/nothing:1", f"test/image@sha256:{'0' * 64}"):
        with pytest.raises(NotFound) as raised:
            await store.prepare(f"{upstream}/{name}")
        assert raised.value.reason == "IMAGE_NOT_FOUND"


async def test_what_is_here_needs_no_registry(upstream: str, pushed: str, store: DiskImageStore) -> None:
    """A tree that was lost, or never became whole, is made from what was fetched."""
    async with FaultProxy(upstream).running() as front:
        image = await store.prepare(f"{front.host}/{pushed}")
    shutil.rmtree(image.rootfs)
    check((await store.prepare(f"{front.host}/{pushed}@{image.digest}")).rootfs)


async def test_nobody_answers(store: DiskImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RETRY_BASE_S", 0.001)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await store.prepare("127.0.0.1:1/test/image:1")


@pytest.mark.parametrize("kind", ["oci", "docker"])
@pytest.mark.parametrize("depth", [1, 2])
async def test_index(upstream: str, pushed: str, store: DiskImageStore, tmp_path: Path, kind: str, depth: int) -> None:
    """An image for several machines, also as an index inside an index, in OCI's words and in Docker's."""
    layout = Layout(tmp_path / "layout")
    make_image(layout.directory, {"kind": kind.encode()}, compression="gzip")
    push_layout(layout.directory, f"{upstream}/test/index:part")
    (descriptor,) = layout.index().manifests
    manifest = json.loads(layout.blob(descriptor).read_bytes())
    manifest_type, index_type = (types[0 if kind == "oci" else 1] for types in (MANIFEST_TYPES, INDEX_TYPES))
    if kind == "docker":
        manifest["mediaType"] = manifest_type
        manifest["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json"
        manifest["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    here = this_platform()
    others = [("linux", "riscv64"), (here.os, here.architecture), ("unknown", "unknown")]
    inner, media_type = json.dumps(manifest).encode(), manifest_type
    for _ in range(depth):
        digest = put_manifest(upstream, "test/index:inner", inner, media_type)
        described = {"mediaType": media_type, "digest": digest, "size": len(inner)}
        platforms = [{**described, "platform": {"os": os_, "architecture": arch}} for os_, arch in others]
        document = {"schemaVersion": 2, "mediaType": index_type, "manifests": platforms}
        inner, media_type = json.dumps(document).encode(), index_type
    index_digest = put_manifest(upstream, "test/index:all", inner, media_type)
    image = await store.prepare(f"{upstream}/test/index:all")
    assert contents(image.rootfs) == {"kind": kind.encode()}
    assert image.digest == f"sha256:{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}"
    # The index's digest means the same image.
    assert (await store.prepare(f"{upstream}/test/index@{index_digest}")).digest == image.digest
