"""A program of some four hundred bytes that runs inside sandboxes, whatever the image holds.

It is a static ELF file that `program` makes, because an image may have no shell and no C library, and because the
host name must be right before the first instruction of the actor's own program:

    init                        wait for ever (the self-test's actor)
    init NAME                   set the host name; exit status is the errno
    init NAME COMMAND ARG...    set the host name, give up the right to do so, become the actor's user, become COMMAND

NAME that begins with ``/`` is the path of a file that holds the name: a sandbox is created before its actor is known.
"Give up" drops CAP_SYS_ADMIN and then CAP_SETPCAP from the bounding set, so that the `execve` that follows loses them
for good. It must begin as root even for another user's actor, because gVisor gives no rights to others. Exit status
127: COMMAND is not there; 126: it can't be run (as shells do).

The machine code is the assembly in ``hostname_x86_64.S`` and ``hostname_aarch64.S`` beside this file; a test assembles
them anew and compares.
"""

from __future__ import annotations

import platform
import struct

from greenroom.core.errors import FailedPrecondition

#: What the program needs to be started with, on top of the actor's own; and CAP_SETUID and CAP_SETGID.
CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETPCAP")

_EM_X86_64, _EM_AARCH64 = 62, 183
_BASE = 0x400000
_HEADERS = 64 + 56

_CODE = {
    "x86_64": (
        _EM_X86_64,
        "488b1c24488d6c24084883fb017f09b8220000000f05ebf7488b7d08803f2f75"
        "26be00000800b8020000000f0589c74883ec404889e6ba4000000031c00f0548"
        "89e74889c6eb0d31f6803c3700740548ffc6ebf5b8aa0000000f0585c00f858f"
        "0000004883fb020f8485000000bf18000000be15000000b89d0000000f0585c0"
        "7570bf18000000be08000000b89d0000000f0585c0755b31ff31f6b874000000"
        "0f0585c0754c8b3d5800000089fe89fab8770000000f0585c075378b3d3f0000"
        "0089fe89fab8750000000f0585c07522488b7d10488d7510488d54dd08b83b00"
        "00000f05bf7f00000083f8fe7408ffcfeb04f7d889c7b8e70000000f050f1f00",
    ),
    "aarch64": (
        _EM_AARCH64,
        "f30340f9f42300917f0600f10c010054000080d2010080d2020080d2030080d2"
        "280980d2010000d4faffff17810640f9240040399fbc0071a1010054600c8092"
        "0201a0d2080780d2010000d4ff0301d1e1030091020880d2e80780d2010000d4"
        "e10300aae003009107000014e00301aa010080d2046861386400003421040091"
        "fdffff17281480d2010000d4400500357f0a00f100050054000380d2a10280d2"
        "e81480d2010000d460040035000380d2010180d2e81480d2010000d4c0030035"
        "000080d2010080d2e81380d2010000d42003003575030010a00640b9e103002a"
        "e203002aa81280d2010000d440020035a00240b9e103002ae203002a681280d2"
        "010000d480010035800a40f981420091820e138b42200091a81b80d2010000d4"
        "1f080031e00f80d280000054c00f80d202000014e003004bc80b80d2010000d4",
    ),
}


def code(machine: str) -> bytes:
    """The bare machine code for ``machine`` (as `platform.machine` names it)."""
    if machine not in _CODE:
        raise FailedPrecondition(f"gVisor sandboxes need x86_64 or aarch64, this machine is {machine}")
    return bytes.fromhex(_CODE[machine][1])


def program(uid: int = 0, gid: int = 0, machine: str = "") -> bytes:
    """The program as a file: an ELF header, one segment (read and execute), the code, the actor's user and group.

    Source: elf(5).
    """
    machine = machine or platform.machine()
    text = code(machine) + struct.pack("<II", uid, gid)
    size = _HEADERS + len(text)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bit, little endian, version 1
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, _CODE[machine][0], 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return elf + segment + text
