"""MMIO: accesses to guest-physical addresses without RAM end in KVM_EXIT_MMIO.

Source: api.rst, "The kvm_run structure".
"""

from __future__ import annotations

import pytest

from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, HIGH_MMIO, MMIO, RAM_SIZE, Mode, TinyGuest, describe

VALUE = 0x8877665544332211
REGISTERS = {1: "al", 2: "ax", 4: "eax", 8: "rax"}
SIZED = [(mode, size) for mode in Mode for size in REGISTERS if size < 8 or mode.long]
SIZED_IDS = [f"{mode.value}-{size}" for mode, size in SIZED]


def operand(mode: Mode, offset: int = 0) -> str:
    """How code of *mode* addresses MMIO + *offset*, after prelude()."""
    return f"[es:{offset:#x}]" if mode is Mode.REAL else f"[abs {MMIO + offset:#x}]"


def prelude(mode: Mode) -> str:
    return f"mov bx, {MMIO >> 4:#x}\n mov es, bx\n" if mode is Mode.REAL else "default abs\n"


def expect_mmio(guest: TinyGuest, address: int, size: int, write: bool) -> bytes:
    """Run to an MMIO exit, check it, return its data."""
    reason = guest.run()
    assert reason is Exit.MMIO, describe(guest.vcpu, reason)
    mmio = guest.vcpu.kvm_run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (address, size, int(write)), describe(guest.vcpu, reason)
    return bytes(mmio.data[:size])


def answer(guest: TinyGuest, data: bytes) -> None:
    """Give the value of an MMIO read."""
    guest.vcpu.kvm_run.u.mmio.data[: len(data)] = list(data)


def constant(size: int) -> str:
    register = "rax" if size == 8 else "eax"
    return f"mov {register}, {VALUE & ((1 << 8 * max(size, 4)) - 1):#x}\n"


@pytest.mark.parametrize(("mode", "size"), SIZED, ids=SIZED_IDS)
def test_write(guest: TinyGuest, mode: Mode, size: int) -> None:
    guest.load(mode, f"{prelude(mode)} {constant(size)} mov {operand(mode, 8)}, {REGISTERS[size]}\n out 0x10, al")
    assert expect_mmio(guest, MMIO + 8, size, write=True) == VALUE.to_bytes(8, "little")[:size]
    assert guest.out()[0] == 0x10


@pytest.mark.parametrize(("mode", "size"), SIZED, ids=SIZED_IDS)
def test_read(guest: TinyGuest, mode: Mode, size: int) -> None:
    """The value given is read, and stored where the test can see all of it."""
    store = f"mov [{DATA:#x}], {REGISTERS[size]}"
    guest.load(mode, f"{prelude(mode)} mov {REGISTERS[size]}, {operand(mode, 8)}\n {store}\n out 0x10, al")
    expect_mmio(guest, MMIO + 8, size, write=False)
    answer(guest, VALUE.to_bytes(8, "little")[:size])
    assert guest.out()[0] == 0x10
    assert guest.ram.read(DATA, 8) == VALUE.to_bytes(8, "little")[:size] + bytes(8 - size)


EXTENDING = [
    ("movzx-byte", "movzx eax, byte {}", 1, b"\x80", 0x80),
    ("movzx-word", "movzx eax, word {}", 2, b"\x00\x80", 0x8000),
    ("movsx-byte", "movsx eax, byte {}", 1, b"\x80", 0xFFFFFF80),
    ("movsx-word", "movsx eax, word {}", 2, b"\x00\x80", 0xFFFF8000),
]


@pytest.mark.parametrize(
    ("template", "size", "data", "value"), [row[1:] for row in EXTENDING], ids=[row[0] for row in EXTENDING]
)
@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.LONG], ids=lambda mode: mode.value)
def test_extending_read(guest: TinyGuest, mode: Mode, template: str, size: int, data: bytes, value: int) -> None:
    guest.load(mode, f"{prelude(mode)} {template.format(operand(mode))}\n out 0x10, eax")
    expect_mmio(guest, MMIO, size, write=False)
    answer(guest, data)
    assert guest.out() == (0x10, value)


MODIFYING = [
    ("add", "add dword {}, 5", 7, 12),
    ("or", "or dword {}, 0xf0", 0x0F, 0xFF),
    ("xor", "xor dword {}, eax", 0xFF, 0xFF ^ 0x3C),
    ("inc", "inc dword {}", 0xFFFFFFFF, 0),
    ("not", "not dword {}", 0, 0xFFFFFFFF),
    ("xchg", "xchg {}, eax", 1, 0x3C),
    ("bts", "bts dword {}, 4", 0, 0x10),
]


@pytest.mark.parametrize(
    ("template", "before", "after"), [row[1:] for row in MODIFYING], ids=[row[0] for row in MODIFYING]
)
def test_read_modify_write(guest: TinyGuest, template: str, before: int, after: int) -> None:
    """One instruction, two exits: its read, then its write."""
    guest.load(
        Mode.PROTECTED, f"{prelude(Mode.PROTECTED)} mov eax, 0x3c\n {template.format(operand(Mode.PROTECTED))}\n hlt"
    )
    expect_mmio(guest, MMIO, 4, write=False)
    answer(guest, before.to_bytes(4, "little"))
    assert expect_mmio(guest, MMIO, 4, write=True) == after.to_bytes(4, "little")
    assert guest.run() is Exit.HLT


