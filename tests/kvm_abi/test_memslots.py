"""Memory slots: set, refuse, move, delete, read-only. Source: api.rst, KVM_SET_USER_MEMORY_REGION."""

from __future__ import annotations

import errno
import os

import pytest

from vmonty.base.errors import GuestMemoryError
from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.api import System, Vm
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.flags import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from vmonty.kvm.uapi.vm import kvm_userspace_memory_region
from vmonty.testing.guests import DATA, HIGH_MMIO, MMIO, RAM_SIZE, Mode, TinyGuest, describe

from .refusals import outcome, refused

# A slot that no other test uses, behind the guest's RAM.
EXTRA, EXTRA_SIZE = 0x200000, 0x4000


@pytest.fixture
def extra() -> Ram:
    """RAM for a second slot."""
    return Ram(EXTRA_SIZE)


READ_EXTRA = f"default abs\n again: mov eax, [{EXTRA:#x}]\n out 0x10, eax\n jmp again"


def expect_hole(guest: TinyGuest, address: int) -> None:
    """The guest's read of *address* must be an MMIO exit; it is answered with 0xdead."""
    reason = guest.run()
    assert reason is Exit.MMIO, describe(guest.vcpu, reason)
    assert guest.vcpu.kvm_run.u.mmio.phys_addr == address
    guest.vcpu.kvm_run.u.mmio.data[:4] = [0xAD, 0xDE, 0, 0]


def test_guest_and_host_share_memory(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"default abs\n mov eax, [{DATA}]\n inc eax\n mov [{DATA + 4}], eax\n out 0x10, al")
    guest.ram.write_u32(DATA, 0x1000)
    assert guest.out() == (0x10, 1)
    assert guest.ram.read_u32(DATA + 4) == 0x1001


def test_second_slot(guest: TinyGuest, extra: Ram) -> None:
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    extra.write_u32(0, 0xCAFE)
    guest.load(Mode.LONG, READ_EXTRA)
    assert guest.out() == (0x10, 0xCAFE)


def test_slot_of_a_part_of_ram(guest: TinyGuest, extra: Ram) -> None:
    guest.vm.set_user_memory_region(1, EXTRA, extra, offset=PAGE_SIZE, size=PAGE_SIZE)
    extra.write_u32(PAGE_SIZE, 0xBEEF)
    guest.load(Mode.LONG, f"default abs\n mov eax, [{EXTRA:#x}]\n out 0x10, eax\n mov eax, [{EXTRA + PAGE_SIZE:#x}]")
    assert guest.out() == (0x10, 0xBEEF)
    expect_hole(guest, EXTRA + PAGE_SIZE)


def test_one_ram_in_two_slots(guest: TinyGuest, extra: Ram) -> None:
    """Two guest-physical addresses, one memory."""
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    guest.vm.set_user_memory_region(2, 2 * EXTRA, extra)
    guest.load(Mode.LONG, f"default abs\n mov dword [{2 * EXTRA:#x}], 77\n mov eax, [{EXTRA:#x}]\n out 0x10, eax")
    assert guest.out() == (0x10, 77)


def test_slot_above_four_gib(guest: TinyGuest, extra: Ram) -> None:
    guest.vm.set_user_memory_region(1, 1 << 32, extra)
    extra.write_u32(0, 0x4444)
    guest.load(Mode.LONG, "default abs\n mov rbx, 0x100000000\n mov eax, [rbx]\n out 0x10, eax")
    # The identity map ends at 4 GiB: let the fifth GiB be the page directory of the first, at 4 GiB.
    tables = 0x40000
    guest.ram.write_u64(0x31000 + 4 * 8, tables | 7)
    guest.ram.write_u64(tables, 1 << 32 | 0x87)
    assert guest.out() == (0x10, 0x4444)


