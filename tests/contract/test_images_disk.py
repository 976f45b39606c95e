"""The image store on disk keeps the port's rules; and what is its own: sharing, killed processes, memory."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.images.port import Image, ImageStore
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import ImageStoreContract, contents, make_image
from greenroom.testing.oci_layout import Layout

#: Prepares argv[2] in the store argv[1] and prints what it was like; hangs in the phase argv[3].
_PREPARE = """
import asyncio, sys, time
from pathlib import Path
from greenroom.images.store import DiskImageStore

def peak_mib(process):  # since exec; what getrusage gives is inherited from whoever forked
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)

def heard(phase, layers):
    if phase == sys.argv[3]:
        print(phase, flush=True)
        time.sleep(3600)

store, base = DiskImageStore(Path(sys.argv[1])), peak_mib("self")
image = asyncio.run(store.prepare(sys.argv[2], heard))
print("done", image.digest, peak_mib("self") - base, flush=True)
"""

#: The start of each process below: an unpacker writes at its end how much memory it took (MiB), beside this.
_UNPACKER_TELLS = """
import atexit, os, sys
from pathlib import Path

def tell():
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    Path(__file__).with_name(f"peak-{os.getpid()}").write_text(str(peak))

if "greenroom.images.unpack" in sys.orig_argv:
    atexit.register(tell)
