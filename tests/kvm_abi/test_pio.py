"""Port I/O: KVM_EXIT_IO, its sizes, directions, counts and data. Source: api.rst, "The kvm_run structure"."""

from __future__ import annotations

import pytest

from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.exits import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from vmonty.testing.guests import CODE, DATA, RFLAGS, RFLAGS_IOPL3, TSS, TSS_IOPB, TSS_SIZE, Mode, TinyGuest

SIZES = [(1, "al"), (2, "ax"), (4, "eax")]
PORT = 0x5678


@pytest.mark.parametrize(("size", "register"), SIZES, ids=["1", "2", "4"])
def test_out(guest: TinyGuest, mode: Mode, size: int, register: str) -> None:
    guest.load(mode, f"mov dx, {PORT:#x}\n mov eax, 0x87654321\n out dx, {register}\n hlt")
    assert guest.run() is Exit.IO
    io = guest.vcpu.kvm_run.u.io
    assert (io.direction, io.size, io.port, io.count) == (KVM_EXIT_IO_OUT, size, PORT, 1)
    assert bytes(guest.vcpu.io_data()) == bytes.fromhex("21436587")[:size]


@pytest.mark.parametrize(("size", "register"), SIZES, ids=["1", "2", "4"])
def test_in(guest: TinyGuest, mode: Mode, size: int, register: str) -> None:
    """IN fills only as much of EAX as it is wide; the rest of EAX stays."""
    guest.load(mode, f"mov dx, {PORT:#x}\n mov eax, 0xaaaaaaaa\n in {register}, dx\n out 0x10, eax\n hlt")
    assert guest.run() is Exit.IO
    io = guest.vcpu.kvm_run.u.io
    assert (io.direction, io.size, io.port, io.count) == (KVM_EXIT_IO_IN, size, PORT, 1)
    guest.vcpu.io_data()[:] = bytes.fromhex("11223344")[:size]
    assert guest.out() == (
        0x10,
        int.from_bytes(bytes.fromhex("11223344")[:size] + bytes([0xAA] * (4 - size)), "little"),
    )


