"""Who may call over TCP, and how both sides know each other: a certificate and tokens.

The server shows a certificate (`Guard`); a caller holds it to the authority that it knows, and shows a token in turn
(`Access`), as ``authorization: Bearer TOKEN``. A token is only ever sent over TLS. Unix sockets need neither: the file
system says who may open them.

Certificates, keys and tokens lie in files, which are read again when they change: Kubernetes replaces a secret's files
in place. A file of tokens has one a line, all of them good, so that a new one can be handed out before the old one
goes. A stream that is open stays open when its token goes.
"""

from __future__ import annotations

import datetime
import hmac
import ipaddress
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from greenroom.api import errors
from greenroom.core.errors import FailedPrecondition, InvalidArgument, Unauthenticated

log = structlog.get_logger(__name__)

#: A certificate that ends within this is warned of: whoever renews it should have done so long before.
ENDS_SOON = datetime.timedelta(days=3)
#: How often it is said of one certificate at most.
SAID_EVERY_S = 3600.0
#: What a file of tokens or certificates may have at most; more is not one.
MAX_FILE_BYTES = 1 << 20
#: How long a connection may take to come about, with its handshake: several times across an ocean and through a
#: port-forward. (What gRPC calls the least time between two attempts bounds each of them.)
CONNECT_TIMEOUT_MS = 20_000
#: Where callers take theirs from.
CA_VARIABLE = "GREENROOM_CA"
TOKEN_VARIABLE = "GREENROOM_TOKEN"
TOKEN_FILE_VARIABLE = "GREENROOM_TOKEN_FILE"
SERVER_NAME_VARIABLE = "GREENROOM_SERVER_NAME"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Watched:
    """A file whose content is read again when it has changed. Usable from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] = ()
        self._data = b""

    def read(self) -> bytes:
        """Raises `FailedPrecondition` (reason ``FILE_UNREADABLE``)."""
        try:
            status = self.path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                with self.path.open("rb") as file:
                    self._data = file.read(MAX_FILE_BYTES)
                self._stamp = stamp
        except OSError as error:
            raise FailedPrecondition(
                f"can't read {self.path}: {error.strerror or error}", reason="FILE_UNREADABLE"
            ) from error
        return self._data


# --- the server's side ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guard:
    """What a TCP listener shows and asks for. ``tokens`` None: whoever connects may call."""

    certificate: Path
    key: Path
    tokens: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Raises `FailedPrecondition`: certificate or key can't be used."""
        pair = _Pair(self.certificate, self.key)
        return grpc.dynamic_ssl_server_credentials(pair.first(), pair.renewed)

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """Raises `FailedPrecondition`: there are no tokens."""
        return [_TokenCheck(self.tokens)] if self.tokens else []


class _Pair:
    """A certificate and its key, as they are now."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = _Watched(certificate), _Watched(key)
        self._used: tuple[bytes, bytes] = (b"", b"")
        self._said_at = float("-inf")
        self._lock = threading.Lock()

    def first(self) -> grpc.ServerCertificateConfiguration:
        pair = self._read()
        self._used = pair
        self._warn(pair[0])
        return _configuration(pair)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, which asks at every handshake, from a thread of its own: None when nothing has changed."""
        with self._lock:
            try:
                pair = self._read()
            except FailedPrecondition as error:  # it is being replaced just now; the next handshake looks again
                log.warning("the certificate is not read anew yet", error=error.message)
                return None
            self._warn(pair[0])
            if pair == self._used:
                return None
            self._used = pair
            log.info("a renewed certificate is used", certificate=str(self._certificate.path))
            return _configuration(pair)

    def _read(self) -> tuple[bytes, bytes]:
        pair = self._certificate.read(), self._key.read()
        if pair == self._used:
            return pair
        try:  # also whether they belong together
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate.path, self._key.path)
        except (ssl.SSLError, OSError) as error:
            raise FailedPrecondition(
                f"{self._certificate.path} and {self._key.path} are no certificate and key that belong together: "
                f"{error}; give both as PEM files (--tls-cert, --tls-key)",
                reason="BAD_CERTIFICATE",
            ) from error
        return pair

    def _warn(self, certificate: bytes) -> None:
        left = _ends_at(certificate) - datetime.datetime.now(datetime.UTC)
        if left > ENDS_SOON or time.monotonic() < self._said_at + SAID_EVERY_S:
            return
        self._said_at = time.monotonic()
        path = str(self._certificate.path)
        if left.total_seconds() <= 0:
            log.error("the certificate has expired: nobody who looks connects; renew it", certificate=path)
        else:
            hours = round(left.total_seconds() / 3600)
            log.warning("the certificate expires soon: renew it", certificate=path, hours=hours)


