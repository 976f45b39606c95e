"""Runs on the sandbox's side of the `process` backend: makes the namespaces, becomes their init, starts the actor.

Not imported but run, as ``python -I -S _init.py <control fd> <directory>``: without ``site`` and with few
imports it is up in 15 ms. Standard library only, for the same reason. One request comes through the control socket;
what follows depends on its ``do``:

``run``     the sandbox itself. Conversation (-> agent, <- agent):
                -> userns          this process is in its user namespace; the agent writes its id maps   (mode "user")
                <- go
                -> pid N           number of the init, which is still waiting; the first process ends
                -> ready           file system, host name and command are as they should be (may come before pid)
                <- go              the agent has the pid on its disk: the actor may run
                end of file        the actor's program has been started (its copy closes on exec)
            or, at any point, ``-> error REASON MESSAGE`` and the end. If the agent dies before the last ``go``, the
            init reads an end of file and goes too: nothing half made stays.
``exec``    a further command in a sandbox that runs: joins its namespaces by a pidfd.
``check``   whether all of this works here: namespaces, overlayfs, /proc; ends with status 0, or an error is sent.

A message is its length (4 bytes, little endian) and a ``marshal`` value: both ends are the same interpreter.
"""

# pathlib would double the time that this takes to start:
# ruff: noqa: PTH101, PTH102, PTH103, PTH110, PTH112, PTH113, PTH114, PTH116, PTH118, PTH120, PTH211

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource  # all imports here: later, the files are the sandbox's
import signal
import socket
import sys
from typing import Any, NoReturn

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, ST_RELATIME = 1024, 2048, 1 << 21, 4096
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24

#: What the parent of an actor or a command waits for, and passes on.
HEARD = frozenset({signal.SIGTERM, signal.SIGCHLD})
#: What the actor's root keeps inside: enough for a package manager and a server that drops its rights; the list of
#: container engines without MKNOD and NET_RAW. Source: linux/capability.h
KEPT_CAPABILITIES = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31})
#: Where a process that is root outside, too, could change the machine; as container engines have it.
READ_ONLY_PROC = ("sys", "sysrq-trigger", "irq", "bus", "fs")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
#: Of a command and its PATH, that an error quotes.
MAX_SHOWN = 100
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IDENTITY_DIR = "/run/greenroom"

