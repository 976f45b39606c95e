"""What people may write to name an image, and what an image says about itself."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from greenroom.core.errors import FailedPrecondition, InvalidArgument
from greenroom.images.config import (
    Descriptor,
    Index,
    Manifest,
    Platform,
    choose,
    parse_config,
    parse_manifest,
    resolve_user,
    this_platform,
)
from greenroom.images.reference import LayoutReference, RegistryReference, check_digest, parse, pinned
from greenroom.images.registries import Registries

DIGEST = "sha256:" + "a1" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:/srv/images", LayoutReference(directory=Path("/srv/images"))),
        ("oci:/images:v1.2", LayoutReference(directory=Path("/images"), tag="v1.2")),
        ("oci:/srv/a:b/images", LayoutReference(directory=Path("/srv/a:b/images"))),
        (f"oci:/srv/images@{DIGEST}", LayoutReference(directory=Path("/srv/images"), digest=DIGEST)),
        ("localhost:5000/a/b", RegistryReference(host="localhost:5000", repository="a/b")),
        ("127.0.0.1:5000/a:1", RegistryReference(host="127.0.0.1:5000", repository="a", tag="1")),
        ("[::1]:5000/a:1", RegistryReference(host="[::1]:5000", repository="a", tag="1")),
        ("docker.io/python:3.13", RegistryReference(host="docker.io", repository="library/python", tag="3.13")),
        ("python:3.13-slim", RegistryReference(host="docker.io", repository="library/python", tag="3.13-slim")),
        ("acme/tool", RegistryReference(host="docker.io", repository="acme/tool")),
        (f"r.example/a:1@{DIGEST}", RegistryReference(host="r.example", repository="a", tag="1", digest=DIGEST)),
    ],
)
def test_parse(text: str, expected: LayoutReference | RegistryReference) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/srv/images",
        "./images",
        "oci:images:v1.2",
        "oci:",
        "oci:/x:bad tag",
        "r.example/",
        "r.example/UPPER",
        "r.example/a:",
        "r.example/a@sha256:12",
        "r.example/../a",
        "user@r.example/a",
        "r.example:port/a",
        "https://r.example/a",
        "r.example/" + "a" * 2000,
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text)


def test_only_loopback_is_spoken_to_without_tls() -> None:
    def url(host: str) -> str:
        (endpoint,) = Registries().endpoints(RegistryReference(host=host, repository="a"))
        return endpoint.base_url.removesuffix("/v2/a")

    for host in ("localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:5000", "x.localhost"):
        assert url(host) == f"http://{host}"
    for host in ("r.example", "r.example:80", "localhost.example", "127.0.0.1.example", "10.0.0.1:5000"):
        assert url(host) == f"https://{host}"


def test_check_digest() -> None:
    assert check_digest(DIGEST) == DIGEST
    for bad in ("", "a1" * 32, "sha512:" + "a" * 128, "sha256:../../x", DIGEST.upper()):
        with pytest.raises(InvalidArgument):
            check_digest(bad)


def test_pinned() -> None:
    assert pinned("r.example/a:1", DIGEST) == f"r.example/a:1@{DIGEST}"
    assert pinned(f"python@{DIGEST.replace('a1', 'b2')}", DIGEST) == f"python@{DIGEST}"
    assert pinned("oci:/srv/images:v1", DIGEST) == f"oci:/srv/images:v1@{DIGEST}"
    for reference, digest in (("r.example/A", DIGEST), ("r.example/a", "sha256:12")):
        with pytest.raises(InvalidArgument):
            pinned(reference, digest)


# --- manifests and indexes ------------------------------------------------------------------------------------


def _descriptor(media_type: str, size: int = 1) -> dict[str, object]:
    return {"mediaType": media_type, "digest": DIGEST, "size": size}


OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def _manifest(**changes: object) -> bytes:
    document = {"schemaVersion": 2, "config": _descriptor(OCI_CONFIG), "layers": [_descriptor(OCI_LAYER)]}
    return msgspec.json.encode({**document, **changes})


def test_docker_and_oci_manifests() -> None:
    docker = _manifest(
        mediaType="application/vnd.docker.distribution.manifest.v2+json",
        config=_descriptor("application/vnd.docker.container.image.v1+json"),
        layers=[_descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip")],
    )
    for data in (_manifest(), _manifest(mediaType="application/vnd.oci.image.manifest.v1+json"), docker):
        found = parse_manifest("x", data)
        assert isinstance(found, Manifest)
        assert found.layers[0].digest == DIGEST


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        _manifest(schemaVersion=1),
        _manifest(mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws"),
        _manifest(mediaType="application/zip"),
        _manifest(config=_descriptor("application/vnd.cncf.helm.config.v1+json")),
        _manifest(config=_descriptor(OCI_CONFIG, size=1 << 40)),
        _manifest(config=_descriptor(OCI_CONFIG, size=-1)),
        _manifest(layers=[_descriptor("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")]),
        _manifest(layers=[_descriptor(OCI_LAYER)] * 501),
        _manifest(layers=[{**_descriptor(OCI_LAYER), "digest": "sha256:../../etc/passwd"}]),
        _manifest(layers=[{**_descriptor(OCI_LAYER), "digest": "sha512:" + "a" * 128}]),
    ],
)
def test_manifests_that_are_refused(data: bytes) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        parse_manifest("x", data)
    assert raised.value.reason == "IMAGE_INVALID"


def test_choose_takes_this_machines_platform() -> None:
    here = this_platform()
    other = Platform(os="linux", architecture="riscv64")
    attestation = Platform(os="unknown", architecture="unknown")

    def entry(number: int, platform: Platform) -> Descriptor:
        kind = "application/vnd.oci.image.manifest.v1+json"
        return Descriptor(digest="sha256:" + f"{number:02x}" * 32, size=1, media_type=kind, platform=platform)

    wanted = entry(3, here)
    assert choose("x", Index(manifests=(entry(1, attestation), entry(2, other), wanted))) == wanted
    with pytest.raises(FailedPrecondition, match="linux/riscv64"):
        choose("x", Index(manifests=(entry(1, attestation), entry(2, other))))


def test_config() -> None:
    document = {
        "os": "linux",
        "architecture": this_platform().architecture,
        "config": {
            "Entrypoint": ["/bin/app"],
            "Cmd": None,
            "Env": ["A=1", "B=x=y", "EMPTY="],
            "User": "app:staff",
            "WorkingDir": "",
            "ExposedPorts": {"8080/tcp": {}, "53/udp": {}, "80": {}},
            "StopSignal": "SIGINT",
        },
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "history": [{"created": "2020-01-01T00:00:00Z"}],
    }
    config, diff_ids = parse_config("x", msgspec.json.encode(document), 1)
    assert diff_ids == (DIGEST,)
    assert config.entrypoint == ("/bin/app",)
    assert config.cmd == ()
    assert config.env == (("A", "1"), ("B", "x=y"), ("EMPTY", ""))
    assert config.exposed_ports == (80, 8080)
    assert (config.user, config.workdir, config.stop_signal) == ("app:staff", "/", "SIGINT")
    for changed, layers in (
        (document, 2),
        ({**document, "architecture": "riscv64"}, 1),
        ({**document, "os": "windows"}, 1),
        ({**document, "config": {"ExposedPorts": {"99999/tcp": {}}}}, 1),
        ({**document, "config": 5}, 1),
    ):
        with pytest.raises(FailedPrecondition):
            parse_config("x", msgspec.json.encode(changed), layers)


# --- users ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nbroken line\nodd:x:one:2:::\nhuge:x:99999999999:1:::\n"
        "app:x:1000:1001:App:/home/app:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nstaff:x:50:app\n")
    return root


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, "/root")),
        ("root", (0, 0, "/root")),
        ("app", (1000, 1001, "/home/app")),
        ("1000", (1000, 1001, "/home/app")),
        ("4711", (4711, 0, "/")),
        ("4711:4712", (4711, 4712, "/")),
        ("app:staff", (1000, 50, "/home/app")),
        ("app:7", (1000, 7, "/home/app")),
        ("app:", (1000, 1001, "/home/app")),
        (":staff", (0, 50, "/root")),
    ],
)
def test_resolve_user(rootfs: Path, user: str, expected: tuple[int, int, str]) -> None:
    assert resolve_user(rootfs, user) == expected


@pytest.mark.parametrize("user", ["nobody", "odd", "huge", "app:nobody", "-1", "4294967295", "1:99999999999", "../x"])
def test_resolve_user_refuses(rootfs: Path, user: str) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        resolve_user(rootfs, user)
    assert raised.value.reason == "USER_NOT_FOUND"


def test_resolve_user_stays_inside(rootfs: Path, tmp_path: Path) -> None:
    """Links in the image mean what they mean inside it, and nothing but a plain file is read."""
    outside = tmp_path / "outside"
    outside.write_text("evil:x:666:666:::\n")
    passwd = rootfs / "etc/passwd"
    for target in (str(outside), "../../outside", "/../../../" + str(outside)):
        passwd.unlink()
        passwd.symlink_to(target)
        with pytest.raises(FailedPrecondition):
            resolve_user(rootfs, "evil")
    # Inside, both kinds of links work.
    (rootfs / "usr").mkdir()
    (rootfs / "usr/accounts").write_text("app:x:5:6:::\n")
    for target in ("/usr/accounts", "../usr/./accounts", "../../../usr/accounts"):
        passwd.unlink()
        passwd.symlink_to(target)
        assert resolve_user(rootfs, "app") == (5, 6, "/")
    passwd.unlink()
    os.mkfifo(passwd)  # must not block
    assert resolve_user(rootfs, "12") == (12, 0, "/")
    passwd.unlink()
    passwd.symlink_to("passwd")  # a loop
    assert resolve_user(rootfs, "12") == (12, 0, "/")


@pytest.mark.parametrize("target", ["etc", "e" * 300, "loop"])
def test_links_that_lead_nowhere_are_the_fault_of_the_image(tmp_path: Path, target: str) -> None:
    """What is raised otherwise counts against the worker, which is quarantined for it."""
    (tmp_path / "loop").symlink_to("loop/loop")
    (tmp_path / "etc").symlink_to(target)
    with pytest.raises(FailedPrecondition, match=r"the image's /etc/passwd can't be read") as raised:
        resolve_user(tmp_path, "12")
    assert raised.value.reason == "IMAGE_INVALID"
