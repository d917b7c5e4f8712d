"""Entries for devices in shadow tables: their #PF has RSVD in its error code, and the guest's tables are not walked."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.soft.mmu.paging_tmpl import GuestWalker
from vmonty.kvm.soft.mmu.spte import GENERATION_BITS, check_mmio_spte, is_mmio_spte, make_mmio_spte
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, PML4, PTE_P, PTE_U, PTE_W, Mode, TinyGuest

from .plain import plain_guest

# A device, and pages that the guest's own table at TABLE maps: it lies where the RAM of the test does not end yet.
AT = 0x20_0000
TABLE, MAPPED = 0x7F000, 0x4000_0000
SLOT = 1 << GENERATION_BITS
READS = f"mov esi, {AT:#x}\n again: mov eax, [rsi]\n out 0x10, eax\n jmp again"


@pytest.fixture(params=["kvm_intel ept=0", "kvm_amd npt=0"])
def guest(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    with plain_guest(request.param) as made:
        yield made


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses for which the guest's tables were walked."""
    asked: list[int] = []
    walk = GuestWalker.walk

    def noting(walker: GuestWalker, registers: object, gva: int, *others: object) -> object:
        asked.append(gva)
        return walk(walker, registers, gva, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(GuestWalker, "walk", noting)
    return asked


def newest() -> Kvm:
    module = modules.loaded()
    assert module is not None
    return module.vm_list[-1]


def entry(guest: TinyGuest, gva: int) -> int:
    """What our table has for *gva*."""
    told = guest.vm.translate(gva, guest.vcpu)
    last = [step for step in told.steps if step.table == "shadow"][-1]
    value: int = last.value if last.level == 1 else 0
    assert told.hpa is None or not is_mmio_spte(value)
    return value


def map_page(guest: TinyGuest, physical: int, flags: int = PTE_P | PTE_W | PTE_U) -> str:
    """Code that maps MAPPED by a table of small pages. It spoils EBX."""
    guest.ram.write_u64(TABLE, physical | flags)
    return f"mov dword [abs {PML4 + 0x3000}], {TABLE | PTE_P | PTE_W | PTE_U:#x}\n invlpg [abs {MAPPED}]\n"


def device(guest: TinyGuest, answer: int = 0) -> int:
    """The next exit must be for a device: its address."""
    assert guest.run() is Exit.MMIO
    mmio = guest.vcpu.kvm_run.u.mmio
    if not mmio.is_write:
        mmio.data[:4] = list(answer.to_bytes(4, "little"))
    address: int = mmio.phys_addr
    return address


def test_format() -> None:
    for generation in (0, 1, 0x1FF, 0x200, 0xABCDE, SLOT - 1):
        spte = make_mmio_spte(0xFEE00, 6, generation)
        assert spte >> 63 == 0
        assert is_mmio_spte(spte)
        assert check_mmio_spte(spte, generation)
        assert check_mmio_spte(spte, generation + SLOT)
        assert not check_mmio_spte(spte, generation + 1)
        assert not check_mmio_spte(spte, generation ^ 0x80000)
    assert not check_mmio_spte(0, 0)
    assert not is_mmio_spte(0x7FFF_1234_5067)


def test_tables_are_walked_once(guest: TinyGuest, walks: list[int]) -> None:
    guest.load(Mode.LONG, READS)
    with guest.vcpu.stats() as counters:
        for turn in range(10):
            assert device(guest, turn) == AT
            assert guest.out() == (0x10, turn)
            if not turn:
                assert walks.count(AT) == 1
        told = counters.read()
    assert walks.count(AT) == 1
    assert told["mmio_exits"] == 10
    assert told["pf_mmio_spte_created"] == 1
    assert is_mmio_spte(entry(guest, AT))


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.LONG, Mode.USER])
def test_stores(guest: TinyGuest, mode: Mode, walks: list[int]) -> None:
    guest.load(mode, f"mov esi, {AT + 8:#x}\n mov eax, 7\n again: mov [esi], eax\n inc eax\n jmp again")
    for value in range(7, 12):
        assert device(guest) == AT + 8
        assert guest.vcpu.kvm_run.u.mmio.data[0] == value
    assert walks.count(AT + 8) <= 1


def test_memory_comes_and_goes(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, READS)
    memory = Ram(0x1000)
    memory.write_u32(0, 0x600D)
    for turn in range(3):
        assert device(guest, turn) == AT
        assert guest.out() == (0x10, turn)
        guest.vm.set_user_memory_region(1, AT, memory)
        assert guest.outs(2) == [0x600D, 0x600D]
        guest.vm.set_user_memory_region(1, AT, None)


