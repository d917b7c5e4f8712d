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
from vmonty.kvm.soft.mmu.tdp import ARENA_PAGES, Tables, TdpMmu
from vmonty.kvm.soft.stats import PAGES_1G, PAGES_2M
from vmonty.kvm.uapi import flags
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


LARGE = 2 << 20
BESIDE = 1 << 32  # where more memory lies


@pytest.fixture(params=["kvm_intel", "kvm_amd"])
def large(request: pytest.FixtureRequest) -> Iterator[tuple[TinyGuest, Ram]]:
    """A guest that reads the first byte of each of three large pages in turn."""
    with modules.only(request.param), kvm.open("soft") as system, system.create_vm() as vm:
        ram, more = Ram(8 << 20), Ram(3 * LARGE)
        vm.set_user_memory_region(0, 0, ram, size=RAM_SIZE)
        vm.set_user_memory_region(1, BESIDE, more)
        with vm.create_vcpu() as vcpu:
            guest = TinyGuest(vm, vcpu, ram)
            tables = 0x7000  # page tables of four levels as a directory with large pages
            code = f"again: mov al, [rbx]\n out 0x10, al\n add rbx, {LARGE}\n cmp rbx, rcx\n jb again\n"
            begin = f"mov rbx, {BESIDE}\n mov rcx, {BESIDE + 3 * LARGE}\n"
            guest.load(Mode.LONG, f"start: {begin} {code} jmp start")
            sregs = vcpu.get_sregs()
            ram.write_u64(tables, 0x83)  # the first GiB, and the fifth: one to one
            ram.write_u64(tables + 8 * (BESIDE >> 30), BESIDE | 0x83)
            ram.write_u64(sregs.cr3, tables | 3)
            vcpu.set_sregs(sregs)
            yield guest, more


def mapped(vm: Kvm) -> int:
    """The large pages of the part that is looked at."""
    return int(vm.stats.values[PAGES_2M])


def level_of(vm: Kvm, gpa: int) -> int | None:
    """The level of the entry that maps it."""
    assert isinstance(vm.mmu, TdpMmu)
    *_, (level, _, value) = vm.mmu.walk(gpa)
    return level if value & 7 else None


def test_large_pages_where_slot_and_host_have_them(large: tuple[TinyGuest, Ram]) -> None:
    guest, more = large
    vm = newest()
    for part in range(3):
        more.write_u8(part * LARGE, 10 + part)
    assert guest.outs(4) == [10, 11, 12, 10]
    assert [level_of(vm, BESIDE + part * LARGE) for part in range(3)] == [2, 2, 2]
    assert mapped(vm) == 3
    found = guest.vm.provider.translate(guest.vcpu.fileno(), BESIDE + LARGE + 0x12345)  # type: ignore[attr-defined]
    assert (found.hva, found.hpa) == (more.address + LARGE + 0x12345,) * 2


def test_a_large_page_of_which_a_part_goes(large: tuple[TinyGuest, Ram]) -> None:
    guest, more = large
    vm = newest()
    more.write_u8(LARGE, 1)
    assert guest.outs(3) == [0, 1, 0]
    other = Ram(mmap.PAGESIZE)
    other.write_u8(0, 77)
    guest.vm.provider.memory_unmapped(more.address + LARGE, mmap.PAGESIZE)  # type: ignore[attr-defined]
    assert mapped(vm) == 2
    hostcall.map_over(more.address + LARGE, other.fileno(), mmap.PAGESIZE)
    assert guest.outs(3) == [0, 77, 0]


def test_a_log_of_large_pages_is_one_of_small_ones(large: tuple[TinyGuest, Ram]) -> None:
    """While it is kept; behind it they come back, and the tables that were between are given back."""
    guest, more = large
    vm = newest()
    guest.outs(3)
    tables = vm.mmu.pages
    guest.vm.set_user_memory_region(1, BESIDE, more, flags=flags.KVM_MEM_LOG_DIRTY_PAGES)
    assert mapped(vm) == 0
    guest.outs(3)
    assert (mapped(vm), level_of(vm, BESIDE)) == (0, 1)
    assert guest.vm.get_dirty_log(1, 3 * LARGE // 4096) == bytes(3 * LARGE // 4096 // 8)
    guest.vm.set_user_memory_region(1, BESIDE, more)
    guest.outs(3)
    assert (mapped(vm), vm.mmu.pages) == (3, tables)


def test_a_slot_that_begins_amid_a_large_page(large: tuple[TinyGuest, Ram]) -> None:
    guest, more = large
    vm = newest()
    guest.vm.set_user_memory_region(1, 0, None)
    guest.vm.set_user_memory_region(1, BESIDE, more, size=LARGE + 4096)
    guest.vm.set_user_memory_region(2, BESIDE + LARGE + 4096, more, offset=LARGE + 4096)
    guest.outs(3)
    assert [level_of(vm, BESIDE + part * LARGE) for part in range(3)] == [2, 1, 2]
    guest.vm.set_user_memory_region(1, 0, None)
    assert [level_of(vm, BESIDE + part * LARGE) for part in range(3)] == [None, None, 2]
    assert level_of(vm, BESIDE + LARGE + 4096) in (1, None)


def test_one_large_page_of_a_gigabyte() -> None:
    with kvm.open("soft") as system, system.create_vm() as vm:
        vm.set_user_memory_region(0, 1 << 30, Ram(2 << 30))
        kvm_vm = newest()
        assert kvm_vm.mmu.page_fault((1 << 30) + 0x1234, True)
        assert level_of(kvm_vm, (2 << 30) - 1) == 3
        assert level_of(kvm_vm, 2 << 30) is None
        assert kvm_vm.mmu.page_fault(2 << 30, False)
        assert int(kvm_vm.stats.values[PAGES_1G]) == 2
        kvm_vm.mmu.write_protect(1 << 18, (1 << 18) + 1)
        assert (level_of(kvm_vm, 1 << 30), int(kvm_vm.stats.values[PAGES_1G])) == (None, 1)
        assert kvm_vm.mmu.page_fault(1 << 30, True)
        assert level_of(kvm_vm, 1 << 30) == 3
