// The in-sandbox program for aarch64: see hostname.py.
    ldr x19, [sp]           // argc
    add x20, sp, #8         // argv
    cmp x19, #1
    b.gt named
wait:
    mov x0, #0
    mov x1, #0
    mov x2, #0
    mov x3, #0
    mov x8, #73             // ppoll
    svc #0
    b wait
named:
    ldr x1, [x20, #8]
    ldrb w4, [x1]
    cmp w4, #'/'
    b.ne plain
    mov x0, #-100           // AT_FDCWD
    mov x2, #0x80000        // O_RDONLY | O_CLOEXEC
    mov x8, #56             // openat
    svc #0
    sub sp, sp, #64
    mov x1, sp
    mov x2, #64
    mov x8, #63             // read
    svc #0
    mov x1, x0
    mov x0, sp
    b set
plain:
    mov x0, x1
    mov x1, #0
length:
    ldrb w4, [x0, x1]
    cbz w4, set
    add x1, x1, #1
    b length
set:
    mov x8, #161            // sethostname
    svc #0
    cbnz w0, errno
    cmp x19, #2
    b.eq errno
    mov x0, #24             // PR_CAPBSET_DROP
    mov x1, #21             // CAP_SYS_ADMIN
    mov x8, #167            // prctl
    svc #0
    cbnz w0, errno
    mov x0, #24
    mov x1, #8              // CAP_SETPCAP
    mov x8, #167
    svc #0
    cbnz w0, errno
    mov x0, #0
    mov x1, #0
    mov x8, #159            // setgroups
    svc #0
    cbnz w0, errno
    adr x21, uid
    ldr w0, [x21, #4]       // gid
    mov w1, w0
    mov w2, w0
    mov x8, #149            // setresgid
    svc #0
    cbnz w0, errno
    ldr w0, [x21]
    mov w1, w0
    mov w2, w0
    mov x8, #147            // setresuid
    svc #0
    cbnz w0, errno
    ldr x0, [x20, #16]
    add x1, x20, #16
    add x2, x20, x19, lsl #3
    add x2, x2, #8
    mov x8, #221            // execve
    svc #0
    cmn w0, #2              // ENOENT
    mov x0, #127
    b.eq exit
    mov x0, #126
    b exit
errno:
    neg w0, w0
exit:
    mov x8, #94             // exit_group
    svc #0
    .balign 4
uid:                        // two words that follow the code: uid, gid
