"""Programs for sandboxes: fetched by the command that an init container runs, and never used unless they are right."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

CONTENT = b"#!/bin/sh\necho this is runsc\n" * 10_000


@dataclass
class Files:
    """Serves ``files``; the first ``broken`` answers end in the middle."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    broken: int = 0
    asked: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        content = self.files.get(request.path)
        if content is None:
            return web.Response(status=404)
        if self.broken:
            self.broken -= 1
            response = web.StreamResponse(headers={"Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(content[:1000])
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=content)


@pytest.fixture
async def files() -> AsyncIterator[Files]:
    app = web.Application()
    runner = web.AppRunner(app)
    found = Files("")
    app.router.add_get("/{path:.*}", found.answer)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield found
    await runner.cleanup()


async def run(into: Path, *assets: dict[str, str]) -> tuple[int, str]:
    """Exit code and what it said."""
    environment = {**os.environ, "GREENROOM_ASSETS": json.dumps(assets)}
    words = [sys.executable, "-m", "greenroom", "assets", "--into", str(into)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, env=environment, stderr=pipe)
    _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


def asset(files: Files, path: str, content: bytes = CONTENT) -> dict[str, str]:
    files.files["/" + path] = CONTENT
    return {"url": f"{files.url}/{path}", "sha256": hashlib.sha256(content).hexdigest(), "path": path}


async def test_it_is_there_whole_and_can_be_run_and_is_not_fetched_again(files: Files, tmp_path: Path) -> None:
    wanted = [asset(files, "runsc"), asset(files, "lib/more")]
    files.broken = 2
    code, told = await run(tmp_path / "runtime", *wanted)
    assert code == 0, told
    assert (tmp_path / "runtime" / "lib" / "more").read_bytes() == CONTENT
    assert os.access(tmp_path / "runtime" / "runsc", os.X_OK)
    assert len(files.asked) == 4
    assert (await run(tmp_path / "runtime", *wanted))[0] == 0
    assert len(files.asked) == 4
    # One that somebody has touched is fetched anew.
    (tmp_path / "runtime" / "runsc").write_bytes(b"other")
    assert (await run(tmp_path / "runtime", *wanted))[0] == 0
    assert (tmp_path / "runtime" / "runsc").read_bytes() == CONTENT


async def test_what_is_not_what_its_digest_says_is_not_there(files: Files, tmp_path: Path) -> None:
    code, told = await run(tmp_path, asset(files, "runsc", b"what was meant"))
    assert code != 0 and "it is not used" in told
    assert list(tmp_path.iterdir()) == []


async def test_what_is_wrong_is_said(files: Files, tmp_path: Path) -> None:
    wanted = asset(files, "runsc")
    code, told = await run(tmp_path, {**wanted, "url": f"{files.url}/nothing"})
    assert code != 0 and "answers 404; is the address right?" in told
    code, told = await run(tmp_path, {**wanted, "path": "../../etc/passwd"})
    assert code != 0 and "below the runtime directory" in told
    code, told = await run(tmp_path, {"url": ""})
    assert code != 0 and "can't be read" in told
