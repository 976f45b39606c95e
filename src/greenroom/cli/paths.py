"""Where Greenroom keeps its things on this machine, and where its server is found."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """``$GREENROOM_HOME``, else ``/var/lib/greenroom`` for root and ``~/.local/share/greenroom`` for others. Absolute;
    it need not exist."""
    home = os.environ.get("GREENROOM_HOME")
    if home:
        return Path(home).expanduser().absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/greenroom")
    return Path("~/.local/share/greenroom").expanduser()


def default_server() -> str:
    """``$GREENROOM_SERVER``, else the socket in `data_dir`."""
    return os.environ.get("GREENROOM_SERVER") or f"unix:{data_dir()}/run/api.sock"
