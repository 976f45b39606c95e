"""A client of container registries, as much as pulling takes.

Source: OCI distribution spec v1.1 ("Pull"); Docker registry token and OAuth 2 authentication specifications; RFC 9110
(ranges, challenges).
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from yarl import URL

from greenroom.core.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from greenroom.core.records import Record
from greenroom.images.client import Client, authority, message, origin
from greenroom.images.config import INDEX_TYPES, MANIFEST_TYPES, MAX_JSON_BYTES, Descriptor, invalid
from greenroom.images.credentials import Login
from greenroom.images.download import (
    MAX_FRUITLESS_ATTEMPTS,
    MAX_FRUITLESS_ATTEMPTS_OF_MANY,
    MAX_PAUSE_S,
    RETRY_BASE_S,
    Interrupted,
)
from greenroom.images.pieces import PIECE_BYTES
from greenroom.images.reference import RegistryReference, is_loopback
from greenroom.images.registries import Endpoint, Registries

_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_PARAMETER = re.compile(r'([a-zA-Z_]+)=(?:"([^"]*)"|([^\s",]+))')
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_TRANSIENT = (408, 500, 502, 503, 504)


class _Token(Record, frozen=True, kw_only=True):
    token: str = ""
    access_token: str = ""


class RegistrySource:
    """One repository on one server: `greenroom.images.origins.Source`.

    A mirror that can't be connected to is not tried again by the same source: there is the registry itself to ask.
    """

    def __init__(
        self, endpoint: Endpoint, reference: RegistryReference, registries: Registries, client: Client
    ) -> None:
        self._endpoint = endpoint
        self._reference = reference
        self._registries = registries
        self._client = client
        self._authorization = ""
        self._login = asyncio.Lock()
        self._down = False

    async def resolve(self) -> tuple[str, bytes, str]:
        """The manifest or index that the reference names: (digest or "" if only the bytes tell, bytes, media type).

        Raises:
            NotFound: no such repository or tag.
            Interrupted: the registry does not answer.
            FailedPrecondition: it wants credentials (reason ``REGISTRY_AUTH``).
        """
        reference = self._reference
        data, media_type = await self._manifest(reference.digest or reference.tag)
        return reference.digest, data, media_type

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return (await self._manifest(descriptor.digest))[0]

    @asynccontextmanager
    async def open_blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        part = start > 0 or end < descriptor.size
        headers = {"Range": f"bytes={start}-{end - 1}"} if part else {}
        what = f"blob {descriptor.digest}"
        async with self._get(f"blobs/{descriptor.digest}", headers) as response:
            if response.status == 416:  # it begins after the end
                raise _other_size(descriptor, self._endpoint.host, "fewer")
            await self._check(response, what)
            yield _begin(response, descriptor, start, self._endpoint.host), response.content.iter_chunked(PIECE_BYTES)

    # --- requests --------------------------------------------------------------------------------------------

    async def _manifest(self, name: str) -> tuple[bytes, str]:
        what = f"image {self._reference.host}/{self._reference.repository}:{name}"
        attempts = MAX_FRUITLESS_ATTEMPTS_OF_MANY if self._endpoint.is_mirror else MAX_FRUITLESS_ATTEMPTS
        attempt, paused_s = 0, 0.0
        while True:
            attempt += 1
            try:
                async with self._get(f"manifests/{name}", {"Accept": _ACCEPT}) as response:
                    await self._check(response, what)
                    media_type = response.headers.get("Content-Type", "")
                    # What is no type of its own is not meant: some servers send JSON, or octets.
                    known = media_type if media_type.startswith("application/vnd.") else ""
                    return await _body(response, what), known
            except Interrupted as error:
                paused_s += error.retry_after_s
                if attempt == attempts or paused_s > MAX_PAUSE_S:
                    raise
                await asyncio.sleep(max(RETRY_BASE_S * 2**attempt, error.retry_after_s))

    @asynccontextmanager
    async def _get(self, path: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET; logs in and asks once more when that is what the registry wants (also when a token ran out)."""
        if self._down:
            raise Interrupted(f"mirror {self._endpoint.host} can't be connected to")
        url = URL(f"{self._endpoint.base_url}/{path}")
        used = self._authorization
        try:
            async with self._client.request("GET", url, headers=_with(headers, used)) as response:
                # A challenge is the registry's own: whoever it redirects to must not learn an account by one.
                if response.status != 401 or origin(response.url) != origin(url):
                    yield response
                    return
                challenges = response.headers.getall("WWW-Authenticate", [])
        except Interrupted as error:
            self._down = self._endpoint.is_mirror and isinstance(error.__cause__, aiohttp.ClientConnectorError)
            raise
        async with self._login:
            if self._authorization == used:  # else another request has just done it
                self._authorization = await self._log_in(challenges)
        async with self._client.request("GET", url, headers=_with(headers, self._authorization)) as response:
            yield response

    async def _check(self, response: aiohttp.ClientResponse, what: str) -> None:
        host = self._endpoint.host
        status = response.status
        if status in (200, 206):
            return
        said = await message(response)
        if authority(response.url) != (there := authority(URL(self._endpoint.base_url))) and status in (401, 403):
            raise Interrupted(f"{authority(response.url)}, where {there} redirects to, answers {status} for {what}")
        if status == 404:
            raise NotFound(f"{what} is not in registry {host}{said}; check the name", reason="IMAGE_NOT_FOUND")
        if status == 401:
            raise _auth_error(f"registry {host} does not accept the login for {what}{said}; log in to it again")
        if status == 403:
            raise _auth_error(f"registry {host} forbids {what}{said}: it is private; use an account that may read it")
        if status in _TRANSIENT:
            raise Interrupted(f"{host} answers {status} for {what}{said}")
        raise Unavailable(
            f"registry {host} answers {status} for {what}{said}: it may be no container registry; check the name",
            reason="REGISTRY_UNAVAILABLE",
        )

    # --- logging in ------------------------------------------------------------------------------------------

    async def _log_in(self, challenges: list[str]) -> str:
        """The ``Authorization`` that answers one of the challenges."""
        endpoint = self._endpoint
        login = await self._registries.credentials(endpoint.host, endpoint.repository) or Login()
        if login.registry_token:
            return f"Bearer {login.registry_token}"
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "basic" and login.username:
                return _basic(login)
            if scheme.lower() == "bearer":
                parameters = {name.lower(): quoted or bare for name, quoted, bare in _PARAMETER.findall(rest)}
                return await self._fetch_token(parameters, login)
        raise _auth_error(
            f"registry {endpoint.host} wants a login for {endpoint.repository}: log in to it where the agent runs "
            f"(`docker login {endpoint.host}`)"
        )

    async def _fetch_token(self, parameters: dict[str, str], login: Login) -> str:
        host = self._endpoint.host
        realm = self._realm(parameters.get("realm", ""))
        query = {"scope": parameters.get("scope") or f"repository:{self._endpoint.repository}:pull"}
        if "service" in parameters:
            query["service"] = parameters["service"]
        headers: dict[str, str] = {}
        form = None
        if login.identity_token:
            form = {
                **query,
                "grant_type": "refresh_token",
                "client_id": "greenroom",
                "refresh_token": login.identity_token,
            }
        else:
            realm = realm.update_query(query)
            if login.username:
                headers["Authorization"] = _basic(login)
        async with self._client.request("POST" if form else "GET", realm, headers=headers, data=form) as response:
            if response.status in (400, 401, 403):
                raise _auth_error(
                    f"registry {host} refuses {'the login' if login else 'anonymous access'} for "
                    f"{self._endpoint.repository}{await message(response)}; log in to it (`docker login {host}`)"
                )
            await self._check(response, f"a token for {self._endpoint.repository}")
            body = await _body(response, f"a token of {host}")
        try:
            found = msgspec.json.decode(body, type=_Token)
        except msgspec.MsgspecError:  # its words might quote the token
            found = _Token()
        token = found.token or found.access_token
        if not (token and token.isascii() and token.isprintable()):
            raise Unavailable(
                f"{authority(realm)}, where {host} gives out tokens, sent none", reason="REGISTRY_UNAVAILABLE"
            )
        return f"Bearer {token}"

    def _realm(self, text: str) -> URL:
        """Where tokens are given out. An account must not get there in clear."""
        host = self._endpoint.host
        try:
            realm = URL(text).with_user(None)
        except ValueError:
            realm = URL()
        in_clear = self._endpoint.plain and (is_loopback(realm.host or "") or not is_loopback(host))
        if realm.scheme != "https" and not (realm.scheme == "http" and in_clear):
            raise _auth_error(
                f"registry {host} gives out tokens at {authority(realm) or 'no address'}, which is not https"
            )
        return realm


async def _body(response: aiohttp.ClientResponse, what: str) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(PIECE_BYTES):
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise invalid(f"{what} is larger than {MAX_JSON_BYTES} bytes")
    return bytes(data)


def _begin(response: aiohttp.ClientResponse, descriptor: Descriptor, start: int, host: str) -> int:
    """From where the body is (a server may ignore a range), its size checked as far as it is said."""
    if response.status == 200:
        begin, total = 0, response.headers.get("Content-Length", "*")
    else:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise Interrupted(f"{host} answers something else than the range that it was asked for")
        begin, total = start, found[2]
    if total.isdigit() and int(total) != descriptor.size:
        raise _other_size(descriptor, host, total)
    return begin


def _other_size(descriptor: Descriptor, host: str, total: str) -> DataLoss:
    return DataLoss(
        f"blob {descriptor.digest} has {descriptor.size} bytes by the manifest, but {total} in registry {host}: push "
        "the image again",
        reason="SIZE_MISMATCH",
    )


def _with(headers: dict[str, str], authorization: str) -> dict[str, str]:
    return {**headers, "Authorization": authorization} if authorization else headers


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def _auth_error(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="REGISTRY_AUTH")
