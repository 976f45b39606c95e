"""Programs that sandboxes are run with, pinned by digest."""

from __future__ import annotations

from greenroom.core.records import Record


class Asset(Record, frozen=True, kw_only=True):
    """A file that sandboxes run with. ``path``: below the runtime directory of a worker; ``sha256``: of its content, in
    hexadecimal."""

    url: str
    sha256: str
    path: str
