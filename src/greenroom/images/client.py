"""HTTP to registries and to where their blobs are kept: redirects, certificates, proxies, limits of rate.

Source: RFC 9110 (redirects, ``Retry-After``), RFC 6585 (429); OCI distribution spec v1.1 ("Error Codes").
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import TracebackType

import aiohttp
import msgspec
from yarl import URL

from greenroom.core.errors import FailedPrecondition, Unavailable
from greenroom.core.records import Record
from greenroom.images.download import MAX_PAUSE_S, Interrupted, Throttled
from greenroom.images.registries import Registries

#: A registry that has not accepted a connection after this long, or sends nothing for the second, is taken for gone;
#: both are above any delay of a bad link (a transfer itself may take as long as it likes).
CONNECT_TIMEOUT_S = 15.0
SILENCE_TIMEOUT_S = 30.0
#: Read ahead of what is taken, for a connection.
READ_BUFFER_BYTES = 256 << 10
_MAX_REDIRECTS = 5
#: How much of an answer that is an error is read, and how much of its message is shown.
_MAX_ERROR_BYTES = 8 << 10
_MAX_MESSAGE_CHARS = 200
_REDIRECTS = (301, 302, 303, 307, 308)


class _Problem(Record, frozen=True, kw_only=True):
    code: str = ""
    message: str = ""


class _Problems(Record, frozen=True, kw_only=True):
    errors: tuple[_Problem, ...] = ()


class Client:
    """An async context manager, which holds the connections."""

    def __init__(self, registries: Registries) -> None:
        self._registries = registries
        self._session: aiohttp.ClientSession | None = None
        #: By host, of those that have certificates of their own; all others share that of "". One takes a megabyte, and
        #: a registry may redirect to as many hosts as it likes.
        self._contexts: dict[str, ssl.SSLContext] = {}

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            timeout=timeout,
            # Layers are compressed already, and their digests are of the bytes as they are sent.
            auto_decompress=False,
            headers={"User-Agent": f"greenroom/{version('greenroom')}", "Accept-Encoding": "identity"},
            read_bufsize=READ_BUFFER_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    @asynccontextmanager
    async def request(
        self, method: str, url: URL, *, headers: Mapping[str, str], data: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, redirects followed (for GET). ``Authorization`` goes to ``url``'s own server alone, and nothing
        that began with TLS goes on without.

        Raises:
            Interrupted: no connection, or it broke, also while the answer is read.
            Throttled: the server wants to be asked less often; the next request to it waits for as long as it said.
            FailedPrecondition: its certificate is not trusted (reason ``REGISTRY_TLS``).
            ResourceExhausted: it wants to be left alone for longer than `greenroom.images.download.MAX_PAUSE_S` (reason
                ``REGISTRY_RATE_LIMIT``).
            Unavailable: it redirects in circles or to where it must not (reason ``REGISTRY_REDIRECT``).
        """
        first, sent = url, dict(headers)
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                await self._wait(url)
                async with await self._send(method, url, sent, data) as response:
                    if response.status in _REDIRECTS and method == "GET" and "Location" in response.headers:
                        target = _target(first, url, response.headers["Location"])
                        if origin(target) != origin(url):
                            sent.pop("Authorization", None)
                        url = target
                        continue
                    await self._obey(url, response)
                    yield response
                    return
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch) as error:
            raise FailedPrecondition(
                f"the certificate of {authority(url)} is not trusted ({_words(error)}): put its authority's into "
                f"/etc/containers/certs.d/{authority(url)}/ca.crt, or let SSL_CERT_FILE name it",
                reason="REGISTRY_TLS",
            ) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Interrupted(f"{authority(url)} does not answer: {_words(error)}") from error
        raise _bad_redirect(first, f"more than {_MAX_REDIRECTS} times")

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], data: Mapping[str, str] | None
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        try:
            return await self._session.request(
                method,
                url,
                headers=headers,
                data=data,
                ssl=await self._context(authority(url)) if url.scheme == "https" else True,
                proxy=self._registries.proxy(url),
                allow_redirects=False,
            )
        except UnicodeError as error:
            raise Interrupted(f"{authority(url)} is no name that a host can have") from error

    async def _context(self, host: str) -> ssl.SSLContext:
        key = host if self._registries.has_certificates(host) else ""
        if key not in self._contexts:
            self._contexts[key] = await asyncio.to_thread(self._registries.tls, key)
        return self._contexts[key]

    async def _wait(self, url: URL) -> None:
        pause_s = self._registries.not_before.get(authority(url), 0.0) - asyncio.get_running_loop().time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)

    async def _obey(self, url: URL, response: aiohttp.ClientResponse) -> None:
        pause_s = _pause_s(response.headers.get("Retry-After", ""))
        if not (response.status == 429 or (response.status == 503 and pause_s)):
            return
        wants = f"for {pause_s:.0f} s" if pause_s else "for a while"
        limit = Throttled(f"{authority(url)} wants to be left alone {wants}{await message(response)}", pause_s)
        if pause_s > MAX_PAUSE_S:
            raise limit.final("its limit of requests is reached")
        loop = asyncio.get_running_loop()
        self._registries.not_before[authority(url)] = loop.time() + pause_s
        raise limit


def authority(url: URL) -> str:
    """``host[:port]``, the port if it is not the scheme's own. What of a URL may be shown: a redirect's query is
    signed, so that whoever has it may use it."""
    host = f"[{url.host}]" if ":" in (url.host or "") else url.host or ""
    return host if url.is_default_port() or url.port is None else f"{host}:{url.port}"


async def message(response: aiohttp.ClientResponse) -> str:
    """What the registry says about its error, as ``": ..."`` for the end of a sentence, or ``""``."""
    data = await response.content.read(_MAX_ERROR_BYTES)
    try:
        problems = msgspec.json.decode(data, type=_Problems).errors
    except msgspec.MsgspecError:
        return ""
    said = next((p.message or p.code for p in problems if p.message or p.code), "")
    shown = "".join(c if c.isprintable() else " " for c in said)[:_MAX_MESSAGE_CHARS].strip()
    return f": {shown}" if shown else ""


def _target(first: URL, url: URL, location: str) -> URL:
    """Where a redirect from ``url`` leads, if that is allowed."""
    try:
        target = url.join(URL(location))
        if target.scheme in ("http", "https"):
            target = target.with_user(None).with_fragment(None)
    except ValueError as error:
        raise _bad_redirect(first, "to something that is no URL") from error
    if target.scheme not in ("http", "https"):
        raise _bad_redirect(first, f"to a {target.scheme or 'nameless'} address")
    if url.scheme == "https" and target.scheme != "https":
        raise _bad_redirect(first, f"to {authority(target)} without TLS")
    return target


def _bad_redirect(first: URL, how: str) -> Unavailable:
    return Unavailable(
        f"registry {authority(first)} redirects {how}: its address or configuration is wrong",
        reason="REGISTRY_REDIRECT",
    )


def origin(url: URL) -> tuple[str, str]:
    """Scheme, and host with port: what an account is for."""
    return url.scheme, authority(url)


def _pause_s(text: str) -> float:
    """Seconds of a ``Retry-After``, which may be a number or a date; 0 if it says nothing."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientResponseError):  # its words have the whole URL; this one comes from a proxy
        return f"{error.status} {error.message}"
    if isinstance(error, aiohttp.ClientConnectorError):  # its words name the host again, and objects of ours
        return error.strerror or str(error.os_error)
    return str(error) or ("it takes too long" if isinstance(error, TimeoutError) else type(error).__name__)
