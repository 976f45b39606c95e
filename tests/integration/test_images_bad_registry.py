"""Registries that are down, refuse, lie or are full of what can't be used: a clear error each, and a cache that
works."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from registry_kit import docker_registry, find_registry, put_manifest

from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.images import client, download, registry
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import Layout, push_layout

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")

DATA = os.urandom(3 << 20)
Check = Callable[..., Awaitable[GreenroomError]]


@pytest.fixture(scope="module")
def registry_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def upstream(registry_data: Path) -> Iterator[str]:
    with docker_registry(registry_data) as host:
        yield host


@pytest.fixture(scope="module")
def manifest(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ``test/image:1``, which is good and stays so."""
    layout = Layout(tmp_path_factory.mktemp("layout"))
    make_image(layout.directory, {"data": DATA})
    push_layout(layout.directory, f"{upstream}/test/image:1")
    (descriptor,) = layout.index().manifests
    found: dict[str, Any] = json.loads(layout.blob(descriptor).read_bytes())
    return found


@pytest.fixture
def store(tmp_path: Path) -> DiskImageStore:
    return DiskImageStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(registry, "RETRY_BASE_S", 0.001)
    monkeypatch.setattr(download, "RETRY_BASE_S", 0.001)


@pytest.fixture
async def proxy(upstream: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(upstream).running() as running:
        yield running


@pytest.fixture
async def refused(
    store: DiskImageStore, upstream: str, manifest: dict[str, Any], tmp_path: Path
) -> AsyncIterator[Check]:
    """Preparing fails like this and leaves nothing half done; after the test the good image can be prepared."""

    async def check(reference: str, kind: type[GreenroomError], reason: str, *words: str) -> GreenroomError:
        with pytest.raises(kind) as raised:
            await store.prepare(reference)
        error = raised.value
        assert (type(error), error.reason) == (kind, reason)
        for word in words:
            assert word in error.message, error.message
        assert list((tmp_path / "store/unpacking").iterdir()) == []
        assert await store.list() == []
        return error

    yield check
    image = await store.prepare(f"{upstream}/test/image:1")
    assert contents(image.rootfs) == {"data": DATA}
    assert [found.digest for found in await store.list()] == [image.digest]


def push(upstream: str, name: str, document: object, media_type: str = MANIFEST_TYPES[0]) -> str:
    """Puts a manifest there as it is; returns its digest."""
    return put_manifest(upstream, name, json.dumps(document).encode(), media_type)


async def test_down(refused: Check) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
        await refused(f"{host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", host, "check name and network")


async def test_no_such_name(refused: Check) -> None:
    name = "no-such-host.invalid"
    await refused(f"{name}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", name)


async def test_silent(refused: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and says nothing."""
    with socket.socket() as listening, monkeypatch.context() as impatient:
        impatient.setattr(client, "SILENCE_TIMEOUT_S", 0.1)
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        await refused(f"{host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", host)


async def test_no_http(refused: Check) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n" * 10)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await refused(f"{host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", host)
    server.close()


async def test_not_a_registry(refused: Check, proxy: FaultProxy) -> None:
    """A web server that answers everything with a page."""
    proxy.answer(200, headers={"Content-Type": "text/html"}, body=b"<html>hello</html>")
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "IMAGE_INVALID", "can't be read")
    proxy.answer(418)
    await refused(f"{proxy.host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", "418", "no container registry")


async def test_401(refused: Check, proxy: FaultProxy) -> None:
    proxy.answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "REGISTRY_AUTH", f"docker login {proxy.host}")
    proxy.answer(401)  # without saying how
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "REGISTRY_AUTH", "wants a login")


async def test_403(refused: Check, proxy: FaultProxy) -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "not\nfor\x1b[31m you" + "x" * 5000}]}).encode()
    proxy.answer(403, path="/manifests/", body=body)
    error = await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "REGISTRY_AUTH", "forbids", "not for")
    assert error.message.isprintable()
    assert len(error.message) < 600
    proxy.answer(403, times=100, path="/blobs/")
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "REGISTRY_AUTH", "blob sha256:")


async def test_404(refused: Check, upstream: str, proxy: FaultProxy) -> None:
    for name in ("test/image:2", "test/nothing:1", f"test/image@sha256:{'0' * 64}"):
        await refused(f"{upstream}/{name}", NotFound, "IMAGE_NOT_FOUND", name.partition(":")[0].partition("@")[0])
    proxy.answer(404, times=100, path="/blobs/")
    await refused(f"{proxy.host}/test/image:1", NotFound, "IMAGE_NOT_FOUND", "blob sha256:")


async def test_429_is_obeyed(store: DiskImageStore, proxy: FaultProxy, manifest: dict[str, Any]) -> None:
    """Nobody asks before the time that the registry named, neither for manifests nor for blobs."""
    asked: list[float] = []

    async def watch(request: web.Request) -> None:
        asked.append(time.monotonic())

    for path in ("/manifests/", "/blobs/"):
        proxy.answer(429, path=path, headers={"Retry-After": "1"})
    proxy.intercept = watch
    began = time.monotonic()
    assert contents((await store.prepare(f"{proxy.host}/test/image:1")).rootfs) == {"data": DATA}
    assert min(asked) - began >= 0.9
    assert max(asked) - began >= 1.9
    # The two that were refused, and each of the others once.
    assert len(proxy.requests) == len(asked) + 2 == len(set(proxy.requests)) + 2 + len(DATA) // (1 << 20)


async def test_429_for_long(refused: Check, proxy: FaultProxy) -> None:
    proxy.answer(429, headers={"Retry-After": "3600"}, body=b'{"errors": [{"message": "pull rate limit"}]}')
    began = time.monotonic()
    error = await refused(
        f"{proxy.host}/test/image:1", ResourceExhausted, "REGISTRY_RATE_LIMIT", "3600 s", "pull rate limit", "log in"
    )
    assert isinstance(error, ResourceExhausted) and error.retry_after_s == 3600
    assert time.monotonic() - began < 5
    assert len(proxy.requests) == 1
    # Without a time it is tried a few times.
    proxy.answer(429, times=100, path="/manifests/")
    await refused(f"{proxy.host}/test/image:1", ResourceExhausted, "REGISTRY_RATE_LIMIT")
    assert len(proxy.requests) == 6


async def test_429_again_and_again(refused: Check, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that add up to more than a preparation may stand still end it, and that is what is said."""
    monkeypatch.setattr(download, "MAX_PAUSE_S", 1.5)
    proxy.answer(429, times=100, path="/blobs/", headers={"Retry-After": "1"})
    await refused(f"{proxy.host}/test/image:1", ResourceExhausted, "REGISTRY_RATE_LIMIT", "log in")
    assert sum("/blobs/" in request for request in proxy.requests) == 2


async def test_retry_after_is_a_date(refused: Check, proxy: FaultProxy) -> None:
    proxy.answer(503, headers={"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"})
    error = await refused(f"{proxy.host}/test/image:1", ResourceExhausted, "REGISTRY_RATE_LIMIT")
    assert isinstance(error, ResourceExhausted) and error.retry_after_s > 1e9


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_500(refused: Check, store: DiskImageStore, proxy: FaultProxy, status: int) -> None:
    for path in ("/manifests/", "/blobs/"):
        proxy.answer(status, times=2, path=path)
    image = await store.prepare(f"{proxy.host}/test/image:1")
    await store.remove(image.digest)
    proxy.answer(status, times=100, path="/manifests/")
    await refused(f"{proxy.host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", str(status))


async def test_500_for_blobs(refused: Check, proxy: FaultProxy) -> None:
    proxy.answer(500, times=1000, path="/blobs/")
    await refused(f"{proxy.host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", "500")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{path}", "more than 5 times"),
        ("//{host}{path}?again", "more than 5 times"),
        ("file:///etc/passwd", "file address"),
        ("http://[:bad/", "no URL"),
        ("gopher://x/", "gopher address"),
    ],
)
@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
async def test_redirects_to_nowhere(refused: Check, proxy: FaultProxy, where: str, target: str, words: str) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse | None:
        if where not in request.path:
            return None
        location = target.format(path=request.path, host=proxy.host)
        return web.Response(status=307, headers={"Location": location})

    proxy.intercept = redirect
    await refused(f"{proxy.host}/test/image:1", Unavailable, "REGISTRY_REDIRECT", words)


