"""Writing a file tree that hostile archives can't lead out of.

No path is ever handed to the kernel whole. Every directory is opened from its parent's descriptor with ``O_NOFOLLOW``,
and a symbolic link on the way is read and followed by hand, as a process whose root this tree is would follow it: an
absolute target starts at the tree's root, and ``..`` stops there. So ``lib/x`` behind ``lib -> usr/lib`` lands in
``usr/lib/x``, and ``evil/x`` behind ``evil -> /etc`` lands in the tree's own ``etc``. Files are only ever created
(``O_EXCL``) after what had the name was removed, so that nothing is written through a link of a lower layer either.

Without root, owners are not applied (everything belongs to the caller) and set-user-id bits mean nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

Parts = tuple[str, ...]

#: Directories below each other. Linux has no limit of its own, but removing a tree takes a stack as deep.
MAX_DEPTH = 256
#: Links followed in one path. Source: Linux, path_resolution(7): 40.
MAX_LINKS = 40
#: Directory descriptors kept open: more than the way to any two directories takes, so that neither of the two that
#: a hard link needs is closed while the other is opened.
_OPEN_DIRECTORIES = 2 * MAX_DEPTH + 64
#: Remembered results of following a path; dropped all at once when a directory or link is removed.
_RESOLVED = 4096

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Extended attributes that are applied. Others either mean something to the machine and not to the image (overlayfs
#: keeps its own state in ``trusted.overlay.*`` and ``user.overlay.*``; a layer that sets it could make files appear
#: or vanish) or can't be set by a tool at all.
_XATTRS = ("user.", "security.capability", "system.posix_acl_")
_NO_XATTRS = ("user.overlay.",)
_XATTR_UNAVAILABLE = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)
_XATTR_TOO_LONG = (errno.E2BIG, errno.ERANGE)
#: ext4 says of attributes above 4 KiB that no space is left; with so much of it left, that is what it means.
_XATTR_ROOM_BYTES = 1 << 20


class Refused(Exception):
    """The entry can't be written without leaving the tree or its limits; says why."""


class Attributes:
    """Owner, mode, time and extended attributes of an entry."""

    __slots__ = ("gid", "mode", "mtime_ns", "uid", "xattrs")

    def __init__(
        self, mode: int, uid: int = 0, gid: int = 0, mtime_ns: int = 0, xattrs: dict[str, bytes] | None = None
    ):
        self.mode = mode & 0o7777
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.xattrs = xattrs or {}