def test_other_slots_make_it_stale(guest: TinyGuest, walks: list[int]) -> None:
    guest.load(Mode.LONG, READS)
    for turn in range(3):
        guest.vm.set_user_memory_region(2 + turn, 0x1000_0000 * (1 + turn), Ram(0x1000))
        for _ in range(3):
            assert device(guest) == AT
            guest.out()
        assert walks.count(AT) == 1 + turn


def test_generations_wrap_around(guest: TinyGuest) -> None:
    """An old entry would seem to be of the new generation."""
    memory = Ram(0x1000)
    guest.load(Mode.LONG, READS)
    newest().memslots.generation = 0
    assert device(guest) == AT
    guest.out()
    assert entry(guest, AT) == make_mmio_spte(AT >> 12, 6, 0)
    newest().memslots.generation = SLOT - 1
    guest.vm.set_user_memory_region(1, AT, memory)
    assert newest().memslots.generation == SLOT
    memory.write_u32(0, 0x600D)
    assert guest.out() == (0x10, 0x600D)


@pytest.mark.parametrize("flush", ["invlpg [rsi]", "mov rbx, cr3\n mov cr3, rbx"], ids=["invlpg", "cr3"])
def test_the_guest_maps_something_else_there(guest: TinyGuest, flush: str, walks: list[int]) -> None:
    prepare = map_page(guest, AT)
    guest.ram.write_u32(DATA, 0x600D)
    there, device_there = DATA | PTE_P | PTE_W, AT | PTE_P | PTE_W
    guest.load(
        Mode.LONG,
        f"{prepare} mov esi, {MAPPED:#x}\n again:\n mov eax, [rsi]\n out 0x10, eax\n mov eax, [rsi]\n out 0x10, eax\n"
        f"mov dword [abs {TABLE}], {there:#x}\n {flush}\n mov eax, [rsi]\n out 0x10, eax\n"
        f"mov dword [abs {TABLE}], {device_there:#x}\n {flush}\n jmp again",
    )
    for turn in range(5):
        for answer in (turn, 99):
            assert device(guest, answer) == AT
            assert guest.out() == (0x10, answer)
        assert guest.out() == (0x10, 0x600D)


def test_what_the_guests_tables_refuse(guest: TinyGuest) -> None:
    """The entry is there; who may not use it has a page fault of its own."""
    prepare = map_page(guest, AT, PTE_P)  # of the supervisor, and only to read
    guest.load(
        Mode.LONG,
        f"{prepare} mov esi, {MAPPED:#x}\n again: mov eax, [rsi]\n out 0x10, eax\n mov [rsi], eax\n jmp again",
        {14: "pop rax\n out 0x1e, eax\n mov rax, cr2\n out 0x1f, eax\n add qword [rsp], 2\n iretq"},
    )
    for turn in range(3):
        assert device(guest, turn) == AT
        assert guest.out() == (0x10, turn)
        assert is_mmio_spte(entry(guest, MAPPED))
        assert guest.out() == (0x1E, 3)
        assert guest.out() == (0x1F, MAPPED)


def test_nothing_is_counted_as_mapped(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, READS)
    assert device(guest) == AT
    guest.out()
    made = newest()
    made.zap_all()
    assert made.stats.get("pages_4k") == 0
    assert made.stats.get("pages_2m") == 0


def test_physical_addresses_of_32_bit_guests(guest: TinyGuest) -> None:
    """Tables of 1024 entries: the page tables of the guest are not those of the processor."""
    flags = PTE_P | PTE_W
    guest.ram.write(0x70000, struct.pack("<1024I", *([0x71000 | flags] + [0] * 1023)))
    guest.ram.write(0x71000, struct.pack("<1024I", *((page << 12 | flags) for page in range(1024))))
    guest.load(
        Mode.PROTECTED,
        f"mov eax, 0x70000\n mov cr3, eax\n mov eax, cr0\n or eax, 0x80000000\n mov cr0, eax\n jmp next\n next:\n"
        f"mov esi, {AT:#x}\n again: mov eax, [esi]\n out 0x10, eax\n jmp again",
    )
    for turn in range(5):
        assert device(guest, turn) == AT
        assert guest.out() == (0x10, turn)
    assert is_mmio_spte(entry(guest, AT))
