"""ELF executables made by hand."""

from __future__ import annotations

import struct


def elf(
    bits: int, entry: int, code: bytes, *, address: int, notes: bytes = b"", zeroes: int = 0, machine: int = 0
) -> bytes:
    """One segment with *code* at physical *address*, *zeroes* bytes behind it, and perhaps a segment of notes."""
    count = 2 if notes else 1
    head, each = (64, 56) if bits == 64 else (52, 32)
    code_at = 4096
    notes_at = head + each * count
    machine = machine or (62 if bits == 64 else 3)
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    if bits == 64:
        header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, entry, head, 0, 0, head, each, count, 0, 0, 0)
        table = struct.pack("<IIQQQQQQ", 1, 5, code_at, address, address, len(code), len(code) + zeroes, 4096)
        if notes:
            table += struct.pack("<IIQQQQQQ", 4, 4, notes_at, 0, 0, len(notes), len(notes), 4)
    else:
        header = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, entry, head, 0, 0, head, each, count, 0, 0, 0)
        table = struct.pack("<IIIIIIII", 1, code_at, address, address, len(code), len(code) + zeroes, 5, 4096)
        if notes:
            table += struct.pack("<IIIIIIII", 4, notes_at, 0, 0, len(notes), len(notes), 4, 4)
    return (header + table + notes).ljust(code_at, b"\0") + code


def note(owner: bytes, kind: int, contents: bytes) -> bytes:
    """One note, padded."""
    name = owner + b"\0"
    padded = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(contents), kind) + padded + contents + bytes(-len(contents) % 4)
