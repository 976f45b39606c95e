"""A small HTTP/1.1 server that counts: the actor of the tests, the demo and the benchmarks.

It counts in memory and in a file: both counts go on after a memory snapshot, only the file's after a data snapshot.
Standard library only, one file, up in 30 ms, 15 MB: copy it into an image and run ``python3 counter_app.py``.
Environment: ``PORT`` (8080) and ``HOST`` (all addresses) to listen on, ``COUNT_FILE`` (/data/count.txt, in a
directory that exists).

    GET  /, /inc                  counts one further in memory and in the file; answers as ``/info``
    GET  /info                    JSON: ram, file, boot, hostname, uuid, actor, generation, pid
    GET  /healthz                 200
    GET  /touch?mb=N              fills N MiB with random bytes and keeps them
    GET  /exit?code=N             answers, then ends the process with that status
    GET  /sleep?s=S               answers after S seconds
    GET  /stream?n=N&interval=S   N lines in chunks, S seconds apart
    GET  /sse?n=N&interval=S      the same as server-sent events
    GET  /big?bytes=N             N bytes
    POST /echo                    the body, streamed back as it comes
    GET  /ws                      WebSocket (RFC 6455) that echoes every frame
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from io import BufferedReader
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

COUNT_FILE = os.environ.get("COUNT_FILE", "/data/count.txt")
IDENTITY = "/run/greenroom"
MAX_LINE = 16 << 10  # of one request line or header; a gateway's own limit is lower
MAX_HEADERS = 100
CHUNK = 64 << 10
MAX_FRAME = 1 << 20  # of a WebSocket frame: it is read whole
CLOSE, PING, PONG = 8, 9, 10  # opcodes of WebSocket frames
MAX_BYTES = 1 << 40  # of /big, so that a slip of the finger ends some day

BOOT = os.urandom(8).hex()
lock = threading.Lock()
ram = 0
kept: list[bytes] = []


def read_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def count() -> None:
    global ram
    ram += 1
    stored = int(read_file(COUNT_FILE) or 0) + 1
    with open(COUNT_FILE + ".new", "w", encoding="utf-8") as file:
        file.write(str(stored))
    os.replace(COUNT_FILE + ".new", COUNT_FILE)  # noqa: PTH105 - whole at every moment, also when killed here


def info(counting: bool = False) -> bytes:
    """What is true now; with ``counting`` one further, and no other request's count comes between."""
    with lock:
        if counting:
            count()
        facts = {
            "ram": ram,
            "file": int(read_file(COUNT_FILE) or 0),
            "boot": BOOT,
            "hostname": socket.gethostname(),
            "uuid": str(uuid.uuid4()),
            "actor": read_file(f"{IDENTITY}/name"),
            "generation": int(read_file(f"{IDENTITY}/generation") or 0),
            "pid": os.getpid(),
        }
    return json.dumps(facts).encode() + b"\n"


class Request:
    """One request: its head is read, its body is still to come."""

    def __init__(self, method: str, target: str, headers: dict[str, str]) -> None:
        split = urlsplit(target)
        self.method = method
        self.path = split.path
        self.query = dict(parse_qsl(split.query))
        self.headers = headers
        self.chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self.length = int(headers.get("content-length", "0"))

    def number(self, name: str, default: float = 0) -> float:
        return float(self.query.get(name, default))


def read_request(stream: BufferedReader) -> Request | None:
    line = stream.readline(MAX_LINE)
    if not line:
        return None
    method, target, _version = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADERS):
        line = stream.readline(MAX_LINE)
        if line in (b"\r\n", b"\n", b""):
            return Request(method, target, headers)
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    raise ValueError("too many headers")


def read_body(stream: BufferedReader, request: Request) -> Iterator[bytes]:
    """The body piece by piece, as it arrives."""
    if request.chunked:
        while size := int(stream.readline(MAX_LINE).split(b";")[0], 16):
            yield from read_exactly(stream, size)
            stream.readline(MAX_LINE)
        while stream.readline(MAX_LINE) not in (b"\r\n", b"\n", b""):
            pass  # trailers
    else:
        yield from read_exactly(stream, request.length)