def test_move(guest: TinyGuest, extra: Ram) -> None:
    """The same slot at another address: the old place is a hole, the contents are at the new one."""
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    extra.write_u32(0, 1)
    guest.load(Mode.LONG, f"default abs\n again: mov eax, [{EXTRA:#x}]\n out 0x10, eax\n mov eax, [{2 * EXTRA:#x}]\n"
               " out 0x11, eax\n jmp again")  # fmt: skip
    assert guest.out() == (0x10, 1)
    expect_hole(guest, 2 * EXTRA)
    assert guest.out() == (0x11, 0xDEAD)
    guest.vm.set_user_memory_region(1, 2 * EXTRA, extra)
    expect_hole(guest, EXTRA)
    assert guest.out() == (0x10, 0xDEAD)
    assert guest.out() == (0x11, 1)


@pytest.mark.parametrize("how", ["no-ram", "size-0"])
def test_delete(guest: TinyGuest, extra: Ram, how: str) -> None:
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    extra.write_u32(0, 5)
    guest.load(Mode.LONG, READ_EXTRA)
    assert guest.out() == (0x10, 5)
    if how == "no-ram":
        guest.vm.set_user_memory_region(1, EXTRA, None)
    else:
        guest.vm.set_user_memory_region(1, EXTRA, extra, size=0)
    expect_hole(guest, EXTRA)
    assert guest.out() == (0x10, 0xDEAD)
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    assert guest.out() == (0x10, 5)


def test_new_memory_in_a_slot_after_delete(guest: TinyGuest, extra: Ram) -> None:
    """KVM must forget the pages of the slot's first life."""
    other = Ram(EXTRA_SIZE)
    extra.write_u32(0, 1)
    other.write_u32(0, 2)
    guest.vm.set_user_memory_region(1, EXTRA, extra)
    guest.load(Mode.LONG, READ_EXTRA)
    assert guest.out() == (0x10, 1)
    guest.vm.set_user_memory_region(1, EXTRA, None)
    guest.vm.set_user_memory_region(1, EXTRA, other)
    assert guest.out() == (0x10, 2)