def test_compare_sets_flags(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"default abs\n cmp byte [{MMIO:#x}], 0x42\n sete al\n out 0x10, al")
    expect_mmio(guest, MMIO, 1, write=False)
    answer(guest, b"\x42")
    assert guest.out() == (0x10, 1)


def test_write_over_a_page_boundary_is_two_exits(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"default abs\n mov eax, 0x44332211\n mov [{MMIO + 0xFFE:#x}], eax\n out 0x10, al")
    assert expect_mmio(guest, MMIO + 0xFFE, 2, write=True) == b"\x11\x22"
    assert expect_mmio(guest, MMIO + 0x1000, 2, write=True) == b"\x33\x44"
    assert guest.out()[0] == 0x10


def test_read_over_a_page_boundary_is_two_exits(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"default abs\n mov eax, [{MMIO + 0xFFD:#x}]\n out 0x10, eax")
    expect_mmio(guest, MMIO + 0xFFD, 3, write=False)
    answer(guest, b"\x11\x22\x33")
    expect_mmio(guest, MMIO + 0x1000, 1, write=False)
    answer(guest, b"\x44")
    assert guest.out() == (0x10, 0x44332211)


def test_write_from_ram_into_mmio(guest: TinyGuest) -> None:
    """The first half lands in the last bytes of RAM, the second is an exit."""
    guest.load(Mode.LONG, f"default abs\n mov eax, 0x44332211\n mov [{RAM_SIZE - 1:#x}], eax\n out 0x10, al")
    assert expect_mmio(guest, RAM_SIZE, 3, write=True) == b"\x22\x33\x44"
    assert guest.out()[0] == 0x10
    assert guest.ram.read(RAM_SIZE - 1, 1) == b"\x11"


def test_read_from_ram_into_mmio(guest: TinyGuest) -> None:
    guest.ram.write(RAM_SIZE - 2, b"\xaa\xbb")
    guest.load(Mode.LONG, f"default abs\n mov eax, [{RAM_SIZE - 2:#x}]\n out 0x10, eax")
    expect_mmio(guest, RAM_SIZE, 2, write=False)
    answer(guest, b"\xcc\xdd")
    assert guest.out() == (0x10, 0xDDCCBBAA)


def test_rep_stos_writes_every_element(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"cld\n mov edi, {MMIO:#x}\n mov ecx, 3\n mov eax, 0x1234\n rep stosw\n out 0x10, al")
    for index in range(3):
        assert expect_mmio(guest, MMIO + 2 * index, 2, write=True) == b"\x34\x12"
    assert guest.out()[0] == 0x10


def test_movs_copies_from_mmio_to_ram(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"cld\n mov esi, {MMIO:#x}\n mov edi, {DATA:#x}\n mov ecx, 2\n rep movsd\n out 0x10, al")
    for index, data in enumerate((b"abcd", b"efgh")):
        expect_mmio(guest, MMIO + 4 * index, 4, write=False)
        answer(guest, data)
    assert guest.out()[0] == 0x10
    assert guest.ram.read(DATA, 8) == b"abcdefgh"


def test_movs_copies_from_ram_to_mmio(guest: TinyGuest) -> None:
    guest.ram.write(DATA, b"abcdefgh")
    guest.load(Mode.LONG, f"cld\n mov esi, {DATA:#x}\n mov edi, {MMIO:#x}\n mov ecx, 2\n rep movsd\n out 0x10, al")
    assert expect_mmio(guest, MMIO, 4, write=True) == b"abcd"
    assert expect_mmio(guest, MMIO + 4, 4, write=True) == b"efgh"
    assert guest.out()[0] == 0x10


def test_sixteen_bytes_are_two_exits(guest: TinyGuest) -> None:
    """kvm_run.mmio holds eight bytes at most."""
    guest.ram.write(DATA, bytes(range(16)))
    guest.load(Mode.LONG, f"default abs\n movups xmm0, [{DATA:#x}]\n movups [{MMIO:#x}], xmm0\n out 0x10, al")
    assert expect_mmio(guest, MMIO, 8, write=True) == bytes(range(8))
    assert expect_mmio(guest, MMIO + 8, 8, write=True) == bytes(range(8, 16))
    assert guest.out()[0] == 0x10


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_high_address(guest: TinyGuest, mode: Mode) -> None:
    guest.load(mode, f"mov ebx, {HIGH_MMIO:#x}\n mov eax, [ebx + 0x20]\n out 0x10, eax")
    expect_mmio(guest, HIGH_MMIO + 0x20, 4, write=False)
    answer(guest, b"\1\2\3\4")
    assert guest.out() == (0x10, 0x04030201)


def test_push_to_mmio(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov esp, {MMIO + 0x100:#x}\n push 0x55\n mov esp, 0x7000\n out 0x10, al")
    assert expect_mmio(guest, MMIO + 0xF8, 8, write=True) == (0x55).to_bytes(8, "little")
    assert guest.out()[0] == 0x10


def test_read_is_complete_after_complete_io(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"default abs\n xor eax, eax\n mov al, [{MMIO:#x}]\n hlt")
    expect_mmio(guest, MMIO, 1, write=False)
    answer(guest, b"\x77")
    guest.vcpu.complete_io()
    assert guest.vcpu.get_regs().rax == 0x77
