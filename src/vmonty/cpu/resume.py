"""How a processor goes on behind an instruction that ended its block.

System calls, returns from handlers, loads of control registers: the next block is in the jump cache most of the time,
and then the dispatcher need not be asked. Whatever is out of the ordinary is left to it.
"""

import cython
from cython.cimports.vmonty.cpu.boundary import data_trap
from cython.cimports.vmonty.cpu.codecache import CodeCache, jump_cache_clear, shadow_reset
from cython.cimports.vmonty.cpu.decode import Insn
from cython.cimports.vmonty.cpu.mmio import mmio_done
from cython.cimports.vmonty.cpu.state import (
    FLAG_RF,
    FLAG_TF,
    JUMP_CACHE_ENTRIES,
    LEAVE_JUMP,
    LEAVE_NEXT,
    MODE_LONG64,
    SHADOW_MOV_SS,
    SHADOW_STI,
)
from cython.cimports.vmonty.cpu.svm_exit import V_IRQ, svm_of
from cython.cimports.vmonty.cpu.system import execute
from cython.cimports.vmonty.cpu.vmx_exit import (
    GUEST_VMX,
    PROC_INTERRUPT_WINDOW,
    PROC_NMI_WINDOW,
    vmx_of,
)


def new_key(s):
    """Drop what the old mode's predictions say: translations of another key must not be reached by them."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    if (s.last_key ^ s.block_key) & ~cython.cast(uint32_t, 0x38):
        jump_cache_clear(s)
    s.last_key = s.block_key
    s.lookup_now = c.lookup[s.tlb_set]
    shadow_reset(s)


def cached_code(s):
    """Give the translation of rip from the jump cache, which serves 64-bit mode only; 0 when it has none."""
    h: cython.int = (s.rip >> 2) & (JUMP_CACHE_ENTRIES - 1)
    if s.mode != MODE_LONG64 or s.jump_negated[s.tlb_set][h] + s.rip:
        return 0
    return s.jump_code[s.tlb_set][h]


def _undisturbed(s):
    """May the next block run at once? True only when the dispatcher would find nothing to do in front of it.

    What the VMX-preemption timer is due for has cleared the run flag.
    """
    if (
        s.run == 0
        or s.event.pending
        or s.mmio_writes_count
        or s.code_page_written
        or s.interrupt_line | s.nmi_line | s.init_line | s.startup_line | s.pending_debug | s.activity
        or s.interruptibility & (SHADOW_STI | SHADOW_MOV_SS)
        or s.rflags & FLAG_TF
        or s.breakpoints | s.monitor_trap | s.observe | s.careful_next | s.alignment
    ):
        return False
    if s.guest_mode == GUEST_VMX:
        return vmx_of(s).processor & (PROC_INTERRUPT_WINDOW | PROC_NMI_WINDOW) == 0
    return s.guest_mode == 0 or svm_of(s).int_ctl & V_IRQ == 0


def execute_system(s, number):
    """Execute an instruction that ends its block; gives the code to go on with, or 0 to ask the dispatcher."""
    c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), s.translator)
    i: cython.pointer(Insn) = cython.address(c.side[number])
    guest: uint32_t = s.guest_mode
    r: cython.int
    s.rip = i.rip
    s.slow_host_rip = 0
    s.watch_hits = 0
    r = execute(s, i)
    if r == 0 or r == LEAVE_NEXT:
        s.rip = i.rip + i.length
        r = LEAVE_JUMP
    s.leave_code = r
    if r != LEAVE_JUMP:
        return 0
    mmio_done(s)
    data_trap(s)
    if s.guest_mode != guest or not _undisturbed(s):
        return 0
    s.rflags &= ~cython.cast(uint64_t, FLAG_RF)  # it has nothing to suppress
    if s.block_key != s.last_key:
        new_key(s)
    return cached_code(s)
