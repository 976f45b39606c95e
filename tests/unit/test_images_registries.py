"""Which servers stand for a registry, as registries.conf and certs.d say."""

from __future__ import annotations

from pathlib import Path

import pytest
from yarl import URL

from greenroom.core.errors import FailedPrecondition
from greenroom.images.reference import RegistryReference, parse
from greenroom.images.registries import Registries, read_conf

DIGEST = "sha256:" + "a1" * 32

CONF = """
unqualified-search-registries = ["docker.io"]

[[registry]]
prefix = "docker.io"
location = "docker.io"
[[registry.mirror]]
location = "mirror.local:5000/hub"
insecure = true
[[registry.mirror]]
location = "digests.local"
pull-from-mirror = "digest-only"

[[registry]]
location = "plain.local:5000"
insecure = true

[[registry]]
prefix = "moved.example/old"
location = "new.example/team"

[[registry]]
prefix = "moved.example/old/secret"
blocked = true

[[registry]]
prefix = "*.corp.example"
mirror-by-digest-only = true
[[registry.mirror]]
location = "cache.corp.local"
"""


@pytest.mark.parametrize(
    ("reference", "urls"),
    [
        (
            "python:3",
            ["http://mirror.local:5000/v2/hub/library/python", "https://registry-1.docker.io/v2/library/python"],
        ),
        (
            f"acme/app@{DIGEST}",
            [
                "http://mirror.local:5000/v2/hub/acme/app",
                "https://digests.local/v2/acme/app",
                "https://registry-1.docker.io/v2/acme/app",
            ],
        ),
        ("plain.local:5000/a", ["http://plain.local:5000/v2/a"]),
        ("plain.local:5001/a", ["https://plain.local:5001/v2/a"]),
        ("moved.example/old/app:1", ["https://new.example/v2/team/app"]),
        ("moved.example/older/app:1", ["https://moved.example/v2/older/app"]),
        ("r.corp.example/app:1", ["https://r.corp.example/v2/app"]),
        (f"r.corp.example/app@{DIGEST}", ["https://cache.corp.local/v2/app", "https://r.corp.example/v2/app"]),
        ("corp.example/app", ["https://corp.example/v2/app"]),
        ("127.0.0.1:5000/app", ["http://127.0.0.1:5000/v2/app"]),
    ],
)
def test_endpoints(tmp_path: Path, reference: str, urls: list[str]) -> None:
    (tmp_path / "registries.conf").write_text(CONF)
    found = parse(reference)
    assert isinstance(found, RegistryReference)
    endpoints = Registries(registries=read_conf(tmp_path / "registries.conf")).endpoints(found)
    assert [endpoint.base_url for endpoint in endpoints] == urls
    assert [endpoint.is_mirror for endpoint in endpoints] == [True] * (len(urls) - 1) + [False]


def test_blocked(tmp_path: Path) -> None:
    (tmp_path / "registries.conf").write_text(CONF)
    registries = Registries(registries=read_conf(tmp_path / "registries.conf"))
    with pytest.raises(FailedPrecondition) as raised:
        registries.endpoints(RegistryReference(host="moved.example", repository="old/secret/app"))
    assert raised.value.reason == "REGISTRY_BLOCKED"


@pytest.mark.parametrize("text", ["[[registry", "registry = 5", "[[registry]]\nblocked = true", "\xff"])
def test_damaged_conf(tmp_path: Path, text: str) -> None:
    (tmp_path / "registries.conf").write_text(text, encoding="latin-1")
    with pytest.raises(FailedPrecondition, match=r"registries\.conf") as raised:
        read_conf(tmp_path / "registries.conf")
    assert raised.value.reason == "REGISTRY_CONFIG"


def test_conf_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "mine.conf").write_text(CONF)
    user = tmp_path / "home/.config/containers"
    (user / "certs.d/127.0.0.1:5000").mkdir(parents=True)
    (user / "registries.conf").write_text('[[registry]]\nlocation = "r.example"\ninsecure = true\n')
    plain = RegistryReference(host="r.example", repository="a")

    def url(environment: dict[str, object], reference: RegistryReference = plain) -> str:
        registries = Registries.from_environment({key: str(value) for key, value in environment.items()})
        return registries.endpoints(reference)[0].base_url

    assert url({"HOME": tmp_path / "home"}) == "http://r.example/v2/a"
    chosen = {"HOME": tmp_path / "home", "CONTAINERS_REGISTRIES_CONF": tmp_path / "mine.conf"}
    assert url(chosen) == "https://r.example/v2/a"
    # Whoever has made certificates for a registry on loopback wants TLS.
    loopback = RegistryReference(host="127.0.0.1:5000", repository="a")
    assert url({"HOME": tmp_path / "home"}, loopback) == "https://127.0.0.1:5000/v2/a"


def test_proxies() -> None:
    registries = Registries(
        proxies={"https": "http://proxy:3128", "http": "http://plain:3128", "no": "local, .corp.example,r.example:444"}
    )
    for url, proxy in {
        "https://a.example": "http://proxy:3128",
        "http://a.example": "http://plain:3128",
        "https://x.corp.example": None,
        "https://r.example:444": None,
        "https://r.example": "http://proxy:3128",
        "https://127.0.0.1:5000": None,
        "https://localhost": None,
        "https://[::1]:5000": None,
        "https://x.local": None,
    }.items():
        assert registries.proxy(URL(url)) == proxy, url


def test_damaged_certificate(tmp_path: Path) -> None:
    (tmp_path / "r.example").mkdir()
    (tmp_path / "r.example/ca.crt").write_text("no certificate")
    registries = Registries(certificates=[tmp_path])
    with pytest.raises(FailedPrecondition, match=r"ca\.crt") as raised:
        registries.tls("r.example")
    assert raised.value.reason == "REGISTRY_CONFIG"
    assert registries.tls("other.example").verify_mode.name == "CERT_REQUIRED"
