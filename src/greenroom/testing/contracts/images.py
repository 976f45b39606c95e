"""The contract of `greenroom.images.port.ImageStore`, with images from OCI layouts. An adapter's test is its factory:

class TestMyImages(ImageStoreContract):
    @pytest.fixture
    def store(self, tmp_path): ...
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from greenroom.core.errors import DataLoss, FailedPrecondition, GreenroomError, InvalidArgument, NotFound
from greenroom.core.records import LayerProgress
from greenroom.images.config import INDEX_TYPES, Manifest, Platform, this_platform
from greenroom.images.port import ImageConfig, ImageStore
from greenroom.testing.oci_layout import Compression, Layer, Layout

COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "zstd")

#: More than a pipe, a buffer or a chunk holds, and not compressible to nothing.
_LARGE = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(100_000))


def make_layer(layout: Layout, files: Mapping[str, bytes], compression: Compression = "none") -> Layer:
    """A layer of plain files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out.seek(0)
    return layout.add_layer(out, compression)


def make_image(
    directory: Path, *layers: Mapping[str, bytes], compression: Compression = "zstd", tag: str = "latest"
) -> str:
    """A layout with one image of these layers; returns its reference."""
    layout = Layout(directory)
    made = [make_layer(layout, files, compression) for files in layers]
    layout.add_image(made, {"Entrypoint": ["/app"], "Env": ["A=1"], "ExposedPorts": {"80/tcp": {}}}, tag)
    return f"oci:{directory}:{tag}"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class ImageStoreContract:
    """Every test gets a new, empty store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ImageStore:
        raise NotImplementedError

    # --- what goes right --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    async def test_prepared(self, store: ImageStore, tmp_path: Path, compression: Compression) -> None:
        reference = make_image(
            tmp_path / "layout",
            {"large": _LARGE, "a": b"lower"},
            {"a": b"upper", "dir/b": b"b"},
            compression=compression,
        )
        image = await store.prepare(reference)
        assert contents(image.rootfs) == {"large": _LARGE, "a": b"upper", "dir/b": b"b"}
        assert image.reference == reference
        assert image.config == ImageConfig(entrypoint=("/app",), env=(("A", "1"),), exposed_ports=(80,))
        assert len(image.layers) == 2
        assert await store.get(image.digest) == image
        assert await store.list() == [image]
        assert store.digests() == (image.digest,)
        assert ":" not in str(image.rootfs)  # it goes into mount options, where a colon separates

    async def test_what_is_there_is_not_done_again(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"a": b"1"})
        first = await store.prepare(reference)
        before = (first.rootfs / "a").stat()
        for blob in (tmp_path / "layout/blobs/sha256").iterdir():
            if f"sha256:{blob.name}" in first.layers:
                blob.unlink()
        assert await store.prepare(reference) == first
        assert (first.rootfs / "a").stat() == before

    async def test_by_digest(self, store: ImageStore, tmp_path: Path) -> None:
        image = await store.prepare(make_image(tmp_path / "layout", {"a": b"1"}))
        reference = f"oci:{tmp_path / 'layout'}@{image.digest}"
        assert (await store.prepare(reference)).digest == image.digest
        (tmp_path / "layout/index.json").unlink()  # nobody needs to be asked what a digest means
        assert (await store.prepare(reference)).digest == image.digest

    async def test_a_tag_that_moved(self, store: ImageStore, tmp_path: Path) -> None:
        first = await store.prepare(make_image(tmp_path / "layout", {"a": b"1"}))
        second = await store.prepare(make_image(tmp_path / "layout", {"a": b"2"}))
        assert contents(first.rootfs) == {"a": b"1"}
        assert contents(second.rootfs) == {"a": b"2"}

    async def test_index_of_several_platforms(self, store: ImageStore, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "layout")
        entries = []
        for architecture in ("riscv64", this_platform().architecture):
            layer = make_layer(layout, {"architecture": architecture.encode()})
            image = layout.add_image([layer], {}, f"only-{architecture}")
            platform = Platform(os="linux", architecture=architecture)
            entries.append(msgspec.structs.replace(image, platform=platform))
        document = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": entries}
        layout.tag(layout.add_blob(msgspec.json.encode(document), INDEX_TYPES[0]), "multi")
        found = await store.prepare(f"oci:{tmp_path / 'layout'}:multi")
        assert contents(found.rootfs) == {"architecture": this_platform().architecture.encode()}
        assert found.digest == entries[1].digest

    async def test_progress(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"large": _LARGE}, {"b": b"b"})
        seen: list[tuple[str, tuple[LayerProgress, ...]]] = []
        image = await store.prepare(reference, lambda phase, layers: seen.append((phase, layers)))
        phases = list(dict.fromkeys(phase for phase, _ in seen))
        assert phases == ["resolve", "download", "unpack"]
        last = seen[-1][1]
        assert tuple(layer.digest for layer in last) == image.layers
        assert all(layer.done_bytes == layer.total_bytes > 0 for layer in last)
        assert sum(layer.total_bytes for layer in last) == image.size_bytes

    async def test_at_once(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"large": _LARGE}, {"b": b"b"})
        heard: list[list[str]] = [[], [], []]
        images = await asyncio.gather(
            *(store.prepare(reference, lambda phase, _, own=own: own.append(phase)) for own in heard)  # type: ignore[misc]
        )
        assert images[0] == images[1] == images[2]
        assert all("unpack" in own for own in heard)

    async def test_one_of_two_gives_up(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"large": _LARGE})
        downloading = asyncio.Event()
        first = asyncio.create_task(store.prepare(reference, lambda phase, _: _set(downloading, phase == "download")))
        second = asyncio.create_task(store.prepare(reference))
        await downloading.wait()
        first.cancel()
        image = await second
        assert contents(image.rootfs) == {"large": _LARGE}
        with pytest.raises(asyncio.CancelledError):
            await first

    @pytest.mark.parametrize("phase", ["resolve", "download", "unpack"])
    async def test_cancelled_and_done_again(self, store: ImageStore, tmp_path: Path, phase: str) -> None:
        reference = make_image(tmp_path / "layout", {"large": _LARGE})
        reached = asyncio.Event()
        preparing = asyncio.create_task(store.prepare(reference, lambda now, _: _set(reached, now == phase)))
        await reached.wait()
        preparing.cancel()
        await asyncio.wait([preparing])
        image = await store.prepare(reference)
        assert contents(image.rootfs) == {"large": _LARGE}

    async def test_removed(self, store: ImageStore, tmp_path: Path) -> None:
        shared = {"shared": _LARGE}
        first = await store.prepare(make_image(tmp_path / "one", shared, {"a": b"1"}))
        second = await store.prepare(make_image(tmp_path / "two", shared, {"a": b"2"}))
        assert store.digests() == tuple(sorted((first.digest, second.digest)))
        await store.remove(first.digest)
        await store.remove(first.digest)
        assert store.digests() == (second.digest,)
        assert not first.rootfs.exists()
        assert await store.list() == [second]
        with pytest.raises(NotFound):
            await store.get(first.digest)
        assert contents(second.rootfs) == {**shared, "a": b"2"}
        again = await store.prepare(first.reference)
        assert contents(again.rootfs) == {**shared, "a": b"1"}
        assert store.digests() == tuple(sorted((first.digest, second.digest)))

    # --- what is refused --------------------------------------------------------------------------------------

    async def test_unknown(self, store: ImageStore, tmp_path: Path) -> None:
        make_image(tmp_path / "layout", {"a": b"1"}, tag="one")
        (tmp_path / "empty").mkdir()
        make_image(tmp_path / "layout", {"a": b"2"}, tag="two")
        for reference in (
            f"oci:{tmp_path}/nowhere",
            f"oci:{tmp_path}/empty",
            f"oci:{tmp_path}/layout:three",
            f"oci:{tmp_path}/layout",  # two tags and none of them latest
            f"oci:{tmp_path}/layout@sha256:{'0' * 64}",
        ):
            with pytest.raises(NotFound) as raised:
                await store.prepare(reference)
            assert raised.value.reason == "IMAGE_NOT_FOUND"
        with pytest.raises(NotFound):
            await store.get(f"sha256:{'0' * 64}")
        await store.remove(f"sha256:{'0' * 64}")

    async def test_malformed(self, store: ImageStore) -> None:
        with pytest.raises(InvalidArgument):
            await store.prepare("no/Capitals")
        with pytest.raises(InvalidArgument):
            await store.get("../../etc")
        with pytest.raises(InvalidArgument):
            await store.remove("../../etc")

    async def test_hostile_entry_is_named(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"fine": b"1", "../evil": b"2"})
        with pytest.raises(FailedPrecondition, match=r"\.\./evil") as raised:
            await store.prepare(reference)
        assert raised.value.reason == "IMAGE_INVALID"
        assert await store.list() == []
        assert not list(tmp_path.rglob("evil"))

    # --- what goes wrong with the bytes -----------------------------------------------------------------------

    async def test_wrong_digest(self, store: ImageStore, tmp_path: Path) -> None:
        reference, blob = _image_and_layer(tmp_path / "layout")
        good = blob.read_bytes()
        blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await self._lost(store, reference)
        blob.write_bytes(good)
        assert contents((await store.prepare(reference)).rootfs) == {"large": _LARGE}

    async def test_truncated_and_too_long(self, store: ImageStore, tmp_path: Path) -> None:
        reference, blob = _image_and_layer(tmp_path / "layout")
        good = blob.read_bytes()
        for damaged in (good[: len(good) // 2], b"", good + b"more"):
            blob.write_bytes(damaged)
            await self._lost(store, reference, "SIZE_MISMATCH")
        blob.write_bytes(good)
        assert contents((await store.prepare(reference)).rootfs) == {"large": _LARGE}

    async def test_missing_blob(self, store: ImageStore, tmp_path: Path) -> None:
        reference, blob = _image_and_layer(tmp_path / "layout")
        blob.unlink()
        with pytest.raises(NotFound):
            await store.prepare(reference)

    async def test_wrong_diff_id(self, store: ImageStore, tmp_path: Path) -> None:
        """The config promises another content than the layer has."""
        layout = Layout(tmp_path / "layout")
        layer = make_layer(layout, {"a": b"1"}, "gzip")
        other = make_layer(layout, {"a": b"2"}, "gzip")
        layout.add_image([Layer(descriptor=layer.descriptor, diff_id=other.diff_id)], {}, "latest")
        await self._lost(store, f"oci:{tmp_path / 'layout'}")
        assert await store.list() == []

    async def test_manifest_that_is_not_what_the_index_says(self, store: ImageStore, tmp_path: Path) -> None:
        reference = make_image(tmp_path / "layout", {"a": b"1"})
        layout = Layout(tmp_path / "layout")
        manifest = layout.blob(layout.index().manifests[0])
        manifest.write_bytes(manifest.read_bytes() + b" ")
        await self._lost(store, reference)

    async def test_no_manifest_at_all(self, store: ImageStore, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "layout")
        for document in (b"{}", b"not json", b"[1]"):
            layout.tag(layout.add_blob(document, "application/vnd.oci.image.manifest.v1+json"), "latest")
            with pytest.raises(GreenroomError) as raised:
                await store.prepare(f"oci:{tmp_path / 'layout'}")
            assert raised.value.reason == "IMAGE_INVALID"

    @staticmethod
    async def _lost(store: ImageStore, reference: str, reason: str = "DIGEST_MISMATCH") -> None:
        with pytest.raises(DataLoss) as raised:
            await store.prepare(reference)
        assert raised.value.reason == reason


def _image_and_layer(directory: Path) -> tuple[str, Path]:
    reference = make_image(directory, {"large": _LARGE})
    layout = Layout(directory)
    manifest = msgspec.json.decode(layout.blob(layout.index().manifests[0]).read_bytes(), type=Manifest)
    return reference, layout.blob(manifest.layers[0])


def _set(event: asyncio.Event, now: bool) -> None:
    if now:
        event.set()
