"""The local APIC's registers, for Python. What happens rarely is in lapic.py, and uses these."""

from __future__ import annotations

import cython
from cython.cimports.libc.stdlib import free
from cython.cimports.libc.string import memset
from cython.cimports.vmonty.kvm.soft.kvm_host import (
    SEQUENTIAL,
    load32,
    store64,
)
from cython.cimports.vmonty.kvm.soft.lapic_irq import (
    WORD_IRR,
    WORD_ISR,
    WORD_TMR,
    apic_find_highest,
    apic_set_eoi,
    apic_take_deadline,
    kvm_apic_has_interrupt,
    kvm_apic_ppr,
    kvm_get_apic_interrupt,
    kvm_lapic_set_irr,
)


@cython.cclass
class LapicRegs:
    """The registers of one APIC by their offsets; sets of vectors as integers with a bit each.

    *vcpu*: whose they are; one that has none (a test's) is no target of fast IPIs.
    """

    def __cinit__(self, vcpu_id: cython.uint, vm: VmArch, vcpu: VcpuArch = None):
        memset(cython.address(self.l), 0, cython.sizeof(KvmLapic))
        self.l.regs = cython.cast(cython.pointer(uint32_t), aligned_alloc(4096, 4096))
        if self.l.regs == cython.NULL:
            raise MemoryError("no page for the registers of a local APIC")
        memset(self.l.regs, 0, 4096)
        self.l.vcpu_id = vcpu_id
        self._vm = vm
        self._vcpu = vcpu
        self.l.kvm = cython.address(vm.k)
        if vcpu is not None:
            self.l.vcpu = cython.address(vcpu.a)
            vcpu.a.apic = cython.address(self.l)
            vcpu._apic = self

    def __dealloc__(self):
        free(self.l.regs)

    @property
    def page(self) -> int:
        """The address of the register page."""
        return cython.cast(uint64_t, self.l.regs)

    def publish(self) -> None:
        """The vCPU is complete: fast IPIs find this APIC from now on."""
        if self._vcpu is not None:
            self._vm.add_apic(cython.address(self.l), self)

    def __getitem__(self, offset: cython.uint) -> int:
        if offset >= 0x400:
            raise IndexError(f"no APIC register at {offset:#x}")
        return self.l.regs[offset >> 2]

    def __setitem__(self, offset: cython.uint, value: cython.uint) -> None:
        if offset >= 0x400:
            raise IndexError(f"no APIC register at {offset:#x}")
        self.l.regs[offset >> 2] = value

    def _vectors(self, word):
        value: object = 0
        part: object
        for k in range(7, -1, -1):
            part = load32(cython.address(self.l.regs[word + 4 * k]), SEQUENTIAL)
            value = value << 32 | part
        return value

    def _set_vectors(self, word, value):
        for k in range(8):
            self.l.regs[word + 4 * k] = value >> 32 * k & 0xFFFFFFFF
        return 0

    @property
    def irr(self) -> int:
        """What is pending."""
        return self._vectors(WORD_IRR)

    @irr.setter
    def irr(self, value: object) -> None:
        self._set_vectors(WORD_IRR, value)

    @property
    def isr(self) -> int:
        """What is in service."""
        return self._vectors(WORD_ISR)

    @isr.setter
    def isr(self, value: object) -> None:
        self._set_vectors(WORD_ISR, value)

    @property
    def tmr(self) -> int:
        """What came level-triggered."""
        return self._vectors(WORD_TMR)

    @tmr.setter
    def tmr(self, value: object) -> None:
        self._set_vectors(WORD_TMR, value)

    @property
    def icr64(self) -> int:
        """The interrupt command register of x2APIC mode."""
        return self.l.icr

    @icr64.setter
    def icr64(self, value: cython.ulonglong) -> None:
        self.l.icr = value

    @property
    def apic_base(self) -> int:
        """IA32_APIC_BASE."""
        return self.l.apic_base

    @apic_base.setter
    def apic_base(self, value: cython.ulonglong) -> None:
        self.l.apic_base = value

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE."""
        return self.l.tsc_deadline

    @tsc_deadline.setter
    def tsc_deadline(self, value: cython.ulonglong) -> None:
        store64(cython.address(self.l.tsc_deadline), value, SEQUENTIAL)

    def take_deadline(self, tsc: cython.ulonglong) -> bool:
        """Whether it has come by *tsc*; then it is disarmed, and the caller lets the timer fire."""
        return apic_take_deadline(cython.address(self.l), tsc)

    @property
    def armed_tsc(self) -> int:
        """When the host's timer looks at the deadline; 0: never."""
        return self.l.armed_tsc

    @armed_tsc.setter
    def armed_tsc(self, value: cython.ulonglong) -> None:
        store64(cython.address(self.l.armed_tsc), value, SEQUENTIAL)

    @property
    def deadline_mode(self) -> bool:
        """Whether LVTT is in TSC-deadline mode."""
        return self.l.deadline_mode != 0

    @deadline_mode.setter
    def deadline_mode(self, value: cython.bint) -> None:
        self.l.deadline_mode = value

    @property
    def ppr(self) -> int:
        """The processor priority."""
        return kvm_apic_ppr(cython.address(self.l))

    @property
    def highest_isr(self) -> int:
        """The highest vector in service, -1 for none."""
        return apic_find_highest(cython.address(self.l), WORD_ISR)

    def has_interrupt(self) -> int:
        """The vector that can be delivered now, or -1."""
        return kvm_apic_has_interrupt(cython.address(self.l))

    def get_interrupt(self) -> int:
        """Acknowledge it."""
        return kvm_get_apic_interrupt(cython.address(self.l))

    def set_irr(self, vector: cython.uint, level_triggered: cython.bint) -> None:
        """*vector* becomes pending. Any thread, which kicks the vCPU then."""
        kvm_lapic_set_irr(cython.address(self.l), vector & 0xFF, level_triggered)

    def is_pending(self, vector: cython.uint) -> bool:
        """Whether *vector* is pending or in service."""
        word: uint32_t = 4 * ((vector & 0xFF) >> 5)
        return ((self.l.regs[WORD_IRR + word] | self.l.regs[WORD_ISR + word]) >> (vector & 31)) & 1 != 0

    def is_level_triggered(self, vector: cython.uint) -> bool:
        """Whether *vector* came level-triggered."""
        return (self.l.regs[WORD_TMR + 4 * ((vector & 0xFF) >> 5)] >> (vector & 31)) & 1 != 0

    def set_eoi(self) -> int:
        """End the highest vector in service, and give it; -1 for none. The caller tells whoever must hear of it."""
        return apic_set_eoi(cython.address(self.l))
