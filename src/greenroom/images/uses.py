"""Who uses an image: reference counts on disk, which several processes share and which outlive them.

Below the store's root::

    uses/<hex>/          one for each image that is there; when it was changed last is when the image was used last
    uses/<hex>/<user>    somebody uses it: an actor's sandbox (``<holder>~<actor uid>``), the warm sandboxes of a worker
                         (``<holder>~warm``), or a person who pinned it (``pin``)
    holders/<holder>     where a worker has its state directory

A holder is a worker, by its name and its state directory: servers that share a store may each have a ``default-0``.

A sandbox outlives the agent that made it, so a use can't be a lock that ends with its process. It is a file; and the
directory is what makes counting safe without a lock: whoever removes an image begins with ``rmdir``, which fails while
there is a user; from then on nobody becomes one, because there is no directory to write into. A use that was
written before a restart of the machine means nothing any more: no sandbox outlives that. Nor does one of a worker whose
state directory is gone (``holders/<holder>`` says where it was): whoever takes a worker away for good removes that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec
import structlog

from greenroom.core.records import Record
from greenroom.images.blobs import hex_of, write_atomically

log = structlog.get_logger(__name__)

#: The user that stands for a person's wish to keep the image.
PIN = "pin"
#: Separates the parts of a user's name; not in a uid.
_SEPARATOR = "~"
#: The place of an actor's uid for sandboxes that are kept ready for actors to come.
WARM = "warm"
_WARM_SANDBOXES = "warm sandboxes"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Use(Record, frozen=True, kw_only=True):
    """``who``: the actor as ``namespace/name``, for people. ``boot``: of the machine."""

    who: str = ""
    boot: str = ""


def holder_of(worker: str, state_dir: Path) -> str:
    """What a worker is called among the users of a store."""
    return f"{quote(worker, safe='')}.{hashlib.sha256(os.fsencode(state_dir.absolute())).hexdigest()[:8]}"


def is_warm(described: str) -> bool:
    """Whether a user as people call it (`Uses.described`) is no actor."""
    return described.startswith(f"{_WARM_SANDBOXES} on ")


def user_of(holder: str, actor_uid: str) -> str:
    return f"{holder}{_SEPARATOR}{actor_uid}"


class Uses:
    """The uses below ``root``, which is made if it is not there. All methods block for a file operation or two."""

    def __init__(self, root: Path) -> None:
        self._root = root / "uses"
        self._holders = root / "holders"
        for directory in (self._root, self._holders):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._boot = _BOOT_ID.read_text().strip()

    # --- the image comes and goes ------------------------------------------------------------------------

    def open(self, digest: str) -> None:
        """The image is there, or is about to be: it may be used. For who has its lock: whoever removes it has."""
        self._path(digest).mkdir(mode=0o700, exist_ok=True)

    def close(self, digest: str) -> bool:
        """Whether nobody uses it, and from now on nobody begins to. Idempotent. Undone by `open`."""
        try:
            self._path(digest).rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def is_open(self, digest: str) -> bool:
        return self._path(digest).is_dir()

    def digests(self) -> list[str]:
        """Of the images that may be used."""
        return sorted(f"sha256:{path.name}" for path in self._root.iterdir())

    # --- users come and go -------------------------------------------------------------------------------

    def add(self, digest: str, user: str, who: str = "") -> bool:
        """``user`` uses it from now on, until `drop`. Idempotent. False: it is not there."""
        data = msgspec.json.encode(_Use(who=who, boot=self._boot))
        try:
            fd = os.open(self._path(digest) / user, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        try:
            os.write(fd, data)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            # Its name is what counts: an actor whose image is here wakes also when the disk is full.
        finally:
            os.close(fd)
        return True

    def drop(self, digest: str, user: str) -> None:
        """Idempotent."""
        (self._path(digest) / user).unlink(missing_ok=True)

    def touch(self, digest: str) -> None:
        """It is used just now. Nothing when it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(digest))

    def last_used_at(self, digest: str) -> float:
        """Seconds since the epoch; 0 when it is not there."""
        try:
            return self._path(digest).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def users(self, digest: str) -> list[str]:
        """Names of its users, `PIN` among them, sorted; [] also when it is not there."""
        try:
            return sorted(path.name for path in self._path(digest).iterdir())
        except FileNotFoundError:
            return []

    def described(self, digest: str) -> tuple[str, ...]:
        """Its users but `PIN`, as people call them: ``default/alice on worker-0``."""
        return tuple(self._describe(digest, user) for user in self.users(digest) if user != PIN)

    def _describe(self, digest: str, user: str) -> str:
        holder, _, uid = user.rpartition(_SEPARATOR)
        use = self._read(digest, user)
        what = _WARM_SANDBOXES if uid == WARM else (use.who if use and use.who else f"actor {uid}")
        return f"{what} on {unquote(holder.rpartition('.')[0])}"

    # --- what is left of those that are gone -------------------------------------------------------------

    def keep_only(
        self, holder: str, actor_uids: Collection[str], state_dir: Path | None = None
    ) -> dict[str, tuple[str, ...]]:
        """Of this holder, whose ``state_dir`` is written down, only these use anything. One of them of which nothing is
        known uses everything that is there: it was made before uses were written down. A holder that nobody uses
        anything for and that has no ``state_dir`` is none any more.

        Returns: for each of them the digests that it uses.
        """
        if state_dir is not None:
            self._note_holder(holder, os.fsencode(state_dir.absolute()))
        elif not actor_uids:
            (self._holders / holder).unlink(missing_ok=True)
        held: dict[str, list[str]] = {uid: [] for uid in actor_uids}
        digests = self.digests()
        for digest in digests:
            for user in self.users(digest):
                of, _, uid = user.rpartition(_SEPARATOR)
                if of == holder and uid in held:
                    held[uid].append(digest)
                elif of == holder:
                    self.drop(digest, user)
        for uid in [uid for uid, found in held.items() if not found]:
            held[uid] = [digest for digest in digests if self.add(digest, user_of(holder, uid))]
        return {uid: tuple(found) for uid, found in held.items()}

    def _note_holder(self, holder: str, place: bytes) -> None:
        """Where it is not noted, its uses only live longer than their worker: no reason for an agent not to begin."""
        path = self._holders / holder
        try:
            if not path.exists() or path.read_bytes() != place:
                write_atomically(path, place)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            log.warning("the disk is full: where a worker is could not be noted", holder=holder)

    def drop_stale(self) -> None:
        """Drops the uses from before the machine was started, and those of workers that are gone for good; pins
        stay."""
        gone = {path for path in self._holders.glob("[!.]*") if not self._is_there(path)}
        names = {path.name for path in gone}
        for digest in self.digests():
            used_at = self.last_used_at(digest)
            for user in self.users(digest):
                use = self._read(digest, user)
                before = user != PIN and use is not None and use.boot != self._boot
                if before or user.rpartition(_SEPARATOR)[0] in names:
                    self.drop(digest, user)
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(self._path(digest), (used_at, used_at))  # to be tidied up is no use
        for path in gone:
            path.unlink(missing_ok=True)

    @staticmethod
    def _is_there(holder: Path) -> bool:
        try:
            return Path(os.fsdecode(holder.read_bytes())).is_dir()
        except FileNotFoundError:
            return True  # somebody else found out first

    def _read(self, digest: str, user: str) -> _Use | None:
        """None for one that can't be read: just being written, or left by a killed process. Its owner drops it."""
        try:
            return msgspec.json.decode((self._path(digest) / user).read_bytes(), type=_Use)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def _path(self, digest: str) -> Path:
        return self._root / hex_of(digest)
