"""INS and OUTS whose operand is a device, is not mapped, or cannot be written. SDM, "INS", "OUTS"."""

from __future__ import annotations

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.exits import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY
from vmonty.testing.guests import DATA, HIGH_MMIO, MMIO, PML4, PTE_P, PTE_PS, PTE_U, Mode, TinyGuest

PORT = 0x5678
PD = PML4 + 0x2000
FAULT = "pop rax\n out 0x20, eax\n mov rax, cr2\n out 0x21, eax"


def port_in(guest: TinyGuest, data: bytes) -> None:
    """The guest reads the port, and gets *data*."""
    assert guest.run() is Exit.IO
    io = guest.vcpu.kvm_run.u.io
    assert (io.direction, io.port) == (KVM_EXIT_IO_IN, PORT)
    guest.vcpu.io_data()[:] = data


def mmio(guest: TinyGuest, address: int, size: int, write: bool) -> bytearray:
    """The device's part of the exit; what it holds."""
    assert guest.run() is Exit.MMIO
    access = guest.vcpu.kvm_run.u.mmio
    assert (access.phys_addr, access.len, access.is_write) == (address, size, int(write))
    return bytearray(access.data[:size])


@pytest.mark.parametrize(("size", "suffix"), [(1, "b"), (2, "w"), (4, "d")], ids=["1", "2", "4"])
def test_from_a_port_into_a_device(guest: TinyGuest, size: int, suffix: str) -> None:
    guest.load(Mode.LONG, f"cld\n mov edi, {HIGH_MMIO:#x}\n mov dx, {PORT}\n ins{suffix}\n ins{suffix}\n out 0x10, al")
    for element in range(2):
        port_in(guest, bytes([0x51 + element]) * size)
        assert mmio(guest, HIGH_MMIO + element * size, size, write=True) == bytes([0x51 + element]) * size
    assert guest.out()[0] == 0x10
    assert guest.vcpu.get_regs().rdi == HIGH_MMIO + 2 * size


@pytest.mark.parametrize(("size", "suffix"), [(1, "b"), (2, "w"), (4, "d")], ids=["1", "2", "4"])
def test_from_a_device_to_a_port(guest: TinyGuest, size: int, suffix: str) -> None:
    guest.load(
        Mode.LONG, f"std\n mov esi, {HIGH_MMIO:#x}\n mov ecx, 2\n mov dx, {PORT}\n rep outs{suffix}\n out 0x10, al"
    )
    for element in range(2):
        mmio(guest, HIGH_MMIO - element * size, size, write=False)
        guest.vcpu.kvm_run.u.mmio.data[:size] = [0x61 + element] * size
        assert guest.run() is Exit.IO
        io = guest.vcpu.kvm_run.u.io
        assert (io.direction, io.port, io.size, io.count) == (KVM_EXIT_IO_OUT, PORT, size, 1)
        assert bytes(guest.vcpu.io_data()) == bytes([0x61 + element]) * size
    assert guest.out()[0] == 0x10
    assert guest.vcpu.get_regs().rsi == HIGH_MMIO - 2 * size


@pytest.mark.needs(Cap.READONLY_MEM)
def test_into_memory_that_is_read_only(guest: TinyGuest) -> None:
    """The write is a device's, and the memory stays as it is."""
    rom = Ram(4096)
    rom.write(0, b"firm")
    guest.vm.set_user_memory_region(1, MMIO, rom, flags=KVM_MEM_READONLY)
    guest.load(Mode.LONG, f"cld\n mov edi, {MMIO:#x}\n mov dx, {PORT}\n insb\n out 0x10, al")
    port_in(guest, b"X")
    assert mmio(guest, MMIO, 1, write=True) == b"X"
    assert guest.out()[0] == 0x10
    assert rom.read(0, 4) == b"firm"


ORDER = pytest.mark.known_gap("string-io-order")


@pytest.mark.parametrize(
    ("instruction", "entry", "error"),
    [
        pytest.param("outsb", 0, 0b100, id="read-absent"),
        pytest.param("outsb", PTE_P | PTE_PS, 0b101, id="read-supervisor"),
        pytest.param("insb", 0, 0b110, id="write-absent", marks=ORDER),
        pytest.param("insb", PTE_P | PTE_U | PTE_PS, 0b111, id="write-protected", marks=ORDER),
    ],
)
def test_a_page_fault_is_the_guests(guest: TinyGuest, instruction: str, entry: int, error: int) -> None:
    """In CPL 3: its tables refuse, so neither the port nor user space sees anything."""
    at = 64 << 21
    guest.load(
        Mode.USER, f"cld\n mov esi, {at + 8}\n mov edi, {at + 8}\n mov dx, {PORT}\n {instruction}\n out 0x10, al",
        handlers={14: FAULT},
    )  # fmt: skip
    guest.ram.write_u64(PD + 8 * 64, entry and at | entry)
    guest.vcpu.set_sregs(guest.vcpu.get_sregs())
    assert [guest.out(), guest.out()] == [(0x20, error), (0x21, at + 8)]


def test_a_fault_in_the_second_page(guest: TinyGuest) -> None:
    """A word whose second byte is absent: CR2 tells the second page."""
    at = 64 << 21
    guest.load(Mode.USER, f"cld\n mov esi, {at - 1}\n mov dx, {PORT}\n outsw\n out 0x10, al", handlers={14: FAULT})
    guest.ram.write_u64(PD + 8 * 63, DATA & ~0x1FFFFF | PTE_P | PTE_U | PTE_PS)
    guest.ram.write_u64(PD + 8 * 64, 0)
    guest.vcpu.set_sregs(guest.vcpu.get_sregs())
    assert [guest.out(), guest.out()] == [(0x20, 0b100), (0x21, at)]
