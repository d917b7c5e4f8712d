"""5-level paging in guests. Source: arch/x86/kvm/x86.c, __cr4_reserved_bits(), kvm_is_valid_cr4(); SDM, "4-Level Paging
and 5-Level Paging".
"""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import CpuidEntry
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import PML4, RAM_SIZE, Mode, TinyGuest

LA57 = 1 << 12
PML5, UPPER = RAM_SIZE - 0x3000, RAM_SIZE - 0x2000
HIGH = 1 << 50  # maps what 0 maps
DEVICE = 0x3000_0000  # mapped, but no memory
KERNEL_GS_BASE = 0xC0000102


def offered(cpuid: list[CpuidEntry]) -> bool:
    return any(entry.function == 7 and entry.index == 0 and entry.ecx >> 16 & 1 for entry in cpuid)


def hidden(cpuid: list[CpuidEntry]) -> list[CpuidEntry]:
    return [e._replace(ecx=e.ecx & ~(1 << 16)) if (e.function, e.index) == (7, 0) else e for e in cpuid]


def five(guest: TinyGuest, source: str, cpuid: list[CpuidEntry]) -> TinyGuest:
    """In 64-bit mode with CR4.LA57. Skips where this KVM has none."""
    if not offered(cpuid):
        pytest.skip("this KVM offers guests no LA57")
    guest.load(
        Mode.LONG, source, {13: "mov al, 13\n out 0x11, al", 14: "mov rax, cr2\n shr rax, 48\n out 0x12, eax"}, cpuid
    )
    guest.ram.write_u64(PML5, PML4 | 7)
    guest.ram.write_u64(PML5 + 8 * (HIGH >> 48), UPPER | 7)
    guest.ram.write_u64(UPPER, PML4 + 0x1000 | 7)
    sregs = guest.vcpu.get_sregs()
    sregs.cr3, sregs.cr4 = PML5, sregs.cr4 | LA57
    guest.vcpu.set_sregs(sregs)
    return guest


def test_addresses_of_57_bits(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    five(guest, f"mov rbx, {HIGH + 0x20000}\n mov dword [rbx], 0x55\n mov eax, [0x20000]\n out 0x10, eax", cpuid)
    assert guest.out() == (0x10, 0x55)
    assert guest.vcpu.get_sregs().cr4 & LA57
    translation = guest.vcpu.translate(HIGH + 0x20005)
    assert (translation.valid, translation.physical_address) == (1, 0x20005)


def test_string_io_at_such_addresses(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """KVM walks the guest's tables itself."""
    source = f"""
        cld
        mov rdi, {HIGH + 0x20000}
        mov rsi, rdi
        mov ecx, 4
        mov edx, 0x40
        rep insb
        mov ecx, 4
        rep outsb
        mov eax, [0x20000]
        out 0x10, eax
    """
    five(guest, source, cpuid)
    taken, given = b"", b""
    while (reason := guest.run()) is Exit.IO and (io := guest.vcpu.kvm_run.u.io).port == 0x40:
        if io.direction == 0:
            answer = b"LA57"[len(taken) : len(taken) + io.count]
            guest.vcpu.io_data()[:] = answer
            taken += answer
        else:
            given += bytes(guest.vcpu.io_data())
    assert reason is Exit.IO
    assert (taken, given, bytes(guest.vcpu.io_data())) == (b"LA57", b"LA57", b"LA57")


def test_devices_at_such_addresses(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    five(guest, f"mov rbx, {HIGH + DEVICE}\n mov word [rbx], 0x1234\n hlt", cpuid)
    assert guest.run() is Exit.MMIO
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, bytes(mmio.data[:2])) == (DEVICE, 2, 1, b"\x34\x12")


@pytest.mark.parametrize(
    ("address", "seen"), [(1 << 49, (0x12, 2)), (1 << 56, (0x11, 13))], ids=["absent", "not-canonical"]
)
def test_faults(guest: TinyGuest, cpuid: list[CpuidEntry], address: int, seen: tuple[int, int]) -> None:
    five(guest, f"mov rbx, {address}\n mov eax, [rbx]\n hlt", cpuid)
    assert guest.out() == seen


def test_the_bit_is_fixed_in_long_mode(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    five(guest, "mov rax, cr4\n btr rax, 12\n mov cr4, rax\n hlt", cpuid)
    assert guest.out() == (0x11, 13)


@pytest.mark.parametrize("bit", [50, pytest.param(56, marks=pytest.mark.known_gap("gs-base-canonical"))])
def test_registers_hold_such_addresses(guest: TinyGuest, cpuid: list[CpuidEntry], bit: int) -> None:
    source = f"mov ecx, {KERNEL_GS_BASE}\n mov edx, {1 << bit - 32}\n xor eax, eax\n wrmsr\n out 0x10, al"
    five(guest, source, cpuid)
    assert guest.out()[0] == (0x10 if bit == 50 else 0x11)


def test_what_cpuid_does_not_show(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """Neither the guest nor user space may set it."""
    guest.load(Mode.LONG, "mov rax, cr4\n bts rax, 12\n mov cr4, rax\n hlt", {13: "out 0x11, al"}, hidden(cpuid))
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 |= LA57
    with pytest.raises(OSError) as refused:
        guest.vcpu.set_sregs(sregs)
    assert refused.value.errno == errno.EINVAL
    assert guest.out()[0] == 0x11
