"""64-bit mode: the tables translate every address to itself, the state is one that KVM takes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.api import System
from vmonty.vmm.boot import longmode
from vmonty.vmm.memory import GuestMemory

BASE = 0x1_0000
GIB = 1 << 30


def walk(memory: GuestMemory, linear: int) -> int | None:
    """The physical address, by the tables at BASE as a processor walks them; None for not present."""
    table = BASE + 0x1000
    for level, shift in enumerate((39, 30, 21)):
        entry = struct.unpack("<Q", memory.read(table + (linear >> shift & 511) * 8, 8))[0]
        if not entry & longmode.PTE_PRESENT:
            return None
        assert entry & longmode.PTE_WRITABLE
        if entry & longmode.PTE_LARGE:
            assert level == 2
            return int(entry & ~0x1F_FFFF | linear & 0x1F_FFFF)
        table = entry & ~0xFFF
    raise AssertionError("no large page at the last level")


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    made = GuestMemory(1 << 20)
    longmode.write_tables(made, BASE)
    return made


@given(linear=st.integers(0, 4 * GIB - 1))
def test_4_gib_are_mapped_one_to_one(memory: GuestMemory, linear: int) -> None:
    assert walk(memory, linear) == linear


@pytest.mark.parametrize("linear", [4 * GIB, 512 * GIB, (1 << 48) - 1])
def test_nothing_else_is_mapped(memory: GuestMemory, linear: int) -> None:
    assert walk(memory, linear) is None


def test_tables_stay_in_their_room() -> None:
    made = GuestMemory(1 << 20)
    made.ram.fill(0, 1 << 20, 0xA5)
    longmode.write_tables(made, BASE)
    assert made.read(BASE - 8, 8) == made.read(BASE + longmode.TABLES_SIZE, 8) == b"\xa5" * 8


def test_descriptors_are_those_of_the_segments(memory: GuestMemory) -> None:
    gdt = struct.unpack("<6Q", memory.read(BASE, 48))
    code, data = gdt[longmode.CODE_SELECTOR // 8], gdt[longmode.DATA_SELECTOR // 8]
    for descriptor, kind, long in ((code, 11, 1), (data, 3, 0)):
        assert descriptor >> 40 & 15 == kind
        assert descriptor >> 44 & 0xF == 9, "a segment, for CPL 0, present"
        assert descriptor >> 53 & 1 == long
        assert descriptor & 0xFFFF == 0xFFFF


def test_kvm_takes_the_state(system: System) -> None:
    memory = GuestMemory(1 << 20)
    longmode.write_tables(memory, BASE)
    with system.create_vm() as vm:
        memory.attach(vm)
        with vm.create_vcpu() as vcpu:
            longmode.enter(vcpu, BASE)
            sregs = vcpu.get_sregs()
            assert (sregs.cr3, sregs.gdt.base) == (BASE + 0x1000, BASE)
            assert sregs.cr0 & longmode.CR0_PG
            assert sregs.efer & longmode.EFER_LMA
            assert (sregs.cs.selector, sregs.cs.l, sregs.ss.selector) == (0x10, 1, 0x18)
