"""A program for a Linux guest: it opens a device, makes one ioctl, and exits with the error's number."""

from __future__ import annotations

import shutil

import pytest

from vmonty.testing.nasm import assemble

# An ELF header and one program header for all of it; open(), ioctl(), exit(). Source: elf(5), syscalls(2).
PROGRAM = """
header: db 0x7f, 'ELF', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0
    dw 2, 62
    dd 1
    dq start, 64, 0
    dd 0
    dw 64, 56, 1, 0, 0, 0
    dd 1, 5
    dq 0, header, header, end - header, end - header, 4096
start:
    mov eax, 2
    lea rdi, [path]
    mov esi, {flags:#x}
    syscall
    mov edi, eax
    mov eax, 16
    mov esi, {request:#x}
    lea rdx, [argument]
    syscall
    neg eax
    mov edi, eax
    mov eax, 60
    syscall
path: db '{path}', 0
argument: {argument}
end:
"""


def ioctl_program(path: str, request: int, *words: int, flags: int = 2) -> bytes:
    """The file; *request* gets a pointer to 64-bit *words*, *flags* are open()'s (2: O_RDWR). Skips without nasm."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not on this host: apt-get install nasm")
    argument = "dq " + ", ".join(map(str, words or (0,)))
    source = PROGRAM.format(path=path, request=request, argument=argument, flags=flags)
    return assemble(source, bits=64, org=0x40_0000)
