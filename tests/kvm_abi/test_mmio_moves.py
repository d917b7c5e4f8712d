"""MMIO by plain moves, again and again at one address: what drivers do, and what KVMs have short ways for.

Source: api.rst, "The kvm_run structure"; SDM, "MOV—Move", "MOVZX", "MOVSX/MOVSXD", "General-Purpose Registers".
"""

from __future__ import annotations

import struct

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, HIGH_MMIO, MMIO, Mode, TinyGuest, describe

TURNS = 3
END = 0x10
OLD, GIVEN = 0xFFEE_DDCC_BBAA_9988, 0x8182_8384_8586_8788
MODES = [Mode.PROTECTED, Mode.LONG, Mode.USER]


def turns(mode: Mode, body: str) -> str:
    """*body* a few times, with RBX at the device, R15 or EBP its turns, and RSI at where it may keep results."""
    count = "r15d" if mode.long else "ebp"
    return (
        f"mov ebx, {MMIO:#x}\n mov esi, {DATA}\n mov {count}, {TURNS}\n again: {body}\n dec {count}\n jnz again\n"
        f" out {END}, al"
    )


def mmio(guest: TinyGuest, write: bool, size: int, address: int = MMIO + 8) -> bytes:
    """Run to an MMIO exit; its data."""
    reason = guest.run()
    assert reason is Exit.MMIO, describe(guest.vcpu, reason)
    writes, at, data = guest.vcpu.mmio_access()
    assert (at, writes, len(data)) == (address, write, size)
    return bytes(data)


def answer(guest: TinyGuest, data: bytes) -> None:
    guest.vcpu.mmio_access()[2][:] = data


def low(value: int, size: int) -> int:
    return value & (1 << 8 * size) - 1


STORES = {
    "mov [rbx + 8], cl": (1, OLD),
    "mov [rbx + 8], ch": (1, OLD >> 8),
    "mov [rbx + 8], cx": (2, OLD),
    "mov [rbx + 8], ecx": (4, OLD),
    "mov dword [rbx + 8], 0x12345678": (4, 0x1234_5678),
    "mov word [rbx + 8], 0x9ABC": (2, 0x9ABC),
    "mov byte [rbx + 8], 0xDE": (1, 0xDE),
    "mov [rbx + rdi*4], ecx": (4, OLD),
    f"mov [abs {MMIO + 8:#x}], al": (1, OLD),
    f"mov [abs {MMIO + 8:#x}], ax": (2, OLD),
    f"mov [abs {MMIO + 8:#x}], eax": (4, OLD),
}
LONG_STORES = {
    "mov [rbx + 8], rcx": (8, OLD),
    "mov [rbx + 8], sil": (1, DATA),
    "mov [rbx + 8], r9d": (4, OLD),
    "mov qword [rbx + 8], -2": (8, -2),
    f"mov [abs {MMIO + 8:#x}], r9w": (2, OLD),
    f"mov [qword abs {MMIO + 8:#x}], rax": (8, OLD),
    f"mov [qword abs {MMIO + 8:#x}], al": (1, OLD),
}


def all_of(plain: dict[str, tuple[int, int]], long: dict[str, tuple[int, int]]) -> list[object]:
    return [
        pytest.param(mode, code, *facts, id=f"{mode.value}-{code}")
        for mode in MODES
        for code, facts in (plain | (long if mode.long else {})).items()
    ]


def for_mode(mode: Mode, code: str) -> str:
    """With the address registers that *mode* has."""
    return code if mode.long else code.replace("rbx", "ebx").replace("rdi", "edi")


@pytest.mark.parametrize(("mode", "code", "size", "value"), all_of(STORES, LONG_STORES))
def test_stores(guest: TinyGuest, mode: Mode, code: str, size: int, value: int) -> None:
    prepare = f"mov rcx, {OLD:#x}\n mov rax, rcx\n mov r9, rcx\n"
    if not mode.long:
        prepare = f"mov ecx, {low(OLD, 4):#x}\n mov eax, ecx\n"
    guest.load(mode, f"{prepare} mov edi, 2\n {turns(mode, for_mode(mode, code))}")
    for _ in range(TURNS):
        assert mmio(guest, True, size) == (value & (1 << 64) - 1).to_bytes(8, "little")[:size]
    assert guest.out()[0] == END


