"""The second vCPU of ``--vcpus 2``: it runs, on a thread of its own, while a test drives the first.

It has a slot with its own memory, far above the test's, and from there it does what a busy processor does to the
others: it writes its pages, reads all of the test's, drops translations, takes the interrupts of its local APIC's timer
where there is an irqchip, and exits to user space now and then. It writes nothing that a test looks at.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmonty.base.errors import KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.flags import KVM_MP_STATE_RUNNABLE
from vmonty.testing.guests import CODE64, RAM_SIZE, describe, enter_long, identity_map
from vmonty.testing.nasm import assemble

from .irq_guests import APIC_LVTT, APIC_ON, APIC_TDCR, APIC_TMICT, EOI, TIMER_VECTOR, apic_write
from .runner import WAIT_S

# An APIC ID, a slot and an address that no test uses.
ID, SLOT, BASE = 62, 300, 0x6000_0000
# What lies from BASE on: code, interrupt table, descriptors, page tables, the end of the stack, pages to write to.
IDT, GDT, TABLES, STACK, PAGES = 0x1000, 0x2000, 0x3000, 0x10000, 0x10000
SIZE = 0x20000
HANDLER, TICKS = 0x800, 0xF00
PORT = 0xE8
PERIODIC, PERIOD_NS = 1 << 17, 5_000_000
TIMER = "".join(
    apic_write(register, value)
    for register, value in ((APIC_TDCR, 0xB), (APIC_LVTT, PERIODIC | TIMER_VECTOR), (APIC_TMICT, PERIOD_NS))
)
# How long to wait before memory is tried again that a test has taken away.
LOST_S = 0.002


def program(chipped: bool) -> str:
    """What it does for ever; *chipped*: with a periodic timer."""
    return f"""
        {APIC_ON + TIMER + "sti" if chipped else ""}
    again:
        out {PORT:#x}, al
        mov ebp, 4
    rounds:
        mov edi, {BASE + PAGES:#x}
    write:
        lock inc dword [rdi]
        invlpg [rdi]
        add edi, 4096
        cmp edi, {BASE + SIZE:#x}
        jb write
        xor esi, esi
    read:
        mov eax, [rsi]
        add esi, 4096
        cmp esi, {RAM_SIZE:#x}
        jb read
        mov rax, cr3
        mov cr3, rax
        dec ebp
        jnz rounds
        jmp again
    """


class SecondVcpu:
    """*vm*'s, on a thread. It has begun when this is made."""

    def __init__(self, vm: Vm, vcpu: Vcpu, chipped: bool) -> None:
        self.vcpu = vcpu
        self.ram = Ram(SIZE)
        self.failure: BaseException | None = None
        self._turns = threading.Semaphore(0)
        self._ended = False
        vm.set_user_memory_region(SLOT, BASE, self.ram)
        self._load(chipped)
        self._thread = threading.Thread(target=self._work, name="second vCPU")
        self._thread.start()
        self.turn()

    def turn(self) -> None:
        """Wait for one turn of its program that has not been waited for."""
        while not self._turns.acquire(timeout=0.1):
            assert self._thread.is_alive(), f"the second vCPU has ended: {self.failure!r}"

    @property
    def ticks(self) -> int:
        """How many interrupts of its timer it has had."""
        return self.ram.read_u32(TICKS)

    def _load(self, chipped: bool) -> None:
        ram, vcpu = self.ram, self.vcpu
        ram.write(0, assemble(program(chipped), 64, BASE))
        ram.write(
            HANDLER,
            assemble(f"push rbx\n lock inc dword [abs {BASE + TICKS}]\n {EOI} pop rbx\n iretq", 64, BASE + HANDLER),
        )
        address = BASE + HANDLER
        gate = struct.pack("<HHHHQ", address & 0xFFFF, CODE64, 0x8E00, address >> 16, 0)
        ram.write(IDT + 16 * TIMER_VECTOR, gate)
        ram.write(GDT, struct.pack("<4Q", 0, 0, 0x00CF93000000FFFF, 0x00AF9B000000FFFF))
        ram.write(TABLES, identity_map(BASE + TABLES))
        sregs = vcpu.get_sregs()
        sregs.cr0 = 0x80050033
        enter_long(sregs, 0)
        sregs.cr3 = BASE + TABLES
        sregs.gdt.base, sregs.gdt.limit = BASE + GDT, 0x1F
        sregs.idt.base, sregs.idt.limit = BASE + IDT, 0xFFF
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = BASE, BASE + STACK, 2
        vcpu.set_regs(regs)
        if chipped:
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)

    def _work(self) -> None:
        try:
            while not self._ended:
                self._turn()
        except BaseException as error:
            self.failure = error

    def _turn(self) -> None:
        """To its next exit. What a test has taken away is read as a device that nobody answers for, and goes on."""
        try:
            reason = self.vcpu.run()
        except KvmError as error:
            if error.errno != errno.EFAULT:
                raise
            time.sleep(LOST_S)
            return
        assert reason in (Exit.IO, Exit.MMIO, Exit.INTR), describe(self.vcpu, reason)
        if reason is Exit.IO:
            self._turns.release()

    def end(self) -> None:
        """Out of the guest. Raises what went wrong there."""
        self._ended = True
        end = time.monotonic() + WAIT_S
        while self._thread.is_alive() and time.monotonic() < end:
            self.vcpu.kick()
            self._thread.join(0.1)
        assert not self._thread.is_alive(), "the second vCPU still runs"
        if self.failure is not None:
            raise self.failure


@contextmanager
def second_vcpu(vm: Vm, chipped: bool) -> Iterator[SecondVcpu]:
    """It runs while the block lasts."""
    with vm.create_vcpu(ID) as vcpu:
        second = SecondVcpu(vm, vcpu, chipped)
        try:
            yield second
        finally:
            second.end()