@pytest.mark.needs(Cap.READONLY_MEM)
@pytest.mark.parametrize("mode", [Mode.REAL, Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_read_only(guest: TinyGuest, mode: Mode) -> None:
    """Reads work; a write is an MMIO exit and does not reach the memory."""
    rom = Ram(PAGE_SIZE)
    rom.write_u8(0, 0x31)
    guest.vm.set_user_memory_region(1, MMIO, rom, flags=KVM_MEM_READONLY)
    where = f"mov bx, {MMIO >> 4:#x}\n mov es, bx\n" if mode is Mode.REAL else ""
    place = "[es:0]" if mode is Mode.REAL else f"[abs {MMIO:#x}]"
    guest.load(
        mode, f"{where} mov al, {place}\n out 0x10, al\n mov byte {place}, 0x32\n mov al, {place}\n out 0x11, al"
    )
    assert guest.out() == (0x10, 0x31)
    reason = guest.run()
    assert reason is Exit.MMIO, describe(guest.vcpu, reason)
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (MMIO, 1, 1, 0x32)
    assert guest.out() == (0x11, 0x31)
    assert rom.read_u8(0) == 0x31


@pytest.mark.needs(Cap.READONLY_MEM)
@pytest.mark.parametrize("flags", [KVM_MEM_READONLY, KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES])
def test_read_and_write_of_read_only(guest: TinyGuest, flags: int) -> None:
    """One instruction that does both, to a page that nothing has touched: memory's value, and a write exit."""
    rom = Ram(PAGE_SIZE)
    rom.write_u8(0, 0x31)
    guest.vm.set_user_memory_region(1, MMIO, rom, flags=flags)
    guest.load(Mode.LONG, f"add byte [abs {MMIO:#x}], 5\n out 0x10, al")
    reason = guest.run()
    assert reason is Exit.MMIO, describe(guest.vcpu, reason)
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (MMIO, 1, 1, 0x36)
    assert guest.out()[0] == 0x10
    assert rom.read_u8(0) == 0x31


REFUSED = [
    # id, slot, flags, guest_phys_addr, memory_size, userspace_addr offset, errno
    ("misaligned-gpa", 5, 0, EXTRA + 1, PAGE_SIZE, 0, errno.EINVAL),
    ("misaligned-size", 5, 0, EXTRA, PAGE_SIZE + 1, 0, errno.EINVAL),
    ("misaligned-hva", 5, 0, EXTRA, PAGE_SIZE, 1, errno.EINVAL),
    ("small-size", 5, 0, EXTRA, 1, 0, errno.EINVAL),
    ("overlap-same", 5, 0, 0, RAM_SIZE, 0, errno.EEXIST),
    ("overlap-inside", 5, 0, PAGE_SIZE, PAGE_SIZE, 0, errno.EEXIST),
    ("overlap-end", 5, 0, RAM_SIZE - PAGE_SIZE, 2 * PAGE_SIZE, 0, errno.EEXIST),
    ("unknown-flag", 5, 1 << 30, EXTRA, PAGE_SIZE, 0, errno.EINVAL),
    ("bad-slot", 0x7FFF, 0, EXTRA, PAGE_SIZE, 0, errno.EINVAL),
    ("bad-address-space", 9 << 16, 0, EXTRA, PAGE_SIZE, 0, errno.EINVAL),
    ("wraps-around", 5, 0, (1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 0, errno.EINVAL),
    ("delete-of-nothing", 5, 0, EXTRA, 0, 0, errno.EINVAL),
    ("resize", 0, 0, 0, RAM_SIZE - PAGE_SIZE, 0, errno.EINVAL),
    ("other-memory-in-use", 0, 0, 0, RAM_SIZE, PAGE_SIZE, errno.EINVAL),
]


@pytest.mark.parametrize(
    ("slot", "flags", "gpa", "size", "shift", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(configured: Vm, ram: Ram, slot: int, flags: int, gpa: int, size: int, shift: int, code: int) -> None:
    region = kvm_userspace_memory_region(
        slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=ram.address + shift
    )
    with refused(code):
        configured.ioctl(Requests.KVM_SET_USER_MEMORY_REGION, region)


def test_a_refused_slot_changes_nothing(guest: TinyGuest, extra: Ram) -> None:
    guest.ram.write_u32(DATA, 11)
    extra.fill(0, EXTRA_SIZE, 0xFF)
    with refused(errno.EEXIST):
        guest.vm.set_user_memory_region(1, DATA, extra)
    guest.load(Mode.LONG, f"default abs\n mov eax, [{DATA}]\n out 0x10, eax")
    assert guest.out() == (0x10, 11)


def test_move_onto_another_slot(configured: Vm, extra: Ram) -> None:
    configured.set_user_memory_region(1, EXTRA, extra)
    with refused(errno.EEXIST):
        configured.set_user_memory_region(1, 0, extra)


@pytest.mark.needs(Cap.READONLY_MEM)
def test_read_only_cannot_be_switched_on_later(configured: Vm, extra: Ram) -> None:
    configured.set_user_memory_region(1, EXTRA, extra)
    with refused(errno.EINVAL):
        configured.set_user_memory_region(1, EXTRA, extra, flags=KVM_MEM_READONLY)
    # Dirty logging can.
    configured.set_user_memory_region(1, EXTRA, extra, flags=KVM_MEM_LOG_DIRTY_PAGES)
    assert configured.get_dirty_log(1, EXTRA_SIZE // PAGE_SIZE) == bytes(8)


@pytest.mark.parametrize(("offset", "size"), [(-PAGE_SIZE, None), (0, 2 * EXTRA_SIZE), (EXTRA_SIZE, PAGE_SIZE)])
def test_range_that_is_not_inside_ram(configured: Vm, extra: Ram, offset: int, size: int | None) -> None:
    with pytest.raises(GuestMemoryError):
        configured.set_user_memory_region(1, EXTRA, extra, offset=offset, size=size)


def test_as_many_slots_as_promised(system: System, vm: Vm) -> None:
    page = Ram(PAGE_SIZE)
    last = vm.check_extension(Cap.NR_MEMSLOTS) - 1
    vm.set_user_memory_region(last, EXTRA, page)
    with refused(errno.EEXIST):
        vm.set_user_memory_region(0, EXTRA, page)


@pytest.mark.needs(Cap.USER_MEMORY2)
class TestRegion2:
    """KVM_SET_USER_MEMORY_REGION2, and memory that only the guest maps."""

    def test_as_the_first_request(self, guest: TinyGuest, extra: Ram) -> None:
        guest.vm.set_user_memory_region2(1, EXTRA, extra)
        extra.write_u32(0, 0x22)
        guest.load(Mode.LONG, READ_EXTRA)
        assert guest.out() == (0x10, 0x22)
        guest.vm.set_user_memory_region2(1, EXTRA, None)
        expect_hole(guest, EXTRA)

    def test_overlap(self, configured: Vm, extra: Ram) -> None:
        with refused(errno.EEXIST):
            configured.set_user_memory_region2(1, 0, extra)

    def test_guest_memfd_that_is_none(self, configured: Vm, extra: Ram) -> None:
        with refused(errno.EINVAL, errno.EBADF):
            configured.set_user_memory_region2(1, EXTRA, extra, flags=KVM_MEM_GUEST_MEMFD, guest_memfd=extra.fileno())


def test_region2_where_it_is_unknown(system: System, configured: Vm, extra: Ram) -> None:
    if system.check_extension(Cap.USER_MEMORY2):
        pytest.skip("this KVM has KVM_CAP_USER_MEMORY2; TestRegion2 covers it")
    with refused(errno.ENOTTY):
        configured.set_user_memory_region2(1, EXTRA, extra)


def test_guest_memfd(configured: Vm) -> None:
    """Memory of the guest only; where KVM_CAP_GUEST_MEMFD is absent the request is refused."""
    if configured.check_extension(Cap.GUEST_MEMFD):
        fd = configured.create_guest_memfd(2 * PAGE_SIZE)
        assert os.fstat(fd).st_size == 2 * PAGE_SIZE
        os.close(fd)
        with refused(errno.EINVAL):
            configured.create_guest_memfd(PAGE_SIZE + 1)
    else:
        with refused(errno.ENOTTY, errno.EINVAL):
            configured.create_guest_memfd(2 * PAGE_SIZE)


def test_memory_attributes(configured: Vm) -> None:
    """Private memory needs a VM type that has it; a default VM refuses."""
    with refused(errno.ENOTTY, errno.EINVAL):
        configured.set_memory_attributes(0, PAGE_SIZE, 8)


def test_tss_and_identity_map_addresses(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFEFFC000)
    vm.set_tss_addr(0xFEFFD000)
    with refused(errno.EINVAL):
        vm.set_tss_addr(0xFFFFF000)
    with vm.create_vcpu(), refused(errno.EINVAL):
        vm.set_identity_map_addr(0xFEFFC000)


def test_nr_mmu_pages(vm: Vm) -> None:
    """What is set is what is read; a number below KVM_MIN_ALLOC_MMU_PAGES is refused."""
    vm.set_nr_mmu_pages(1024)
    # Linux 6.5 took KVM_GET_NR_MMU_PAGES back.
    if outcome(vm.get_nr_mmu_pages, errno.ENOTTY, errno.EINVAL) == 0:
        assert vm.get_nr_mmu_pages() == 1024
    with refused(errno.EINVAL):
        vm.set_nr_mmu_pages(1)


def test_slot_of_memory_beyond_what_the_guest_touches(guest: TinyGuest) -> None:
    """A large slot costs nothing until it is used."""
    huge = Ram(1 << 33)
    guest.vm.set_user_memory_region(1, HIGH_MMIO, huge, size=1 << 28)
    guest.load(Mode.LONG, f"mov ebx, {HIGH_MMIO + 0xFFFF000:#x}\n mov eax, [rbx]\n out 0x10, eax")
    huge.write_u32(0xFFFF000, 3)
    assert guest.out() == (0x10, 3)
