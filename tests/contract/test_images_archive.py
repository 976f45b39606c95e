"""Images in one file: archives of OCI layouts, and what ``docker save`` writes."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from greenroom.core.errors import DataLoss, FailedPrecondition, GreenroomError, NotFound
from greenroom.images.config import this_platform
from greenroom.images.port import Image
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image

FILES = ({"shared": b"s" * 5000, "a": b"lower"}, {"a": b"upper", "b": b"b"})
MERGED = {"shared": b"s" * 5000, "a": b"upper", "b": b"b"}
CONFIG: dict[str, Any] = {"Entrypoint": ["/app"], "Env": ["A=1"]}


@pytest.fixture
def store(tmp_path: Path) -> DiskImageStore:
    return DiskImageStore(tmp_path / "store")


def tar(members: dict[str, bytes], *, links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return out.getvalue()


def docker_members(*, compress: bool = False, tags: list[str] | None = None) -> dict[str, bytes]:
    """As ``docker save`` wrote it before its version 25."""
    layers = [tar(files) for files in FILES]
    here = this_platform()
    config = {
        "architecture": here.architecture,
        "os": here.os,
        "config": CONFIG,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]},
    }
    manifest = {"Config": "abc.json", "RepoTags": tags or ["app:1"], "Layers": ["l0/layer.tar", "l1/layer.tar"]}
    return {
        "l0/layer.tar": gzip.compress(layers[0]) if compress else layers[0],
        "l1/layer.tar": layers[1],
        "abc.json": json.dumps(config).encode(),
        "manifest.json": json.dumps([manifest]).encode(),
    }


def write(path: Path, members: dict[str, bytes], **more: Any) -> str:
    path.write_bytes(tar(members, **more))
    return f"oci:{path}"


def check(image: Image) -> None:
    assert contents(image.rootfs) == MERGED
    assert image.config.entrypoint == ("/app",)
    assert dict(image.config.env) == {"A": "1"}


# --- what goes right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["."], ["index.json", "oci-layout", "blobs"]], ids=["dot", "names"])
async def test_layout_in_an_archive(store: DiskImageStore, tmp_path: Path, arguments: list[str]) -> None:
    directory = await store.prepare(make_image(tmp_path / "layout", *FILES))
    command = ["tar", "-cf", tmp_path / "layout.tar", "-C", tmp_path / "layout", *arguments]
    await asyncio.to_thread(subprocess.run, command, check=True)
    shutil.rmtree(tmp_path / "layout")
    other = DiskImageStore(tmp_path / "other")
    image = await other.prepare(f"oci:{tmp_path}/layout.tar:latest")
    check(image)
    assert image.digest == directory.digest


@pytest.mark.parametrize("compress", [False, True])
async def test_docker_archive(store: DiskImageStore, tmp_path: Path, compress: bool) -> None:
    members = docker_members(compress=compress)
    image = await store.prepare(write(tmp_path / "saved.tar", members))
    check(image)
    for tag in ("1", "app:1"):
        if ":" not in tag:  # a tag in a reference has no colon
            assert (await store.prepare(f"oci:{tmp_path}/saved.tar:{tag}")).digest == image.digest
    assert (await store.prepare(f"oci:{tmp_path}/saved.tar@{image.digest}")).digest == image.digest
    # The same archive makes the same image, wherever it is read.
    again = await DiskImageStore(tmp_path / "other").prepare(f"oci:{tmp_path}/saved.tar@{image.digest}")
    assert again.digest == image.digest


async def test_layers_that_are_links(store: DiskImageStore, tmp_path: Path) -> None:
    """Docker writes a layer that several images have once, and links to it."""
    members = docker_members()
    members["blob"] = members.pop("l0/layer.tar")
    check(await store.prepare(write(tmp_path / "saved.tar", members, links={"l0/layer.tar": "../blob"})))


async def test_several_images(store: DiskImageStore, tmp_path: Path) -> None:
    members = docker_members(tags=["app:1", "registry.example/team/app:2"])
    one = json.loads(members["manifest.json"])[0]
    members["manifest.json"] = json.dumps([one, {**one, "RepoTags": None}]).encode()
    name = write(tmp_path / "saved.tar", members)
    check(await store.prepare(f"{name}:2"))
    with pytest.raises(NotFound, match=r"'latest'; it has app:1, registry\.example/team/app:2"):
        await store.prepare(name)


async def test_what_skopeo_writes(store: DiskImageStore, tmp_path: Path) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("no skopeo: run scripts/setup.sh --test")
    make_image(tmp_path / "layout", *FILES, compression="gzip")
    for kind in ("docker-archive", "oci-archive"):
        target = f"{kind}:{tmp_path}/{kind}.tar:{'team/app:' if kind == 'docker-archive' else ''}1"
        command = [skopeo, "--insecure-policy", "copy", f"oci:{tmp_path}/layout:latest", target]
        await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        check(await store.prepare(f"oci:{tmp_path}/{kind}.tar:1"))


# --- what goes wrong --------------------------------------------------------------------------------------------


async def refused(store: DiskImageStore, reference: str, says: str, kind: type[GreenroomError]) -> None:
    with pytest.raises(kind, match=says):
        await store.prepare(reference)
    assert await store.list() == []


async def test_no_archive_of_images(store: DiskImageStore, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for data, says in (
        (b"", "neither an OCI image layout"),
        (b"hello", "ends too early"),
        (b"hello" * 1000, "no tar archive"),
        (tar({"readme": b"x"}), "neither an OCI image layout"),
        (tar({"manifest.json": b"x" * 5000})[:3000], "ends too early"),
        (gzip.compress(tar(docker_members())), r"compressed as a whole: unpack it first \(gzip -d\)"),
        (tar({"manifest.json": b'[{"X": ' + b"[" * 100_000}), "nested too deeply"),
        (tar({"manifest.json": b'{"Config": 1}'}), r"manifest\.json can't be read"),
        (tar({"index.json": b"[]"}), r"index\.json can't be read"),
        (tar({"manifest.json": b"x" * (5 << 20)}), "at most 4194304 are read"),
    ):
        path.write_bytes(data)
        await refused(store, f"oci:{path}", says, FailedPrecondition)
    path.unlink()
    os.mkfifo(path)
    await refused(store, f"oci:{path}", "neither a directory nor a plain file", FailedPrecondition)


async def test_names_of_an_archive_are_bounded(store: DiskImageStore, tmp_path: Path) -> None:
    """They are kept in the agent's memory."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(20):
            archive.addfile(tarfile.TarInfo(f"{number}{'x' * 900_000}"))
    await refused(store, f"oci:{path}", "names of more than 16 MiB", FailedPrecondition)


