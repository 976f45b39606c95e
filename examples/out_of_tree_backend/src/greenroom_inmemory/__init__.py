"""The smallest real backend: an actor is a counter in the agent's process, behind a unix socket of its own."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from greenroom.core.agentapi import ActorStats, Identity
from greenroom.core.errors import DataLoss, ResourceExhausted, Unavailable, Unimplemented
from greenroom.core.records import Endpoint, PhaseTime, SnapshotScope
from greenroom.sandbox.port import BackendProbe, Capabilities, ExecSession, ExecSpec, Found, Running, SandboxClass


class Actor:
    """What a sandbox is here: some state, a server, and a future that says how it ended."""

    def __init__(self, owner: Identity, path: Path, state: dict[str, object]) -> None:
        self.owner = owner
        self.path = path
        self.state = state
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.thawed = asyncio.Event()
        self.thawed.set()

    async def listen(self) -> None:
        self.server = await asyncio.start_unix_server(self.serve, self.path)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request and closes."""
        target = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
        await self.thawed.wait()
        if target == "/":
            self.state["count"] += 1  # type: ignore[operator]
        answer = {**self.state, "actor": self.owner.name, "generation": self.owner.generation}
        body = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()
        if target.startswith("/exit?code="):
            self.end(int(target.partition("=")[2]))

    def end(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)
            self.server.close()
            self.path.unlink()


class InMemoryBackend:
    name = "inmemory"
    capabilities = Capabilities(
        scope=SnapshotScope.MEMORY, isolation="none", security_boundary=False, needs_image=False
    )

    def __init__(self) -> None:
        self.actors: dict[str, Actor] = {}

    async def probe(self) -> BackendProbe:
        return BackendProbe(available=True, version="1", fingerprint="inmemory-1")

    async def open(self, state_dir: Path, worker: str) -> BackendProbe:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir = state_dir
        return await self.probe()

    async def reconcile(self) -> list[Found]:
        for socket in self.state_dir.glob("*.sock"):  # an earlier agent's actors ended with it
            socket.unlink()
        return []

    async def start(self, cls: SandboxClass, owner: Identity) -> Running:
        return await self.run(owner, {"count": 0, "boot": os.urandom(8).hex()})

    async def restore(self, cls: SandboxClass, owner: Identity, source: Path, hostname: str) -> Running:
        try:
            state = json.loads((source / "state.json").read_bytes())
        except (OSError, ValueError) as error:
            raise DataLoss(f"the snapshot in {source} can't be read: {error}", reason="SNAPSHOT_CORRUPT") from error
        return await self.run(owner, state)

    async def run(self, owner: Identity, state: dict[str, object]) -> Running:
        sid = os.urandom(16).hex()
        actor = Actor(owner, self.state_dir / f"{sid}.sock", state)
        await actor.listen()
        self.actors[sid] = actor
        return Running(sid=sid, endpoint=Endpoint(path=str(actor.path)))

    async def checkpoint(self, sid: str, dest: Path) -> tuple[PhaseTime, ...]:
        actor = self.get(sid)
        try:
            (dest / "state.json").write_text(json.dumps(actor.state))
        except OSError as error:
            raise ResourceExhausted(f"can't write the snapshot: {error}", reason="DISK_FULL") from error
        actor.thawed.clear()
        return ()

    async def freeze(self, sid: str) -> None:
        self.get(sid).thawed.clear()

    async def thaw(self, sid: str) -> Endpoint:
        actor = self.get(sid)
        actor.thawed.set()
        return Endpoint(path=str(actor.path))

    async def exec(self, sid: str, spec: ExecSpec) -> ExecSession:
        self.get(sid)
        raise Unimplemented("there are no programs in an in-memory actor")

    async def stats(self, sid: str) -> ActorStats:
        self.get(sid)
        return ActorStats()

    async def wait(self, sid: str) -> int:
        actor = self.actors.get(sid)
        return 137 if actor is None else await asyncio.shield(actor.ended)

    async def destroy(self, sid: str) -> None:
        if actor := self.actors.pop(sid, None):
            actor.end(137)

    async def close(self, *, keep_running: bool) -> None:
        for sid in list(self.actors):
            await self.destroy(sid)

    def get(self, sid: str) -> Actor:
        actor = self.actors.get(sid)
        if actor is None or actor.ended.done():
            raise Unavailable(f"sandbox {sid} is gone: wake its actor again", reason="SANDBOX_GONE")
        return actor
