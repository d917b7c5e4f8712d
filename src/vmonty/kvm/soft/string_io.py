"""INS and OUTS, an element or up to a page at a time: their operand may be memory, a device, or not there at all.

The exit comes before the operand is looked at. So the guest's tables are walked here, with the rights of its code, and
what they refuse is the guest's #PF. Source: arch/x86/kvm/emulate.c, em_in(), em_out(), segmented_read(); SDM, "INS",
"OUTS".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmonty.kvm.soft.mmu.paging_tmpl import CR4_PAE, ERROR_USER, ERROR_WRITE, Absent, GuestFault, GuestWalker, Registers
from vmonty.kvm.soft.stats import INSN_EMULATION
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY, PF_VECTOR

if TYPE_CHECKING:
    from vmonty.kvm.soft.intercepts import Intercepts

RCX, RSI, RDI = 1, 6, 7
DIRECTION, PAGE = 0x400, 0x1000
MOST = 1024  # elements at once


class StringIo:
    """One such instruction: an element of *size* bytes at the linear address *linear*; *bits*: its address size."""

    def __init__(
        self, owner: Intercepts, port: int, size: int, is_in: bool, repeated: bool, bits: int, linear: int
    ) -> None:
        self._owner, self._vcpu, self._vendor = owner, owner.vcpu, owner.vcpu.vendor
        self._port, self._size, self._is_in, self._repeated = port, size, is_in, repeated
        self._mask, self._linear = (1 << bits) - 1, linear
        self._backwards = bool(self._vendor.get_rflags() & DIRECTION)
        self._left = self._vendor.get_gpr(RCX) & self._mask if repeated else 1

    def emulate(self) -> bool:
        """An exit handler's answer. What is left to do runs again."""
        if self._left == 0:
            self._owner.skip()
            return True
        self._vcpu.stats.values[INSN_EMULATION] += 1
        try:
            parts = self._operand()
        except Absent:
            return self._owner.emulation_failure()
        if parts is None:
            return True
        if all(self._is_memory(gpa) for gpa, _ in parts):
            return self._memory(parts)
        return self._device(parts[0][0]) if len(parts) == 1 else self._owner.emulation_failure()

    def _operand(self) -> list[tuple[int, int]] | None:
        """The first element: guest-physical addresses and lengths. None after a #PF. Raises Absent."""
        parts = []
        at, left = self._linear, self._size
        while left:
            length = min(left, PAGE - at % PAGE)
            try:
                parts.append((self._translate(at), length))
            except GuestFault as fault:
                self._vcpu.queue_exception(PF_VECTOR, fault.error_code, at)
                return None
            at, left = at + length, left - length
        return parts

    def _registers(self) -> Registers:
        get = self._vendor.get_control
        cr0, cr3, cr4, efer = (get(name) for name in ("cr0", "cr3", "cr4", "efer"))
        registers = Registers(cr0, cr3, cr4, efer)
        if registers.paging and cr4 & CR4_PAE and not registers.long_mode:
            table = self._vcpu.kvm.read_gpa(cr3 & 0xFFFF_FFE0, 32) or bytes(32)
            registers = registers._replace(pdptrs=tuple(memoryview(table).cast("Q")))
        return registers

    def _translate(self, linear: int) -> int:
        registers = self._registers()
        if not registers.paging:
            return linear
        cpl = self._vendor.get_cpl()
        error = (ERROR_WRITE if self._is_in else 0) | (ERROR_USER if cpl == 3 else 0)
        walker = GuestWalker(self._vcpu.kvm.memslots)
        found = walker.walk(registers, linear, error, cpl, self._vendor.get_rflags())
        return found.gfn << 12 | linear & PAGE - 1

    def _is_memory(self, gpa: int) -> bool:
        slot = self._vcpu.kvm.memslots.find(gpa)
        return slot is not None and not (self._is_in and slot.flags & KVM_MEM_READONLY)

    def _advance(self, count: int) -> None:
        vendor, mask = self._vendor, self._mask
        pointer = RDI if self._is_in else RSI
        step = -self._size * count if self._backwards else self._size * count
        old = vendor.get_gpr(pointer)
        vendor.set_gpr(pointer, old & ~mask | (old + step) & mask)
        if self._repeated:
            old = vendor.get_gpr(RCX)
            vendor.set_gpr(RCX, old & ~mask | (self._left - count) & mask)
        if not self._repeated or self._left == count:
            self._owner.skip()

    def _memory(self, parts: list[tuple[int, int]]) -> bool:
        """As many elements as lie in this page, or one that crosses its end."""
        size, (gpa, _), kvm = self._size, parts[0], self._vcpu.kvm
        if len(parts) == 1:
            room = gpa % PAGE // size + 1 if self._backwards else (PAGE - gpa % PAGE) // size
            count = max(1, min(self._left, room, MOST))
            parts = [(gpa - size * (count - 1) if self._backwards else gpa, size * count)]
        else:
            count = 1
        if self._is_in:

            def done(data: bytes) -> bool:
                data, at = _reversed(data, size) if self._backwards else data, 0
                for gpa, length in parts:
                    kvm.write_gpa(gpa, data[at : at + length])
                    at += length
                self._advance(count)
                return True

            return self._vcpu.port_in(self._port, size, count, done)
        fetched = b"".join(kvm.read_gpa(gpa, length) or bytes(length) for gpa, length in parts)
        self._advance(count)
        return self._vcpu.port_out(self._port, size, _reversed(fetched, size) if self._backwards else fetched)

    def _device(self, gpa: int) -> bool:
        """One element from or to where no memory is."""
        vcpu = self._vcpu

        def from_port(data: bytes) -> bool:
            self._advance(1)
            return vcpu.mmio_write(gpa, data, lambda: True)

        def from_device(data: bytes) -> bool:
            self._advance(1)
            return vcpu.port_out(self._port, self._size, data)

        if self._is_in:
            return vcpu.port_in(self._port, self._size, 1, from_port)
        return vcpu.mmio_read(gpa, self._size, from_device)


def _reversed(data: bytes, size: int) -> bytes:
    """The elements of *size* bytes in reverse order."""
    return b"".join(data[at : at + size] for at in range(len(data) - size, -1, -size))