def test_immediate_port(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov al, 7\n out 0x80, al\n in al, 0x81\n out 0x82, al")
    assert guest.out() == (0x80, 7)
    assert guest.run() is Exit.IO
    assert guest.vcpu.kvm_run.u.io.port == 0x81
    guest.vcpu.io_data()[:] = b"\x99"
    assert guest.out() == (0x82, 0x99)


def test_highest_port(guest: TinyGuest) -> None:
    guest.load(Mode.REAL, "mov dx, 0xffff\n mov al, 1\n out dx, al")
    assert guest.out() == (0xFFFF, 1)


def test_in_extends_eax_to_rax(guest: TinyGuest) -> None:
    """A 32-bit destination clears the upper half in 64-bit mode."""
    guest.load(Mode.LONG, "mov rax, -1\n in eax, 0x10\n mov rbx, rax\n shr rbx, 32\n mov eax, ebx\n out 0x11, eax")
    assert guest.run() is Exit.IO
    guest.vcpu.io_data()[:] = b"\1\2\3\4"
    assert guest.out() == (0x11, 0)


STRINGS = [(1, "b"), (2, "w"), (4, "d")]


def collect_outs(guest: TinyGuest, size: int, total: int) -> bytes:
    """Gather *total* bytes of string output; KVM may split it into several exits."""
    data = b""
    while len(data) < total:
        assert guest.run() is Exit.IO
        io = guest.vcpu.kvm_run.u.io
        assert (io.direction, io.size, io.port) == (KVM_EXIT_IO_OUT, size, PORT)
        assert len(guest.vcpu.io_data()) == io.size * io.count
        data += bytes(guest.vcpu.io_data())
    return data


@pytest.mark.parametrize(("size", "suffix"), STRINGS, ids=["outsb", "outsw", "outsd"])
def test_rep_outs(guest: TinyGuest, mode: Mode, size: int, suffix: str) -> None:
    """``rep outs`` of five elements, forwards."""
    data = bytes(range(1, 5 * size + 1))
    guest.ram.write(DATA, data)
    guest.load(mode, f"cld\n mov esi, {DATA}\n mov ecx, 5\n mov dx, {PORT:#x}\n rep outs{suffix}\n hlt")
    assert collect_outs(guest, size, len(data)) == data
    guest.vcpu.complete_io()
    regs = guest.vcpu.get_regs()
    assert (regs.rcx, regs.rsi) == (0, DATA + len(data))


@pytest.mark.parametrize(("size", "suffix"), STRINGS, ids=["insb", "insw", "insd"])
def test_rep_ins(guest: TinyGuest, mode: Mode, size: int, suffix: str) -> None:
    """``rep ins`` of five elements lands in guest memory; one exit may carry several (kvm_run.io.count)."""
    guest.load(
        mode, f"cld\n mov edi, {DATA}\n mov ecx, 5\n mov dx, {PORT:#x}\n rep ins{suffix}\n mov al, 1\n out 0x10, al"
    )
    wanted = bytes(range(0x40, 0x40 + 5 * size))
    given = 0
    while given < len(wanted):
        assert guest.run() is Exit.IO
        io = guest.vcpu.kvm_run.u.io
        assert (io.direction, io.size, io.port) == (KVM_EXIT_IO_IN, size, PORT)
        room = guest.vcpu.io_data()
        assert 1 <= io.count <= 5
        room[:] = wanted[given : given + len(room)]
        given += len(room)
    assert guest.out() == (0x10, 1)
    assert guest.ram.read(DATA, len(wanted) + 1) == wanted + b"\0"
    guest.vcpu.complete_io()
    regs = guest.vcpu.get_regs()
    assert (regs.rcx, regs.rdi) == (0, DATA + len(wanted))


def test_rep_outs_backwards(guest: TinyGuest) -> None:
    guest.ram.write(DATA, b"abcd")
    guest.load(Mode.LONG, f"std\n mov esi, {DATA + 3}\n mov ecx, 4\n mov dx, {PORT:#x}\n rep outsb\n hlt")
    assert collect_outs(guest, 1, 4) == b"dcba"
    guest.vcpu.complete_io()
    assert guest.vcpu.get_regs().rsi == DATA - 1


def test_rep_ins_over_a_page_boundary(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"cld\n mov edi, {DATA + 0xFFE}\n mov ecx, 4\n mov dx, {PORT:#x}\n rep insb\n out 0x10, al")
    given = 0
    while given < 4:
        assert guest.run() is Exit.IO
        room = guest.vcpu.io_data()
        room[:] = b"wxyz"[given : given + len(room)]
        given += len(room)
    assert guest.out()[0] == 0x10
    assert guest.ram.read(DATA + 0xFFE, 4) == b"wxyz"


def test_rep_with_count_zero_does_nothing(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"xor ecx, ecx\n mov esi, {DATA}\n mov dx, {PORT:#x}\n rep outsb\n out 0x10, al")
    assert guest.out()[0] == 0x10


def test_state_is_complete_after_complete_io(guest: TinyGuest, mode: Mode) -> None:
    """After an OUT the instruction counts as executed only once KVM_RUN was entered again (api.rst, KVM_RUN)."""
    guest.load(mode, "out 0x10, al\n inc ax\n out 0x11, al")
    assert guest.run() is Exit.IO
    guest.vcpu.complete_io()
    assert guest.vcpu.get_regs().rip == CODE + 2
    assert guest.out()[0] == 0x11


def test_in_is_complete_after_complete_io(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov eax, 0\n in al, 0x10\n hlt")
    assert guest.run() is Exit.IO
    guest.vcpu.io_data()[:] = b"\x5a"
    guest.vcpu.complete_io()
    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0x5A, CODE + 7)


@pytest.mark.parametrize(
    ("level", "bitmap", "allowed"),
    [
        pytest.param(0, False, False, id="neither"),
        pytest.param(RFLAGS_IOPL3, False, True, id="iopl3", marks=pytest.mark.known_gap("iopl")),
        pytest.param(0, True, True, id="bitmap", marks=pytest.mark.known_gap("io-bitmap")),
    ],
)
def test_port_io_in_cpl3_needs_privilege(guest: TinyGuest, level: int, bitmap: bool, allowed: bool) -> None:
    """IN in CPL3 is a #GP unless IOPL is 3 or the TSS's permission bitmap allows the port.

    SDM, "I/O Privilege Level" and "I/O Permission Bit Map".
    """
    guest.load(Mode.USER, "in al, 0x10\n hlt", handlers={13: "mov al, 0xd\n out 0x20, al"})
    if not bitmap:
        guest.ram.write_u16(TSS + TSS_IOPB - 2, TSS_SIZE)
    regs = guest.vcpu.get_regs()
    regs.rflags = RFLAGS | level
    guest.vcpu.set_regs(regs)
    assert guest.run() is Exit.IO
    io = guest.vcpu.kvm_run.u.io
    assert (io.direction, io.port) == ((KVM_EXIT_IO_IN, 0x10) if allowed else (KVM_EXIT_IO_OUT, 0x20))
