"""vcpu_cache_mmio_info(): a device's page is not looked up again, until the memory slots have changed."""

from __future__ import annotations

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.soft.memslots import Memslots
from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

AT = 0x20_0000
READS = f"mov esi, {AT:#x}\n again: mov eax, [rsi]\n jmp again"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses at AT that slots were asked for."""
    asked: list[int] = []
    find = Memslots.find

    def noting(slots: Memslots, gpa: int) -> object:
        if gpa >> 12 == AT >> 12:
            asked.append(gpa)
        return find(slots, gpa)

    monkeypatch.setattr(Memslots, "find", noting)
    return asked


def test_slots_are_asked_once(guest: TinyGuest, found: list[int]) -> None:
    guest.load(Mode.LONG, READS)
    with guest.vcpu.stats() as counters:
        assert guest.run() is Exit.MMIO
        assert found
        found.clear()
        for _ in range(10):
            assert guest.run() is Exit.MMIO
        assert found == []
        assert counters.read()["mmio_exits"] == 11


def test_a_new_slot_makes_it_stale(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov esi, {AT:#x}\n again: mov eax, [rsi]\n out 0x10, eax\n jmp again")
    memory = Ram(0x1000)
    memory.write_u32(0, 0x600D)
    for _ in range(3):
        assert guest.run() is Exit.MMIO
        assert guest.out() == (0x10, 0)
        guest.vm.set_user_memory_region(1, AT, memory)
        assert guest.out() == (0x10, 0x600D)
        guest.vm.set_user_memory_region(1, AT, None)
    assert guest.run() is Exit.MMIO


def test_rom_is_no_device(guest: TinyGuest) -> None:
    """Its writes are exits; its reads are not."""
    rom = Ram(0x1000)
    rom.write_u32(0, 0x4D4F52)
    guest.vm.set_user_memory_region(1, AT, rom, flags=KVM_MEM_READONLY)
    guest.load(Mode.LONG, f"mov esi, {AT:#x}\n again: mov [rsi], esi\n mov eax, [rsi]\n out 0x10, eax\n jmp again")
    for _ in range(3):
        assert guest.run() is Exit.MMIO
        assert guest.vcpu.kvm_run.u.mmio.is_write
        assert guest.out() == (0x10, 0x4D4F52)


def test_two_devices_by_turns(guest: TinyGuest, found: list[int]) -> None:
    other = AT + 0x5000
    guest.load(Mode.LONG, f"mov esi, {AT:#x}\n again: mov eax, [rsi]\n mov eax, [rsi + 0x5000]\n jmp again")
    for _ in range(3):
        for address in (AT, other):
            assert guest.run() is Exit.MMIO
            assert guest.vcpu.kvm_run.u.mmio.phys_addr == address
    found.clear()
    for _ in range(6):
        assert guest.run() is Exit.MMIO
    assert found == []
    assert RAM_SIZE < AT