async def test_signed_urls_are_not_shown(refused: Check, proxy: FaultProxy) -> None:
    """Blobs are redirected to storage that is down; the signature in its address is a secret."""

    async def redirect(request: web.Request) -> web.StreamResponse | None:
        if "/blobs/" in request.path:
            raise web.HTTPTemporaryRedirect("http://user:hidden@127.0.0.1:1/bucket/blob?X-Amz-Signature=hidden")
        return None

    proxy.intercept = redirect
    error: BaseException | None = await refused(
        f"{proxy.host}/test/image:1", Unavailable, "REGISTRY_UNAVAILABLE", "127.0.0.1:1"
    )
    while error is not None:
        assert "hidden" not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


async def test_wrong_manifest_for_a_digest(refused: Check, proxy: FaultProxy, manifest: dict[str, Any]) -> None:
    proxy.answer(200, body=json.dumps(manifest).encode() + b" ", headers={"Content-Type": MANIFEST_TYPES[0]})
    name = f"test/image@sha256:{'1' * 64}"
    await refused(f"{proxy.host}/{name}", DataLoss, "DIGEST_MISMATCH", "1" * 64)


async def test_endless_manifest(refused: Check, proxy: FaultProxy) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    proxy.intercept = endless
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "IMAGE_INVALID", "larger than")


