"""Pulling from a real registry, also when it is slow, breaks off, lies or wants a token."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from registry_kit import docker_registry, find_registry

import greenroom.testing
from greenroom.core.errors import FailedPrecondition, NotFound, Unavailable
from greenroom.images import registry
from greenroom.images.credentials import Login
from greenroom.images.registries import Registries
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import COMPRESSIONS, contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import Compression, push_layout
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


async def test_nobody_answers(store: DiskImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RETRY_BASE_S", 0.001)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await store.prepare("127.0.0.1:1/test/image:1")


# --- logging in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifetime", [8, 1000])
async def test_anonymous_token(upstream: str, pushed: str, store: DiskImageStore, lifetime: int) -> None:
    """Also when tokens run out while layers are under way."""
    async with FaultProxy(upstream).running() as front:
        scopes = front.want_tokens(lifetime_requests=lifetime)
        front.cut_after_bytes = SIZE // 2
        check((await store.prepare(f"{front.host}/{pushed}")).rootfs)
        assert set(scopes) == {"repository:test/image:pull"}


async def test_token_for_an_account(upstream: str, pushed: str, tmp_path: Path) -> None:
    async def credentials(host: str, repository: str) -> Login | None:
        return Login(username="ada", password="secret") if host == front.host else None

    async with FaultProxy(upstream).running() as front:
        front.want_tokens(account=("ada", "secret"))
        with pytest.raises(FailedPrecondition) as raised:
            await DiskImageStore(tmp_path / "anonymous").prepare(f"{front.host}/{pushed}")
        assert raised.value.reason == "REGISTRY_AUTH"
        store = DiskImageStore(tmp_path / "store", registries=Registries(credentials=credentials))
        check((await store.prepare(f"{front.host}/{pushed}")).rootfs)


async def test_password_is_not_sent_in_clear_elsewhere(upstream: str, pushed: str, tmp_path: Path) -> None:
    """A registry that sends the login to a plain http address of another machine gets no password."""

    async def credentials(host: str, repository: str) -> Login | None:
        return Login(username="ada", password="secret")

    async def intercept(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=401, headers={"WWW-Authenticate": 'Bearer realm="http://192.0.2.1/token"'})

    async with FaultProxy(upstream).running() as front:
        front.intercept = intercept
        with pytest.raises(FailedPrecondition, match="not https"):
            await DiskImageStore(tmp_path / "store", registries=Registries(credentials=credentials)).prepare(
                f"{front.host}/{pushed}"
            )


async def test_credentials_do_not_follow_a_redirect(upstream: str, pushed: str, tmp_path: Path) -> None:
    """Blobs are often kept by somebody else; a token is for the registry alone."""
    leaked: list[str] = []

    async def watch(request: web.Request) -> web.StreamResponse | None:
        leaked.extend(request.headers.getall("Authorization", []))
        return None

    async with FaultProxy(upstream).running() as storage, FaultProxy(upstream).running() as front:
        storage.intercept = watch
        front.want_tokens(lifetime_requests=1000)
        tokens = front.intercept
        assert tokens is not None

        async def redirect(request: web.Request) -> web.StreamResponse | None:
            if "/blobs/" in request.path and request.headers.get("Authorization"):
                raise web.HTTPTemporaryRedirect(f"http://{storage.host}{request.path_qs}")
            return await tokens(request)

        front.intercept = redirect
        check((await DiskImageStore(tmp_path / "store").prepare(f"{front.host}/{pushed}")).rootfs)
        assert storage.blob_bytes >= SIZE
        assert leaked == []
