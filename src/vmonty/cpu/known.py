"""What instructions of 64-bit code are that begin as an earlier one did.

REX, opcode, ModRM and SIB tell all of a simple instruction but its displacement and immediate, and the same of them
come again and again: what ``decode`` made of them is kept.
"""

import cython
from cython.cimports.libc.stdlib import calloc, free
from cython.cimports.vmonty.cpu.decode import (
    A_MODRM,
    C_CALL,
    C_JCC,
    C_JMP,
    C_LOOP,
    NO_REGISTER,
    ROOT,
    ROW,
    SHAPE,
    Insn,
    decode,
)


def _build():
    modrm: cython.int
    opcode_map: cython.int
    opcode: cython.int
    entry: cython.int
    for modrm in range(256):
        MODRM_MASK[modrm] = 0xFFFFFF if SHAPE[modrm] & 8 else 0xFFFF
    for opcode_map in range(2):
        for opcode in range(256):
            entry = ROOT[0][opcode_map][opcode][0]
            if entry & 0x8000 or ROW[entry].attributes & A_MODRM:
                OPCODE_MASK[opcode_map][opcode] = 0xFFFFFF
            else:
                OPCODE_MASK[opcode_map][opcode] = 0xFF


_build()


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _learn(k: cython.pointer(Known), key: uint64_t, i: cython.pointer(Insn)) -> cython.void:
    """Note what a simple instruction is."""
    size: cython.int = SHAPE[i.modrm] & 7 if i.has_memory else 0
    kills: cython.uchar = i.kills
    if i.has_memory and i.base == NO_REGISTER:
        size = 4
    if i.shift_mask:
        i.kills = ROW[i.row].flags_written | ROW[i.row].flags_undefined  # unless the count is 0
    k.shape = cython.cast(cython.pointer(Shape), cython.address(i.row))[0]
    i.kills = kills
    k.key = key
    k.immediate_at = i.length - i.immediate_size
    k.displacement_at = k.immediate_at - size
    k.displacement_mask = 0
    k.displacement_sign = 0
    k.immediate_mask = 0
    k.immediate_sign = 0
    if size:
        k.displacement_mask = ~cython.cast(uint32_t, 0) >> (32 - 8 * size)
        k.displacement_sign = cython.cast(uint32_t, 1) << (8 * size - 1)
    if i.immediate_size:
        k.immediate_mask = ~cython.cast(uint64_t, 0) >> (64 - 8 * i.immediate_size)
        if i.cls in (C_JCC, C_JMP, C_CALL, C_LOOP):
            k.immediate_sign = cython.cast(uint64_t, 1) << (8 * i.immediate_size - 1)


def decode_known(known, code, rip, i):
    """Decode an instruction of 64-bit code, by what an earlier one of the same first bytes was if there was one.

    24 bytes are there. Gives what ``decode`` does.
    """
    word: uint64_t = cython.cast(cython.pointer(uint64_t), code)[0]
    bits: uint64_t = word
    rex: cython.int = bits & 0xFF if (bits & 0xF0) == 0x40 else 0
    size: cython.int
    opcode_map: cython.int
    key: uint64_t
    k: cython.pointer(Known)
    bits >>= 8 if rex else 0
    opcode_map = (bits & 0xFF) == 0x0F
    bits >>= 8 * opcode_map
    key = bits & OPCODE_MASK[opcode_map][bits & 0xFF] & MODRM_MASK[bits >> 8 & 0xFF]
    key |= cython.cast(uint64_t, 2 + opcode_map) << 32 | cython.cast(uint64_t, rex) << 24
    k = cython.address(known[key * cython.cast(uint64_t, 0x9E3779B97F4A7C15) >> (64 - KNOWN_BITS)])
    if k.key != key:
        size = decode(code, 24, rip, 8, i)
        if size > 0 and i.simple:
            _learn(k, key, i)
        return size
    i.rip = rip
    cython.cast(cython.pointer(uint64_t), cython.address(i.bytes[0]))[0] = word
    cython.cast(cython.pointer(uint64_t), cython.address(i.bytes[8]))[0] = cython.cast(
        cython.pointer(uint64_t), code + 8
    )[0]
    cython.cast(cython.pointer(Shape), cython.address(i.row))[0] = k.shape
    i.displacement = cython.cast(
        int64_t, cython.cast(cython.pointer(uint32_t), code + k.displacement_at)[0] & k.displacement_mask
    )
    i.displacement = (i.displacement ^ k.displacement_sign) - k.displacement_sign
    bits = cython.cast(cython.pointer(uint64_t), code + k.immediate_at)[0] & k.immediate_mask
    i.immediate = (bits ^ k.immediate_sign) - k.immediate_sign
    if i.shift_mask and not i.immediate & i.shift_mask:
        i.kills = 0
    return i.length


def compare(codes: list[bytes]) -> tuple[int, int]:
    """For tests: the first of these instructions that ``decode`` sees otherwise, or -1, and how many were known.

    They have 24 bytes each; one table serves all of them, in this order.
    """
    known: cython.pointer(Known) = cython.cast(cython.pointer(Known), calloc(1 << KNOWN_BITS, cython.sizeof(Known)))
    a: Insn[2]
    n: cython.int
    k: cython.int
    m: cython.int
    hits: cython.int = 0
    buffer: cython.p_uchar
    try:
        for n in range(len(codes)):
            data: bytes = codes[n][:24].ljust(24, b"\0")
            buffer = data
            for m in range(2):
                for k in range(cython.cast(cython.int, cython.sizeof(Insn))):
                    cython.cast(cython.p_uchar, cython.address(a[m]))[k] = 0
            a[1].group_offset = n + 1  # another one comes from the table
            m = decode_known(known, buffer, 0x1000, cython.address(a[1]))
            hits += a[1].group_offset != n + 1
            a[1].group_offset = 0
            if m != decode(buffer, 24, 0x1000, 8, cython.address(a[0])):
                return n, hits
            if m <= 0:
                continue
            for k in range(cython.cast(cython.int, cython.sizeof(Insn))):
                if (
                    cython.cast(cython.p_uchar, cython.address(a[0]))[k]
                    != cython.cast(cython.p_uchar, cython.address(a[1]))[k]
                ):
                    return n, hits
        return -1, hits
    finally:
        free(known)
