"""How long a bucket is waited for, with a server that is slow or silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import obstore
import pytest
from obstore.exceptions import GenericError

from greenroom.snapshots import transfers
from greenroom.snapshots.store import ObjectSnapshotStore
from greenroom.snapshots.transfers import client_options, open_bucket

SIZE = 10


class SlowBucket:
    """Answers each GET with a byte every ``pause_s``, and after ``hangs_after`` of them with nothing more."""

    def __init__(self, pause_s: float, hangs_after: int = SIZE) -> None:
        self._pause_s = pause_s
        self._hangs_after = hangs_after
        self.requests = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[dict[str, str]]:
        """Yields the environment that leads to it."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield {"AWS_ENDPOINT": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "x"} | {
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
            }
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                start = int(head.partition(b"bytes=")[2].partition(b"-")[0] or 0)
                status = f"206 Partial\r\nContent-Range: bytes {start}-{SIZE - 1}/{SIZE}" if start else "200 OK"
                writer.write(
                    f"HTTP/1.1 {status}\r\nETag: x\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
                    f"Content-Length: {SIZE - start}\r\n\r\n".encode()
                )
                for number in range(SIZE - start):
                    await asyncio.sleep(self._pause_s if number < self._hangs_after else 3600)
                    writer.write(b"x")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transfers.RETRIES, "max_retries", 1)


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "SILENCE_TIMEOUT", timedelta(seconds=0.5))


async def _get(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = open_bucket("s3://bucket/prefix")
    return len(await asyncio.to_thread(lambda: obstore.get(bucket, "key").bytes()))


async def test_what_moves_goes_on(monkeypatch: pytest.MonkeyPatch, few_retries: None, short_silence: None) -> None:
    """It takes four times as long as silence may, in one request."""
    slow = SlowBucket(pause_s=0.2)
    async with slow.running() as environment:
        assert await _get(environment, monkeypatch) == SIZE
        assert slow.requests == 1


async def test_what_hangs_ends(monkeypatch: pytest.MonkeyPatch, few_retries: None, short_silence: None) -> None:
    slow = SlowBucket(pause_s=0.01, hangs_after=2)
    async with slow.running() as environment:
        async with asyncio.timeout(20):
            with pytest.raises(GenericError):
                await _get(environment, monkeypatch)
        assert slow.requests == 2  # it went on once where it had stopped


def test_the_environment_goes_first() -> None:
    said = {"AWS_ALLOW_HTTP": "true", "AWS_TIMEOUT": "5 minutes", "AZURE_PROXY_URL": "http://proxy:3128", "HOME": "/"}
    assert client_options(said) == {
        "allow_http": "true",
        "timeout": "5 minutes",
        "proxy_url": "http://proxy:3128",
        "connect_timeout": transfers.CONNECT_TIMEOUT,
        "read_timeout": transfers.SILENCE_TIMEOUT,
    }


def test_the_store_waits_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "x")
    bucket = vars(ObjectSnapshotStore("s3://bucket/prefix")._objects)["_store"]
    assert bucket.client_options["timeout"] == "1day"
    assert bucket.retry_config["retry_timeout"] == timedelta(days=1)