def read_exactly(stream: BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = stream.read1(min(size, CHUNK))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        stream = sock.makefile("rb", CHUNK)
        assert isinstance(stream, BufferedReader)
        self.stream = stream

    def serve(self) -> None:
        """Answers one request after the other until the client has had enough."""
        try:
            while (request := read_request(self.stream)) is not None:
                if request.headers.get("expect", "").lower() == "100-continue":
                    self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.answer(request)
                if request.headers.get("connection", "").lower() == "close":
                    return
        except EOFError:
            pass  # the client went away, as it may
        except (OSError, ValueError) as error:
            print(f"connection ended: {error!r}", file=sys.stderr, flush=True)
        finally:
            self.stream.close()
            self.sock.close()

    def answer(self, request: Request) -> None:
        if request.path == "/echo":
            return self.echo(request)
        if request.path == "/ws":
            return self.websocket(request)
        for _ in read_body(self.stream, request):
            pass
        match request.path:
            case "/" | "/inc":
                self.reply(info(counting=True))
            case "/info":
                self.reply(info())
            case "/healthz":
                self.reply(b"ok\n", content_type="text/plain")
            case "/touch":
                kept.extend(os.urandom(1 << 20) for _ in range(int(request.number("mb", 1))))
                self.reply(json.dumps({"mb": len(kept)}).encode())
            case "/sleep":
                time.sleep(request.number("s", 1))
                self.reply(info())
            case "/exit":
                self.reply(b'{"exiting": true}\n')
                os._exit(int(request.number("code")))
            case "/stream":
                self.parts(request, "line {}\n", "text/plain")
            case "/sse":
                self.parts(request, "id: {0}\ndata: event {0}\n\n", "text/event-stream")
            case "/big":
                self.big(min(int(request.number("bytes", 1 << 20)), MAX_BYTES))
            case _:
                self.reply(b"no such page\n", status="404 Not Found", content_type="text/plain")

    def head(self, *headers: str, status: str = "200 OK") -> None:
        self.sock.sendall("\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1"))

    def reply(self, body: bytes, *, status: str = "200 OK", content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sock.sendall(head.encode("latin-1") + body)

    def chunk(self, piece: bytes) -> None:
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

    def parts(self, request: Request, form: str, content_type: str) -> None:
        self.head(f"Content-Type: {content_type}", "Cache-Control: no-store", "Transfer-Encoding: chunked")
        for i in range(int(request.number("n", 10))):
            if i:
                time.sleep(request.number("interval", 0.1))
            self.chunk(form.format(i).encode())
        self.chunk(b"")

    def big(self, size: int) -> None:
        self.head("Content-Type: application/octet-stream", f"Content-Length: {size}")
        piece = bytes(range(256)) * (CHUNK // 256)
        for offset in range(0, size, CHUNK):
            self.sock.sendall(piece[: size - offset])

    def echo(self, request: Request) -> None:
        length = "Transfer-Encoding: chunked" if request.chunked else f"Content-Length: {request.length}"
        self.head(f"Content-Type: {request.headers.get('content-type', 'application/octet-stream')}", length)
        send = self.chunk if request.chunked else self.sock.sendall
        for piece in read_body(self.stream, request):
            send(piece)
        if request.chunked:
            self.chunk(b"")

    def websocket(self, request: Request) -> None:
        """Echoes frames until the client closes; pings are answered. Source: RFC 6455 sections 4.2.2 and 5.2."""
        import base64
        import hashlib  # not above: it loads OpenSSL, 3 MB and 5 ms

        key = request.headers.get("sec-websocket-key", "")
        if not key:
            return self.reply(b"speak WebSocket here\n", status="426 Upgrade Required", content_type="text/plain")
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())
        upgrade = ("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {accept.decode()}")
        self.head(*upgrade, status="101 Switching Protocols")
        while True:
            first, second = self.exactly(2)
            size, opcode = second & 0x7F, first & 0x0F
            if size >= 126:
                size = int.from_bytes(self.exactly(2 if size == 126 else 8), "big")
            if size > MAX_FRAME or not second & 0x80:
                raise ValueError("frame too long or not masked")
            mask = self.exactly(4)
            data = bytes(byte ^ mask[i & 3] for i, byte in enumerate(self.exactly(size)))
            if opcode == PONG:
                continue
            if size < 126:
                length = bytes([size])
            else:
                length = b"\x7e" + size.to_bytes(2, "big") if size <= 0xFFFF else b"\x7f" + size.to_bytes(8, "big")
            self.sock.sendall(bytes([first & 0xF0 | (PONG if opcode == PING else opcode)]) + length + data)
            if opcode == CLOSE:
                raise EOFError

    def exactly(self, size: int) -> bytes:
        return b"".join(read_exactly(self.stream, size))


def main() -> NoReturn:
    # By hand, because the first process of a pid namespace is not ended by a signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.stack_size(256 << 10)
    server = socket.create_server((os.environ.get("HOST", ""), int(os.environ.get("PORT", "8080"))), backlog=512)
    print(f"counter {BOOT} listens on port {server.getsockname()[1]}", flush=True)
    while True:
        sock, _ = server.accept()
        threading.Thread(target=Connection(sock).serve, daemon=True).start()


if __name__ == "__main__":
    main()
