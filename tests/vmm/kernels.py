"""Kernels of a few instructions: bzImages made by hand, whose 64-bit entry is a program for nasm."""

from __future__ import annotations

import struct

from vmonty.testing.nasm import assemble

LOAD_ADDRESS = 0x20_0000
ENTRY = LOAD_ADDRESS + 0x200
MEMORY = 8 << 20

# What every program below may use. rsi is the zero page, as Linux gets it.
PROLOGUE = """
    mov rsp, 0x300000
    jmp main
print:                          ; rbx: text, which a zero byte ends
    mov dx, 0x3f8
.next:
    mov al, [rbx]
    inc rbx
    test al, al
    jz .done
    out dx, al
    jmp .next
.done:
    ret
power_off:
    mov dx, 0x604
    mov ax, (5 << 10) | (1 << 13)
    out dx, ax
halt:
    cli
    hlt
    jmp halt
main:
"""

HELLO = "mov rbx, text\ncall print\njmp power_off\ntext: db 'hello from CPL 0', 10, 0"
RESET = "mov al, 0xfe\nout 0x64, al\njmp halt"
TRIPLE_FAULT = "mov rax, 0x1122334455667788\nlidt [none]\nud2\nnone: times 10 db 0"
HALT = "mov rbx, text\ncall print\njmp halt\ntext: db 'halting', 10, 0"
SPIN = "mov rbx, text\ncall print\nagain: jmp again\ntext: db 'spinning', 10, 0"

# Prints the command line that the zero page points to.
COMMAND_LINE = "mov ebx, [rsi + 0x228]\ncall print\njmp power_off"

# Echoes what comes in on COM1, by polling with the receive interrupt on; q powers off, ! is a triple fault.
ECHO = """
    mov dx, 0x3fc
    mov al, 0x0b
    out dx, al
    mov dx, 0x3f9
    mov al, 1
    out dx, al
    mov rbx, ready
    call print
again:
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz again
    mov dx, 0x3f8
    in al, dx
    out dx, al
    cmp al, 'q'
    je power_off
    cmp al, '!'
    jne again
    lidt [none]
    ud2
none: times 10 db 0
ready: db 'ready', 10, 0
"""

# Starts processor 1 in real mode, by INIT and SIPI; it says so in memory, then both print.
TWO_PROCESSORS = """
    mov rsi, trampoline
    mov rdi, 0x8000
    mov rcx, 64
    rep movsb
    mov dword [0x9000], 0
    mov rbx, 0xfee00000
    mov eax, 1 << 24
    mov [rbx + 0x310], eax
    mov dword [rbx + 0x300], 0x4500     ; INIT
    mov [rbx + 0x310], eax
    mov dword [rbx + 0x300], 0x4608     ; SIPI to 0x8000
starting:
    pause
    cmp dword [0x9000], 0x31
    jne starting
    mov rbx, text
    call print
    jmp power_off
text: db 'both run', 10, 0
trampoline:
bits 16
    xor ax, ax
    mov ds, ax
    mov dx, 0x3f8
    mov al, '1'
    out dx, al
    mov dword [0x9000], 0x31
stop:
    cli
    hlt
    jmp stop
bits 64
"""


def bzimage(program: bytes, **changes: int) -> bytes:
    """A kernel that begins with *program*; *changes* are header fields by boot.rst's names, to be different."""
    fields = {
        "setup_sects": 1, "syssize": -(-(0x200 + len(program)) // 16), "boot_flag": 0xAA55, "jump": 0x6AEB,
        "version": 0x20F, "loadflags": 1, "initrd_addr_max": 0x7FFF_FFFF, "kernel_alignment": LOAD_ADDRESS,
        "relocatable_kernel": 1, "xloadflags": 1, "cmdline_size": 2047, "pref_address": LOAD_ADDRESS,
        "init_size": 0x20_0000,
    } | changes  # fmt: skip
    setup = bytearray(512 * (fields["setup_sects"] + 1))
    setup[0x202:0x206] = b"HdrS"
    for name, (offset, form) in HEADER_FIELDS.items():
        struct.pack_into("<" + form, setup, offset, fields[name])
    return bytes(setup) + bytes(0x200) + program


HEADER_FIELDS = {
    "setup_sects": (0x1F1, "B"), "syssize": (0x1F4, "I"), "boot_flag": (0x1FE, "H"), "jump": (0x200, "H"),
    "version": (0x206, "H"), "loadflags": (0x211, "B"), "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"), "relocatable_kernel": (0x234, "B"), "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"), "pref_address": (0x258, "Q"), "init_size": (0x260, "I"),
}  # fmt: skip


def kernel(source: str) -> bytes:
    """A bzImage of one of the programs above. Raises UsageError where nasm is missing."""
    return bzimage(assemble(PROLOGUE + source, 64, ENTRY))