async def test_truncated_blob(
    refused: Check, upstream: str, registry_data: Path, tmp_path: Path, manifest: dict[str, Any]
) -> None:
    """The registry's own storage has lost the end of a layer."""
    make_image(tmp_path / "layout", {"data": os.urandom(2 << 20)}, compression="none")
    push_layout(tmp_path / "layout", f"{upstream}/test/truncated:1")
    (descriptor,) = Layout(tmp_path / "layout").index().manifests
    layer = json.loads(Layout(tmp_path / "layout").blob(descriptor).read_bytes())["layers"][0]["digest"][7:]
    for keep in (1 << 20, 100_000, 0):
        with (registry_data / f"data/docker/registry/v2/blobs/sha256/{layer[:2]}/{layer}/data").open("r+b") as file:
            file.truncate(keep)
        await refused(f"{upstream}/test/truncated:1", DataLoss, "SIZE_MISMATCH", layer)


@pytest.mark.parametrize("size", [len(DATA) // 2, len(DATA) * 2, 5, 0])
async def test_manifest_that_lies_about_sizes(
    refused: Check, upstream: str, manifest: dict[str, Any], size: int
) -> None:
    lying = {**manifest, "layers": [{**manifest["layers"][0], "size": size}]}
    push(upstream, "test/image:lies", lying)
    kind, reason = (DataLoss, "SIZE_MISMATCH") if size else (DataLoss, "DIGEST_MISMATCH")
    await refused(f"{upstream}/test/image:lies", kind, reason, manifest["layers"][0]["digest"])


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, -1])
async def test_sizes_beyond_the_disk(refused: Check, upstream: str, proxy: FaultProxy, size: int) -> None:
    lying = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPES[0],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": f"sha256:{'2' * 64}", "size": 2},
        "layers": [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{n:064x}", "size": size}
            for n in range(16)
        ],
    }
    proxy.answer(200, body=json.dumps(lying).encode(), headers={"Content-Type": MANIFEST_TYPES[0]}, path="/manifests/")
    if size == 1 << 40:  # as large as a blob may be, and there are 16 of them
        await refused(f"{proxy.host}/test/image:1", ResourceExhausted, "DISK_FULL", "its layers need")
    else:
        await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "IMAGE_INVALID", "impossible size")


async def test_no_image_for_this_machine(refused: Check, upstream: str, manifest: dict[str, Any]) -> None:
    digest = push(upstream, "test/image:only", manifest)
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPES[0],
        "manifests": [
            {
                "mediaType": MANIFEST_TYPES[0],
                "digest": digest,
                "size": len(json.dumps(manifest)),
                "platform": {"os": os_, "architecture": architecture},
            }
            for os_, architecture in (("linux", "riscv64"), ("windows", "amd64"), ("unknown", "unknown"))
        ],
    }
    push(upstream, "test/image:index", index, INDEX_TYPES[0])
    await refused(f"{upstream}/test/image:index", FailedPrecondition, "IMAGE_INVALID", "linux/riscv64", "windows/amd64")


async def test_schema_1(refused: Check, proxy: FaultProxy) -> None:
    old = {"schemaVersion": 1, "name": "test/image", "tag": "1", "fsLayers": [], "history": [], "signatures": []}
    media_type = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    proxy.answer(200, body=json.dumps(old).encode(), headers={"Content-Type": media_type})
    await refused(f"{proxy.host}/test/image:1", FailedPrecondition, "IMAGE_INVALID", "schema 1", "push it again")


