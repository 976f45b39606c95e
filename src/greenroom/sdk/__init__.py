"""Actors from Python programs: `Actor` blocks, `AsyncActor` is for asyncio. Errors are `GreenroomError`s."""

from greenroom.sdk.aio import AsyncActor
from greenroom.sdk.blocking import Actor
from greenroom.sdk.common import CommandFailed, CommandResult

__all__ = ["Actor", "AsyncActor", "CommandFailed", "CommandResult"]
