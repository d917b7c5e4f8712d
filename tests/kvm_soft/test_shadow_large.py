"""Large pages of a guest with shadow paging: entries of 2 MiB, as long as nothing in them is watched."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from vmonty import kvm
from vmonty.base import hostcall
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.uapi import flags
from vmonty.testing.guests import PML4, RAM_SIZE, Mode, TinyGuest

SIZE = 2 << 20
AT = 1 << 30  # where memory of two large pages lies; the guest's tables map it in large ones
# A table that the guest makes in that memory, for addresses where nothing was mapped.
# Its directory is no part of what the code itself needs.
TABLE, THERE, ENTRY = AT + SIZE + 0x5000, 2 << 30, PML4 + 0x4000


@pytest.fixture(params=["kvm_intel ept=0", "kvm_amd npt=0"])
def guest(request: pytest.FixtureRequest) -> Iterator[tuple[TinyGuest, Ram]]:
    name, parameters = modules.parse(request.param)
    with modules.only(name, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram, more = Ram(RAM_SIZE), Ram(2 * SIZE)
        vm.set_user_memory_region(0, 0, ram)
        vm.set_user_memory_region(1, AT, more)
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram), more


def newest() -> Kvm:
    module = modules.loaded()
    assert module is not None
    return module.vm_list[-1]


def large_pages() -> int:
    return newest().stats.get("pages_2m")


READER = f"again: mov ebx, {AT}\n mov al, [rbx]\n out 0x10, al\n mov al, [rbx + {SIZE}]\n out 0x10, al\n jmp again"


def test_a_whole_one_is_one_entry(guest: tuple[TinyGuest, Ram]) -> None:
    tiny, more = guest
    more.write_u8(0, 1)
    more.write_u8(SIZE, 2)
    tiny.load(Mode.LONG, READER)
    assert tiny.outs(4) == [1, 2, 1, 2]
    assert large_pages() == 2
    told = tiny.vm.translate(AT + SIZE + 0x12345, tiny.vcpu)
    assert told.hpa == told.hva == more.address + SIZE + 0x12345
    assert [step.level for step in told.steps if step.table == "shadow"] == [4, 3, 2]


def test_writes_are_logged_page_by_page(guest: tuple[TinyGuest, Ram]) -> None:
    tiny, more = guest
    tiny.load(Mode.LONG, f"again: mov ebx, {AT + 0x7000}\n inc byte [rbx]\n out 0x10, al\n jmp again")
    tiny.outs(2)
    assert large_pages() == 1
    tiny.vm.set_user_memory_region(1, AT, more, flags=flags.KVM_MEM_LOG_DIRTY_PAGES)
    tiny.outs(2)
    assert large_pages() == 0
    assert tiny.vm.get_dirty_log(1, 1024) == (1 << 7).to_bytes(128, "little")
    tiny.vm.set_user_memory_region(1, AT, more)
    tiny.outs(1)
    assert large_pages() == 1
    assert more.read_u8(0x7000) == 5


def test_one_that_gets_a_page_table_is_watched(guest: tuple[TinyGuest, Ram]) -> None:
    """The guest makes a table in it, uses it, and changes it where it is mapped by the large page."""
    tiny, more = guest
    more.write(0, b"\x0a")
    more.write(0x1000, b"\x0b")
    tiny.load(
        Mode.LONG,
        f"mov ebx, {AT}\n mov esi, {THERE}\n mov al, [rbx]\n mov edi, {TABLE}\n mov eax, {AT | 7}\n"
        f"mov [rdi], rax\n out 0x10, al\n mov eax, {TABLE | 7}\n mov [abs {ENTRY}], rax\n invlpg [rsi]\n"
        f"mov al, [rsi]\n out 0x10, al\n"
        f"mov eax, {AT + 0x1000 | 7}\n mov [rdi], rax\n invlpg [rsi]\n mov al, [rsi]\n out 0x10, al\n"
        f"mov eax, {AT | 7}\n mov [rdi], rax\n mov rax, cr3\n mov cr3, rax\n mov al, [rsi]\n out 0x10, al",
    )
    tiny.ram.write_u64(ENTRY, 0)
    tiny.vcpu.set_sregs(tiny.vcpu.get_sregs())
    tiny.out()
    assert large_pages() == 2
    assert tiny.outs(1) == [0x0A]
    assert large_pages() == 1
    assert tiny.outs(2) == [0x0B, 0x0A]


def test_a_part_of_which_the_memory_changes(guest: tuple[TinyGuest, Ram]) -> None:
    tiny, more = guest
    tiny.load(Mode.LONG, READER)
    assert tiny.outs(2) == [0, 0]
    other = Ram(mmap.PAGESIZE)
    other.write_u8(0, 77)
    tiny.vm.provider.memory_unmapped(more.address + SIZE, mmap.PAGESIZE)  # type: ignore[attr-defined]
    assert large_pages() == 0
    hostcall.map_over(more.address + SIZE, other.fileno(), mmap.PAGESIZE)
    assert tiny.outs(2) == [0, 77]


def test_a_page_that_the_guest_protects(guest: tuple[TinyGuest, Ram]) -> None:
    """What the guest's entry allows holds for the large one too, before and after it changes."""
    tiny, _ = guest
    entry = PML4 + 0x3000  # of the second GiB
    tiny.load(
        Mode.LONG,
        f"mov ebx, {AT}\n mov [rbx], al\n out 0x10, al\n and byte [abs {entry}], 0xfd\n invlpg [rbx]\n mov [rbx], al\n"
        "out 0x11, al",
        handlers={14: "pop rax\n out 0x20, al"},
    )
    assert tiny.out()[0] == 0x10
    assert large_pages() == 1
    assert tiny.out() == (0x20, 0b11)
