"""What no archive may do: each is refused with what is wrong and where, and nothing outside the target is touched."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from hostile_archives import CORPUS, archive, directory, file, link, symlink

from greenroom.core.errors import FailedPrecondition
from greenroom.images.unpack import Job, JobLayer, unpack


class Yard:
    """A target and beside it a directory that must stay as it is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.target = directory / "target"
        self.outside = directory / "outside"
        self.target.mkdir()
        self.outside.mkdir()
        (self.outside / "secret").write_text("untouched")
        (self.outside / "directory").mkdir(mode=0o700)
        os.setxattr(self.outside / "secret", "user.note", b"untouched")
        self._before = self._look()

    def _look(self) -> list[object]:
        seen: list[object] = []
        for path in (self.outside, *sorted(self.outside.rglob("*"))):
            status = path.lstat()
            seen.append((path, status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns))
        return [*seen, (self.outside / "secret").read_text()]

    def unpack(self, layers: list[bytes], **limits: int) -> Path:
        described = []
        for number, data in enumerate(layers):
            blob = self.directory / f"blob{number}"
            blob.write_bytes(data)
            diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
            described.append(JobLayer(blob=str(blob), digest=f"layer{number}", diff_id=diff_id))
        names = {"target", "outside", *(f"blob{number}" for number in range(len(layers)))}
        try:
            unpack(Job(target=str(self.target), layers=tuple(described), **limits), io.BytesIO())
        finally:
            assert self._look() == self._before
            assert {path.name for path in self.directory.iterdir()} == names
        return self.target


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 40


@pytest.mark.parametrize("name", CORPUS)
def test_refused(yard: Yard, name: str) -> None:
    case = CORPUS[name]
    with pytest.raises(FailedPrecondition, match=f"(?s)layer layer[0-9] .*{case.says}") as raised:
        yard.unpack(case.layers(yard.outside), **case.limits)
    assert raised.value.reason == "IMAGE_INVALID"
    assert len(raised.value.message) < 1000


# --- what is allowed, and stays inside --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["{outside}", "../outside", "../../../../../../outside", "/../outside"])
def test_a_link_never_leads_a_write_out(yard: Yard, target: str) -> None:
    """Whatever goes through the link, in the same layer or one above, goes where the link leads inside of the image."""
    out = symlink("out", target.format(outside=yard.outside))
    root = yard.unpack(
        [
            archive(out, file("out/secret", b"evil")),
            archive(file("out/other", b"evil"), file("out/.wh.secret", b""), directory("out/directory", mode=0o777)),
            archive(link("out/hard", "out/other"), symlink("out/sym", "secret"), file("out/.wh..wh..opq", b"")),
        ]
    )
    assert {path.name for path in root.rglob("*")} >= {"hard", "sym"}


@pytest.mark.parametrize(
    "entry",
    [
        file("direct", b"evil", mode=0o777),
        directory("direct", mode=0o777),
        symlink("direct", "x"),
        file(".wh.direct", b""),
    ],
    ids=["file", "directory", "link", "whiteout"],
)
def test_a_link_in_the_place_of_an_entry_is_replaced(yard: Yard, entry: object) -> None:
    for name in ("secret", "directory"):
        yard.unpack([archive(symlink("direct", f"{yard.outside}/{name}")), archive(entry)])  # type: ignore[arg-type]


def test_a_hard_link_to_a_link_is_one(yard: Yard) -> None:
    """And what replaces it replaces it alone."""
    first = archive(symlink("a", f"{yard.outside}/secret"), link("b", "a"))
    root = yard.unpack([first, archive(file("b", b"evil", mode=0o777, uid=5))])
    assert (root / "a").is_symlink() and (root / "b").read_text() == "evil"


def test_whiteouts_said_again_and_again(yard: Yard) -> None:
    """Not worked through each time: this would take minutes."""
    files = [file(f"d/{n}", b"") for n in range(3000)]
    opaque = [file("d/.wh..wh..opq", b""), file(".wh.d", b"")] * 3000
    root = yard.unpack([archive(file("d/lower", b"")), archive(*files, *opaque)])
    assert len(list((root / "d").iterdir())) == 3000
    assert not (root / "d/lower").exists()


def test_attributes_of_the_machine_are_left_out(yard: Yard) -> None:
    """overlayfs would take them for its own."""
    names = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque", "security.selinux")
    headers = {f"SCHILY.xattr.{name}": "y" for name in names}
    root = yard.unpack([archive(directory("d", pax_headers=headers), file("f", pax_headers=headers))])
    assert not set(os.listxattr(root / "d")) & set(names)
    assert not set(os.listxattr(root / "f")) & set(names)
