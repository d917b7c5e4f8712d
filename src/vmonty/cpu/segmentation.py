"""Logical to linear addresses: bases, limits, and access checks of segments.

SDM, "Limit Checking", "Type Checking", "Canonical Addressing". The page walk comes after, in ``tlb``.
"""

import cython
from cython.cimports.vmonty.cpu.decode import NO_REGISTER, RIP_BASE
from cython.cimports.vmonty.cpu.state import (
    AR_DB,
    AR_UNUSABLE,
    FS,
    MODE_LONG64,
    MODE_REAL,
    MODE_VM86,
    SS,
    is_canonical,
    raise_error,
)


def linear_address(s, segment, offset, size, write, linear):
    """Check an access of ``size`` bytes at ``segment:offset`` and give its linear address."""
    vector: uint32_t = 12 if segment == SS else 13
    rights: uint32_t
    limit: uint64_t
    if s.mode == MODE_LONG64:
        linear[0] = offset + (s.segs[segment].base if segment >= FS else 0)
        if segment == SS and not is_canonical(s, offset):
            return raise_error(s, 12, 0)  # SDM, "Canonical Addressing"; elsewhere the access itself raises #GP
        return 0
    linear[0] = cython.cast(uint32_t, s.segs[segment].base + offset)
    rights = s.segs[segment].access_rights
    limit = s.segs[segment].limit
    if rights & AR_UNUSABLE:
        return raise_error(s, vector, 0)
    if s.mode != MODE_REAL and s.mode != MODE_VM86:
        if rights & 8:  # code
            if write or not rights & 2:
                return raise_error(s, vector, 0)
        elif write and not rights & 2:
            return raise_error(s, vector, 0)
    if not rights & 8 and rights & 4:  # expand-down
        if offset <= limit or offset + size - 1 > (cython.cast(uint64_t, 0xFFFFFFFF) if rights & AR_DB else 0xFFFF):
            return raise_error(s, vector, 0)
    elif offset + size - 1 > limit:
        return raise_error(s, vector, 0)
    return 0


def effective_address(s, i):
    """Give the offset of an instruction's memory operand, cut to its address size."""
    offset: uint64_t = cython.cast(uint64_t, i.displacement)
    if i.base == RIP_BASE:
        offset += i.rip + i.length
    elif i.base != NO_REGISTER:
        offset += s.gpr[i.base]
    if i.index != NO_REGISTER:
        offset += s.gpr[i.index] << i.scale
    if i.address_size == 4:
        return cython.cast(uint32_t, offset)
    if i.address_size == 2:
        return offset & 0xFFFF
    return offset


def operand_address(s, i, size, write, linear):
    """Give the checked linear address of an instruction's memory operand."""
    return linear_address(s, i.segment, effective_address(s, i), size, write, linear)