class Tree:
    """A directory as the root of a tree. Paths are tuples of names without ``.``, ``..`` and ``/``.

    Not for use by several threads. To be closed (a context manager).
    """

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._owner = os.geteuid() == 0
        self._open: OrderedDict[Parts, int] = OrderedDict()
        self._resolved: dict[Parts, Parts] = {}
        #: Modes and times (ns) of directories wait until all is written: writing into a directory changes its time, and
        #: a read-only one could not be written to without root.
        self._directories: dict[Parts, tuple[int, int]] = {}
        #: Directories that no entry speaks of, made because something lies below them: up to `MAX_DEPTH` for an entry.
        self.implied = 0
        #: Paths made since `start_layer`, for whiteouts, which only hide what lower layers brought. None: no lower one.
        self._layer: set[Parts] | None = None
        #: Paths at which nothing of lower layers is left. Said again, a whiteout costs nothing: an archive may say it
        #: a million times of a directory with a million files.
        self._hidden: set[Parts] = set()

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._forget()
        os.close(self._root)

    # --- reading ---------------------------------------------------------------------------------------------

    def open_file(self, path: str) -> int | None:
        """A descriptor of the file at ``path``, links followed inside the tree; None when there is none. It may be a
        FIFO or device: opened without blocking, to be checked by the caller."""
        parts = tuple(path.split("/"))
        for _ in range(MAX_LINKS):
            if parts[-1] in ("", ".", ".."):
                return None  # a directory
            try:
                parent = self._resolve(parts[:-1], create=False)
                fd = self._directory(parent)
                return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
            target = os.readlink(parts[-1], dir_fd=fd)
            parts = (*(() if target.startswith("/") else parent), *target.split("/"))
        return None

    # --- writing ---------------------------------------------------------------------------------------------

    def start_layer(self, *, lowest: bool) -> None:
        """What comes now is another layer."""
        self._layer = None if lowest else set()
        self._hidden.clear()

    def directory(self, parts: Parts, attributes: Attributes) -> None:
        """Makes a directory, or gives the one that is there these attributes. ``()`` is the root."""
        if not parts:
            here: Parts = ()
        else:
            parent = self._resolve(parts[:-1], create=True)
            here = (*parent, parts[-1])
            self._check_depth(here)
            mode = self._mode_of(parent, parts[-1])
            if mode is None or not stat.S_ISDIR(mode):
                self._clear(parent, parts[-1], mode)
                os.mkdir(parts[-1], 0o700, dir_fd=self._directory(parent))
        fd = self._directory(here)
        if self._owner:
            os.fchown(fd, attributes.uid, attributes.gid)
        self._set_xattrs(fd, attributes)
        self._directories[here] = (attributes.mode, attributes.mtime_ns)
        self._made(here)

    def new_file(self, parts: Parts) -> int:
        """A descriptor of a new, empty file; what had the name is removed. `finish_file` closes it."""
        parent = self._place(parts)
        return os.open(parts[-1], _NEW_FILE, 0o600, dir_fd=parent)

    def finish_file(self, fd: int, attributes: Attributes) -> None:
        """Applies the attributes, in the order in which none undoes another (a change of owner clears set-user-id
        bits and capabilities)."""
        if self._owner:
            os.fchown(fd, attributes.uid, attributes.gid)
        os.fchmod(fd, attributes.mode)
        self._set_xattrs(fd, attributes)
        os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))

    def symlink(self, parts: Parts, target: str, attributes: Attributes) -> None:
        """The target is kept as it is: it only ever means something to the process whose root this becomes."""
        parent = self._place(parts)
        os.symlink(target, parts[-1], dir_fd=parent)
        if self._owner:
            os.chown(parts[-1], attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        times = (attributes.mtime_ns, attributes.mtime_ns)
        os.utime(parts[-1], ns=times, dir_fd=parent, follow_symlinks=False)

    def hard_link(self, parts: Parts, target: Parts) -> None:
        """Another name for a file that is in the tree.

        Raises:
            Refused: there is no such file in the tree.
        """
        if not parts:
            raise Refused("only a directory can be the root")
        try:
            source = self._resolve(target[:-1], create=False)
            mode = self._mode_of(source, target[-1])
        except (FileNotFoundError, NotADirectoryError):
            mode = None
        if mode is None or stat.S_ISDIR(mode):
            raise Refused(f"it is a hard link to {'/'.join(target)!r}, which is no file of the image")
        if (*source, target[-1]) == (*self._resolve(parts[:-1], create=True), parts[-1]):
            return
        parent = self._place(parts)
        # Should making room have removed the target (it was below a directory of this name), this fails.
        os.link(target[-1], parts[-1], src_dir_fd=self._directory(source), dst_dir_fd=parent, follow_symlinks=False)

    def fifo(self, parts: Parts, attributes: Attributes) -> None:
        parent = self._place(parts)
        os.mkfifo(parts[-1], 0o600, dir_fd=parent)
        if self._owner:
            os.chown(parts[-1], attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(parts[-1], attributes.mode, dir_fd=parent)  # not a link: it was made here just now
        times = (attributes.mtime_ns, attributes.mtime_ns)
        os.utime(parts[-1], ns=times, dir_fd=parent, follow_symlinks=False)

    def whiteout(self, parts: Parts) -> None:
        """Removes what lower layers have at this path; nothing there is fine."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._remove_lower(self._resolve(parts[:-1], create=False), parts[-1])

    def opaque(self, parts: Parts) -> None:
        """Removes what lower layers have in this directory."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            here = self._resolve(parts, create=False)
            if here in self._hidden:
                return
            self._hidden.add(here)
            for name in _names(self._directory(here)):
                self._remove_lower(here, name)

    def finish(self) -> None:
        """Gives the directories their modes and times, the deepest first."""
        for here in sorted(self._directories, key=len, reverse=True):
            mode, mtime_ns = self._directories[here]
            try:
                fd = self._directory(here)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue  # a later layer took it away
                raise
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))

    # --- parts -----------------------------------------------------------------------------------------------

    def _resolve(self, parts: Parts, *, create: bool) -> Parts:
        """Where in the tree the directory really is, links followed. Makes what is missing if ``create``."""
        known = self._resolved.get(parts)
        if known is not None:
            return known
        here: Parts = ()
        todo = list(reversed(parts))
        links = 0
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":  # from a link's target; as at a process's root, it stops there
                here = here[:-1]
                continue
            mode = self._mode_of(here, name)
            if mode is None:
                if not create:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/".join(parts))
                self._check_depth((*here, name))
                os.mkdir(name, 0o700, dir_fd=self._directory(here))
                here = (*here, name)
                self._directories[here] = (0o755, 0)
                self.implied += 1
                self._made(here)
            elif stat.S_ISLNK(mode):
                links += 1
                if links > MAX_LINKS:
                    raise Refused("there are too many symbolic links on the way to it")
                target = os.readlink(name, dir_fd=self._directory(here))
                todo.extend(reversed(target.split("/")))
                if target.startswith("/"):
                    here = ()
            elif stat.S_ISDIR(mode):
                here = (*here, name)
            else:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/".join((*here, name)))
        if len(self._resolved) >= _RESOLVED:
            self._resolved.clear()
        self._resolved[parts] = here
        return here

    def _directory(self, here: Parts) -> int:
        """A descriptor of a real directory of the tree; stays open for a while."""
        if not here:
            return self._root
        fd = self._open.get(here)
        if fd is not None:
            self._open.move_to_end(here)
            return fd
        fd = os.open(here[-1], _DIRECTORY, dir_fd=self._directory(here[:-1]))
        self._open[here] = fd
        if len(self._open) > _OPEN_DIRECTORIES:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _mode_of(self, here: Parts, name: str) -> int | None:
        try:
            return os.stat(name, dir_fd=self._directory(here), follow_symlinks=False).st_mode
        except FileNotFoundError:
            return None

    def _place(self, parts: Parts) -> int:
        """Makes room for a new entry: its directory is there and its name is free."""
        if not parts:
            raise Refused("only a directory can be the root")
        parent = self._resolve(parts[:-1], create=True)
        self._check_depth((*parent, parts[-1]))
        self._clear(parent, parts[-1], self._mode_of(parent, parts[-1]))
        self._made((*parent, parts[-1]))
        return self._directory(parent)

    def _made(self, here: Parts) -> None:
        if self._layer is not None:
            self._layer.add(here)

    def _clear(self, parent: Parts, name: str, mode: int | None) -> None:
        if mode is None:
            return
        if stat.S_ISDIR(mode):
            self._remove_all((*parent, name))
        else:
            os.unlink(name, dir_fd=self._directory(parent))
            if stat.S_ISLNK(mode):
                self._forget()

    def _remove_all(self, here: Parts) -> None:
        fd = self._directory(here)
        for name in _names(fd):
            mode = self._mode_of(here, name)
            if mode is not None and stat.S_ISDIR(mode):
                self._remove_all((*here, name))
            else:
                os.unlink(name, dir_fd=self._directory(here))
        self._forget()
        os.rmdir(here[-1], dir_fd=self._directory(here[:-1]))

    def _remove_lower(self, parent: Parts, name: str) -> None:
        here = (*parent, name)
        mode = self._mode_of(parent, name)
        if mode is None or self._layer is None or here in self._hidden:
            return
        self._hidden.add(here)
        if stat.S_ISDIR(mode):
            for child in _names(self._directory(here)):
                self._remove_lower(here, child)
            if here not in self._layer:
                self._forget()
                try:
                    os.rmdir(name, dir_fd=self._directory(parent))
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:  # something of this layer is in it
                        raise
        elif here not in self._layer:
            self._clear(parent, name, mode)

    def _forget(self) -> None:
        """After a directory or link was removed, no remembered way through it may be used again."""
        self._resolved.clear()
        while self._open:
            os.close(self._open.popitem()[1])

    @staticmethod
    def _check_depth(here: Parts) -> None:
        if len(here) > MAX_DEPTH:
            raise Refused(f"it is more than {MAX_DEPTH} directories deep")

    @staticmethod
    def _set_xattrs(fd: int, attributes: Attributes) -> None:
        for name, value in attributes.xattrs.items():
            if name.startswith(_XATTRS) and not name.startswith(_NO_XATTRS):
                try:
                    os.setxattr(fd, name, value)
                except (OSError, ValueError) as error:  # ValueError: a NUL in its name
                    number = error.errno if isinstance(error, OSError) else None
                    if number in _XATTR_UNAVAILABLE:  # the file system has none, or this takes root
                        continue
                    full = number == errno.ENOSPC and _free_bytes(fd) < _XATTR_ROOM_BYTES
                    if number is None or number in _XATTR_TOO_LONG or (number == errno.ENOSPC and not full):
                        raise Refused(f"its attribute {name[:64]!r} of {len(value)} bytes can't be set") from error
                    raise


def _free_bytes(fd: int) -> int:
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def _names(directory: int) -> list[str]:
    return os.listdir(directory)
