"""Message heads: read strictly, judged, and written anew. Pure.

A head goes through httptools (llhttp) whole, from its first byte to the empty line, and never goes on as it came: what
is sent further is put together from the parsed fields, so a reader behind the gateway can't see another message than
the gateway saw. llhttp is strict by default: each leniency (bare LF, folded lines, length and chunked together, ...)
has to be asked for with ``set_dangerous_leniencies``, which is never done here. What it lets pass though a proxy should
not (other protocols' names, version 2.0, control characters in a reason phrase), is refused or replaced here.

Source: RFC 9110 section 7 (forwarding), RFC 9112 sections 2, 3, 6 and 11; llhttp's README on lenient flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, HttpResponseParser

from greenroom.core.records import Key

#: Values of a message's framing besides a length in bytes (0: no body).
CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2

HEAD_END: Final = b"\r\n\r\n"
#: Methods whose repetition does no harm (RFC 9110 9.2.2).
IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
#: Of these a request that was cut off by its actor's suspension is repeated.
SAFE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS"))

_LENGTH = re.compile(rb"[0-9]{1,18}")
_CONTROL = re.compile(rb"[^\t\x20-\x7e\x80-\xff]")
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)((?:[/?][^#]*)?)", re.IGNORECASE)
_VERSION = re.compile(rb" HTTP/[0-9]\.[0-9]")
_VERSIONS: Final = (b" HTTP/1.1", b" HTTP/1.0")
#: Reserved for the gateway in both directions; underscores too, since CGI and WSGI read them as hyphens.
_OWN_PREFIX: Final = b"greenroom-"
_DROPPED: Final = frozenset((b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"))
_FORWARDED: Final = frozenset((b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"))
_REQUEST_FIELDS: Final = _DROPPED | _FORWARDED | frozenset((b"connection", b"content-length", b"expect", b"host", b"te",
                                                            b"transfer-encoding", b"upgrade"))  # fmt: skip
_RESPONSE_FIELDS: Final = _DROPPED | frozenset(
    (b"connection", b"content-length", b"te", b"transfer-encoding", b"upgrade")
)
#: Fields that must not come after the body, where they could change what was decided before it (RFC 9110 6.5.1).
_NOT_IN_TRAILERS: Final = _REQUEST_FIELDS | frozenset((b"authorization", b"cookie", b"set-cookie", b"content-encoding",
                                                       b"content-type", b"content-range", b"cache-control",
                                                       b"server-timing", b"trailer"))  # fmt: skip
#: HTTP/2 in the clear would take a connection out of the gateway's sight with requests to come.
_NO_UPGRADE: Final = frozenset((b"h2c", b"h2"))


class BadMessage(Exception):
    """The sender broke HTTP. ``status``: what to tell a client that did; a server's fault is always a 502."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Parsed:
    """What httptools calls back."""

    __slots__ = ("complete", "fields", "line")

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.line = b""
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_url(self, part: bytes) -> None:
        self.line += part

    on_status = on_url

    def on_headers_complete(self) -> None:
        if self.complete:
            raise BadMessage("a second message inside a head")
        self.complete = True

    def on_body(self, data: bytes) -> None:
        raise BadMessage("a body inside a head")


def _parse(parser_class: Callable[[_Parsed], Any], head: bytes) -> tuple[_Parsed, Any]:
    parsed = _Parsed()
    parser = parser_class(parsed)
    try:
        parser.feed_data(head)
    except HttpParserUpgrade:
        pass  # said by the fields, too; nothing comes behind the head here
    except HttpParserError as e:
        raise BadMessage(str(e)) from e
    if not parsed.complete:
        raise BadMessage("the head is not complete")
    return parsed, parser


class RequestHead:
    """A request as it was understood. ``lines`` are the end-to-end fields, each a whole line, that go on unchanged."""

    __slots__ = (
        "actor", "expect_continue", "forwarded", "framing", "host", "http11", "keep_alive", "lines",
        "method", "port", "target", "trailers_wanted", "upgrade",
    )  # fmt: skip

    method: bytes
    #: Origin form, or ``*``.
    target: bytes
    http11: bool
    #: As sent; of the target when that is a whole URL; empty when there is none (HTTP/1.0).
    host: bytes
    #: A length in bytes or `CHUNKED`.
    framing: int
    keep_alive: bool
    expect_continue: bool
    #: The protocol to switch to; empty if none or not to be forwarded.
    upgrade: bytes
    trailers_wanted: bool
    #: Values of ``Greenroom-Actor`` and ``Greenroom-Port``.
    actor: bytes
    port: bytes
    lines: list[bytes]
    #: The sender's own X-Forwarded fields.
    forwarded: dict[bytes, bytes]


