"""Accounts of registries, from where `docker login` and `podman login` keep them.

Files are read anew for each login: they are small, and helpers hand out passwords that run out. Nothing of what is
read, nor what a helper prints, gets into an error.

Source: docker/cli ("config.json": auths, credsStore, credHelpers, identitytoken, registrytoken);
docker-credential-helpers (the protocol of ``get``); containers-auth.json(5) (order of files, keys with namespaces,
``$REGISTRY_AUTH_FILE``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE

import msgspec

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Record

#: A helper may ask a key ring or a cloud; one that takes longer waits for somebody who is not there.
HELPER_TIMEOUT_S = 30.0
#: Tokens of clouds have a few KiB.
_MAX_HELPER_BYTES = 64 << 10
_MAX_FILE_BYTES = 4 << 20
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: What a helper prints, and exits with 1, when it has no account for a registry.
_NOT_FOUND = "credentials not found in native keychain"
#: Where `docker login` keeps the account of Docker Hub.
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_DOCKER_HUB_NAMES = ("index.docker.io", "registry-1.docker.io")


class Login(Record, frozen=True, kw_only=True):
    """An account: user name and password, or an identity token (an OAuth 2 refresh token), or a bearer token as it
    is."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return "Login(...)"  # no secret in a log

    def __bool__(self) -> bool:
        return bool(self.username or self.password or self.identity_token or self.registry_token)


Credentials = Callable[[str, str], Awaitable[Login | None]]
"""``host[:port]`` of a registry and a repository -> the account to use, or None for anonymous access."""


async def anonymous(host: str, repository: str) -> Login | None:
    return None


class _Entry(Record, frozen=True, kw_only=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""

    def __repr__(self) -> str:
        return "_Entry(...)"


class _File(Record, frozen=True, kw_only=True, rename={"creds_store": "credsStore", "cred_helpers": "credHelpers"}):
    auths: dict[str, _Entry] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}

    def __repr__(self) -> str:
        return "_File(...)"


class _Secret(Record, frozen=True, kw_only=True, rename={"username": "Username", "secret": "Secret"}):
    username: str = ""
    secret: str = ""

    def __repr__(self) -> str:
        return "_Secret(...)"


