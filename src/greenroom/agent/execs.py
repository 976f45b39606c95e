"""`Exec`: a command in a sandbox; what it reads and writes goes over the call's own stream."""

from __future__ import annotations

import asyncio

from greenroom.agent.progress import Reporter
from greenroom.core import agentapi as api
from greenroom.sandbox.port import Backend, ExecSession, ExecSpec


async def carry_out(backend: Backend, sid: str, call: api.Exec, reporter: Reporter) -> api.Exited:
    spec = ExecSpec(argv=call.argv, env=tuple(call.env.items()), cwd=call.cwd, timeout_s=call.timeout_s)
    session = await backend.exec(sid, spec)
    feeder = asyncio.create_task(_feed(session, reporter))
    try:
        async for channel, data in session.output():
            await reporter.data(channel, data)
        return api.Exited(code=await session.wait())
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)
        try:
            await session.kill()
        finally:
            session.abort()  # who has gone away reads no more, and what is left would wait for that


async def _feed(session: ExecSession, reporter: Reporter) -> None:
    async for data in reporter.input():
        await session.write(data)