def _configuration(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    certificate, key = pair
    return grpc.ssl_server_certificate_configuration([(key, certificate)])


def _ends_at(certificate: bytes) -> datetime.datetime:
    from cryptography import x509  # takes a while to import

    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio ships no types
    def __init__(self, path: Path) -> None:
        self._file = _Watched(path)
        self._known: list[bytes] = _tokens(self._file.read())
        if not self._known:
            raise FailedPrecondition(
                f"there is no token in {path}: write one a line, for example made by `openssl rand -hex 32`",
                reason="NO_TOKEN",
            )

    async def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        if self._is_known(_bearer(details.invocation_metadata)):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _is_known(self, token: bytes) -> bool:
        try:
            self._known = _tokens(self._file.read())
        except FailedPrecondition as error:  # it is being replaced just now
            log.warning("the tokens are not read anew yet", error=error.message)
        # All are compared, each in constant time: how long it takes says nothing of any.
        return sum(hmac.compare_digest(token, known) for known in self._known) > 0


async def _refuse(requests: object, context: Any) -> None:
    error = Unauthenticated(
        "this server asks for a token, and none that it knows came with the call: set GREENROOM_TOKEN_FILE (a file) or "
        "GREENROOM_TOKEN to one of those in the server's token file",
        reason="TOKEN_REFUSED",
    )
    status = errors.to_status(error)
    trailer = ((errors.STATUS_KEY, status.SerializeToString()),)
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message, trailer)


def _tokens(data: bytes) -> list[bytes]:
    return [line.strip() for line in data.splitlines() if line.strip()]


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> bytes:
    for key, value in metadata or ():
        if key == "authorization":
            text = value if isinstance(value, bytes) else value.encode()
            scheme, _, token = text.partition(b" ")
            if scheme.lower() == b"bearer":
                return token.strip()
    return b""


# --- the callers' side ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller knows of a server on TCP, and shows it.

    Attributes:
        ca: certificates (PEM) of the authorities, one of which has signed the server's. None: the server has none.
        token_file: with the token in its first line; ``token`` is one itself.
        server_name: what the certificate is for, where that is not the host of the address: behind a port-forward.
        tunnel: the address is the near end of a way to a server on TCP, also when it is a socket's.
    """

    ca: Path | None = None
    token_file: Path | None = None
    token: str = field(default="", repr=False)
    server_name: str = ""
    tunnel: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Access:
        ca, file = environment.get(CA_VARIABLE), environment.get(TOKEN_FILE_VARIABLE)
        return cls(
            ca=Path(ca) if ca else None,
            token_file=Path(file) if file else None,
            token=environment.get(TOKEN_VARIABLE, ""),
            server_name=environment.get(SERVER_NAME_VARIABLE, ""),
        )

    def authority(self) -> bytes:
        """The certificates in ``ca`` as they are now; b"" without. Raises as `aio_channel`."""
        return b"" if self.ca is None else _Watched(self.ca).read()

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> Any:
        """A blocking channel. Raises as `aio_channel`."""
        if self._is_plain(address):
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self._credentials(), options=self._named(options))

    def aio_channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """
        Raises:
            FailedPrecondition: a file can't be read.
            InvalidArgument: there is a token, and no authority to know the server by (reason ``NO_CA``).
        """
        if self._is_plain(address):
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self._credentials(), options=self._named(options))

    def _is_plain(self, address: str) -> bool:
        if address.startswith("unix:") and not self.tunnel:
            return True
        if self.ca is None and (self.token or self.token_file):
            raise InvalidArgument(
                f"a token is not sent to {address}: nobody knows who that is. Set {CA_VARIABLE} to the certificate of "
                "its authority, or take the token away if that server needs none",
                reason="NO_CA",
            )
        return self.ca is None

    def _credentials(self) -> grpc.ChannelCredentials:
        assert self.ca is not None
        channel = grpc.ssl_channel_credentials(root_certificates=self.authority())
        if not (self.token or self.token_file):
            return channel
        shown = _ShownToken(self.token, self.token_file)
        shown.current()  # a file that is not there is said now
        return grpc.composite_channel_credentials(channel, grpc.metadata_call_credentials(shown))

    def _named(self, options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
        # What the certificate is held to comes from the address, or is given; not from the name that sockets have.
        kept = [option for option in options if option[0] != "grpc.default_authority"]
        return [*kept, ("grpc.ssl_target_name_override", self.server_name)] if self.server_name else kept


class _ShownToken(grpc.AuthMetadataPlugin):  # type: ignore[misc]
    """gRPC asks for it with every call, from a thread of its own."""

    def __init__(self, token: str, file: Path | None) -> None:
        self._token = token
        self._file = _Watched(file) if file and not token else None

    def current(self) -> str:
        if self._file is None:
            tokens, where = [self._token.encode()], TOKEN_VARIABLE
        else:
            tokens, where = _tokens(self._file.read()), str(self._file.path)
        if not tokens:
            raise FailedPrecondition(f"there is no token in {where}", reason="NO_TOKEN")
        if not re.fullmatch(rb"[!-~]+", tokens[0]):  # gRPC would say no more than that the server can't be reached
            raise FailedPrecondition(
                f"what is in {where} is no token: those are letters, digits and signs, without spaces",
                reason="NO_TOKEN",
            )
        return tokens[0].decode("ascii")

    def __call__(self, context: Any, callback: Callable[[Any, Exception | None], None]) -> None:
        try:
            callback((("authorization", f"Bearer {self.current()}"),), None)
        except FailedPrecondition as error:
            callback((), error)