def parse_request(head: bytes) -> RequestHead:
    """``head`` is everything up to and with the empty line.

    Raises:
        BadMessage: with the status that the client is to get.
    """
    eol = head.find(b"\r\n")
    version = head[eol - 9 : eol]
    if version not in _VERSIONS:
        raise BadMessage("the gateway speaks HTTP/1.1 and HTTP/1.0", status=505 if _VERSION.fullmatch(version) else 400)
    parsed, parser = _parse(HttpRequestParser, head)
    request = RequestHead()
    request.method = parser.get_method()
    request.http11 = version == _VERSIONS[0]
    special: dict[bytes, bytes] = {}
    lines: list[bytes] = []
    for name, value in parsed.fields:
        low = name.lower()
        if low in _REQUEST_FIELDS:
            _collect(special, low, value)
        elif b"_" not in low and not low.startswith(_OWN_PREFIX):
            lines.append(b"%b: %b\r\n" % (name, value))
        elif low in (b"greenroom-actor", b"greenroom-port"):
            _collect(special, low, value)
        elif not _impersonates(low):
            lines.append(b"%b: %b\r\n" % (name, value))
    get = special.get
    connection = _tokens(get(b"connection"))
    request.lines = _without(lines, connection)
    request.keep_alive = b"close" not in connection if request.http11 else b"keep-alive" in connection
    request.framing = _request_framing(special, request.http11)
    request.actor, request.port = get(b"greenroom-actor", b""), get(b"greenroom-port", b"")
    request.expect_continue = request.http11 and request.framing != 0 and _is_continue(get(b"expect"))
    request.trailers_wanted = b"trailers" in _tokens(get(b"te"))
    upgrade = get(b"upgrade", b"") if b"upgrade" in connection and request.http11 and request.framing == 0 else b""
    request.upgrade = b"" if _tokens(upgrade) & _NO_UPGRADE else upgrade
    request.forwarded = {name: special[name] for name in _FORWARDED if name in special}
    _set_target(request, parsed.line, get(b"host"))
    return request


