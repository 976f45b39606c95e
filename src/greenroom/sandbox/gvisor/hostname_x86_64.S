# The in-sandbox program for x86_64: see hostname.py.  as -o x.o hostname_x86_64.S && objcopy -O binary -j .text x.o x.bin
.intel_syntax noprefix
    mov rbx, [rsp]          # argc
    lea rbp, [rsp+8]        # argv
    cmp rbx, 1
    jg named
wait:
    mov eax, 34             # pause
    syscall
    jmp wait
named:
    mov rdi, [rbp+8]
    cmp byte ptr [rdi], '/'
    jne plain
    mov esi, 0x80000        # O_RDONLY | O_CLOEXEC
    mov eax, 2              # open
    syscall
    mov edi, eax
    sub rsp, 64
    mov rsi, rsp
    mov edx, 64
    xor eax, eax            # read
    syscall
    mov rdi, rsp
    mov rsi, rax
    jmp set
plain:
    xor esi, esi
length:
    cmp byte ptr [rdi+rsi], 0
    je set
    inc rsi
    jmp length
set:
    mov eax, 170            # sethostname
    syscall
    test eax, eax
    jnz errno
    cmp rbx, 2
    je errno
    mov edi, 24             # PR_CAPBSET_DROP
    mov esi, 21             # CAP_SYS_ADMIN
    mov eax, 157            # prctl
    syscall
    test eax, eax
    jnz errno
    mov edi, 24
    mov esi, 8              # CAP_SETPCAP
    mov eax, 157
    syscall
    test eax, eax
    jnz errno
    xor edi, edi
    xor esi, esi
    mov eax, 116            # setgroups
    syscall
    test eax, eax
    jnz errno
    mov edi, [rip+gid]
    mov esi, edi
    mov edx, edi
    mov eax, 119            # setresgid
    syscall
    test eax, eax
    jnz errno
    mov edi, [rip+uid]
    mov esi, edi
    mov edx, edi
    mov eax, 117            # setresuid
    syscall
    test eax, eax
    jnz errno
    mov rdi, [rbp+16]
    lea rsi, [rbp+16]
    lea rdx, [rbp+rbx*8+8]
    mov eax, 59             # execve
    syscall
    mov edi, 127
    cmp eax, -2             # ENOENT
    je exit
    dec edi
    jmp exit
errno:
    neg eax
    mov edi, eax
exit:
    mov eax, 231            # exit_group
    syscall
    .balign 4
uid:                        # two words that follow the code
.equ gid, uid + 4
