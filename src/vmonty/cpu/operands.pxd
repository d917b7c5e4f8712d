"""Memory operands, and instructions that are copied with their operands rewritten."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from vmonty.cpu.assembler cimport NONE
from vmonty.cpu.decode cimport Insn
from vmonty.cpu.stubs cimport displacement
from vmonty.cpu.translate cimport Ea, Work

cdef enum:
    S0 = 1                   # rcx
    S1 = 12                  # r12
    S2 = 15                  # r15
    RBP_HOST = 5
    GUEST_RSP = 13           # where guest rsp lives
    GUEST_RCX = 14


cdef inline int host(int g) noexcept nogil:
    """Give the host register of guest register ``g``, or NONE when it lives in the state (or ``g`` is RIP_BASE)."""
    cdef int h = 0xBA9876FD32E0ULL >> (4 * g & 63) & 15
    return NONE if g >= 12 or h == 15 else h


cdef inline int32_t home(Work *w, int g) noexcept nogil:
    """Give the displacement from rbp of a guest register's place in the state."""
    return displacement(w.s, &w.s.gpr[g])


cdef void ea_of(Work *w, Insn *i, Ea *ea) noexcept nogil
cdef void ea_stack(Work *w, int64_t displacement, Ea *ea) noexcept nogil
cdef void emit_ea(Work *w, Ea *ea) noexcept nogil
cdef int new_slot(Work *w, int size) noexcept nogil
cdef int32_t slot_field(Work *w, int slot, int field) noexcept nogil
cdef void emit_slot_check(Work *w, int slot, uint32_t what, Ea *ea, int write) noexcept nogil
cdef void emit_access(Work *w, Insn *i, Ea *ea, int size, int access, int stack) noexcept nogil
cdef void emit_commit(Work *w, int access) noexcept nogil
cdef void emit_copy(Work *w, Insn *i) noexcept nogil
cdef void access_op(Work *w, int prefix, int wide, int opcode, int reg) noexcept nogil
cdef void to_one_register(Work *w, int reg) noexcept nogil


cdef inline void move(Work *w, Insn *i) noexcept nogil:
    """Emit an instruction that means here what it means in the guest.

    Without REX, numbers 4 to 7 of byte registers are AH, CH, DH, BH: 6 and 7 lie in rdx and rbx either way.
    """
    (<uint64_t *>w.a.at)[0] = (<uint64_t *>&i.bytes[0])[0]
    (<uint64_t *>w.a.at)[1] = (<uint64_t *>&i.bytes[8])[0]
    w.a.at += i.length
    w.held = w.kept
