"""Debian's docker-registry on loopback, and what may stand before a registry: a proxy, an authority."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from greenroom.testing.ports import free_port

_TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "bin"
#: A registry is up in about a second; this is for a busy machine.
_START_TIMEOUT_S = 30.0


def find_tool(name: str) -> str | None:
    """A program that scripts/setup.sh brought, or one on PATH."""
    return shutil.which(name, path=f"{_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}")


def find_registry() -> str | None:
    return find_tool("docker-registry")


@contextlib.contextmanager
def docker_registry(directory: Path, *, accounts: str = "") -> Iterator[str]:
    """Runs one with its data in ``directory``; yields ``host:port``. ``accounts``: the text of an htpasswd file
    (bcrypt) with those who may use it; "" is everybody."""
    program = find_registry()
    assert program is not None
    port = free_port()
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    if accounts:
        (directory / "htpasswd").write_text(accounts)
        with config.open("a") as file:
            file.write(f"auth: {{htpasswd: {{realm: test, path: {directory / 'htpasswd'}}}}}\n")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}/v2/"):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "the registry does not come up"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def put_manifest(host: str, name: str, data: bytes, media_type: str) -> str:
    """Puts ``repository:tag`` into a registry as it is; returns its digest."""
    repository, _, tag = name.partition(":")
    request = urllib.request.Request(
        f"http://{host}/v2/{repository}/manifests/{tag}", data, {"Content-Type": media_type}, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=30):
        return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except (urllib.error.URLError, ConnectionError):
        return False


class WebProxy:
    """A proxy as companies have them, on loopback: it forwards requests for http and tunnels https.

    Attributes:
        url: what goes into ``$HTTPS_PROXY`` while it runs.
        hosts: names that it knows -> ``host:port`` where they really are; it knows no others.
        asked: method and target of each request.
        account: ``user:password`` that it wants, or "".
    """

    def __init__(self, hosts: Mapping[str, str], account: str = "") -> None:
        self.hosts = dict(hosts)
        self.account = account
        self.url = ""
        self.asked: list[str] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[WebProxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.url = f"http://{self.account}@{at}" if self.account else f"http://{at}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, target, _ = head.partition("\r\n")[0].split(" ")
            self.asked.append(f"{method} {target}")
            wanted = f"Proxy-Authorization: Basic {base64.b64encode(self.account.encode()).decode()}"
            url = urlsplit(target if "://" in target else f"//{target}")
            there = self.hosts.get(url.netloc)
            if self.account and wanted not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            elif there is None:
                writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            else:
                host, _, port = there.partition(":")
                upstream_reader, upstream = await asyncio.open_connection(host, int(port))
                if method == "CONNECT":
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                else:  # one request a connection
                    rest = head.partition("\r\n")[2].replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
                    upstream.write(f"{method} {url.path}?{url.query} HTTP/1.1\r\n{rest}".encode())
                await asyncio.gather(_pump(reader, upstream), _pump(upstream_reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def make_authority(directory: Path, *names: str) -> ssl.SSLContext:
    """Makes ``ca.crt``, and ``server.crt`` and ``.key`` for these DNS names and 127.0.0.1; returns the server's
    side."""
    alternatives = ",".join(["IP:127.0.0.1", *(f"DNS:{name}" for name in names)])
    commands = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=test-server -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    )
    (directory / "names").write_text(f"subjectAltName={alternatives}\n")
    for command in commands:
        subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")
    return context
