"""Operands of instructions that helpers execute: what ModRM names, and how VM exits report it."""

import cython
from cython.cimports.vmonty.cpu.decode import (
    RIP_BASE,
)
from cython.cimports.vmonty.cpu.segmentation import operand_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_READ,
    ACCESS_WRITE,
)
from cython.cimports.vmonty.cpu.tlb import read_value, write_value


def read_rm(s, i, size, value):
    linear: uint64_t = 0
    r: cython.int
    if not i.has_memory:
        value[0] = get_register(s, i.rm, size)
        return 0
    r = operand_address(s, i, size, 0, cython.address(linear))
    if r:
        return r
    return read_value(s, linear, size, ACCESS_READ, value)


def write_rm(s, i, size, value):
    linear: uint64_t = 0
    r: cython.int
    if not i.has_memory:
        put_register(s, i.rm, value, size)
        return 0
    r = operand_address(s, i, size, 1, cython.address(linear))
    if r:
        return r
    return write_value(s, linear, size, ACCESS_WRITE, value)


def displacement(i):
    """Give what a VM exit reports as the exit qualification of a memory operand."""
    if not i.has_memory:
        return 0
    if i.base == RIP_BASE:
        return cython.cast(uint64_t, i.displacement) + i.rip + i.length
    return cython.cast(uint64_t, i.displacement)


def instruction_info(i):
    """Give the VM-exit instruction information. SDM, "Information for VM Exits Due to Instruction Execution"."""
    word: uint32_t = 0
    digit: uint32_t = i.modrm >> 3 & 7
    if i.has_memory:
        word = i.scale | (0 if i.address_size == 2 else (1 << 7 if i.address_size == 4 else 2 << 7))
        word |= cython.cast(uint32_t, i.segment & 7) << 15
        word |= (cython.cast(uint32_t, i.index) << 18) if i.index >= 0 else (1 << 22)
        word |= (cython.cast(uint32_t, i.base) << 23) if i.base >= 0 and i.base < 16 else (1 << 27)
    else:
        word = (1 << 10) | (cython.cast(uint32_t, i.rm) << 3)
    if i.map == 2:  # INVPCID and its like: the register operand
        word |= cython.cast(uint32_t, i.reg) << 28
    elif i.opcode == 1:  # SGDT, SIDT, LGDT, LIDT
        word |= (digit & 3) << 28
        if i.operand_size != 2:
            word |= 1 << 11
    else:  # SLDT, STR, LLDT, LTR
        word |= (digit & 3) << 28
    return word
