"""What stays in the image store and what goes: by last use, by reference counts, by marks in bytes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.images.blobs import try_lock
from greenroom.images.port import Image
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image
from greenroom.testing.oci_layout import Layout

MIB = 1 << 20


class Shelf:
    """A store and images for it, each with a layer of 1 MiB that can't be compressed: 2 MiB on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.limit(0, 0)

    def limit(self, high_bytes: int, low_bytes: int) -> None:
        self.store = DiskImageStore(self.root / "store", high_bytes=high_bytes, low_bytes=low_bytes, recent_s=0.0)

    async def add(self, name: str, *, age_s: float = 0.0, **shared: bytes) -> Image:
        """``age_s``: as if it had been used last so long ago."""
        layers = [{key: data} for key, data in shared.items()]
        image = await self.store.prepare(make_image(self.root / name, *layers, {name: os.urandom(MIB)}))
        self.age(image, age_s)
        return image

    def age(self, image: Image, age_s: float) -> None:
        path = self.root / "store/uses" / image.digest.removeprefix("sha256:")
        at = path.stat().st_mtime - age_s
        os.utime(path, (at, at))

    def there(self) -> set[str]:
        return {*self.store.digests()}


async def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    images = [await shelf.add(f"i{n}", age_s=100 - n) for n in range(5)]
    shelf.limit(11 * MIB, 6 * MIB)
    assert (await shelf.store.trim()).removed == ()  # 10 MiB and a little
    shelf.age(images[0], -200)  # used again
    shelf.limit(10 * MIB, 6 * MIB)
    evicted = await shelf.store.trim()
    assert [image.digest for image in evicted.removed] == [images[n].digest for n in (1, 2, 3)]
    assert evicted.over_bytes == 0
    assert evicted.freed_bytes >= 6 * MIB
    assert shelf.there() == {images[0].digest, images[4].digest}
    cache = await shelf.store.cache()
    assert cache.used_bytes < 6 * MIB
    assert {image.disk_bytes // MIB for image in cache.images} == {2}
    assert (await shelf.store.trim()).removed == ()


async def test_room_is_made_for_what_is_about_to_come(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    old, new = await shelf.add("old", age_s=50), await shelf.add("new")
    shelf.limit(int(4.5 * MIB), int(3.5 * MIB))
    assert (await shelf.store.trim()).removed == ()
    other = await shelf.add("other")  # of whose layer it is known before that it does not fit beside the two
    assert shelf.there() == {new.digest, other.digest}
    assert old.digest not in [image.digest for image in (await shelf.store.cache()).images]


async def test_nothing_goes_for_what_can_not_fit(tmp_path: Path) -> None:
    """Or a manifest that only says that it is large would empty the store."""
    shelf = Shelf(tmp_path)
    image = await shelf.add("a", age_s=100)
    shelf.limit(10 * MIB, 6 * MIB)
    make_image(tmp_path / "layout", {"b": b"b"})
    layout = Layout(tmp_path / "layout")
    manifest = msgspec.json.decode(layout.blob(layout.index().manifests[0]).read_bytes())
    manifest["layers"][0]["size"] = 1 << 40
    layout.tag(layout.add_blob(msgspec.json.encode(manifest), manifest["mediaType"]), "lies")
    with pytest.raises(ResourceExhausted, match="does not fit"):
        await shelf.store.prepare(f"oci:{tmp_path / 'layout'}:lies")
    assert image.digest in shelf.there()


async def test_what_is_used_or_pinned_stays_and_the_rest_is_said(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    used, pinned = await shelf.add("used", age_s=50), await shelf.add("pinned", age_s=50)
    await shelf.store.hold(used.digest, "w.1", "uid", "default/alice")
    await shelf.store.pin(pinned.digest)
    other = await shelf.add("other")
    shelf.limit(3 * MIB, 2 * MIB)
    evicted = await shelf.store.trim()
    assert [image.digest for image in evicted.removed] == [other.digest]
    assert evicted.over_bytes > MIB
    assert sorted(why.partition(": ")[2] for why in evicted.kept) == [
        "it is pinned",
        "it is used by default/alice on w",
    ]
    assert (await shelf.store.cache()).over_bytes == evicted.over_bytes
    for image, why in ((used, "default/alice on w"), (pinned, "pinned")):
        with pytest.raises(FailedPrecondition, match=why) as raised:
            await shelf.store.remove(image.digest)
        assert raised.value.reason == "IMAGE_IN_USE"
    await shelf.store.release(used.digest, "w.1", "uid")
    await shelf.store.pin(pinned.digest, undo=True)
    assert len((await shelf.store.trim()).removed) >= 1
    assert (await shelf.store.cache()).over_bytes == 0


async def test_what_is_being_prepared_stays(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    image = await shelf.add("a")
    fd = try_lock(tmp_path / "store", image.digest)
    assert fd is not None
    assert (await shelf.store.prune()).kept == (f"{image.reference}: it is being prepared",)
    os.close(fd)
    assert len((await shelf.store.prune(dry_run=True)).removed) == 1
    assert shelf.there() == {image.digest}
    assert len((await shelf.store.prune()).removed) == 1
    assert (await shelf.store.cache()).used_bytes < 100_000


async def test_who_removes_what_is_being_prepared_is_told_so(tmp_path: Path) -> None:
    """It may take hours; nobody is held for that."""
    shelf = Shelf(tmp_path)
    image = await shelf.add("a")
    lock = try_lock(tmp_path / "store", image.digest)
    assert lock is not None
    async with asyncio.timeout(60):
        with pytest.raises(FailedPrecondition, match="is being prepared or removed just now"):
            await shelf.store.remove(image.digest)
    os.close(lock)
    await shelf.store.remove(image.digest)


@pytest.mark.parametrize("kind", ["many bytes", "a bomb", "many files"])
async def test_what_does_not_fit_below_the_limit_is_refused(tmp_path: Path, kind: str) -> None:
    """The disk has room, but it is not the store's to take. What nobody uses goes first."""
    limit = 8 * MIB
    store = DiskImageStore(tmp_path / "store", limit_bytes=limit, recent_s=0.0)
    used = await store.prepare(make_image(tmp_path / "used", {"a": os.urandom(MIB)}))
    await store.hold(used.digest, "w.1", "uid")
    unused = await store.prepare(make_image(tmp_path / "unused", {"a": os.urandom(MIB)}))
    assert (await store.cache()).free_bytes < limit - 4 * MIB
    files, compression = {
        "many bytes": ({"b": os.urandom(7 * MIB)}, "none"),
        "a bomb": ({f"b{n}": bytes(MIB) for n in range(20)}, "zstd"),
        "many files": ({f"{n}": b"b" for n in range(2000)}, "gzip"),
    }[kind]
    large = make_image(tmp_path / "large", files, compression=compression)
    with pytest.raises(ResourceExhausted, match="images may take") as raised:
        await store.prepare(large)
    assert raised.value.reason == "DISK_FULL"
    assert used.digest in store.digests()
    assert (await store.cache()).used_bytes < limit
    fits = await store.prepare(make_image(tmp_path / "fits", {"b": os.urandom(int(2.5 * MIB))}))
    assert {*store.digests()} == {used.digest, fits.digest}
    assert unused.digest not in store.digests()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 14 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m,mode=755", "greenroom-test", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_full_disk_lets_go_of_what_nobody_uses(small: Path, tmp_path: Path) -> None:
    """Also without marks; and what is used stays, then it is said how much is missing."""
    store = DiskImageStore(small, recent_s=0.0)
    old = await store.prepare(make_image(tmp_path / "old", {"a": os.urandom(3 * MIB)}))
    new = await store.prepare(make_image(tmp_path / "new", {"a": os.urandom(5 * MIB)}))
    assert store.digests() == (new.digest,)
    await store.hold(new.digest, "w.1", "uid")
    with pytest.raises(ResourceExhausted, match=r"more\. Remove what nobody needs") as raised:
        await store.prepare(make_image(tmp_path / "old", {"a": os.urandom(5 * MIB)}))
    assert raised.value.reason == "DISK_FULL"
    assert int(raised.value.metadata["missing_bytes"]) > MIB // 2
    assert store.digests() == (new.digest,)
    await store.release(new.digest, "w.1", "uid")
    assert (await store.prepare(make_image(tmp_path / "old", {"a": os.urandom(5 * MIB)}))).digest != old.digest


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_nothing_goes_for_a_layer_that_says_too_much_of_itself(small: Path, tmp_path: Path) -> None:
    store = DiskImageStore(small, recent_s=0.0)
    image = await store.prepare(make_image(tmp_path / "a", {"a": b"1"}))
    make_image(tmp_path / "layout", {"b": b"b"}, compression="gzip")
    layout = Layout(tmp_path / "layout")
    manifest = msgspec.json.decode(layout.blob(layout.index().manifests[0]).read_bytes())
    packed = (tmp_path / "layout/blobs/sha256" / manifest["layers"][0]["digest"][7:]).read_bytes()
    lying = layout.add_blob(packed[:-4] + b"\xff" * 4, manifest["layers"][0]["mediaType"])  # 4 GiB, says gzip's trailer
    manifest["layers"][0] |= {"digest": lying.digest}
    layout.tag(layout.add_blob(msgspec.json.encode(manifest), manifest["mediaType"]), "lies")
    with pytest.raises(ResourceExhausted, match=r"at least 4295\.0 MB are still to be written"):
        await store.prepare(f"oci:{tmp_path / 'layout'}:lies")
    assert store.digests() == (image.digest,)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_an_image_that_is_here_is_used_also_when_the_disk_is_full(small: Path, tmp_path: Path) -> None:
    store = DiskImageStore(small)
    image = await store.prepare(make_image(tmp_path / "layout", {"a": b"1"}))
    with pytest.raises(OSError, match="No space"):
        (small / "filler").write_bytes(bytes(64 << 20))
    await store.hold(image.digest, "w.1", "1")
    (small / "filler").unlink()
    with pytest.raises(FailedPrecondition, match="used by actor 1 on w"):
        await store.remove(image.digest)


async def test_a_shared_layer_stays_as_long_as_one_needs_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shared = os.urandom(MIB)
    first = await shelf.add("first", shared=shared)
    second = await shelf.add("second", shared=shared)
    sizes = {image.digest: image.disk_bytes // MIB for image in (await shelf.store.cache()).images}
    assert set(sizes.values()) == {3}  # a tree of two, and a blob that only it has
    evicted = await shelf.store.prune(dry_run=True)
    assert evicted.freed_bytes >= 7 * MIB  # together they are worth more than one by one
    await shelf.store.remove(first.digest)
    assert first.layers[0] == second.layers[0]
    assert (tmp_path / "store/blobs/sha256" / second.layers[0].removeprefix("sha256:")).exists()
    assert contents(second.rootfs)["shared"] == shared
    await shelf.store.remove(second.digest)
    assert not list((tmp_path / "store/blobs/sha256").iterdir())


async def test_of_a_worker_that_comes_back_only_what_lives(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    a, b = await shelf.add("a"), await shelf.add("b")
    for image, uid in ((a, "1"), (a, "2"), (b, "warm")):
        await shelf.store.hold(image.digest, "w.1", uid)
    await shelf.store.hold(a.digest, "w.2", "1")
    assert await shelf.store.keep_only("w.1", ["2"]) == {"2": (a.digest,)}
    users = {image.digest: image.users for image in (await shelf.store.cache()).images}
    assert users == {a.digest: ("actor 2 on w", "actor 1 on w"), b.digest: ()}
    # One that was made before uses were written down: it may be any image's.
    assert await shelf.store.keep_only("w.1", ["old"]) == {"old": tuple(sorted((a.digest, b.digest)))}


async def test_of_a_worker_that_is_gone_for_good_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    image = await shelf.add("a", age_s=50)
    for holder in ("w.1", "w.2"):
        (tmp_path / holder).mkdir()
        await shelf.store.keep_only(holder, [], tmp_path / holder)
        await shelf.store.hold(image.digest, holder, "1")
    (tmp_path / "w.1").rmdir()
    with pytest.raises(FailedPrecondition, match=r"is used by actor 1 on w$"):
        await shelf.store.remove(image.digest)
    assert [path.name for path in (tmp_path / "store/holders").iterdir()] == ["w.2"]
    (tmp_path / "w.2").rmdir()
    assert [gone.digest for gone in (await shelf.store.prune()).removed] == [image.digest]
    assert not list((tmp_path / "store/holders").iterdir())


async def test_a_name_that_is_nobodys_is_not_used(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(NotFound):
        await shelf.store.hold(f"sha256:{'0' * 64}", "w.1", "uid")
    with pytest.raises(NotFound):
        await shelf.store.pin(f"sha256:{'0' * 64}")
    assert not list((tmp_path / "store/uses").iterdir())


#: Takes the image argv[2] of the store argv[1] into use and lets go of it, until there is a file argv[3], and prepares
#: it anew when it is gone; each time it looks whether what it uses is whole.
_USER = """
import asyncio, sys
from pathlib import Path
from greenroom.core.errors import NotFound
from greenroom.images.store import DiskImageStore

async def main(root, reference, enough, me):
    store = DiskImageStore(Path(root), recent_s=0.0)
    image, prepared = await store.prepare(reference), 1
    while not Path(enough).exists():
        while True:
            try:
                await store.hold(image.digest, "w." + me, "uid")
                break
            except NotFound:
                image, prepared = await store.prepare(reference), prepared + 1
        for _ in range(5):
            assert (image.rootfs / "a").read_bytes() == b"a" * 1000
            await asyncio.sleep(0)
        await store.release(image.digest, "w." + me, "uid")
        await asyncio.sleep(0.005)
    print(prepared)

asyncio.run(main(*sys.argv[1:]))
"""


def test_nothing_is_taken_away_from_under_its_user(tmp_path: Path) -> None:
    """Two processes use an image on and off, a third removes it whenever nobody does."""
    reference = make_image(tmp_path / "layout", {"a": b"a" * 1000})
    enough = tmp_path / "enough"
    users = [
        subprocess.Popen(
            [sys.executable, "-c", _USER, str(tmp_path / "store"), reference, str(enough), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]

    async def remove() -> int:
        store, removed = DiskImageStore(tmp_path / "store", recent_s=0.0), 0
        while removed < 5 and all(user.poll() is None for user in users):
            removed += len((await store.prune()).removed)
            await asyncio.sleep(0.01)
        enough.touch()
        return removed

    removed = asyncio.run(remove())
    outputs = [user.communicate()[0] for user in users]
    assert [user.returncode for user in users] == [0, 0]
    assert removed == 5
    print(f"removed {removed} times, prepared {[int(output.split()[-1]) for output in outputs]} times")


async def test_who_waits_for_another_process_sees_how_far_it_is(tmp_path: Path) -> None:
    """A preparation that waits for another process's tells how far that is, so that it does not count as stuck."""
    layout = Layout(tmp_path / "layout")
    reference = make_image(tmp_path / "layout", {"large": os.urandom(4 * MIB)}, compression="none")
    digest = layout.index().manifests[0].digest
    fd = try_lock(tmp_path / "store", digest) if DiskImageStore(tmp_path / "store") else None
    assert fd is not None
    shared = tmp_path / "store/progress" / digest.removeprefix("sha256:")
    store = DiskImageStore(tmp_path / "store")
    heard: list[tuple[str, int]] = []
    waiting = asyncio.create_task(
        store.prepare(reference, lambda phase, layers: heard.append((phase, sum(la.done_bytes for la in layers))))
    )
    layer = await _first_layer(layout)
    for done in (1000, 2000):
        shared.write_text(f'{{"phase":"unpack","layers":[{{"digest":"{layer}","done_bytes":{done}}}]}}')
        async with asyncio.timeout(60):
            while ("unpack", done) not in heard:
                await asyncio.sleep(0.02)
    os.close(fd)
    assert contents((await waiting).rootfs).keys() == {"large"}


async def _first_layer(layout: Layout) -> str:
    import msgspec

    from greenroom.images.config import Manifest

    manifest = layout.blob(layout.index().manifests[0]).read_bytes()
    return msgspec.json.decode(manifest, type=Manifest).layers[0].digest
