"""VPGATHER and VGATHER: loads of vector elements from addresses in a vector.

An element is loaded where the sign bit of its element of the mask is set, and that is cleared then: after a fault or an
exit in the middle the instruction goes on where it was. SDM, "VPGATHERDD/VPGATHERQD—Gather Packed Dword Values".
"""

import cython
from cython.cimports.vmonty.cpu.codecache import string_function
from cython.cimports.vmonty.cpu.decode import NO_REGISTER
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.state import ACCESS_READ
from cython.cimports.vmonty.cpu.tlb import read_value


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
            r = read_value(s, linear, size, ACCESS_READ, cython.address(value))
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
