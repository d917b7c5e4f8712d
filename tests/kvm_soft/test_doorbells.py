"""ioeventfds in guest-physical memory: plain stores ring them without Python, everything else as before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules, stats
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, Mode, TinyGuest

DOOR = 0x10_0000
VALUE = 0x1122_3344
# The store, its size and what it writes, with RAX = VALUE and RBX = DOOR.
STORES = {
    "mov [rbx], al": (1, 0x44),
    "mov [rbx], ah": (1, 0x33),
    "mov [rbx], r8b": (1, 0x78),
    "mov [rbx + rcx * 2 - 8], sil": (1, 0x99),
    "mov [rbx], ax": (2, 0x3344),
    "mov [rbx], eax": (4, VALUE),
    f"mov [abs {DOOR}], eax": (4, VALUE),
    "mov [rbx], rax": (8, VALUE),
    "mov byte [rbx], 0x81": (1, 0x81),
    "mov word [rbx], 0x8182": (2, 0x8182),
    "mov dword [rbx], 0x81828384": (4, 0x8182_8384),
    "mov qword [rbx], -2": (8, (1 << 64) - 2),
}
SETUP = f"mov eax, {VALUE:#x}\n mov ebx, {DOOR:#x}\n mov r8d, 0x5678\n mov ecx, 4\n mov esi, 0x99\n"


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def rung(event: int) -> int:
    """How often it was rung since the last time."""
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def emulated() -> int:
    """How many accesses Python has seen."""
    module = modules.loaded()
    assert module is not None
    return sum(int(vcpu.stats.values[stats.PF_EMULATE]) for vcpu in module.vm_list[-1].vcpus.values())


def looping(guest: TinyGuest, store: str) -> TinyGuest:
    return guest.load(Mode.LONG, f"{SETUP} again: {store}\n out 0x10, al\n jmp again")


@pytest.mark.parametrize("store", STORES)
def test_a_store_rings(guest: TinyGuest, event: int, store: str) -> None:
    size, value = STORES[store]
    looping(guest, store)
    for match in (None, value):
        guest.vm.ioeventfd(event, DOOR, size, match)
        assert [guest.out()[0] for _ in range(3)] == [0x10] * 3
        assert rung(event) == 3
        guest.vm.ioeventfd(event, DOOR, size, match, deassign=True)
    guest.vm.ioeventfd(event, DOOR, 0)  # a wildcard
    assert guest.out()[0] == 0x10
    assert rung(event) == 1
    assert emulated() == 0


@pytest.mark.parametrize("store", STORES)
def test_a_store_that_does_not_match_is_the_devices(guest: TinyGuest, event: int, store: str) -> None:
    size, value = STORES[store]
    looping(guest, store)
    guest.vm.ioeventfd(event, DOOR, size, value ^ 1)
    guest.vm.ioeventfd(event, DOOR, size % 8 + size % 8 or 1)
    assert guest.run() is Exit.MMIO
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DOOR, size, 1)
    assert int.from_bytes(bytes(mmio.data[:size]), "little") == value
    assert rung(event) == 0
    assert guest.out()[0] == 0x10


def test_other_instructions_ring_by_the_bus(guest: TinyGuest, event: int) -> None:
    """What reads first is told of its read; a string's store and one with a lock ring all the same."""
    guest.vm.ioeventfd(event, DOOR, 4)
    looping(guest, "mov edi, ebx\n stosd")
    assert guest.out()[0] == 0x10
    assert (rung(event), emulated()) == (1, 1)
    looping(guest, "or dword [rbx], 1")
    assert guest.run() is Exit.MMIO
    assert guest.vcpu.kvm_run.u.mmio.is_write == 0


def test_of_several_the_one_that_matches(guest: TinyGuest) -> None:
    """As the queues of virtio-mmio: one address, a number for each."""
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    try:
        for number, bell in enumerate(bells):
            guest.vm.ioeventfd(bell, DOOR, 4, number)
        guest.load(Mode.LONG, f"{SETUP} xor eax, eax\n again: mov [rbx], eax\n out 0x10, al\n inc eax\n and eax, 3\n"
                   " jmp again")  # fmt: skip
        guest.outs(7)
        assert [rung(bell) for bell in bells] == [2, 2, 2, 1]
        assert emulated() == 0
    finally:
        for bell in bells:
            os.close(bell)


def test_a_store_that_crosses_into_its_page_is_none_to_it(guest: TinyGuest, event: int) -> None:
    """Two bytes are RAM, two lie where the eventfd stands: that is an access of two bytes there."""
    guest.vm.ioeventfd(event, DOOR, 4)
    guest.vm.set_user_memory_region(1, DOOR - 0x1000, Ram(0x1000))
    looping(guest, "mov [rbx - 2], eax")
    assert guest.run() is Exit.MMIO
    assert rung(event) == 0
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len) == (DOOR, 2)


def test_memory_hides_it(guest: TinyGuest, event: int) -> None:
    guest.vm.ioeventfd(event, DOOR, 4)
    looping(guest, "mov [rbx], eax")
    ram = Ram(0x1000)
    guest.vm.set_user_memory_region(1, DOOR, ram)
    assert guest.out()[0] == 0x10
    assert (rung(event), ram.read_u32(0)) == (0, VALUE)
    guest.vm.set_user_memory_region(1, DOOR, None)
    assert guest.out()[0] == 0x10
    assert rung(event) == 1


def test_a_counter_at_its_limit(guest: TinyGuest) -> None:
    """It stays there, and the guest goes on, though writes to it would wait."""
    event = os.eventfd(0)
    try:
        os.eventfd_write(event, (1 << 64) - 2)
        guest.vm.ioeventfd(event, DOOR, 4)
        looping(guest, "mov [rbx], eax")
        guest.outs(3)
        assert os.eventfd_read(event) == (1 << 64) - 2
    finally:
        os.close(event)


def test_one_that_is_answered_at_once(guest: TinyGuest, event: int) -> None:
    """On the vCPU's thread, behind the store and without the emulator; the eventfd when that is not possible."""
    answers, called = iter([True, False, True, True]), []

    def at_once() -> bool:
        called.append(guest.ram.read_u32(DATA))
        return next(answers)

    guest.vm.ioeventfd(event, DOOR, 4, at_once=at_once)
    guest.load(Mode.LONG, f"{SETUP} again: inc dword [abs {DATA}]\n mov [rbx], eax\n out 0x10, al\n jmp again")
    guest.outs(4)
    assert called == [1, 2, 3, 4]
    assert (rung(event), emulated()) == (1, 0)
    guest.vm.ioeventfd(event, DOOR, 4, deassign=True)
    assert guest.run() is Exit.MMIO
