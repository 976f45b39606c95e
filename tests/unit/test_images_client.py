"""What a registry may say in its headers: anything."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from greenroom.core.errors import GreenroomError
from greenroom.images import client
from greenroom.images.client import Client, authority
from greenroom.images.download import Interrupted
from greenroom.images.registries import Registries

FIRST = URL("https://r.example:5000/v2/a/manifests/1")


@given(st.text())
@example("1" * 10_000)
@example("-1")
@example("Fri, 31 Dec 9999 23:59:59 GMT")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("²")
def test_any_retry_after(text: str) -> None:
    assert client._pause_s(text) >= 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 0), ("5", 5), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("soon", 0), ("1.5", 0)]
)
def test_retry_after(text: str, seconds: float) -> None:
    assert client._pause_s(text) == seconds


def test_retry_after_is_a_date() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 98 < client._pause_s(date) <= 100


@given(st.text() | st.tuples(st.sampled_from(["http", "https", "//", "ftp"]), st.text()).map("://".join))
@example("https://")
@example("//")
@example("https://[::1")
@example("https://r.example:99999/")
@example("https://\x00/")
@example("https://user:secret@other.example/path#part")
def test_any_redirect(location: str) -> None:
    """It leads to a web address with TLS and without an account, or it is refused."""
    try:
        target = client._target(FIRST, FIRST, location)
    except GreenroomError as error:
        assert error.reason == "REGISTRY_REDIRECT"
    else:
        assert (target.scheme, target.user, target.password) == ("https", None, None)
        assert target.host


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://r.example/v2/", "r.example"),
        ("https://r.example:443/v2/", "r.example"),
        ("https://r.example:5000/v2/", "r.example:5000"),
        ("http://[::1]:5000/?secret", "[::1]:5000"),
        ("https://ada:secret@r.example/", "r.example"),
    ],
)
def test_authority(url: str, expected: str) -> None:
    assert authority(URL(url)) == expected


async def test_hosts_without_certificates_share_a_context(tmp_path: Path) -> None:
    """A registry may redirect each piece to another name: what is kept for it must not grow with them."""
    own = "127.0.0.1:1"
    (tmp_path / own).mkdir()
    made: list[str] = []

    class Counting(Registries):
        def tls(self, host: str) -> ssl.SSLContext:
            made.append(host)
            return super().tls(host)

    async with Client(Counting(certificates=[tmp_path])) as web:
        for host in (own, *(f"127.0.0.{n}:1" for n in range(2, 12)), own, "a" * 300):
            with pytest.raises(Interrupted):
                async with web.request("GET", URL(f"https://{host}/v2/"), headers={}):
                    pass
    assert made == [own, ""]
