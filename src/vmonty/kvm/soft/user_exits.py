"""Exits to user space: what exit handlers put into kvm_run, and what is done when user space comes back.

Each gives an exit handler's answer: True to enter the guest again, False to leave. Source: arch/x86/kvm/x86.c:
kvm_fast_pio(), emulator_pio_in(), kvm_msr_user_space(), emulator_read_write(), complete_emulated_mmio().
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmonty.base.ram import PAGE_SIZE
from vmonty.kvm.soft.stats import MMIO_EXITS
from vmonty.kvm.soft.vcpu_state import VcpuState
from vmonty.kvm.uapi import Exit, flags
from vmonty.kvm.uapi.exits import KVM_EXIT_HYPERCALL_LONG_MODE, KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from vmonty.kvm.uapi.run import kvm_run

PIO_DATA_OFFSET = flags.KVM_PIO_PAGE_OFFSET * 4096


def run_offset(field: str) -> int:
    """Where a field of struct kvm_run is."""
    offset: int = getattr(kvm_run, field).offset
    return offset


# The io member of its union, from direction to data_offset.
EXIT_IO, RUN_U = struct.Struct("<BBHIQ"), run_offset("u")
# The mmio member.
EXIT_MMIO, MMIO_DATA = struct.Struct("<Q8sI?"), RUN_U + 8


class UserExits(VcpuState):
    """Accesses that in-kernel devices, or user space, answer; hypercalls and MSRs that user space wants to see."""

    # What KVM_RUN does first, when user space has answered.
    completion: Callable[[], bool] | None = None

    def port_out(self, port: int, size: int, data: bytes) -> bool:
        """Write *data*, a whole number of *size* units, to a port: the in-kernel bus, or user space."""
        bus = self.kvm.buses.pio
        at = 0
        if bus.candidates(port, size):
            while at < len(data) and bus.write(port, size, int.from_bytes(data[at : at + size], "little")):
                at += size
            if at == len(data):
                return True
        self._exit_io(KVM_EXIT_IO_OUT, port, size, data[at:])
        return False

    def port_in(self, port: int, size: int, count: int, done: Callable[[bytes], bool]) -> bool:
        """Read *count* units from a port and give them to *done*, now or when user space has answered.

        *done* returns as an exit handler does: False when it needs user space itself.
        """
        data = b""
        while len(data) < size * count:
            value = self.kvm.buses.pio.read(port, size)
            if value is None:
                break
            data += value.to_bytes(size, "little")
        if len(data) == size * count:
            return done(data)
        had, rest = data, size * count - len(data)
        self._exit_io(KVM_EXIT_IO_IN, port, size, bytes(rest))
        self.completion = lambda: done(had + bytes(self.page[PIO_DATA_OFFSET : PIO_DATA_OFFSET + rest]))
        return False

    def _exit_io(self, direction: int, port: int, size: int, data: bytes) -> None:
        # At once: a field of a ctypes structure costs as much.
        EXIT_IO.pack_into(self.page, RUN_U, direction, size, port, len(data) // size, PIO_DATA_OFFSET)
        self.run.exit_reason = Exit.IO
        self.page[PIO_DATA_OFFSET : PIO_DATA_OFFSET + len(data)] = data

    def hypercall_exit(self, number: int, arguments: list[int], long_mode: bool, done: Callable[[int], bool]) -> bool:
        """KVM_EXIT_HYPERCALL: *done* gets user space's answer."""
        self.run.exit_reason = Exit.HYPERCALL
        call = self.run.u.hypercall
        call.nr, call.ret, call.flags = number, 0, KVM_EXIT_HYPERCALL_LONG_MODE if long_mode else 0
        call.args[: len(arguments)] = [*arguments]
        self.completion = lambda: done(call.ret)
        return False

    def msr_exit(
        self, exit_reason: Exit, reason: int, index: int, data: int, done: Callable[[int | None], bool]
    ) -> None:
        """kvm_msr_user_space(): *done* gets user space's value, None where it wants a fault."""
        self.run.exit_reason = exit_reason
        msr = self.run.u.msr
        msr.error, msr.reason, msr.index, msr.data = 0, reason, index, data
        msr.pad[:] = [0] * len(msr.pad)
        self.completion = lambda: done(None if msr.error else msr.data)

    def mmio_write(self, gpa: int, data: bytes, done: Callable[[], bool]) -> bool:
        """Write to where no memory is: the local APIC, the in-kernel bus, the coalesced ring, or user space.

        False: *done* is called when user space comes back.
        """
        self._note_page(gpa)
        if self.kvm.mmio_write(self, gpa, data):
            return True
        self._exit_mmio(gpa, data, True)
        self.completion = done
        return False

    def mmio_read(self, gpa: int, size: int, done: Callable[[bytes], bool]) -> bool:
        """Read where no memory is, and give the bytes to *done*, now or when user space has answered."""
        self._note_page(gpa)
        value = self.kvm.mmio_read(self, gpa, size)
        if value is not None:
            return done(value)
        self._exit_mmio(gpa, bytes(size), False)
        self.completion = lambda: done(bytes(self.page[MMIO_DATA : MMIO_DATA + size]))
        return False

    def _note_page(self, gpa: int) -> None:
        """Plain accesses to the page need not come here again: see fast_mmio."""
        generation = self.kvm.irqs.arch.mmio_generation  # before anything is looked at
        if self.kvm.memslots.find(gpa) is not None:
            return
        page = gpa & -PAGE_SIZE
        if self.apic is not None and page == self.apic.base_address:
            self.arch.note_apic(gpa, generation)
        elif self.kvm.buses.mmio.is_empty(page, PAGE_SIZE):
            self.arch.note_mmio(gpa, generation)

    def _exit_mmio(self, gpa: int, data: bytes, is_write: bool) -> None:
        self.stats.values[MMIO_EXITS] += 1
        self.run.exit_reason = Exit.MMIO
        EXIT_MMIO.pack_into(self.page, RUN_U, gpa, data, len(data), is_write)
