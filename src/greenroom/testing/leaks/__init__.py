"""Whether anything leaks, and whether anything that is needed is gone: the database and the machine against each other.

`leaks` looks at a whole Greenroom on one machine, from beside it, while it runs. `compare.differences` is the
comparison, which is pure. For what a server that has *ended* must not
leave there is `greenroom.testing.leftovers`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from greenroom.store.sqlite_file import DATABASE_FILE
from greenroom.testing.leaks.compare import Wanted, differences
from greenroom.testing.leaks.places import entries, look
from greenroom.testing.leaks.rows import Rows, read


def leaks(
    data_dir: Path,
    *,
    database: str = "",
    state_dirs: Mapping[str, Path] | None = None,
    gone: Collection[str] = (),
    images: Path | None = None,
    objects: Iterable[str] | Path | None = None,
    wanted: Wanted | None = None,
    prefix: str = "",
) -> list[str]:
    """Every difference between what there is and what should be, as a line each; [] when there is none. Takes some
    50 ms, and is right at rest only: what is under way is a line of its own (``under way: ...``).

    Args:
        data_dir: of the server.
        database: a ``postgresql://`` URL; "" for SQLite in the data directory.
        state_dirs: of workers elsewhere than below ``workers/`` of the data directory, by name.
        gone: workers that once were: they have left nothing in the kernel either.
        images: the image store; in the data directory when None.
        objects: keys in the snapshot store, or the directory that it is; in the data directory when None.
        wanted: which workers there should be, for example; by default those that the pools in the database ask for,
            and those of ``state_dirs``.
        prefix: of the names of this server's workers, where several share a database: ``<its name>-``.

    Raises:
        OSError, apsw.Error, psycopg.Error: it can't be looked at.
    """
    rows = read(database or data_dir / DATABASE_FILE)
    home = data_dir / "workers"
    names = {w.name for w in rows.workers} | {*gone} | {path.name for path in entries(home)}
    elsewhere = {} if state_dirs is None else dict(state_dirs)
    if wanted is None:
        pools = {f"{prefix}{pool.name}-{n}" for pool in rows.pools for n in range(pool.spec.replicas)}
        wanted = Wanted(workers=pools | elsewhere.keys())
    machine = look(
        data_dir,
        {name: home / name for name in sorted(names)} | elsewhere,
        images or data_dir / "images",
        data_dir / "snapshots" if objects is None else objects,
    )
    return differences(rows, machine, wanted)


__all__ = ["Rows", "Wanted", "differences", "leaks", "read"]
