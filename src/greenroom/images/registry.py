"""A client of container registries, as much as pulling takes.

Source: OCI distribution spec v1.1 ("Pull"); Docker registry token authentication specification; RFC 9110 (ranges);
RFC 7235 (challenges).
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp
import msgspec
from yarl import URL

from greenroom.core.errors import FailedPrecondition, NotFound, Unavailable
from greenroom.core.records import Record
from greenroom.images.blobs import CHUNK_BYTES, Interrupted
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, MAX_JSON_BYTES, Descriptor, invalid
from greenroom.images.reference import RegistryReference, is_loopback

Credentials = Callable[[str], Awaitable[tuple[str, str] | None]]
"""Host of a registry -> user name and password, or None for anonymous access."""

#: A registry that has not accepted a connection after this long, or sends nothing for the second, is taken for gone;
#: both are above any delay of a bad link (a transfer itself may take as long as it likes).
CONNECT_TIMEOUT_S = 15.0
SILENCE_TIMEOUT_S = 30.0
#: Attempts of small requests (manifest, token) and the pause before attempt n, times 2**n.
_ATTEMPTS = 4
_RETRY_BASE_S = 0.25
_MAX_REDIRECTS = 5
#: Read ahead while a piece is hashed and written. When a fast connection breaks, this is lost and asked for again.
READ_BUFFER_BYTES = 256 << 10

_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_PARAMETER = re.compile(r'([a-zA-Z_]+)="([^"]*)"')
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class _Token(Record, frozen=True, kw_only=True):
    token: str = ""
    access_token: str = ""


async def anonymous(host: str) -> tuple[str, str] | None:
    return None


class RegistrySource:
    """One repository of a registry. An async context manager, which holds the connections."""

    def __init__(self, reference: RegistryReference, credentials: Credentials = anonymous) -> None:
        self._reference = reference
        self._credentials = credentials
        self._base = f"{reference.base_url}/v2/{reference.repository}"
        self._authorization = ""
        self._login = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RegistrySource:
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        # Layers are compressed already, and their digests are of the bytes as they are sent. trust_env: proxies.
        self._session = aiohttp.ClientSession(
            timeout=timeout, auto_decompress=False, read_bufsize=READ_BUFFER_BYTES, trust_env=True
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest or index that the reference names: (digest or "" if only the bytes tell, bytes, media type).

        Raises:
            NotFound: no such repository or tag.
            Unavailable: the registry does not answer.
            FailedPrecondition: it wants credentials (reason ``REGISTRY_AUTH``).
        """
        reference = self._reference
        data, media_type = await self._manifest(reference.digest or reference.tag)
        return reference.digest, data, media_type

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return (await self._manifest(descriptor.digest))[0]

    @asynccontextmanager
    async def open_blob(self, descriptor: Descriptor, offset: int) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            async with self._get(f"{self._base}/blobs/{descriptor.digest}", headers) as response:
                if response.status in _TRANSIENT or response.status == 416:
                    raise Interrupted(f"{self._reference.host} answers {response.status} {response.reason}")
                await self._check(response, f"blob {descriptor.digest}")
                yield _start(response, offset), response.content.iter_chunked(CHUNK_BYTES)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Interrupted(f"{self._reference.host}: {_words(error)}") from error

    # --- parts -----------------------------------------------------------------------------------------------

    async def _manifest(self, name: str) -> tuple[bytes, str]:
        url = f"{self._base}/manifests/{name}"
        what = f"image {self._reference.host}/{self._reference.repository}:{name}"
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._get(url, {"Accept": _ACCEPT}) as response:
                    if response.status not in _TRANSIENT or attempt == _ATTEMPTS:
                        await self._check(response, what)
                        return await _body(response, what), response.content_type
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if attempt == _ATTEMPTS:
                    raise Unavailable(
                        f"registry {self._reference.host} does not answer ({_words(error)}): check name and network"
                    ) from error
            await asyncio.sleep(_RETRY_BASE_S * 2**attempt)

    @asynccontextmanager
    async def _get(self, url: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET; logs in and asks once more when that is what the registry wants (also when a token ran out)."""
        assert self._session is not None
        used = self._authorization
        async with self._session.get(
            url, headers=self._headers(headers, used), max_redirects=_MAX_REDIRECTS
        ) as response:
            if response.status != 401:
                yield response
                return
            challenges = response.headers.getall("WWW-Authenticate", [])
        async with self._login:
            if self._authorization == used:  # else another request has just done it
                self._authorization = await self._log_in(challenges)
        async with self._session.get(
            url, headers=self._headers(headers, self._authorization), max_redirects=_MAX_REDIRECTS
        ) as response:
            yield response

    @staticmethod
    def _headers(headers: dict[str, str], authorization: str) -> dict[str, str]:
        # aiohttp drops Authorization when a redirect leads to another origin (a registry's storage).
        return {**headers, "Authorization": authorization} if authorization else headers

    async def _log_in(self, challenges: list[str]) -> str:
        host = self._reference.host
        account = await self._credentials(host)
        basic = "Basic " + base64.b64encode(":".join(account).encode()).decode() if account else ""
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "basic" and basic:
                return basic
            if scheme.lower() == "bearer":
                return await self._fetch_token(dict(_PARAMETER.findall(rest)), basic)
        raise FailedPrecondition(f"registry {host} wants a login: log in to it first", reason="REGISTRY_AUTH")

    async def _fetch_token(self, parameters: dict[str, str], basic: str) -> str:
        assert self._session is not None
        host = self._reference.host
        realm = URL(parameters.get("realm", ""))
        if realm.scheme != "https" and not (is_loopback(host) and is_loopback(realm.host or "")):
            raise FailedPrecondition(
                f"registry {host} wants a token from {str(realm)!r}, which is not https", reason="REGISTRY_AUTH"
            )
        query = {"scope": parameters.get("scope") or f"repository:{self._reference.repository}:pull"}
        if "service" in parameters:
            query["service"] = parameters["service"]
        headers = {"Authorization": basic} if basic else {}
        async with self._session.get(realm.update_query(query), headers=headers) as response:
            if response.status in (401, 403):
                raise FailedPrecondition(
                    f"registry {host} refuses the login for {self._reference.repository}", reason="REGISTRY_AUTH"
                )
            await self._check(response, f"a token of {host}")
            body = await _body(response, f"a token of {host}")
        try:
            token = msgspec.json.decode(body, type=_Token)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Unavailable(f"registry {host} sent a token that can't be read: {error}") from error
        return f"Bearer {token.token or token.access_token}"

    async def _check(self, response: aiohttp.ClientResponse, what: str) -> None:
        host = self._reference.host
        if response.status in (200, 206):
            return
        if response.status in (401, 403):
            raise FailedPrecondition(
                f"registry {host} does not give {what} away: it is private or does not exist", reason="REGISTRY_AUTH"
            )
        if response.status == 404:
            raise NotFound(f"{what} is not in registry {host}", reason="IMAGE_NOT_FOUND")
        raise Unavailable(f"registry {host} answers {response.status} {response.reason} for {what}")


async def _body(response: aiohttp.ClientResponse, what: str) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise invalid(f"{what} is larger than {MAX_JSON_BYTES} bytes")
    return bytes(data)


def _start(response: aiohttp.ClientResponse, offset: int) -> int:
    """From where the body is: a server may ignore a range."""
    if response.status == 200:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != offset:
        raise Interrupted(f"a range from {offset} was answered with {response.headers.get('Content-Range')!r}")
    return offset


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
