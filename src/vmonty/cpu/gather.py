"""Gathers and masked moves: vector instructions that reach memory element by element.

A gather loads an element where the sign bit of its element of the mask is set, and clears that: after a fault or an
exit in the middle the instruction goes on where it was. SDM, "VPGATHERDD/VPGATHERQD—Gather Packed Dword Values".
A masked move touches the elements that its mask chooses and no others; translated code does it at once where all of
them are in one page. SDM, "VMASKMOV—Conditional SIMD Packed Loads and Stores", "MASKMOVDQU—Store Selected Bytes of
Double Quadword".
"""

import cython
from cython.cimports.vmonty.cpu.codecache import string_function
from cython.cimports.vmonty.cpu.decode import NO_REGISTER
from cython.cimports.vmonty.cpu.segmentation import effective_address, linear_address
from cython.cimports.vmonty.cpu.state import ACCESS_READ, ACCESS_UNALIGNED, ACCESS_WRITE, DS, misaligned, raise_error
from cython.cimports.vmonty.cpu.tlb import probe_write, read_value, write_linear


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _vectors(s: cython.pointer(CpuState), buffer: cython.p_uchar, fill: cython.int) -> cython.void:
    """Copy ymm0 to ymm15 into the buffer, or back."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    f: string_function = cython.cast(
        string_function, cython.cast(cython.p_void, c.fill_vectors if fill else c.store_vectors)
    )
    f(cython.cast(uint64_t, buffer), 0, 0)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _offset(s: cython.pointer(CpuState), i: cython.pointer(Insn), index: int64_t) -> uint64_t:
    offset: uint64_t = cython.cast(uint64_t, i.displacement) + (cython.cast(uint64_t, index) << i.scale)
    if i.base != NO_REGISTER:
        offset += s.gpr[i.base]
    return offset if i.address_size == 8 else cython.cast(uint32_t, offset)


def gather_instruction(s, i):
    """Execute one; GO_ON, or LEAVE_* with the elements before the one that left in place."""
    vectors: uint8_t[512]
    to: cython.p_uchar = cython.address(vectors[32 * i.reg])
    mask: cython.p_uchar = cython.address(vectors[32 * i.vvvv])
    indices: cython.p_uchar = cython.address(vectors[32 * i.index])
    size: cython.int = 8 if i.w else 4
    index_size: cython.int = 8 if i.opcode & 1 else 4
    count: cython.int = (32 if i.l else 16) // (max(size, index_size))
    index: int64_t
    linear: uint64_t = 0
    value: uint64_t = 0
    k: cython.int
    n: cython.int
    r: cython.int = 0
    _vectors(s, cython.address(vectors[0]), 0)
    for k in range(count):  # elements of all ones or all zeros, as a fault shows them
        for n in range(size):
            mask[k * size + n] = 0xFF if mask[k * size + size - 1] & 0x80 else 0
    for k in range(count):
        if not mask[k * size]:
            continue
        if index_size == 8:
            index = cython.cast(cython.pointer(int64_t), indices)[k]
        else:
            index = cython.cast(cython.pointer(int32_t), indices)[k]
        r = linear_address(s, i.segment, _offset(s, i, index), size, 0, cython.address(linear))
        if not r:
            r = read_value(s, linear, size, ACCESS_READ | ACCESS_UNALIGNED, cython.address(value))
        if r:
            break
        s.mmio_at = 0
        s.mmio_count = 0
        for n in range(size):
            to[k * size + n] = cython.cast(uint8_t, value >> (8 * n))
            mask[k * size + n] = 0
    if not r:
        for k in range(count * size, 32):
            to[k] = 0
        for k in range(32):
            mask[k] = 0
    _vectors(s, cython.address(vectors[0]), 1)
    return r


def masked_instruction(s, i):
    """Execute VMASKMOV or VPMASKMOV: all chosen elements or none; GO_ON or LEAVE_*."""
    vectors: uint8_t[512]
    values: uint64_t[8]
    register_: cython.p_uchar = cython.address(vectors[32 * i.reg])
    mask: cython.p_uchar = cython.address(vectors[32 * i.vvvv])
    is_write: cython.int = 1 if i.opcode & 2 else 0
    # 2C and 2E move singles, 2D and 2F doubles; 8C and 8E by VEX.W
    size: cython.int = 8 if (i.w if i.opcode & 0x80 else i.opcode & 1) else 4
    count: cython.int = (32 if i.l else 16) // size
    linear: uint64_t = 0
    k: cython.int
    n: cython.int
    r: cython.int = 0
    if i.opcode == 0x8E:
        is_write = 1
    _vectors(s, cython.address(vectors[0]), 0)
    for k in range(count):
        values[k] = 0
        if not mask[k * size + size - 1] & 0x80:
            continue
        r = linear_address(s, i.segment, effective_address(s, i) + k * size, size, is_write, cython.address(linear))
        if not r:
            if is_write:
                r = probe_write(s, linear, size, ACCESS_WRITE | ACCESS_UNALIGNED)
            else:
                r = read_value(s, linear, size, ACCESS_READ | ACCESS_UNALIGNED, cython.address(values[k]))
        if r:
            return r
    for k in range(count):
        if is_write:
            if mask[k * size + size - 1] & 0x80:
                linear_address(s, i.segment, effective_address(s, i) + k * size, size, 1, cython.address(linear))
                r = write_linear(s, linear, register_ + k * size, size, ACCESS_WRITE | ACCESS_UNALIGNED)
                if r:
                    return r
            continue
        for n in range(size):
            register_[k * size + n] = cython.cast(uint8_t, values[k] >> (8 * n))
    if not is_write:
        for k in range(count * size, 32):
            register_[k] = 0
        _vectors(s, cython.address(vectors[0]), 1)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _mmx(s: cython.pointer(CpuState), buffer: cython.p_uchar, register_: cython.int) -> cython.p_uchar:
    """Find an MMX register in an FXSAVE image, which has the x87 registers from the top of their stack on."""
    top: cython.int = buffer[3] >> 3 & 7
    return buffer + 32 + 16 * ((register_ - top) & 7)


def masked_bytes(s, i):
    """Execute MASKMOVQ or MASKMOVDQU: all bytes that the mask chooses or none; GO_ON or LEAVE_*."""
    memory: uint8_t[1088]
    buffer: cython.p_uchar = cython.cast(
        cython.p_uchar, (cython.cast(uint64_t, cython.address(memory[0])) + 63) & ~cython.cast(uint64_t, 63)
    )
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    save: string_function = cython.cast(string_function, cython.cast(cython.p_void, c.fpu[0]))
    wide: cython.int = 1 if i.pp == 1 else 0
    source: cython.p_uchar
    mask: cython.p_uchar
    base: uint64_t = s.gpr[7]
    linear: uint64_t = 0
    k: cython.int
    write: cython.int
    r: cython.int
    if wide:
        _vectors(s, buffer, 0)
        source = buffer + 32 * i.reg
        mask = buffer + 32 * i.rm
    else:
        save(cython.cast(uint64_t, buffer), 0, 0)
        source = _mmx(s, buffer, i.reg & 7)
        mask = _mmx(s, buffer, i.rm & 7)
    if misaligned(s, base, 8):
        return raise_error(s, 17, 0)
    for write in range(2):
        for k in range(16 if wide else 8):
            if not mask[k] & 0x80:
                continue
            linear = base + k
            if i.address_size != 8:
                linear &= cython.cast(uint64_t, 0xFFFF if i.address_size == 2 else 0xFFFFFFFF)
            r = linear_address(s, i.segment if i.segment_override else DS, linear, 1, 1, cython.address(linear))
            if not r and write:
                r = write_linear(s, linear, source + k, 1, ACCESS_WRITE)
            elif not r:
                r = probe_write(s, linear, 1, ACCESS_WRITE)
            if r:
                return r
    return 0
