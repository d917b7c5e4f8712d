"""Media that say their name when a BIOS starts them."""

from __future__ import annotations

import struct

from vmonty.testing.nasm import assemble

PROGRAM = """
    xor ax, ax
    mov ds, ax
    mov si, text
print:
    lodsb
    test al, al
    jz stop
    mov ah, 0x0e
    mov bx, 7
    int 0x10
    jmp print
stop:
    hlt
    jmp stop
text: db 'this is @NAME@', 13, 10, 0
    times 510 - ($ - $$) db 0
    dw 0xaa55
"""
SECTOR, CATALOGUE, IMAGE = 2048, 19, 20


def disk(name: str) -> bytes:
    """A disk of 1 MiB whose boot sector prints "this is NAME"."""
    return assemble(PROGRAM.replace("@NAME@", name), org=0x7C00).ljust(1 << 20, b"\0")


def disc(name: str) -> bytes:
    """A CD with such a boot image, without emulation. El Torito 1.0, "Booting Catalog", "Boot Record Volume"."""
    image = bytearray(64 * SECTOR)

    def put(sector: int, data: bytes) -> None:
        image[sector * SECTOR : sector * SECTOR + len(data)] = data

    put(16, b"\1CD001\1")
    put(17, b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", CATALOGUE))
    put(18, b"\xffCD001\1")
    validation = bytearray(b"\1\0\0\0" + bytes(24) + b"\0\0\x55\xaa")
    struct.pack_into("<H", validation, 28, -sum(struct.unpack("<16H", validation)) & 0xFFFF)
    put(CATALOGUE, bytes(validation) + struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, IMAGE))
    put(IMAGE, disk(name)[:512])
    return bytes(image)
