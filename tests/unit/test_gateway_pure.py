"""The gateway's decisions without any connection: routes, heads, bodies, timing."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    LeaseHeld,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import Key, PhaseTime
from greenroom.gateway.body import ChunkedBody, LengthBody, chunk, last_chunk
from greenroom.gateway.heads import (
    CHUNKED,
    UNTIL_CLOSE,
    BadMessage,
    RequestHead,
    forward_request,
    forward_response,
    parse_request,
    parse_response,
)
from greenroom.gateway.inbox import HeadTooLarge, Inbox
from greenroom.gateway.replies import refusal
from greenroom.gateway.route import Route, by_header, by_host
from greenroom.gateway.timing import server_timing

# --- routes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("a.team.localhost", 0),
        ("A.Team.LOCALHOST:8080", 0),
        ("a.team.localhost.", 0),
        ("9000--a.team.localhost:80", 9000),
        ("65535--a.team.localhost", 65535),
    ],
)
def test_host_routes(host: str, port: int) -> None:
    assert by_host(host, "localhost") == Route(Key("team", "a"), port)


@pytest.mark.parametrize(
    "host",
    [
        "", "localhost", "a.localhost", "x.a.team.localhost", "a.team.example", "a.teamlocalhost", ".team.localhost",
        "a..localhost", "-a.team.localhost", "0--a.team.localhost", "65536--a.team.localhost", "[::1]:80", "127.0.0.1",
        "9--9--a.team.localhost", "a_b.team.localhost", "é.team.localhost", "a.team.localhost:x",
        "99999999999--a.b.localhost",
    ],
)  # fmt: skip
def test_hosts_that_name_nobody(host: str) -> None:
    with pytest.raises(NotFound, match="Greenroom-Actor") as e:
        by_host(host, "localhost")
    assert e.value.reason == "NO_ROUTE"


def test_header_routes() -> None:
    assert by_header("team/a") == Route(Key("team", "a"))
    assert by_header("a", "81") == Route(Key("default", "a"), 81)
    for actor, port in (("a/b/c", ""), ("A", ""), ("", ""), ("a", "x"), ("a", "0"), ("a", "-1"), ("9--a", "")):
        with pytest.raises(NotFound):
            by_header(actor, port)


# --- request heads ----------------------------------------------------------------------------------------


def request(*lines: str, line: str = "GET / HTTP/1.1", host: bool = True) -> bytes:
    return "\r\n".join([line, *(["Host: a.b.localhost"] if host else []), *lines, "", ""]).encode("latin-1")


def forwarded(head: RequestHead, **options: bool) -> list[str]:
    data = forward_request(head, Key("b", "a"), "localhost", b"10.0.0.9", options.get("trust", False))
    assert data.endswith(b"\r\n\r\n")
    return data.decode("latin-1").split("\r\n")[:-2]


def test_a_request_is_written_anew() -> None:
    head = parse_request(
        request(
            "Accept: */*", "Connection: keep-alive, X-Secret, Host", "X-Secret: 1", "Keep-Alive: timeout=5",
            "Greenroom-Actor: other/one", "greenroom_actor: other/one", "GREENROOM-Anything: x",
            "X-Forwarded-For: 6.6.6.6",
            "X_Forwarded_Host: evil", "X-Forwarded-Proto: https", "TE: trailers, gzip", "Proxy-Authorization: x",
            "X-Empty:",
            line="GET /p?q=1 HTTP/1.1",
        )
    )  # fmt: skip
    assert head.actor == b"other/one" and head.keep_alive and head.framing == 0
    assert forwarded(head) == [
        "GET /p?q=1 HTTP/1.1", "Host: a.b.localhost", "Accept: */*", "X-Empty: ", "Greenroom-Actor: b/a",
        "X-Forwarded-For: 10.0.0.9", "X-Forwarded-Proto: http", "X-Forwarded-Host: a.b.localhost",
        "Connection: te", "TE: trailers",
    ]  # fmt: skip
    trusted = forwarded(head, trust=True)
    assert "X-Forwarded-For: 6.6.6.6, 10.0.0.9" in trusted and "X-Forwarded-Proto: https" in trusted


def test_what_a_request_says_about_itself() -> None:
    assert parse_request(request("Content-Length: 7 ", line="POST / HTTP/1.1")).framing == 7
    assert parse_request(request("Transfer-Encoding: CHUNKED", line="POST / HTTP/1.1")).framing == CHUNKED
    assert not parse_request(request("Connection: close")).keep_alive
    old = parse_request(request(line="GET / HTTP/1.0", host=False))
    assert not old.keep_alive and not old.http11 and forwarded(old)[:2] == ["GET / HTTP/1.1", "Host: a.b.localhost"]
    assert parse_request(request("Connection: Keep-Alive", line="GET / HTTP/1.0")).keep_alive
    url = parse_request(request(line="GET http://c.d.localhost/x?y HTTP/1.1"))
    assert (url.host, url.target) == (b"c.d.localhost", b"/x?y")
    assert parse_request(request(line="GET http://c.d.localhost HTTP/1.1")).target == b"/"
    assert parse_request(request(line="OPTIONS * HTTP/1.1")).target == b"*"
    ws = parse_request(request("Connection: Upgrade", "Upgrade: websocket"))
    assert ws.upgrade == b"websocket" and forwarded(ws)[-2:] == ["Connection: upgrade", "Upgrade: websocket"]
    for unwanted in (
        request("Connection: upgrade", "Upgrade: h2c"),
        request("Upgrade: websocket"),
        request("Connection: upgrade", "Upgrade: websocket", "Content-Length: 3", line="POST / HTTP/1.1"),
    ):
        head = parse_request(unwanted)
        assert head.upgrade == b"" and not any(line.startswith("Upgrade") for line in forwarded(head))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (request("Transfer-Encoding: chunked", "Content-Length: 5"), 400),
        (request("Content-Length: 5", "Content-Length: 5"), 400),
        (request("Content-Length: 5", "Content-Length: 6"), 400),
        (request("Content-Length: +5"), 400),
        (request("Content-Length: 5, 5"), 400),
        (request("Content-Length: 0x5"), 400),
        (request("Content-Length: -1"), 400),
        (request("Content-Length: " + "9" * 30), 400),
        (request("Content-Length:"), 400),
        (request("Transfer-Encoding: gzip, chunked"), 501),
        (request("Transfer-Encoding: chunked, chunked"), 400),
        (request("Transfer-Encoding: identity"), 400),
        (request("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
        (request("Transfer-Encoding: \x0bchunked"), 400),
        (request("Transfer-Encoding : chunked"), 400),
        (request("Transfer-Encoding: chunked", line="POST / HTTP/1.0"), 400),
        (request("X: a\r\n folded"), 400),
        (request("X: a\nTransfer-Encoding: chunked"), 400),
        (request("X: a\rY: b"), 400),
        (request("X: a\x00b"), 400),
        (request(": a"), 400),
        (request("X Y: a"), 400),
        (request("Host: other.b.localhost"), 400),
        (request(host=False), 400),
        (request("Greenroom-Actor: a", "Greenroom-Actor: b"), 400),
        (request("Expect: tea", "Content-Length: 1"), 417),
        (request(line="GET / HTTP/2.0"), 505),
        (request(line="GET / HTTP/0.9"), 505),
        (request(line="GET /"), 400),
        (request(line="PRI * HTTP/2.0"), 505),
        (request(line="DESCRIBE / RTSP/1.0"), 400),
        (request(line="FOO / HTTP/1.1"), 400),
        (request(line="CONNECT a:1 HTTP/1.1"), 405),
        (request(line="GET x HTTP/1.1"), 400),
        (request(line="GET * HTTP/1.1"), 400),
        (request(line="GET http://u:p@a.b/ HTTP/1.1"), 400),
        (request(line="GET /\x01 HTTP/1.1"), 400),
        (b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    ],
)
def test_requests_that_are_refused(head: bytes, status: int) -> None:
    with pytest.raises(BadMessage) as e:
        parse_request(head)
    assert e.value.status == status


# --- response heads ---------------------------------------------------------------------------------------


def response(*lines: str, line: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join([line, *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("head", "method", "framing"),
    [
        (response("Content-Length: 3"), b"GET", 3),
        (response("Content-Length: 3"), b"HEAD", 0),
        (response("Transfer-Encoding: chunked"), b"GET", CHUNKED),
        (response("Transfer-Encoding: chunked"), b"HEAD", 0),
        (response(), b"GET", UNTIL_CLOSE),
        (response(line="HTTP/1.0 200 OK"), b"GET", UNTIL_CLOSE),
        (response("Content-Length: 3", line="HTTP/1.1 304 No"), b"GET", 0),
        (response("Content-Length: 3", line="HTTP/1.1 204 No"), b"GET", 0),
        (response(line="HTTP/1.1 103 Early Hints"), b"GET", 0),
    ],
)
def test_where_a_response_ends(head: bytes, method: bytes, framing: int) -> None:
    assert parse_response(head, method).framing == framing


def test_a_response_is_written_anew() -> None:
    head = parse_response(
        response(
            "Content-Length: 3", "Connection: close, X-Hop", "X-Hop: 1", "Greenroom-Error: FORGED",
            "Server-Timing: db;dur=1",
            "Set-Cookie: a=1", "Set-Cookie: b=2", "Keep-Alive: timeout=9", line="HTTP/1.1 200 Fi\x01ne",
        ),
        b"GET",
    )  # fmt: skip
    assert not head.keep_alive
    assert forward_response(head, b"X: y\r\n", http11=True, keep_alive=True, chunked=False) == (
        b"HTTP/1.1 200 Fi ne\r\nServer-Timing: db;dur=1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX: y\r\n"
        b"Content-Length: 3\r\n\r\n"
    )
    bare = parse_response(response("Content-Length: 3", line="HTTP/1.0 204 No"), b"GET")
    assert forward_response(bare, b"", http11=False, keep_alive=True, chunked=False) == (
        b"HTTP/1.1 204 No\r\nConnection: keep-alive\r\n\r\n"
    )


@pytest.mark.parametrize(
    "head",
    [
        response("Content-Length: 3", "Transfer-Encoding: chunked"),
        response("Content-Length: 3", "Content-Length: 4"),
        response("Transfer-Encoding: gzip"),
        response("Transfer-Encoding: chunked", line="HTTP/1.0 200 OK"),
        response("Transfer-Encoding: chunked", "Content-Length: 3", line="HTTP/1.1 304 No"),
        response("Content-Length: x"),
        response("X: a\nY: b"),
        response("X: a\r\n b"),
        response(line="HTTP/2.0 200 OK"),
        response(line="HTTP/1.1 999 OK"),
        response(line="HTTP/1.1 000 OK"),
        response(line="HTTP/1.1 20 OK"),
        response(line="ICY 200 OK"),
    ],
)
def test_responses_that_are_refused(head: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_response(head, b"GET")


# --- bodies -----------------------------------------------------------------------------------------------


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


chunks = st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.just(b"x" * 300)), max_size=6)
extension = st.sampled_from([b"", b";a=b", b" ;x"])


@given(st.data(), chunks, extension, st.booleans())
def test_chunks_mean_the_same_however_they_arrive(
    data: st.DataObject, pieces: list[bytes], ext: bytes, trailer: bool
) -> None:
    trailers = b"Digest: x\r\nContent-Length: 9\r\ngreenroom-error: X\r\n" if trailer else b""
    wire = b"".join(b"%X%b\r\n%b\r\n" % (len(p), ext, p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"
    body = ChunkedBody()
    got = behind = b""
    for part in data.draw(split(wire + b"GET /next")):
        if body.done:
            behind += part
        else:
            got += body.feed(part)
    assert body.done and got == b"".join(pieces) and body.rest + behind == b"GET /next"
    assert body.trailers == ((b"Digest: x\r\n",) if trailer else ())


def test_a_small_chunk_that_ends_with_the_read() -> None:
    """Found by the test above: a large chunk, then a small one whose last byte is the last that has arrived."""
    body = ChunkedBody()
    got = body.feed(b"12C\r\n" + b"x" * 300 + b"\r\n1\r\ny") + body.feed(b"\r\n0\r\n\r\n")
    assert body.done and got == b"x" * 300 + b"y"


@given(st.data(), chunks)
def test_what_we_chunk_others_read(data: st.DataObject, pieces: list[bytes]) -> None:
    """httptools as the other reader."""

    class Reader:
        body = b""
        complete = 0

        def on_body(self, part: bytes) -> None:
            self.body += part

        def on_message_complete(self) -> None:
            self.complete += 1

    reader = Reader()
    parser = httptools.HttpResponseParser(reader)
    parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for part in data.draw(split(b"".join(map(chunk, pieces)) + last_chunk((b"A: b\r\n",)))):
        parser.feed_data(part)
    assert (reader.body, reader.complete) == (b"".join(pieces), 1)


@pytest.mark.parametrize(
    "wire",
    [
        b"5\nhello\r\n0\r\n\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello\n", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n",
        b"-1\r\n",
        b"\r\n",
        b" 5\r\nhello\r\n", b"5 \r\nhello\r\n", b"5;a\x00\r\nhello\r\n", b"5;a\rb\r\n", b"f" * 16 + b"\r\n",
        b"5;" + b"x" * 300,
        b"0\r\nA b: c\r\n\r\n", b"0\r\nA: b\nC: d\r\n\r\n", b"0\r\nA: b\r\n c\r\n\r\n", b"0\r\n" + b"A: " + b"x" * 9000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 10_000])
def test_chunks_that_are_refused(wire: bytes, step: int) -> None:
    body = ChunkedBody()
    with pytest.raises(BadMessage):
        for at in range(0, len(wire), step):
            body.feed(wire[at : at + step])


def test_a_length_ends_where_it_says() -> None:
    body = LengthBody(5)
    assert body.feed(b"abc") == b"abc" and not body.done
    assert body.feed(b"defgh") == b"de" and body.done and body.rest == b"fgh"


@given(st.data())
def test_heads_are_found_however_they_arrive(data: st.DataObject) -> None:
    wire = b"\r\n\r\nA\r\nB\r\n\r\nC\r\n\r\nrest"
    inbox, heads = Inbox(), []
    for part in data.draw(split(wire)):
        inbox.add(part)
        while (head := inbox.take_head(100)) is not None:
            heads.append(head)
    assert heads == [b"A\r\nB\r\n\r\n", b"C\r\n\r\n"] and inbox.take_all() == b"rest"


@given(st.data())
def test_a_head_without_end_is_too_large(data: st.DataObject) -> None:
    inbox = Inbox()
    with pytest.raises(HeadTooLarge):
        for part in data.draw(split(b"x" * 200 + b"\r\n\r\n")):
            inbox.add(part)
            inbox.take_head(100)


# --- timing and errors ------------------------------------------------------------------------------------

durations = st.floats(0, 100, allow_nan=False)


@given(durations, durations, st.lists(durations, max_size=8))
@settings(max_examples=300)
def test_phases_sum_to_the_total(waited: float, answered: float, phases: list[float]) -> None:
    records = [PhaseTime(name=f"p{i}", seconds=s) for i, s in enumerate(phases)]
    header = server_timing(1000.0, 1000.0 + waited, 1000.0 + waited + answered, records).decode()
    parts = [(name, duration) for name, _, duration in (item.partition(";dur=") for item in header.split(", "))]
    assert [name for name, _ in parts] == ["queue", *(r.name for r in records), "answer", "total"]
    hundredths = [int(duration.replace(".", "")) for _, duration in parts]
    assert all(h >= 0 for h in hundredths)
    assert sum(hundredths[:-1]) == hundredths[-1]
    assert abs(hundredths[-1] - (waited + answered) * 1e5) <= 1


def test_timing_in_full() -> None:
    phases = (PhaseTime(name="place", seconds=0.010), PhaseTime(name="restore it", seconds=0.080))
    assert server_timing(1.0, 1.1, 1.105, phases) == (
        b"queue;dur=10.00, place;dur=10.00, restore-it;dur=80.00, answer;dur=5.00, total;dur=105.00"
    )
    # Came when 50 ms of the operation were over: it did not wait for those.
    assert server_timing(1.05, 1.1, 1.1, phases).startswith(b"queue;dur=0.00, place;dur=0.00, restore-it;dur=50.00")


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (NotFound("x"), 404, ""),
        (ResourceExhausted("x", retry_after_s=2.5), 503, "3"),
        (FailedPrecondition("x", reason="ACTOR_CRASHED"), 503, ""),
        (FailedPrecondition("x", reason="TEMPLATE_NOT_READY"), 503, ""),
        (FailedPrecondition("x", reason="OTHER"), 502, ""),
        (ResourceExhausted("x", retry_after_s=0.0), 503, "1"),
        (Unavailable("x"), 503, "1"),
        (Unavailable("x", retry_after_s=0.2), 503, "1"),
        (Unavailable("x", retry_after_s=7.1), 503, "8"),
        (Cancelled("x"), 503, ""),
        (LeaseHeld("x"), 502, ""),
        (DeadlineExceeded("x"), 504, ""),
        (Internal("x", reason="we\r\nird"), 502, ""),
    ],
)
def test_errors_in_http(error: Exception, status: int, retry: str) -> None:
    text = refusal(error).render(head_only=False, keep_alive=True).decode()  # type: ignore[arg-type]
    assert text.startswith(f"HTTP/1.1 {status} ")
    assert f"Greenroom-Error: {refusal(error).reason}\r\n" in text  # type: ignore[arg-type]
    assert (f"Retry-After: {retry}\r\n" in text) == bool(retry)
    assert refusal(error).render(head_only=True, keep_alive=True).endswith(b"\r\n\r\n")  # type: ignore[arg-type]