class CredentialFiles:
    """`Credentials` from files in Docker's format; the first that knows the registry counts.

    Args:
        files: those that are not there are passed over.
        helper_timeout_s: a helper that takes longer is ended, with all that it started.
    """

    def __init__(self, files: Sequence[Path], *, helper_timeout_s: float = HELPER_TIMEOUT_S) -> None:
        self._files = tuple(files)
        self._helper_timeout_s = helper_timeout_s

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> CredentialFiles:
        """``$REGISTRY_AUTH_FILE`` alone if it is set; else ``$XDG_RUNTIME_DIR/containers/auth.json``,
        ``~/.config/containers/auth.json`` and ``$DOCKER_CONFIG/config.json`` (``~/.docker/config.json``)."""
        if chosen := environment.get("REGISTRY_AUTH_FILE"):
            return cls([Path(chosen)])
        home = Path(environment.get("HOME") or "/root")
        files = [
            Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json",
            Path(environment.get("DOCKER_CONFIG") or home / ".docker") / "config.json",
        ]
        if runtime := environment.get("XDG_RUNTIME_DIR"):
            files.insert(0, Path(runtime) / "containers/auth.json")
        return cls(files)

    async def __call__(self, host: str, repository: str) -> Login | None:
        """The account for this repository, or None.

        Raises:
            FailedPrecondition: a file can't be read, or a helper fails or takes too long (reason ``REGISTRY_AUTH``).
        """
        for path in self._files:
            file = await asyncio.to_thread(_read, path)
            if file is not None and (login := await self._find(path, file, host, repository)):
                return login
        return None

    async def _find(self, path: Path, file: _File, host: str, repository: str) -> Login | None:
        entries = {_key(name): entry for name, entry in file.auths.items()}
        helpers = {_key(name): helper for name, helper in file.cred_helpers.items()}
        for key in _keys(host, repository):
            # A store for all accounts is asked by registry; docker leaves an empty entry in `auths` for each.
            helper = helpers.get(key) or (file.creds_store if key == host else "")
            if helper and (login := await self._ask(path, helper, key)):
                return login
            if key in entries and (login := _login(path, key, entries[key])):
                return login
        return None

    async def _ask(self, path: Path, helper: str, key: str) -> Login | None:
        program = f"docker-credential-{helper}"
        if not _HELPER_NAME.fullmatch(helper):
            raise _failed(f"{path} names the credential helper {helper!r}, which is no name of a program")
        try:
            # Here and not in a thread: a caller who is cancelled must know what to end.
            process = subprocess.Popen(  # noqa: ASYNC220
                [program, "get"], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
            )
        except OSError as error:
            why = error.strerror
            raise _failed(f"credential helper {program}, which {path} names, can't be started ({why})") from None
        server = _DOCKER_HUB_KEY if key == "docker.io" else key
        try:
            said = await asyncio.to_thread(_converse, process, server.encode(), self._helper_timeout_s)
        except TimeoutError:
            raise _failed(
                f"credential helper {program} does not end within {self._helper_timeout_s:g} s: it may wait for "
                f"somebody to unlock a key ring; try `echo {key} | {program} get`"
            ) from None
        finally:
            # Also what it started and left behind; the thread above then ends, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = await asyncio.shield(asyncio.to_thread(process.wait))
        if status != 0 and _NOT_FOUND.encode() in said:
            return None
        try:
            secret = msgspec.json.decode(said, type=_Secret) if status == 0 else None
        except msgspec.MsgspecError:
            secret = None
        if secret is None:
            raise _failed(f"credential helper {program} fails for {key}: try `echo {key} | {program} get`")
        if secret.username == "<token>":
            return Login(identity_token=secret.secret)
        return Login(username=secret.username, password=secret.secret)


def _converse(process: subprocess.Popen[bytes], server: bytes, timeout_s: float) -> bytes:
    """Asks, and returns the answer, or b"" for one that is far too long. In a thread and not by asyncio, whose
    processes only end when their pipes do: a helper may start a key ring's daemon, which keeps the pipe.

    Raises:
        TimeoutError: no whole answer within ``timeout_s``.
    """
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + timeout_s
    said = b""
    with process.stdin, process.stdout:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(server)
            process.stdin.close()
        while len(said) <= _MAX_HELPER_BYTES:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), _MAX_HELPER_BYTES)
            if not chunk:
                _wait(process, deadline)
                return said
            said += chunk
    return b""


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _read(path: Path) -> _File | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _failed(f"{path}, where logins to registries are kept, can't be read ({error.strerror})") from None
    try:
        return msgspec.json.decode(data, type=_File)
    except msgspec.MsgspecError:  # its words might quote the file
        raise _failed(f"{path}, where logins to registries are kept, is no valid JSON of that kind") from None


def _login(path: Path, key: str, entry: _Entry) -> Login | None:
    username, password = entry.username, entry.password
    if entry.auth:
        try:
            username, _, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise _failed(f"{path}: the login to {key} is damaged; log in again") from None
        password = password.rstrip("\0")
    login = Login(
        username=username,
        password=password,
        identity_token=entry.identitytoken,
        registry_token=entry.registrytoken,
    )
    return login or None


def _keys(host: str, repository: str) -> Iterator[str]:
    """What an account may be kept under, the most specific first."""
    parts = repository.split("/")
    for length in range(len(parts), -1, -1):
        yield "/".join((host, *parts[:length]))


def _key(name: str) -> str:
    """Docker writes URLs where others write hosts."""
    key = re.sub(r"^https?://", "", name)
    key = re.sub(r"/v[12]/?$", "", key).rstrip("/")
    host, slash, rest = key.partition("/")
    return f"{'docker.io' if host in _DOCKER_HUB_NAMES else host}{slash}{rest}"


def _failed(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="REGISTRY_AUTH")
