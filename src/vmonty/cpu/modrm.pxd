"""Operands of instructions that helpers execute."""

from libc.stdint cimport uint32_t, uint64_t

from vmonty.cpu.decode cimport Insn
from vmonty.cpu.state cimport CpuState

cdef int read_rm(CpuState *s, Insn *i, int size, uint64_t *value) noexcept nogil
cdef int write_rm(CpuState *s, Insn *i, int size, uint64_t value) noexcept nogil
# What VM exits report: the exit qualification of a memory operand, and the instruction information.
cdef uint64_t displacement(Insn *i) noexcept nogil
cdef uint32_t instruction_info(Insn *i) noexcept nogil


cdef inline uint64_t get_register(CpuState *s, int g, int size) noexcept nogil:
    if size == 8:
        return s.gpr[g]
    if size == 4:
        return <uint32_t> s.gpr[g]
    if size == 2:
        return s.gpr[g] & 0xFFFF
    return s.gpr[g] & 0xFF


cdef inline void put_register(CpuState *s, int g, uint64_t value, int size) noexcept nogil:
    if size == 8:
        s.gpr[g] = value
    elif size == 4:
        s.gpr[g] = <uint32_t> value
    elif size == 2:
        s.gpr[g] = (s.gpr[g] & ~(<uint64_t> 0xFFFF)) | (value & 0xFFFF)
    else:
        s.gpr[g] = (s.gpr[g] & ~(<uint64_t> 0xFF)) | (value & 0xFF)
