"""``greenroom assets``: what the init container of a worker pod does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click
import msgspec

from greenroom.core.errors import InvalidArgument

#: As JSON: a list of url, sha256 and path.
VARIABLE = "GREENROOM_ASSETS"


@click.command(hidden=True)
@click.option("--config", type=click.Path(path_type=Path), help=f"The list of assets as JSON [default: ${VARIABLE}].")
@click.option("--into", type=click.Path(path_type=Path), required=True, help="Directory of the runtime.")
def assets(config: Path | None, into: Path) -> None:
    """Fetches the programs that sandboxes are run with, and verifies their digests."""
    from greenroom.agent.assets import fetch
    from greenroom.cli.logs import configure
    from greenroom.core.assets import Asset

    configure("info")
    try:
        text = config.read_text() if config is not None else os.environ.get(VARIABLE, "")
        found = msgspec.json.decode(text, type=list[Asset])
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise InvalidArgument(f"the list of assets ({config or VARIABLE}) can't be read: {error}") from error
    asyncio.run(fetch(found, into))
