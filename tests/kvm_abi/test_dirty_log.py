"""Dirty logging: the bitmap, manual protection, the ring. Source: api.rst, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG."""

from __future__ import annotations

import errno

import pytest

from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import Vm
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.flags import (
    KVM_DIRTY_GFN_F_DIRTY,
    KVM_DIRTY_GFN_F_RESET,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
)
from vmonty.kvm.uapi.vm import kvm_clear_dirty_log
from vmonty.testing.guests import Mode, TinyGuest, load

from .refusals import refused

SLOT, BASE, PAGES = 3, 0x400000, 128
MODES = [Mode.LONG, Mode.USER]


@pytest.fixture
def logged(configured: Vm) -> Ram:
    """128 pages at BASE in a slot that logs."""
    memory = Ram(PAGES * PAGE_SIZE)
    configured.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
    return memory


def dirty(vm: Vm) -> set[int]:
    """The numbers of the pages whose bit is set."""
    log = int.from_bytes(vm.get_dirty_log(SLOT, PAGES), "little")
    return {page for page in range(PAGES) if log >> page & 1}


def writes(*pages: int) -> str:
    return "".join(f"mov dword [abs {BASE + page * PAGE_SIZE:#x}], {page + 1}\n" for page in pages) + "out 0x10, al\n"


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_written_pages(guest: TinyGuest, logged: Ram, mode: Mode) -> None:
    """Each call tells what was written since the last one."""
    guest.load(mode, writes(0, 5, 127) + writes(5, 64) + writes())
    assert guest.vm.get_dirty_log(SLOT, PAGES) == bytes(PAGES // 8)
    guest.out()
    assert dirty(guest.vm) == {0, 5, 127}
    assert dirty(guest.vm) == set()
    guest.out()
    assert dirty(guest.vm) == {5, 64}
    guest.out()
    assert dirty(guest.vm) == set()
    assert [logged.read_u32(page * PAGE_SIZE) for page in (0, 5, 64, 127)] == [1, 6, 65, 128]


def test_reads_do_not_count(guest: TinyGuest, logged: Ram) -> None:
    """Except the first, if KVM then maps the page writable (make_spte)."""
    read = f"mov eax, [abs {BASE:#x}]\n out 0x10, al\n"
    guest.load(Mode.LONG, read + read)
    guest.out()
    assert dirty(guest.vm) <= {0}
    guest.out()
    assert dirty(guest.vm) == set()


def test_host_writes_do_not_count(guest: TinyGuest, logged: Ram) -> None:
    logged.write_u32(0, 1)
    assert dirty(guest.vm) == set()


def test_write_over_a_page_boundary_dirties_both(guest: TinyGuest, logged: Ram) -> None:
    guest.load(Mode.LONG, f"mov dword [abs {BASE + PAGE_SIZE - 2:#x}], 0x44332211\n out 0x10, al")
    guest.out()
    assert dirty(guest.vm) == {0, 1}


def test_in_instruction_dirties(guest: TinyGuest, logged: Ram) -> None:
    """What KVM itself writes into guest memory is logged as well."""
    guest.load(Mode.LONG, f"mov edi, {BASE + 7 * PAGE_SIZE:#x}\n mov dx, 0x99\n insb\n out 0x10, al")
    assert guest.run() is Exit.IO
    guest.vcpu.io_data()[:] = b"\x42"
    guest.out()
    assert dirty(guest.vm) == {7}
    assert logged.read_u8(7 * PAGE_SIZE) == 0x42


def test_switched_on_later_and_off(guest: TinyGuest) -> None:
    memory = Ram(PAGES * PAGE_SIZE)
    guest.vm.set_user_memory_region(SLOT, BASE, memory)
    guest.load(Mode.LONG, writes(1) + writes(2) + writes(3))
    guest.out()
    guest.vm.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
    guest.out()
    assert dirty(guest.vm) == {2}
    guest.vm.set_user_memory_region(SLOT, BASE, memory)
    guest.out()
    with refused(errno.ENOENT):
        guest.vm.get_dirty_log(SLOT, PAGES)


@pytest.mark.parametrize(("slot", "code"), [(0, errno.ENOENT), (9, errno.ENOENT), (0x7FFF, errno.EINVAL)])
def test_slot_that_does_not_log(configured: Vm, slot: int, code: int) -> None:
    with refused(code):
        configured.get_dirty_log(slot, PAGES)


@pytest.mark.needs(Cap.MANUAL_DIRTY_LOG_PROTECT2)
class TestManualProtect:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the log does not clear it."""

    def test_clear_is_explicit(self, guest: TinyGuest) -> None:
        guest.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        memory = Ram(PAGES * PAGE_SIZE)
        guest.vm.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
        guest.load(Mode.LONG, writes(1, 65) + writes(1))
        guest.out()
        assert dirty(guest.vm) == {1, 65}
        assert dirty(guest.vm) == {1, 65}
        guest.vm.clear_dirty_log(SLOT, 0, 64, (1 << 1).to_bytes(8, "little"))
        assert dirty(guest.vm) == {65}
        guest.out()
        assert dirty(guest.vm) == {1, 65}
        guest.vm.clear_dirty_log(SLOT, 0, PAGES, b"\xff" * (PAGES // 8))
        assert dirty(guest.vm) == set()

    def test_initially_set(self, configured: Vm) -> None:
        offered = configured.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2)
        flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        if offered & KVM_DIRTY_LOG_INITIALLY_SET == 0:
            with refused(errno.EINVAL):
                configured.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, flags)
            return
        configured.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, flags)
        memory = Ram(PAGES * PAGE_SIZE)
        configured.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
        assert dirty(configured) == set(range(PAGES))

    @pytest.mark.parametrize(
        ("first", "count"),
        [(1, 64), (0, 63), (PAGES, 64), (64, 128)],
        ids=["first-misaligned", "count-misaligned", "behind-the-end", "over-the-end"],
    )
    def test_bad_range(self, configured: Vm, first: int, count: int) -> None:
        configured.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        configured.set_user_memory_region(SLOT, BASE, Ram(PAGES * PAGE_SIZE), flags=KVM_MEM_LOG_DIRTY_PAGES)
        with refused(errno.EINVAL):
            configured.clear_dirty_log(SLOT, first, count, bytes(64))

    def test_unknown_flag(self, configured: Vm) -> None:
        with refused(errno.EINVAL):
            configured.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1 << 40)

    def test_bitmap_that_is_no_memory(self, configured: Vm, logged: Ram) -> None:
        request = kvm_clear_dirty_log(slot=SLOT, num_pages=64)
        request.u.dirty_bitmap = 0xFFFF800000000000
        with refused(errno.EFAULT):
            configured.ioctl(Requests.KVM_CLEAR_DIRTY_LOG, request)


def ring_cap(vm: Vm) -> Cap:
    """The dirty ring's capability, whichever kind this KVM has; the test is skipped without one."""
    for cap in (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING):
        if vm.check_extension(cap) > 0:
            return cap
    pytest.skip("this KVM has no dirty ring (KVM_CAP_DIRTY_LOG_RING)")


class TestDirtyRing:
    """KVM_CAP_DIRTY_LOG_RING: pages are listed per vCPU. Source: api.rst, "KVM_CAP_DIRTY_LOG_RING/ACQ_REL"."""

    SIZE = 0x1000

    def test_harvest_and_reset(self, configured: Vm, ram: Ram) -> None:
        configured.enable_cap(ring_cap(configured), self.SIZE)
        memory = Ram(PAGES * PAGE_SIZE)
        configured.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
        with configured.create_vcpu() as vcpu:
            guest = TinyGuest(configured, vcpu, ram).load(Mode.LONG, writes(4, 9) + writes(4))
            ring = vcpu.dirty_ring(self.SIZE)
            guest.out()
            entries = [entry for entry in ring if entry.flags & KVM_DIRTY_GFN_F_DIRTY]
            assert {(entry.slot, entry.offset) for entry in entries} == {(SLOT, 4), (SLOT, 9)}
            for entry in entries:
                entry.flags = KVM_DIRTY_GFN_F_RESET
            assert configured.reset_dirty_rings() == 2
            assert configured.reset_dirty_rings() == 0
            guest.out()
            assert [entry.offset for entry in ring if entry.flags & KVM_DIRTY_GFN_F_DIRTY] == [4]

    def test_full_ring_is_an_exit(self, configured: Vm, ram: Ram) -> None:
        """Before it is really full: the rest is kept for KVM's own use."""
        configured.enable_cap(ring_cap(configured), self.SIZE)
        memory = Ram(1024 * PAGE_SIZE)
        configured.set_user_memory_region(SLOT, BASE, memory, flags=KVM_MEM_LOG_DIRTY_PAGES)
        with configured.create_vcpu() as vcpu:
            source = (
                f"mov ebx, {BASE:#x}\n again: mov [rbx], al\n add rbx, 0x1000\n cmp rbx, {BASE + 1024 * PAGE_SIZE:#x}\n"
            )
            load(vcpu, ram, Mode.LONG, f"{source} jne again\n out 0x10, al")
            assert vcpu.run() is Exit.DIRTY_RING_FULL
            ring = vcpu.dirty_ring(self.SIZE)
            assert all(entry.flags & KVM_DIRTY_GFN_F_DIRTY for entry in ring[:64])

    def test_bad_size(self, configured: Vm) -> None:
        for size in (PAGE_SIZE + 1, 1, 1 << 40):
            with refused(errno.EINVAL, errno.E2BIG):
                configured.enable_cap(ring_cap(configured), size)

    def test_no_bitmap_then(self, configured: Vm) -> None:
        configured.enable_cap(ring_cap(configured), self.SIZE)
        configured.set_user_memory_region(SLOT, BASE, Ram(PAGES * PAGE_SIZE), flags=KVM_MEM_LOG_DIRTY_PAGES)
        with refused(errno.ENXIO):
            configured.get_dirty_log(SLOT, PAGES)

    def test_after_a_vcpu(self, configured: Vm) -> None:
        cap = ring_cap(configured)
        with configured.create_vcpu(), refused(errno.EINVAL):
            configured.enable_cap(cap, self.SIZE)


def test_reset_without_a_ring(configured: Vm) -> None:
    with refused(errno.EINVAL, errno.ENOTTY):
        configured.reset_dirty_rings()
