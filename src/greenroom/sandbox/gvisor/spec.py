"""The OCI bundle of a sandbox: ``config.json`` for `runsc create`. Source: OCI runtime specification 1.0.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greenroom.core.errors import FailedPrecondition
from greenroom.sandbox.gvisor import hostname
from greenroom.sandbox.gvisor.rootfs import DEFAULT_PATH, find_command
from greenroom.sandbox.port import SandboxClass

#: Where a sandbox finds who it is: the files name, namespace, uid, generation and hostname. The mount point is the one
#: thing that is ever added to an image's tree: gVisor's file server makes the empty directory if it is not there.
IDENTITY_MOUNT = "/run/greenroom"
#: The same once more, for our own program, which runs with rights that the actor must not get (`naming`): nothing on
#: this path can be moved away or replaced from inside, because both parts are mount points. ``/run`` is the image's.
INIT_MOUNT = "/dev/.greenroom"
INIT = f"{INIT_MOUNT}/init"
#: What root inside a sandbox may do there: file ownership, other users, low ports. Less than Docker's set.
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
)
#: Numbers of the capabilities that are used here. Source: linux/capability.h
_BITS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_SYS_ADMIN": 21,
}
#: Open files of one process inside; gVisor's own count, the host's limit is not touched.
OPEN_FILES = 65_536
#: What a sandbox is called before its actor is known; the actor never sees it.
UNNAMED = "greenroom"


def mask(names: tuple[str, ...]) -> int:
    return sum(1 << _BITS[name] for name in names)


def environment(cls: SandboxClass) -> dict[str, str]:
    """The class's, with a PATH and a HOME if it has none."""
    return {"PATH": DEFAULT_PATH, "HOME": "/root" if cls.uid == 0 else "/", **dict(cls.env)}


def config(cls: SandboxClass, identity: Path, netns: str = "") -> dict[str, Any]:
    """The specification of a sandbox of class ``cls``.

    It begins as `hostname.program`, which makes itself the actor's command: see there. ``netns``: path of the network
    namespace, for the command line; otherwise the network comes over the control socket.

    Raises:
        FailedPrecondition: the image lacks the command (reason ``COMMAND_NOT_FOUND``), or has a link for ``/dev``
            (``IMAGE_INVALID``).
    """
    env = environment(cls)
    if not cls.argv:
        raise FailedPrecondition(
            "neither the image nor the template says what to run; set the template's command",
            reason="COMMAND_NOT_FOUND",
        )
    command = find_command(cls.rootfs, cls.argv[0], env["PATH"], cls.cwd)
    if (cls.rootfs / "dev").is_symlink():
        raise FailedPrecondition("the image's /dev is a link; make it a directory there", reason="IMAGE_INVALID")
    caps = sorted({*CAPABILITIES, *hostname.CAPABILITIES})
    network = {"type": "network", "path": netns} if netns else {"type": "network"}
    return {
        "ociVersion": "1.0.2",
        "hostname": UNNAMED,
        # Writable: writes go to an overlay in the sandbox's own memory.
        "root": {"path": str(cls.rootfs), "readonly": False},
        "process": {
            "args": [INIT, f"{INIT_MOUNT}/hostname", command, *cls.argv[1:]],
            "cwd": cls.cwd or "/",
            "env": [f"{k}={v}" for k, v in env.items()],
            "user": {"uid": 0, "gid": 0},  # until it becomes the actor's command, as the actor's user
            "noNewPrivileges": True,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": OPEN_FILES, "hard": OPEN_FILES}],
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "nodev"]},
            *(
                {
                    "destination": destination,
                    "type": "bind",
                    "source": str(identity),
                    "options": ["rbind", "ro", "nosuid", "nodev"],
                }
                for destination in (IDENTITY_MOUNT, INIT_MOUNT)
            ),
        ],
        "linux": {"namespaces": [*({"type": t} for t in ("pid", "ipc", "uts", "mount")), network]},
    }
