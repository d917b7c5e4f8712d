"""ioeventfds that stand in guest-physical memory: the write that rings one signals its eventfd, and the guest goes on.

The kernel finds them by the address alone (handle_ept_misconfig(), KVM_FAST_MMIO_BUS), and therefore only those without
a size. Here the instruction is decoded, if it is a MOV to memory in 64-bit mode, so that size and data count too.
What is not plain is left to the emulator and the bus, in Python; for one that Python answers, the run ends behind the
store.
"""

from __future__ import annotations

import cython
from cython.cimports.posix.unistd import write
from cython.cimports.vmonty.cpu.decode import decode
from cython.cimports.vmonty.cpu.segmentation import effective_address
from cython.cimports.vmonty.cpu.state import FETCH_ENTRIES, FS, MODE_LONG64
from cython.cimports.vmonty.kvm.soft.fastpath import FAST_NONE, FAST_RESUME, FAST_USER, skip_emulated_instruction
from cython.cimports.vmonty.kvm.soft.kvm_host import pthread_mutex_lock, pthread_mutex_unlock
from cython.cimports.vmonty.kvm.soft.lapic_irq import apic_enabled


def _is_hung(k, gpa):
    """With the lock held."""
    n: uint32_t
    for n in range(k.doorbell_count):
        if k.doorbells[n].gpa == gpa:
            return True
    return False


def _ring(a, gpa, size, value):
    """ioeventfd_write() of the first that takes it. With the lock held."""
    k: cython.pointer(KvmArch) = a.kvm
    n: uint32_t
    one: uint64_t = 1
    ready: pollfd
    bell: cython.pointer(KvmDoorbell)
    for n in range(k.doorbell_count):
        bell = cython.address(k.doorbells[n])
        if bell.gpa != gpa or (bell.size and bell.size != size) or (bell.matches and bell.datamatch != value):
            continue
        if bell.calls:
            a.rung = bell.fd
            return True
        ready.fd = bell.fd
        ready.events = POLLOUT
        if poll(cython.address(ready), 1, 0) == 1:  # else its counter is at the limit: it is loud enough
            write(bell.fd, cython.address(one), 8)
        return True
    return False


def _store_of(s, i):
    """Decode the instruction at rip, in a page that is in the fetch TLB as a rule: whether it is a plain store."""
    va: uint64_t = s.rip
    room: cython.int = 4096 - cython.cast(cython.int, va & 0xFFF)
    page = cython.address(s.fetch[1 if s.cpl == 3 else 0][(va >> 12) & (FETCH_ENTRIES - 1)])
    if s.mode != MODE_LONG64 or page.tag != (va & ~cython.cast(uint64_t, 0xFFF) | 1) or page.host == 0:
        return False
    code: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), page.host + (va & 0xFFF))
    if decode(code, min(room, 15), va, 8, i) <= 0 or i.map or i.vex or i.fault or i.rep or i.lock:
        return False
    return i.has_memory != 0 and i.opcode in (MOV_STORE_BYTE, MOV_STORE, MOV_IMMEDIATE_BYTE, MOV_IMMEDIATE)


def _stored(s, i, size):
    """What it stores, in *size* bytes."""
    value: uint64_t
    if i.opcode == MOV_IMMEDIATE_BYTE or i.opcode == MOV_IMMEDIATE:
        value = i.immediate
        if size == 8:
            value = cython.cast(uint64_t, cython.cast(int64_t, cython.cast(int32_t, value)))
    elif size == 1 and i.rex == 0 and i.reg >= 4:
        value = s.gpr[i.reg - 4] >> 8  # AH, CH, DH, BH
    else:
        value = s.gpr[i.reg]
    return value if size == 8 else value & ((cython.cast(uint64_t, 1) << (8 * size)) - 1)


def fastpath_doorbell(a, s, gpa):
    """handle_ept_misconfig(), of an address where eventfds are registered."""
    k: cython.pointer(KvmArch) = a.kvm
    i: Insn
    size: uint32_t
    linear: uint64_t
    rung: cython.bint = False
    if k.doorbell_count == 0:
        return FAST_NONE
    if a.apic != cython.NULL and apic_enabled(a.apic) and (a.apic.apic_base ^ gpa) >> 12 == 0:
        return FAST_NONE
    pthread_mutex_lock(cython.address(k.doorbell_lock))
    if _is_hung(k, gpa) and _store_of(s, cython.address(i)):
        size = 1 if i.opcode == MOV_STORE_BYTE or i.opcode == MOV_IMMEDIATE_BYTE else i.operand_size
        linear = effective_address(s, cython.address(i)) + (s.segs[i.segment].base if i.segment >= FS else 0)
        # All of the operand lies there: it is no part of one that crosses into the page.
        if (linear ^ gpa) & 0xFFF == 0 and (gpa & 0xFFF) + size <= 4096:
            rung = _ring(a, gpa, size, _stored(s, cython.address(i), size))
    pthread_mutex_unlock(cython.address(k.doorbell_lock))
    if not rung:
        return FAST_NONE
    s.exit.instruction_length = i.length
    skip_emulated_instruction(s)
    return FAST_RESUME if a.rung < 0 else FAST_USER