def result(old: int, size: int, data: int, width: int, signed: bool) -> int:
    """What a register that held *old* holds when *size* bytes of *data* were moved to *width* bytes of it."""
    value = low(data, size)
    if signed and value >> 8 * size - 1:
        value -= 1 << 8 * size
    value = low(value, width)
    return value if width >= 4 else old & ~low(-1, width) | value


# Instruction → bytes of memory, bytes of the register, signed.
LOADS = {
    "mov cl, [rbx + 8]": (1, 1, False),
    "mov cx, [rbx + 8]": (2, 2, False),
    "mov ecx, [rbx + 8]": (4, 4, False),
    "movzx ecx, byte [rbx + 8]": (1, 4, False),
    "movzx cx, byte [rbx + 8]": (1, 2, False),
    "movzx ecx, word [rbx + 8]": (2, 4, False),
    "movsx ecx, byte [rbx + 8]": (1, 4, True),
    "movsx cx, byte [rbx + 8]": (1, 2, True),
    "movsx ecx, word [rbx + 8]": (2, 4, True),
    "mov ecx, [rbx + rdi*4]": (4, 4, False),
}
LONG_LOADS = {
    "mov rcx, [rbx + 8]": (8, 8, False),
    "movzx rcx, word [rbx + 8]": (2, 8, False),
    "movsx rcx, byte [rbx + 8]": (1, 8, True),
    "movsxd rcx, dword [rbx + 8]": (4, 8, True),
    f"mov ecx, [abs {MMIO + 8:#x}]": (4, 4, False),
    **{
        f"mov rax, rcx\n mov {name}, [qword abs {MMIO + 8:#x}]\n mov rcx, rax": (size, size, False)
        for name, size in (("al", 1), ("ax", 2), ("eax", 4), ("rax", 8))
    },
}


@pytest.mark.parametrize(("mode", "code", "size", "width", "signed"), all_of(LOADS, LONG_LOADS))
def test_loads(guest: TinyGuest, mode: Mode, code: str, size: int, width: int, signed: bool) -> None:
    prepare = f"mov rcx, {OLD:#x}\n" if mode.long else f"mov ecx, {low(OLD, 4):#x}\n"
    store = "mov [rsi], rcx\n add rsi, 8" if mode.long else "mov [esi], ecx\n add esi, 8"
    guest.load(mode, f"mov edi, 2\n {turns(mode, f'{prepare} {for_mode(mode, code)}{chr(10)} {store}')}")
    old = OLD if mode.long else low(OLD, 4)
    expected = []
    for turn in range(TURNS):
        data = GIVEN ^ turn * 0x1111_1111_1111_1111
        mmio(guest, False, size)
        answer(guest, data.to_bytes(8, "little")[:size])
        expected.append(result(old, size, data, width, signed))
    assert guest.out()[0] == END
    kept = [guest.ram.read_u64(DATA + 8 * turn) for turn in range(TURNS)]
    assert kept == expected


def test_every_register(guest: TinyGuest) -> None:
    """Each is loaded and stored, those that stand elsewhere while a guest runs included."""
    names = ["rax", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 15))]
    body = "\n".join(f"mov {name}, [rbx + 8]\n mov [rbx + 16], {name}" for name in names)
    guest.load(Mode.LONG, turns(Mode.LONG, body))
    for turn in range(TURNS):
        for number in range(len(names)):
            value = OLD + 0x1000 * turn + number
            mmio(guest, False, 8)
            answer(guest, struct.pack("<Q", value))
            assert mmio(guest, True, 8, MMIO + 16) == struct.pack("<Q", value), names[number]
    assert guest.out()[0] == END


def test_two_pages_in_turns(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, turns(Mode.LONG, f"mov [rbx + 8], ecx\n mov edx, {HIGH_MMIO:#x}\n mov eax, [rdx + 4]"))
    for _ in range(TURNS):
        mmio(guest, True, 4)
        mmio(guest, False, 4, HIGH_MMIO + 4)
    assert guest.out()[0] == END


