"""Greenroom runs very many stateful, sandboxed, mostly idle actors on a few warm workers.

`Actor` (blocking) and `AsyncActor` (asyncio) use actors of a running server; everything else is for the server itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenroom.sdk import Actor, AsyncActor, CommandFailed, CommandResult

__all__ = ["Actor", "AsyncActor", "CommandFailed", "CommandResult"]


def __getattr__(name: str) -> Any:  # loaded on use: importing the package must stay cheap for the command line
    if name in __all__:
        from greenroom import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
