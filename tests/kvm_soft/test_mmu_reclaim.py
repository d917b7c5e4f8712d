"""Page tables that are given back, and memory that user space takes away, while guests run."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base import hostcall
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.soft.memslots import Memslot
from vmonty.kvm.soft.mmu.tdp import ARENA_PAGES, Tables
from vmonty.testing.guests import DATA, RAM_SIZE, Mode, TinyGuest

READER = f"again: mov eax, [abs {DATA}]\n out 0x10, eax\n jmp again"


@pytest.fixture
def guest() -> Iterator[TinyGuest]:
    with kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram).load(Mode.LONG, READER)


def newest() -> Kvm:
    module = modules.loaded()
    assert module is not None
    return module.vm_list[-1]


def test_the_shrinker_frees_tables_and_guests_go_on(guest: TinyGuest) -> None:
    guest.out()
    vm, module = newest(), modules.loaded()
    assert module is not None
    tables = vm.mmu.pages
    assert tables > 1
    assert module.shrink(1_000_000) >= tables - 1
    assert vm.mmu.pages == 1
    guest.ram.write_u32(DATA, 77)
    assert guest.out() == (0x10, 77)
    assert vm.mmu.pages == tables


def test_arenas_that_are_free_go_back_to_the_host() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("vmonty-mmu")

    before, tables = mapped(), Tables()
    pages = [tables.allocate() for _ in range(3 * ARENA_PAGES)]
    assert mapped() == before + 3
    for page in pages[5:]:
        tables.free(page)
    assert mapped() == before + 1
    assert all(tables.read(page, 0) == 0 for page in pages[:5])


def test_memory_that_becomes_something_else_is_seen(guest: TinyGuest) -> None:
    """The notifier's seq goes up, and the guest reads what is there now."""
    guest.ram.write_u32(DATA, 1)
    assert guest.out() == (0x10, 1)
    seq = newest().mmu_notifier_seq
    other = Ram(mmap.PAGESIZE)
    other.write_u32(0, 2)
    at = guest.ram.address + DATA
    guest.vm.provider.memory_unmapped(at, mmap.PAGESIZE)  # type: ignore[attr-defined]
    hostcall.map_over(at, other.fileno(), mmap.PAGESIZE)
    assert newest().mmu_notifier_seq == seq + 1
    assert guest.out() == (0x10, 2)


def test_a_fault_maps_nothing_of_a_slot_that_has_gone(guest: TinyGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot goes just after the fault has found it: its page must not come back behind the zap.

    So a dirty log lost writes: the fault mapped what the slot was before it was logged.
    """
    vm, elsewhere = newest(), 1 << 24
    other = Ram(mmap.PAGESIZE)
    guest.vm.set_user_memory_region(1, elsewhere, other)
    find = vm.memslots.find
    remover = threading.Thread(target=guest.vm.set_user_memory_region, args=(1, elsewhere, None))

    def find_and_wait(gpa: int) -> Memslot | None:
        slot = find(gpa)
        if remover.ident is None:
            remover.start()
            remover.join(0.2)
        return slot

    monkeypatch.setattr(vm.memslots, "find", find_and_wait)
    vm.mmu.page_fault(elsewhere, False)
    remover.join()
    assert find(elsewhere) is None
    assert not any(value & 7 for level, _, value in vm.mmu.walk(elsewhere) if level == 1)  # type: ignore[union-attr]