def test_memory_that_comes_is_memory_at_once(guest: TinyGuest) -> None:
    """A device's page is remembered until a slot lies there."""
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n again: mov ecx, [rbx + 8]\n mov [rbx + 12], ecx\n jmp again")
    for _ in range(TURNS):
        mmio(guest, False, 4)
        answer(guest, b"abcd")
        assert mmio(guest, True, 4, MMIO + 12) == b"abcd"
    mmio(guest, False, 4)
    answer(guest, b"last")
    ram = Ram(0x1000)
    guest.vm.set_user_memory_region(1, MMIO, ram)
    guest.vcpu.complete_io()
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n mov ecx, 77\n mov [rbx + 8], ecx\n mov edx, [rbx + 8]\n out {END}, al")
    assert guest.out()[0] == END
    assert ram.read_u32(8) == 77
    guest.vm.set_user_memory_region(1, MMIO, None)
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n mov ecx, 78\n mov [rbx + 8], ecx\n out {END}, al")
    assert mmio(guest, True, 4) == struct.pack("<I", 78)
    assert guest.out()[0] == END


def test_a_read_is_completed_before_registers_are_read(guest: TinyGuest) -> None:
    """With immediate_exit KVM_RUN does that and nothing else."""
    guest.load(Mode.LONG, turns(Mode.LONG, f"mov rcx, {OLD:#x}\n mov cx, [rbx + 8]"))
    for turn in range(TURNS):
        mmio(guest, False, 2)
        before = guest.vcpu.get_regs().rip
        answer(guest, struct.pack("<H", turn))
        guest.vcpu.complete_io()
        registers = guest.vcpu.get_regs()
        assert registers.rip > before
        assert registers.rcx == OLD & ~0xFFFF | turn
    assert guest.out()[0] == END


def test_a_read_over_which_registers_are_looked_at(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, turns(Mode.LONG, "mov ecx, [rbx + 8]\n mov [rbx + 8], ecx"))
    for turn in range(TURNS):
        mmio(guest, False, 4)
        guest.vcpu.get_regs()
        guest.vcpu.get_sregs()
        answer(guest, struct.pack("<I", turn))
        assert mmio(guest, True, 4) == struct.pack("<I", turn)
        guest.vcpu.get_regs()
    assert guest.out()[0] == END


@pytest.mark.parametrize("code", ["mov [rbx + 8], ecx", "movnti [rbx + 8], ecx", "sete [rbx + 8]"])
def test_a_write_is_done_when_it_exits(guest: TinyGuest, code: str) -> None:
    """rip stands behind it: only a read has something to complete, and completing executes nothing more."""
    guest.load(Mode.LONG, turns(Mode.LONG, code))
    places = set()
    for _ in range(TURNS):
        mmio(guest, True, 1 if "sete" in code else 4)
        places.add(guest.vcpu.get_regs().rip)
        guest.vcpu.complete_io()
        places.add(guest.vcpu.get_regs().rip)
    assert len(places) == 1


def test_an_operand_that_crosses_into_the_device(guest: TinyGuest) -> None:
    """Its first part is another page's: no plain access of this one."""
    guest.load(
        Mode.LONG,
        f"mov ebx, {MMIO + 0x1000:#x}\n mov r15d, {TURNS}\n mov ecx, 0x44332211\n"
        f" again: mov [rbx - 2], ecx\n dec r15d\n jnz again\n out {END}, al",
    )
    for _ in range(TURNS):
        assert mmio(guest, True, 2, MMIO + 0xFFE) == b"\x11\x22"
        assert mmio(guest, True, 2, MMIO + 0x1000) == b"\x33\x44"
    assert guest.out()[0] == END


def test_a_data_breakpoint_on_the_device(guest: TinyGuest) -> None:
    """The guest's own, on what it stores: #DB comes behind the instruction."""
    guest.load(
        Mode.LONG,
        f"mov eax, {MMIO + 8:#x}\n mov dr0, rax\n mov eax, 0xD0401\n mov dr7, rax\n mov ebx, {MMIO:#x}\n"
        f" mov r15d, {TURNS}\n again: mov [rbx + 8], ecx\n dec r15d\n jnz again\n out {END}, al",
        {1: f"inc dword [abs {DATA}]\n iretq"},
    )
    for _ in range(TURNS):
        mmio(guest, True, 4)
    assert guest.out()[0] == END
    assert guest.ram.read_u32(DATA) in (0, TURNS), "Linux's emulator looks at no data breakpoint"