def _collect(special: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    value = value.strip(b" \t")
    if name not in special:
        special[name] = value
    elif name in (b"host", b"content-length", b"transfer-encoding", b"greenroom-actor", b"greenroom-port"):
        raise BadMessage(f"two {name.decode()} fields")
    else:
        special[name] += b", " + value


def _impersonates(name: bytes) -> bool:
    name = name.replace(b"_", b"-")
    return name.startswith(_OWN_PREFIX) or name in _FORWARDED


def _tokens(value: bytes | None) -> set[bytes]:
    return {token.strip().lower() for token in value.split(b",")} if value else set()


def _without(lines: list[bytes], connection: set[bytes]) -> list[bytes]:
    """Drops the fields that the Connection field names: they were meant for the gateway."""
    named = connection - {b"", b"close", b"keep-alive", b"upgrade", b"te"}
    return [line for line in lines if line[: line.index(b":")].lower() not in named] if named else lines


def _is_continue(expect: bytes | None) -> bool:
    if expect is not None and expect.lower() != b"100-continue":
        raise BadMessage("the only expectation that can be met is 100-continue", status=417)
    return expect is not None


def _request_framing(special: dict[bytes, bytes], http11: bool) -> int:
    coding, length = special.get(b"transfer-encoding"), special.get(b"content-length")
    if coding is None:
        return 0 if length is None else _length(length)
    if length is not None or not http11:
        raise BadMessage("Transfer-Encoding is not allowed together with Content-Length or in HTTP/1.0")
    if coding.lower() != b"chunked":
        raise BadMessage("the only transfer coding that is understood is chunked", status=501)
    return CHUNKED


def _length(value: bytes) -> int:
    if not _LENGTH.fullmatch(value):
        raise BadMessage("Content-Length is not a number")
    return int(value)


def _set_target(request: RequestHead, target: bytes, host: bytes | None) -> None:
    if host is None and request.http11:
        raise BadMessage("a Host field is missing")
    request.host = host or b""
    if request.method == b"CONNECT":
        raise BadMessage("this is no forward proxy: CONNECT is not possible", status=405)
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            # RFC 9112 3.2.2: the target's authority counts, whatever Host says.
            request.host = absolute[1]
            target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        elif target != b"*" or request.method != b"OPTIONS":
            raise BadMessage("the request target is neither a path nor a URL")
    request.target = target


def forward_request(request: RequestHead, key: Key, domain: str, peer: bytes, trust_forwarded: bool) -> bytes:
    """The head as the actor gets it. ``peer`` is the client's address; ``trust_forwarded``: the client is a proxy of
    ours, whose X-Forwarded fields are kept (and the peer appended)."""
    said = request.forwarded if trust_forwarded else {}
    host = request.host or f"{key.name}.{key.namespace}.{domain}".encode()
    came_for = said.get(b"x-forwarded-for")
    lines = [
        b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (request.method, request.target, host),
        *request.lines,
        b"Greenroom-Actor: %b/%b\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
        % (
            key.namespace.encode(),
            key.name.encode(),
            came_for + b", " + peer if came_for else peer,
            said.get(b"x-forwarded-proto", b"http"),
            said.get(b"x-forwarded-host", host),
        ),
    ]
    if request.framing == CHUNKED:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    elif request.framing or request.method not in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"):
        lines.append(b"Content-Length: %d\r\n" % request.framing)
    if request.expect_continue:
        lines.append(b"Expect: 100-continue\r\n")
    if request.upgrade:
        lines.append(b"Connection: upgrade\r\nUpgrade: %b\r\n" % request.upgrade)
    elif request.trailers_wanted:
        lines.append(b"Connection: te\r\nTE: trailers\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


class ResponseHead:
    """An actor's response as it was understood."""

    __slots__ = ("content_length", "framing", "keep_alive", "lines", "reason", "status", "upgrade")

    status: int
    reason: bytes
    #: A length in bytes, `CHUNKED` or `UNTIL_CLOSE`; 0 for what has no body by its nature.
    framing: int
    #: What Content-Length says, also where there is no body (HEAD, 304); -1 if nothing.
    content_length: int
    keep_alive: bool
    upgrade: bytes
    lines: list[bytes]


def parse_response(head: bytes, method: bytes) -> ResponseHead:
    """``method`` is the request's.

    Raises:
        BadMessage: the actor's server is broken, or hostile.
    """
    http11 = head.startswith(b"HTTP/1.1 ")
    if not http11 and not head.startswith(b"HTTP/1.0 "):
        raise BadMessage("the response is not HTTP/1.1 or HTTP/1.0")
    parsed, parser = _parse(HttpResponseParser, head)
    response = ResponseHead()
    response.status = parser.get_status_code()
    if not 100 <= response.status <= 599:
        raise BadMessage(f"the response has status {response.status}")
    response.reason = _CONTROL.sub(b" ", parsed.line)
    special: dict[bytes, bytes] = {}
    lines: list[bytes] = []
    for name, value in parsed.fields:
        low = name.lower()
        if low in _RESPONSE_FIELDS:
            _collect(special, low, value)
        elif not low.startswith(_OWN_PREFIX):
            lines.append(b"%b: %b\r\n" % (name, value))
    get = special.get
    connection = _tokens(get(b"connection"))
    response.lines = _without(lines, connection)
    response.keep_alive = b"close" not in connection if http11 else b"keep-alive" in connection
    response.upgrade = get(b"upgrade", b"")
    length, coding = get(b"content-length"), get(b"transfer-encoding")
    if coding is not None and (length is not None or not http11 or coding.lower() != b"chunked"):
        raise BadMessage("Transfer-Encoding in HTTP/1.0, together with Content-Length, or other than chunked")
    response.content_length = -1 if length is None else _length(length)
    if method == b"HEAD" or response.status < 200 or response.status in (204, 304):
        response.framing = 0
    elif coding is not None:
        response.framing = CHUNKED
    else:
        response.framing = UNTIL_CLOSE if length is None else response.content_length
    return response


def forward_response(response: ResponseHead, extra: bytes, *, http11: bool, keep_alive: bool, chunked: bool) -> bytes:
    """The head as the client gets it. ``extra``: whole lines of the gateway's own. ``chunked``: how the body will be
    framed if its length is not known."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (response.status, response.reason), *response.lines, extra]
    if response.content_length >= 0 and response.status != 204:
        lines.append(b"Content-Length: %d\r\n" % response.content_length)
    elif chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    elif not http11:
        lines.append(b"Connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def forward_interim(response: ResponseHead) -> bytes:
    """A 1xx response; for 101 with the protocol that is switched to."""
    switch = b"Connection: upgrade\r\nUpgrade: %b\r\n" % response.upgrade if response.status == 101 else b""
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (response.status, response.reason, b"".join(response.lines), switch)


def parse_trailers(section: bytes) -> tuple[bytes, ...]:
    """The lines of a trailer section (with its empty line) that may go on.

    Raises:
        BadMessage
    """
    parsed, _ = _parse(HttpRequestParser, b"GET / HTTP/1.1\r\n" + section)
    return tuple(
        b"%b: %b\r\n" % (name, value)
        for name, value in parsed.fields
        if name.lower() not in _NOT_IN_TRAILERS and not name.lower().replace(b"_", b"-").startswith(_OWN_PREFIX)
    )