#: glibc has no function for it; 41 is the number of the architectures that share the generic table (arm64, riscv).
#: Source: the kernel's syscall.tbl files.
PIVOT_ROOT = {"x86_64": 155, "ppc64le": 203, "s390x": 217}.get(os.uname().machine, 41)

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """Can't go on. ``reason`` is a stable word, "" for an error of the system."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Control:
    """This side of the conversation with the agent."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self.sock = socket.socket(fileno=fd)

    def send(self, *message: str | int) -> None:
        raw = marshal.dumps(message)
        self.sock.sendall(len(raw).to_bytes(4, "little") + raw)

    def receive(self) -> Any:
        return marshal.loads(self._exactly(int.from_bytes(self._exactly(4), "little")))

    def _exactly(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = self.sock.recv(size - len(parts))
            if not part:
                os._exit(1)  # the agent is gone: so is the reason to go on
            parts += part
        return parts


def call(name: str, *args: object) -> None:
    """A system call by its C name; raises OSError with what it was for."""
    if getattr(libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{args}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    encoded = (os.fsencode(source), os.fsencode(target), kind.encode() if kind else None)
    try:
        call("mount", *encoded, ctypes.c_ulong(flags), os.fsencode(options) or None)
    except OSError as error:
        raise OSError(error.errno, f"mount {kind or 'bind'} on {target}: {os.strerror(error.errno or 0)}") from None


def unshare(flags: int) -> None:
    try:
        call("unshare", flags)
    except OSError as error:
        raise OSError(error.errno, f"unshare({flags:#x}): {os.strerror(error.errno or 0)}") from None


def escape(path: str) -> str:
    """A path as an overlayfs option. Source: Documentation/filesystems/overlayfs.rst (":", "," and "\\\\")."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


# --- run: the sandbox ---------------------------------------------------------------------------------------------


def run(control: Control, directory: str, spec: dict[str, Any]) -> NoReturn:
    os.setsid()
    enter_namespaces(control, spec["mode"])
    pid = os.fork()
    if pid:
        control.send("pid", pid)
        os._exit(0)
    become_init(control, directory, spec)


def enter_namespaces(control: Control, mode: str) -> None:
    """This process gets its own namespaces; its next child is the init of the new pid namespace."""
    if mode == "user":
        unshare(CLONE_NEWUSER)
        control.send("userns")
        control.receive()
    unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def become_init(control: Control, directory: str, spec: dict[str, Any]) -> NoReturn:
    try:
        log = os.open(f"{directory}/log.fifo", os.O_RDWR | os.O_CLOEXEC)  # both ends: never a broken pipe
        exit_fd = os.open(f"{directory}/exit", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        make_root(directory, spec)
        set_identity(spec["identity"])
        program = find_program(spec["argv"][0], spec["env"], spec["cwd"])
        control.send("ready")
        control.receive()
        for fd, standard in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, standard)
        # Blocked for good: they are waited for (`look_after`).
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        actor = os.fork()
        if actor == 0:
            start_actor(control, program, spec)
    except BaseException as error:
        report(control, error)
        os._exit(1)
    control.sock.close()
    os._exit(look_after(actor, exit_fd, spec["stop_signal"]))


def look_after(actor: int, exit_fd: int, stop_signal: int) -> int:
    """The life of an init: passes SIGTERM on as the actor's own stop signal, reaps everything, and says on disk how the
    actor ended, for an agent that was not there to see it."""
    while True:
        # Not by a handler: Python's would not run before the next child ends if the signal came between its last look
        # and the system call, and the actor would be killed for want of an answer.
        if signal.sigwait(HEARD) == signal.SIGTERM:
            os.kill(actor, stop_signal)
            continue
        while (ended := reap()) is not None:
            pid, status = ended
            if pid == actor:
                code = os.waitstatus_to_exitcode(status)
                code = code if code >= 0 else 128 - code
                os.write(exit_fd, str(code).encode())
                return code


def reap() -> tuple[int, int] | None:
    """A child that has ended, and how; None: none has (any more)."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def start_actor(control: Control, program: str, spec: dict[str, Any]) -> NoReturn:
    try:
        os.setsid()
        limit_rights(spec)
        os.execve(program, spec["argv"], spec["env"])
    except BaseException as error:
        report(control, explain_exec(error, program))
        os._exit(127)


def limit_rights(spec: dict[str, Any]) -> None:
    """The last steps before a command runs: limits, capabilities, user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    pids = spec["pids"] if hard == resource.RLIM_INFINITY else min(spec["pids"], hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (pids, pids))
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if capability not in KEPT_CAPABILITIES:
            call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    if spec["change_user"]:
        os.setgroups([])
        os.setresgid(spec["gid"], spec["gid"], spec["gid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir(spec["cwd"])
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and number not in (32, 33):
            signal.signal(number, signal.SIG_DFL)


def make_root(directory: str, spec: dict[str, Any]) -> None:
    """Overlay of the image (below) and the actor's own files (above), with /proc and a minimal /dev, as the root.

    Nothing is created below a path of the actor's before the root is changed: a symbolic link that a hostile actor
    left there must lead back into its own files, never to the host's.
    """
    root = f"{directory}/root"
    options = f"lowerdir={escape(spec['rootfs'])},upperdir={escape(directory)}/upper,workdir={escape(directory)}/work"
    # Whiteouts and opaque directories are marked with user.* attributes: the trusted.* ones need real root.
    mount("overlay", root, "overlay", MS_NODEV, f"{options},userxattr")
    host = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(root)
    call("syscall", ctypes.c_long(PIVOT_ROOT), b".", b".")  # the old root is stacked on the new one until unmounted
    os.fchdir(host)  # from here on "/x" is the sandbox's and "x" the host's
    for path, mode in (("/proc", 0o755), ("/dev", 0o755), ("/tmp", 0o1777), (IDENTITY_DIR, 0o755)):
        if not os.path.isdir(path):
            os.makedirs(path)
            os.chmod(path, mode)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in READ_ONLY_PROC:
        if os.path.exists(f"/proc/{name}"):
            bind_readonly(f"/proc/{name}", f"/proc/{name}")
    make_devices()
    share_file("/etc/resolv.conf")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    os.close(host)
    os.makedirs(spec["cwd"], exist_ok=True)


def bind_readonly(source: str, target: str) -> None:
    """Shows something of the host's. It may be owned by who the actor's root is outside, so it must not be changed."""
    mount(source, target, None, MS_BIND)
    inherited = os.statvfs(target).f_flag
    # A user namespace may add restrictions to what it inherited but drop none. Source: mount_namespaces(7).
    flags = inherited & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    flags |= MS_RELATIME if inherited & ST_RELATIME else 0
    mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def make_devices() -> None:
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k")
    for name in DEVICES:
        if os.path.exists(f"dev/{name}"):
            os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
            bind_readonly(f"dev/{name}", f"/dev/{name}")  # a device is written to all the same
    for name, kind, options in (("shm", "tmpfs", "mode=1777"), ("pts", "devpts", "newinstance,ptmxmode=0666,mode=620")):
        os.mkdir(f"/dev/{name}")
        mount(kind, f"/dev/{name}", kind, MS_NOSUID | MS_NOEXEC, options)
    os.symlink("pts/ptmx", "/dev/ptmx")
    os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")


def share_file(path: str) -> None:
    """The sandbox uses the host's network, so it looks names up where the host does."""
    if not os.path.isfile(path[1:]) or os.path.islink(path):
        return
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    bind_readonly(path[1:], path)


def set_identity(identity: dict[str, str]) -> None:
    """Who the actor is, as read-only files that are in no snapshot, and as the host name."""
    mount("tmpfs", IDENTITY_DIR, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=64k")
    for name, value in identity.items():
        with open(f"{IDENTITY_DIR}/{name}", "w") as file:
            file.write(value)
    mount("none", IDENTITY_DIR, None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=64k")
    hostname = identity["hostname"].encode()
    call("sethostname", hostname, len(hostname))


def find_program(command: str, env: dict[str, str], cwd: str) -> str:
    if "/" in command:
        candidates = [os.path.join(cwd, command)]
    else:
        candidates = [os.path.join(p or cwd, command) for p in env.get("PATH", DEFAULT_PATH).split(":")]
    for path in candidates:
        if os.path.isfile(path) and os.stat(path).st_mode & 0o111:
            return path
    where = "" if "/" in command else f" on PATH ({shown(env.get('PATH', DEFAULT_PATH))})"
    raise Refused("COMMAND_NOT_FOUND", f"the image has no program {shown(command)!r}{where}")


def shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def explain_exec(error: BaseException, program: str) -> BaseException:
    if isinstance(error, OSError) and error.filename is not None:
        return error  # not of the program: its working directory, a device
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return Refused("COMMAND_NOT_FOUND", f"the image has {program!r} but not the interpreter that it names")
    if isinstance(error, OSError) and error.errno in (errno.ENOEXEC, errno.EACCES):
        return Refused("COMMAND_NOT_EXECUTABLE", f"{program!r} can't be executed: {error.strerror}")
    return error


def report(control: Control, error: BaseException) -> None:
    if isinstance(error, Refused):
        control.send("error", error.reason, 0, str(error))
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        control.send("error", "", error.errno or 0, f"{error.strerror}{where}")
    else:
        control.send("error", "", 0, repr(error))


# --- exec: a further command --------------------------------------------------------------------------------------


def run_exec(control: Control, spec: dict[str, Any]) -> NoReturn:
    """Joins the sandbox, starts the command in a session of its own, passes SIGTERM on as SIGKILL to that session's
    process group, and ends as the command does."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC
    call("setns", spec["pidfd"], flags | (CLONE_NEWUSER if spec["mode"] == "user" else 0))
    os.close(spec["pidfd"])
    os.chdir("/")
    program = find_program(spec["argv"][0], spec["env"], spec["cwd"])
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    child = os.fork()
    if child == 0:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        start_actor(control, program, spec)
    control.sock.close()
    # Only the command may hold the pipes: their end must be seen when it closes them.
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    while (ended := reap()) is None:  # as `look_after`
        if signal.sigwait(HEARD) == signal.SIGTERM:
            kill_group(child)
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)


def kill_group(leader: int) -> None:
    for kill in (os.killpg, os.kill):  # the second for a leader that has not made its group yet
        try:
            kill(leader, signal.SIGKILL)
        except ProcessLookupError:
            pass


# --- check: can all this work here? ---------------------------------------------------------------------------


def check(control: Control, directory: str, spec: dict[str, Any]) -> NoReturn:
    """Tries the steps in a child that leaves no trace: mounts end with its namespace, files are on a tmpfs."""
    enter_namespaces(control, spec["mode"])
    pid = os.fork()
    if pid == 0:
        try:
            base = directory
            if not base:
                base = "/tmp"
                mount("tmpfs", base, "tmpfs", 0, "size=64k")
            for name in ("lower", "upper", "work", "root"):
                os.makedirs(f"{base}/{name}", exist_ok=True)
            paths = {name: f"{escape(base)}/{name}" for name in ("lower", "upper", "work")}
            options = ",".join(f"{name}dir={path}" for name, path in paths.items())
            mount("overlay", f"{base}/root", "overlay", MS_NODEV, f"{options},userxattr")
            mount("proc", f"{base}/root", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except BaseException as error:
            report(control, error)
            os._exit(1)
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) and 1)


def main() -> NoReturn:
    control = Control(int(sys.argv[1]))
    try:
        spec = control.receive()
        match spec["do"]:
            case "run":
                run(control, sys.argv[2], spec)
            case "exec":
                run_exec(control, spec)
            case "check":
                check(control, sys.argv[2], spec)
            case other:
                raise ValueError(f"unknown request {other!r}")
    except BaseException as error:
        report(control, error)
        os._exit(1)


if __name__ == "__main__":
    main()
