"""KVM_RUN once more after an exit to user space that fastpath.py made, without what Python does around a run.

The vCPU has not been touched since (any other ioctl of it ends that), and who changes something for it from elsewhere
kicks it: that is a request. What is left of the prologue are the words of kvm_run that user space may write.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.kvm.soft.fastpath import COUNT_EXITS
from cython.cimports.vmonty.kvm.soft.kvm_host import REQUEST_HOST
from cython.cimports.vmonty.kvm.soft.lapic_irq import kvm_apic_has_interrupt
from cython.cimports.vmonty.kvm.soft.seats import Seat
from cython.cimports.vmonty.kvm.soft.vcpu_arch import VcpuArch

REFUSED, EXITED, USER_EXIT, USER_EXIT_AND_MORE = range(4)


def _ready(a):
    run: cython.pointer(uint8_t) = a.run
    sync: cython.pointer(uint64_t) = cython.cast(cython.pointer(uint64_t), run + RUN_SYNC_REGS)
    if not a.reenter or a.enter == cython.NULL or a.requests & REQUEST_HOST or a.flush_requested:
        return False
    if run[RUN_IMMEDIATE_EXIT] or sync[0] | sync[1]:
        return False
    if a.user_injects and run[RUN_REQUEST_WINDOW]:
        return False
    if a.pv_eoi and a.apic != cython.NULL and kvm_apic_has_interrupt(a.apic) >= 0:
        return False
    return a.apic != cython.NULL or cython.cast(cython.pointer(uint64_t), run + RUN_CR8)[0] == a.cr8


def reenter(arch: VcpuArch, thread: cython.ulong) -> int:
    """KVM_RUN, if it needs no Python before the guest is entered: with the GIL up to there, which makes it one step.

    REFUSED: nothing has happened. USER_EXIT: back to user space, all is done; ..._AND_MORE: requests or vCPUs wait.
    EXITED: an exit for Python, which now is where the vendor's run() ends, on the processor.
    """
    a: cython.pointer(KvmVcpuArch) = cython.address(arch.a)
    seat: Seat = arch.seat
    if not _ready(a) or seat is None or seat.running or seat.pool.contended or not seat.online:
        return 0
    if arch.cpu.observer is not None:
        return 0
    seat.running = True
    a.reenter = 0
    a.runner = thread
    a.in_guest = 1
    a.processor.host_generation += 1  # vmonty.cpu.core.Cpu.host_had_control()
    with cython.nogil:
        a.outcome = a.enter(a)
    a.in_guest = 0
    if not a.user_exit:
        return 1
    a.user_exit = 0
    a.counters[COUNT_EXITS] += 1
    a.reenter = 1
    a.runner = 0
    seat.running = False
    if a.requests & REQUEST_HOST or seat.pool.contended or not seat.online:
        return 3
    return 2