"""


def _start(store: Path, reference: str, hang: str = "") -> subprocess.Popen[str]:
    site = store.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_UNPACKER_TELLS)
    command = [sys.executable, "-c", _PREPARE, str(store), reference, hang]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(site)})


def _unpackers_mib(store: Path) -> list[int]:
    """Of each unpacker that has come to its end."""
    return [int(path.read_text()) for path in (store.parent / "site").glob("peak-*")]


class TestDisk(ImageStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ImageStore:
        return DiskImageStore(tmp_path / "store")

    async def test_removing_takes_only_unshared_blobs(self, store: ImageStore, tmp_path: Path) -> None:
        first = await store.prepare(make_image(tmp_path / "one", {"shared": b"s"}, {"a": b"1"}))
        second = await store.prepare(make_image(tmp_path / "two", {"shared": b"s"}, {"a": b"2"}))
        await store.remove(first.digest)
        left = {f"sha256:{path.name}" for path in (tmp_path / "store/blobs/sha256").iterdir()}
        assert set(second.layers) <= left
        assert first.layers[1] not in left
        await store.remove(second.digest)
        assert list((tmp_path / "store/blobs/sha256").iterdir()) == []
        assert list((tmp_path / "store/images").iterdir()) == []
        assert list((tmp_path / "store/rootfs").iterdir()) == []

    async def test_a_store_may_be_moved(self, store: ImageStore, tmp_path: Path) -> None:
        image = await store.prepare(make_image(tmp_path / "layout", {"a": b"1"}))
        (tmp_path / "store").rename(tmp_path / "moved")
        found = await DiskImageStore(tmp_path / "moved").get(image.digest)
        assert contents(found.rootfs) == {"a": b"1"}

    async def test_rotten_blob_is_replaced(self, store: ImageStore, tmp_path: Path) -> None:
        """A blob that went bad on disk is noticed when it is unpacked, and fetched anew by the next attempt."""
        reference = make_image(tmp_path / "layout", {"a": b"1" * 5000}, compression="none")
        image = await store.prepare(reference)
        blob = tmp_path / "store/blobs/sha256" / image.layers[0].removeprefix("sha256:")
        blob.write_bytes(blob.read_bytes().replace(b"111", b"121"))
        shutil.rmtree(image.rootfs)
        with pytest.raises(Exception, match="unpacks to"):
            await store.prepare(reference)
        assert contents((await store.prepare(reference)).rootfs) == {"a": b"1" * 5000}

    async def test_nobody_else_of_this_machine_gets_at_it(self, tmp_path: Path) -> None:
        """Images bring set-user-id programs of root."""
        before = os.umask(0o022)
        try:
            store = DiskImageStore(tmp_path / "some" / "where")
        finally:
            os.umask(before)
        await store.prepare(make_image(tmp_path / "layout", {"a": b"1"}))
        assert (tmp_path / "some/where").stat().st_mode & 0o777 == 0o700

    async def test_what_is_wrong_elsewhere_is_nothing_to_others(self, store: ImageStore, tmp_path: Path) -> None:
        """The same image from two places at once, of which one lacks a layer."""
        good = make_image(tmp_path / "good", {"a": b"1"}, {"b": b"2"})
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        image = await DiskImageStore(tmp_path / "other").prepare(good)
        (tmp_path / "bad/blobs/sha256" / image.layers[1].removeprefix("sha256:")).unlink()
        references = [good.replace("/good:", "/bad:"), good]
        bad, found = await asyncio.gather(*map(store.prepare, references), return_exceptions=True)
        assert isinstance(bad, NotFound | Image), "the other may have brought the layer by then"
        assert isinstance(found, Image) and contents(found.rootfs) == {"a": b"1", "b": b"2"}

    async def test_limits_are_the_stores(self, tmp_path: Path) -> None:
        small = DiskImageStore(tmp_path / "store", max_entries=2, max_unpacked_bytes=100_000)
        with pytest.raises(FailedPrecondition, match="more than 2 files"):
            await small.prepare(make_image(tmp_path / "many", {"a": b"", "b": b"", "c": b""}))
        with pytest.raises(FailedPrecondition, match="more than 100000 bytes"):
            await small.prepare(make_image(tmp_path / "large", {"zeros": bytes(1 << 20)}, compression="zstd"))
        assert list((tmp_path / "store/unpacking").iterdir()) == []


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    reference = make_image(tmp_path / "layout", {"large": os.urandom(30 << 20)}, {"b": b"b"}, compression="none")
    processes = [_start(tmp_path / "store", reference) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(_unpackers_mib(tmp_path / "store")) == 1, "the other waited"


@pytest.mark.parametrize("phase", ["download", "unpack"])
def test_killed_and_done_again(tmp_path: Path, phase: str) -> None:
    """Killed in the middle, with its unpacker still at work: the next one waits for that, cleans up and does it."""
    data = os.urandom(60 << 20)
    reference = make_image(tmp_path / "layout", {"large": data}, compression="none")
    process = _start(tmp_path / "store", reference, hang=phase)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == phase
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "store/rootfs").iterdir())
    image = asyncio.run(DiskImageStore(tmp_path / "store").prepare(reference))
    assert contents(image.rootfs) == {"large": data}
    assert not list((tmp_path / "store/unpacking").iterdir())
    assert not list((tmp_path / "store/partial").iterdir())


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_memory_stays_flat(tmp_path: Path, compression: str) -> None:
    """A layer of 200 MB costs neither the agent nor the unpacker memory in proportion."""
    layout = Layout(tmp_path / "layout")
    random = os.urandom(1 << 20)

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return random[: size if 0 <= size < len(random) else len(random)]

    with (tmp_path / "tar").open("w+b") as out:
        with tarfile.open(fileobj=out, mode="w") as tar:
            member = tarfile.TarInfo("large")
            member.size = 200 << 20
            tar.addfile(member, Endless())  # type: ignore[arg-type]
        out.seek(0)
        layer = layout.add_layer(out, compression)  # type: ignore[arg-type]
    layout.add_image([layer], {}, "latest")
    process = _start(tmp_path / "store", f"oci:{tmp_path / 'layout'}")
    output = process.communicate(timeout=100)[0].split()
    assert process.returncode == 0
    own_mib, (child_mib,) = int(output[-1]), _unpackers_mib(tmp_path / "store")
    assert own_mib < 80
    assert 10 < child_mib < 80
    print(f"{compression}: agent +{own_mib} MiB, unpacker {child_mib} MiB in all")


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

    @pytest.mark.parametrize("where", ["download", "unpack"])
    async def test_full_disk(self, small: Path, tmp_path: Path, where: str) -> None:
        data = os.urandom(20 << 20) if where == "download" else bytes(20 << 20)
        store = DiskImageStore(small)
        with pytest.raises(ResourceExhausted) as raised:
            await store.prepare(make_image(tmp_path / "layout", {"large": data}, compression="gzip"))
        assert raised.value.reason == "DISK_FULL"
        if where == "unpack":  # found before a byte was written, because gzip says what it unpacks to
            assert int(raised.value.facts()["needed_bytes"]) > len(data)
            assert 0 < int(raised.value.facts()["free_bytes"]) < 8 << 20
            assert re.search(r"at least 2\d\.\d MB are still to be written, \d\.\d MB are free", raised.value.message)
        assert not list((small / "unpacking").iterdir())
        assert not list((small / "partial").iterdir())
        assert await store.list() == []
        await self._fits(store, tmp_path)

    async def test_full_in_the_middle(self, small: Path, tmp_path: Path) -> None:
        """A stream that does not say what it unpacks to: what is missing is what is left of the file, at least."""
        store = DiskImageStore(small)
        reference = make_image(tmp_path / "layout", {"first": b"1", "large": bytes(20 << 20)}, compression="zstd")
        with pytest.raises(ResourceExhausted, match=r"unpacking 'large': at least 1\d\.\d MB are still") as raised:
            await store.prepare(reference)
        assert raised.value.reason == "DISK_FULL"
        assert int(raised.value.facts()["needed_bytes"]) > 11 << 20
        assert int(raised.value.facts()["free_bytes"]) < 1 << 20
        assert not list((small / "unpacking").iterdir())
        assert await store.list() == []
        await self._fits(store, tmp_path)

    @pytest.fixture
    def few_files(self, tmp_path: Path) -> Iterator[Path]:
        mount = tmp_path / "few"
        mount.mkdir()
        options = "size=8m,mode=755,nr_inodes=60"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "greenroom-test", str(mount)], check=True)
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    async def test_no_more_files(self, few_files: Path, tmp_path: Path) -> None:
        store = DiskImageStore(few_files)
        with pytest.raises(ResourceExhausted, match="it can hold no more files"):
            await store.prepare(make_image(tmp_path / "layout", {f"f{n}": b"" for n in range(100)}))
        assert not list((few_files / "unpacking").iterdir())
        await self._fits(store, tmp_path)

    @staticmethod
    async def _fits(store: DiskImageStore, tmp_path: Path) -> None:
        image = await store.prepare(make_image(tmp_path / "fits", {"a": os.urandom(1 << 20)}))
        assert len(contents(image.rootfs)["a"]) == 1 << 20


def test_unpacker_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    """An image with many directories and many layers ends with as many open files as it began with."""
    reference = make_image(tmp_path / "layout", *({f"{n}/{m}/f": b"" for m in range(20)} for n in range(10)))

    async def work() -> int:
        store = DiskImageStore(tmp_path / "store")
        image = await store.prepare(reference)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            await store.remove(image.digest)
            await store.prepare(reference)
        return len(list(Path("/proc/self/fd").iterdir())) - before

    assert asyncio.run(work()) == 0
