"""Registries that want a login, have mirrors, their own authority, or are behind a proxy."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from registry_kit import WebProxy, docker_registry, find_registry, make_authority
from yarl import URL

from greenroom.core.errors import FailedPrecondition, GreenroomError, Unavailable
from greenroom.images import download, registry
from greenroom.images.credentials import CredentialFiles, Login
from greenroom.images.registries import Mirror, Registries, Registry
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import push_layout

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make an authority with")

DATA = os.urandom(6 << 20)
SIZE = len(DATA)
#: The account ada with the password "secret".
HTPASSWD = "ada:$2b$04$6Ek1gmWmKmNMwi4mR1TxR.YshcyzXZ4o1YWa8NKGu4yZDgng1ZJ7W\n"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def pushed(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    layout = tmp_path_factory.mktemp("layout")
    make_image(layout, {"large": DATA}, {"small": b"small"}, compression="zstd")
    push_layout(layout, f"{upstream}/test/image:1")
    return "test/image:1"


@pytest.fixture
def store(tmp_path: Path) -> DiskImageStore:
    return DiskImageStore(tmp_path / "store")


@pytest.fixture
async def front(upstream: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(upstream).running() as running:
        yield running


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(registry, "RETRY_BASE_S", 0.001)
    monkeypatch.setattr(download, "RETRY_BASE_S", 0.001)


def check(image_root: Path) -> None:
    assert contents(image_root) == {"large": DATA, "small": b"small"}


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


async def test_whoever_is_redirected_to_gets_no_account(upstream: str, pushed: str, tmp_path: Path) -> None:
    """It may ask for one, and say where to send it to."""
    leaked: list[str] = []

    async def credentials(host: str, repository: str) -> Login | None:
        return Login(username="ada", password="secret")

    async with FaultProxy(upstream).running() as storage, FaultProxy(upstream).running() as front:

        async def ask(request: web.Request) -> web.StreamResponse | None:
            leaked.extend(request.headers.getall("Authorization", []))
            realm = f'Bearer realm="http://{storage.host}/token",service="x"'
            return web.Response(status=401, headers={"WWW-Authenticate": realm})

        async def redirect(request: web.Request) -> web.StreamResponse | None:
            if "/blobs/" in request.path:
                raise web.HTTPTemporaryRedirect(f"http://{storage.host}{request.path_qs}")
            return None

        storage.intercept, front.intercept = ask, redirect
        images = DiskImageStore(tmp_path / "store", registries=Registries(credentials=credentials))
        with pytest.raises(Unavailable, match=f"{storage.host}, where {front.host} redirects to, answers 401"):
            await images.prepare(f"{front.host}/{pushed}")
    assert leaked == []


async def test_a_login_as_docker_keeps_it(tmp_path: Path, pushed: str) -> None:
    """A real registry with accounts, and the files that `docker login` writes."""
    make_image(tmp_path / "layout", {"large": DATA}, {"small": b"small"}, compression="zstd")
    (tmp_path / "registry").mkdir()
    with docker_registry(tmp_path / "registry") as host:  # filled while it is open to everybody
        push_layout(tmp_path / "layout", f"{host}/{pushed}")
    with docker_registry(tmp_path / "registry", accounts=HTPASSWD) as host:
        with pytest.raises(FailedPrecondition, match="docker login") as raised:
            await DiskImageStore(tmp_path / "anonymous").prepare(f"{host}/{pushed}")
        assert raised.value.reason == "REGISTRY_AUTH"
        for password, good in (("wrong", False), ("secret", True)):
            auth = base64.b64encode(f"ada:{password}".encode()).decode()
            (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
            registries = Registries.from_environment({"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)})
            store = DiskImageStore(tmp_path / "store", registries=registries)
            if good:
                check((await store.prepare(f"{host}/{pushed}")).rootfs)
                continue
            with pytest.raises(FailedPrecondition, match="log in to it again") as raised:
                await store.prepare(f"{host}/{pushed}")
            assert "wrong" not in str(raised.value)


async def test_identity_token(front: FaultProxy, pushed: str, tmp_path: Path) -> None:
    """What a helper of a cloud hands out: a refresh token, which buys tokens as OAuth 2 has it."""
    scopes = front.want_tokens(identity_token="refresh")
    (tmp_path / "config.json").write_text(json.dumps({"auths": {front.host: {"identitytoken": "refresh"}}}))
    registries = Registries(credentials=CredentialFiles([tmp_path / "config.json"]))
    check((await DiskImageStore(tmp_path / "store", registries=registries).prepare(f"{front.host}/{pushed}")).rootfs)
    assert set(scopes) == {"repository:test/image:pull"}


async def test_tokens_that_run_out_lose_nothing(front: FaultProxy, pushed: str, tmp_path: Path) -> None:
    """Every few requests the token is no longer good."""
    scopes = front.want_tokens(lifetime_requests=5)
    check((await DiskImageStore(tmp_path / "store").prepare(f"{front.host}/{pushed}")).rootfs)
    assert len(scopes) >= 2
    assert front.blob_bytes < SIZE + 10_000


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"", Unavailable),
        (200, b'{"token": 5}', Unavailable),
        (200, b'{"token": "a\\r\\nb"}', Unavailable),
        (200, bytes(5 << 20), FailedPrecondition),
        (403, b'{"errors": [{"message": "suspended"}]}', FailedPrecondition),
        (500, b"", Unavailable),
    ],
)
async def test_bad_token_servers(
    front: FaultProxy, pushed: str, tmp_path: Path, status: int, body: bytes, kind: type[GreenroomError]
) -> None:
    front.want_tokens()
    front.answer(status, times=100, path="/token", body=body)
    with pytest.raises(kind):
        await DiskImageStore(tmp_path / "store").prepare(f"{front.host}/{pushed}")


# --- mirrors --------------------------------------------------------------------------------------------------


def _mirrored(*mirrors: str, location: str) -> Registries:
    entry = Registry(
        prefix="far.invalid", location=location, mirror=tuple(Mirror(location=f"{mirror}/test") for mirror in mirrors)
    )
    return Registries(registries=[entry])


async def test_a_mirror_serves_all(front: FaultProxy, pushed: str, tmp_path: Path) -> None:
    """The registry itself is not asked, nor does it have to be there."""
    store = DiskImageStore(tmp_path / "store", registries=_mirrored(front.host, location="127.0.0.1:1/test"))
    image = await store.prepare("far.invalid/image:1")
    check(image.rootfs)
    assert image.reference == "far.invalid/image:1"


@pytest.mark.parametrize("fault", ["down", "lacks it", "refuses", "lies", "breaks off", "redirects"])
async def test_mirrors_may_fail(front: FaultProxy, upstream: str, pushed: str, tmp_path: Path, fault: str) -> None:
    mirror = "127.0.0.1:1" if fault == "down" else front.host
    match fault:
        case "lacks it":
            front.answer(404, times=1000)
        case "refuses":
            front.answer(401, times=1000)
        case "lies":
            front.corrupt_at = SIZE // 2
        case "breaks off":
            front.answer(500, times=1000, path="/blobs/")
        case "redirects":
            front.answer(302, times=1000, headers={"Location": "/v2/again"})
    store = DiskImageStore(tmp_path / "store", registries=_mirrored(mirror, location=f"{upstream}/test"))
    check((await store.prepare("far.invalid/image:1")).rootfs)


async def test_goes_on_at_the_registry_where_a_mirror_left_off(
    front: FaultProxy, upstream: str, pushed: str, tmp_path: Path
) -> None:
    async with FaultProxy(upstream).running() as origin:

        async def die() -> None:
            if front.blob_bytes > SIZE * 9 // 10:  # more than may be under way
                front.answer(500, times=1000)
                front.cut()

        front.before_chunk = die
        store = DiskImageStore(tmp_path / "store", registries=_mirrored(front.host, location=f"{origin.host}/test"))
        check((await store.prepare("far.invalid/image:1")).rootfs)
        assert 0 < origin.blob_bytes < SIZE


# --- certificates and proxies ---------------------------------------------------------------------------------


@needs_openssl
async def test_authority_of_its_own(upstream: str, pushed: str, tmp_path: Path) -> None:
    tls = make_authority(tmp_path)
    async with FaultProxy(upstream).running(tls=tls) as front:
        certificates = tmp_path / "certs.d" / front.host
        certificates.mkdir(parents=True)
        # A directory for it is enough to speak TLS to loopback; without the authority in it, it is not trusted.
        registries = Registries(certificates=[tmp_path / "certs.d"])
        with pytest.raises(FailedPrecondition, match=r"certs\.d") as raised:
            await DiskImageStore(tmp_path / "store", registries=registries).prepare(f"{front.host}/{pushed}")
        assert raised.value.reason == "REGISTRY_TLS"
        # What was wrong can be put right while the agent runs.
        shutil.copy(tmp_path / "ca.crt", certificates)
        store = DiskImageStore(tmp_path / "store", registries=registries)
        check((await store.prepare(f"{front.host}/{pushed}")).rootfs)


@needs_openssl
async def test_client_certificate(upstream: str, pushed: str, tmp_path: Path) -> None:
    tls = make_authority(tmp_path)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(tmp_path / "ca.crt")
    async with FaultProxy(upstream).running(tls=tls) as front:
        certificates = tmp_path / "certs.d" / front.host
        certificates.mkdir(parents=True)
        shutil.copy(tmp_path / "ca.crt", certificates)
        store = DiskImageStore(tmp_path / "store", registries=Registries(certificates=[tmp_path / "certs.d"]))
        with pytest.raises(Unavailable):
            await store.prepare(f"{front.host}/{pushed}")
        shutil.copy(tmp_path / "server.crt", certificates / "client.cert")
        shutil.copy(tmp_path / "server.key", certificates / "client.key")
        check((await store.prepare(f"{front.host}/{pushed}")).rootfs)


@needs_openssl
@pytest.mark.parametrize("account", ["", "ada:hidden"])
async def test_proxies_of_the_environment(
    upstream: str, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: str
) -> None:
    """Names that only the proxy knows, one behind TLS of an authority that ``$SSL_CERT_FILE`` names, one without."""
    tls = make_authority(tmp_path, "registry.invalid")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    async with FaultProxy(upstream).running(tls=tls) as behind_tls, FaultProxy(upstream).running() as plain:
        hosts = {"registry.invalid:443": behind_tls.host, "plain.invalid:5000": plain.host}
        async with WebProxy(hosts, account).running() as proxy:
            conf = '[[registry]]\nlocation = "plain.invalid:5000"\ninsecure = true\n'
            (tmp_path / "registries.conf").write_text(conf)
            environment = {
                "HOME": str(tmp_path),
                "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "registries.conf"),
                "HTTPS_PROXY": proxy.url,
                "http_proxy": proxy.url,
            }
            for number, host in enumerate(("registry.invalid", "plain.invalid:5000")):
                registries = Registries.from_environment(environment)
                store = DiskImageStore(tmp_path / f"store{number}", registries=registries)
                check((await store.prepare(f"{host}/{pushed}")).rootfs)
            assert "CONNECT registry.invalid:443" in proxy.asked
            assert any(asked.startswith("GET http://plain.invalid:5000/v2/") for asked in proxy.asked)
            # What the proxy does not know it says.
            store = DiskImageStore(tmp_path / "other", registries=Registries.from_environment(environment))
            with pytest.raises(Unavailable, match="502"):
                await store.prepare(f"other.invalid/{pushed}")
            environment["NO_PROXY"] = "registry.invalid"
            asked = len(proxy.asked)
            store = DiskImageStore(tmp_path / "direct", registries=Registries.from_environment(environment))
            with pytest.raises(Unavailable, match=r"registry\.invalid"):
                await store.prepare(f"registry.invalid/{pushed}")
            assert len(proxy.asked) == asked


async def test_a_proxy_that_wants_an_account(tmp_path: Path) -> None:
    async with WebProxy({}, "ada:hidden").running() as proxy:
        wrong = proxy.url.replace("hidden", "mistaken")
        store = DiskImageStore(tmp_path / "store", registries=Registries(proxies={"https": wrong}))
        with pytest.raises(Unavailable, match="407") as raised:
            await store.prepare("registry.invalid/a:1")
        assert "mistaken" not in str(raised.value)


@needs_openssl
@pytest.mark.parametrize("proxy", ["socks5://ada:secret@127.0.0.1:1", "http://ada:secret@[bad:1", "http://"])
def test_a_proxy_that_is_none(proxy: str) -> None:
    with pytest.raises(FailedPrecondition, match="HTTPS_PROXY") as refused:
        Registries.from_environment({"HOME": "/nowhere", "HTTPS_PROXY": proxy})
    assert refused.value.reason == "REGISTRY_CONFIG"
    assert "secret" not in refused.value.message


def test_a_proxy_without_a_scheme() -> None:
    """As other tools take it."""
    proxied = Registries.from_environment({"HOME": "/nowhere", "https_proxy": "proxy.example:3128"})
    assert proxied.proxy(URL("https://registry.example/v2/")) == "http://proxy.example:3128"


async def test_nothing_goes_on_without_tls(upstream: str, pushed: str, tmp_path: Path) -> None:
    """A registry behind TLS sends its readers to plain http."""
    tls = make_authority(tmp_path)
    async with FaultProxy(upstream).running(tls=tls) as front:
        (tmp_path / "certs.d" / front.host).mkdir(parents=True)
        shutil.copy(tmp_path / "ca.crt", tmp_path / "certs.d" / front.host)

        async def redirect(request: web.Request) -> web.StreamResponse | None:
            if "/blobs/" in request.path:
                raise web.HTTPTemporaryRedirect(f"http://{upstream}{request.path_qs}")
            return None

        front.intercept = redirect
        registries = Registries(certificates=[tmp_path / "certs.d"])
        with pytest.raises(Unavailable, match="without TLS") as raised:
            await DiskImageStore(tmp_path / "store", registries=registries).prepare(f"{front.host}/{pushed}")
        assert raised.value.reason == "REGISTRY_REDIRECT"