async def test_a_pipe_in_a_layout_holds_up_nobody(store: DiskImageStore, tmp_path: Path) -> None:
    (tmp_path / "layout").mkdir()
    os.mkfifo(tmp_path / "layout/index.json")
    async with asyncio.timeout(60):
        await refused(store, f"oci:{tmp_path / 'layout'}", r"index\.json is no plain file", FailedPrecondition)


async def test_archive_that_contradicts_itself(store: DiskImageStore, tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    good = docker_members()
    image = json.loads(good["manifest.json"])[0]
    config = json.loads(good["abc.json"])

    def changed(**members: Any) -> str:
        return write(path, {**good, **{k.replace("__", "."): json.dumps(v).encode() for k, v in members.items()}})

    await refused(
        store, write(path, {k: v for k, v in good.items() if k[:2] != "l1"}), "l1/layer.tar", FailedPrecondition
    )
    await refused(store, changed(manifest__json=[{**image, "Config": "x"}]), "does not have: x", FailedPrecondition)
    await refused(store, changed(manifest__json=[{**image, "Layers": []}]), "speaks of 2 layers", FailedPrecondition)
    await refused(store, changed(manifest__json=[]), "no image 'latest'; it has no tags", NotFound)
    await refused(
        store, changed(manifest__json=[{**image, "Config": "../../etc/passwd"}]), "does not have", FailedPrecondition
    )
    await refused(
        store, changed(abc__json={**config, "rootfs": {"diff_ids": ["x", "y"]}}), "only sha256", FailedPrecondition
    )
    await refused(
        store, changed(abc__json={**config, "architecture": "pdp11"}), "is for 'linux/pdp11'", FailedPrecondition
    )
    other = {**good, "l1/layer.tar": tar({"a": b"other"})}
    await refused(store, write(path, other), "digest", DataLoss)
    check(await store.prepare(write(path, good)))


async def test_links_in_an_archive_lead_nowhere(store: DiskImageStore, tmp_path: Path) -> None:
    """They are names in the archive, and never those of a file outside."""
    members = docker_members()
    (tmp_path / "layer").write_bytes(members.pop("l0/layer.tar"))
    for target in (str(tmp_path / "layer"), "../../../../../" + str(tmp_path / "layer"), "layer.tar"):
        reference = write(tmp_path / "saved.tar", members, links={"l0/layer.tar": target})
        await refused(store, reference, "does not have: l0/layer.tar", FailedPrecondition)


async def test_damaged_archive(store: DiskImageStore, tmp_path: Path) -> None:
    """A byte of a layer changed: refused by its digest, and the whole one is taken afterwards."""
    reference = write(tmp_path / "saved.tar", docker_members())
    good = (tmp_path / "saved.tar").read_bytes()
    at = good.index(b"ssss") + 100
    (tmp_path / "saved.tar").write_bytes(good[:at] + b"X" + good[at + 1 :])
    await refused(store, reference, "has the digest", DataLoss)
    (tmp_path / "saved.tar").write_bytes(good)
    check(await store.prepare(reference))