async def test_layer_of_an_unknown_type(refused: Check, upstream: str, manifest: dict[str, Any]) -> None:
    odd = {**manifest, "layers": [{**manifest["layers"][0], "mediaType": "application/vnd.example.squashfs"}]}
    push(upstream, "test/image:odd", odd)
    await refused(f"{upstream}/test/image:odd", FailedPrecondition, "IMAGE_INVALID", "application/vnd.example.squashfs")


async def test_tag_that_moves(store: DiskImageStore, upstream: str, tmp_path: Path) -> None:
    """Each pull means what the tag means then; what was made before stays, and a digest means one thing for ever."""
    images = []
    for number in range(2):
        make_image(tmp_path / str(number), {"data": str(number).encode()})
        push_layout(tmp_path / str(number), f"{upstream}/test/moving:1")
        images.append(await store.prepare(f"{upstream}/test/moving:1"))
    assert images[0].digest != images[1].digest
    assert [contents(image.rootfs) for image in images] == [{"data": b"0"}, {"data": b"1"}]
    pinned = await store.prepare(f"{upstream}/test/moving:1@{images[0].digest}")
    assert contents(pinned.rootfs) == {"data": b"0"}
    recorded = [json.loads(path.read_bytes()) for path in (tmp_path / "store/refs").iterdir()]
    assert {r["digest"] for r in recorded if r["reference"] == f"{upstream}/test/moving:1"} == {images[1].digest}


async def test_tag_that_moves_during_a_pull(store: DiskImageStore, upstream: str, tmp_path: Path) -> None:
    """What was resolved is what is pulled."""
    for number in range(2):
        make_image(tmp_path / str(number), {"data": str(number).encode() * 100})
    push_layout(tmp_path / "0", f"{upstream}/test/moves:1")

    def move(phase: str, layers: object) -> None:
        if phase == "download" and not moved:
            moved.append(True)
            push_layout(tmp_path / "1", f"{upstream}/test/moves:1")

    moved: list[bool] = []
    image = await store.prepare(f"{upstream}/test/moves:1", move)
    assert moved and contents(image.rootfs) == {"data": b"0" * 100}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
class TestFull:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        mount = tmp_path / "small"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "greenroom-test", str(mount)], check=True)
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    async def test_from_the_start(
        self, small: Path, upstream: str, tmp_path: Path, manifest: dict[str, Any], proxy: FaultProxy
    ) -> None:
        """A layer that can't fit is not begun with."""
        make_image(tmp_path / "large", {"data": os.urandom(10 << 20)}, compression="none")
        push_layout(tmp_path / "large", f"{upstream}/test/large:1")
        await self._full(small, f"{proxy.host}/test/large:1", 2 << 20)
        assert proxy.blob_bytes < 100_000
        store = DiskImageStore(small)
        assert contents((await store.prepare(f"{upstream}/test/image:1")).rootfs) == {"data": DATA}

    async def test_in_the_middle(
        self, small: Path, upstream: str, tmp_path: Path, manifest: dict[str, Any], proxy: FaultProxy
    ) -> None:
        """Somebody else fills the disk meanwhile."""
        make_image(tmp_path / "fits", {"data": os.urandom(6 << 20)}, compression="none")
        push_layout(tmp_path / "fits", f"{upstream}/test/fits:1")

        filled: list[int] = []

        async def fill() -> None:  # once: a chunk may be on its way still when the room is made again
            if proxy.blob_bytes > 3 << 20 and not filled:
                filled.append((small / "other").write_bytes(bytes(4 << 20)))

        proxy.before_chunk = fill
        await self._full(small, f"{proxy.host}/test/fits:1", 1)
        (small / "other").unlink()
        store = DiskImageStore(small)
        assert contents((await store.prepare(f"{upstream}/test/image:1")).rootfs) == {"data": DATA}

    async def _full(self, small: Path, reference: str, at_least: int) -> None:
        with pytest.raises(ResourceExhausted, match=r"its layers need|are still to be written") as raised:
            await DiskImageStore(small).prepare(reference)
        assert raised.value.reason == "DISK_FULL"
        assert at_least <= int(raised.value.metadata["missing_bytes"]) < 8 << 20
        assert list((small / "partial").iterdir()) == []
        assert list((small / "unpacking").iterdir()) == []
