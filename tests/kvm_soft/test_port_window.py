"""Ports that the VM answers for: what it was told of needs no exit, and everything else is one as before."""

from __future__ import annotations

import os
import threading

import pytest

from vmonty.kvm.api import PortCell, PortWindow
from vmonty.kvm.soft.insight import ExitRecord
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, Mode, TinyGuest

BASE, END = 0x3F8, 0x10
ROOM = 4096
WAIT_S = 30


@pytest.fixture
def window(guest: TinyGuest) -> PortWindow:
    made = guest.vm.port_window(BASE)
    assert made is not None
    return made


def test_at_first_every_access_is_an_exit(guest: TinyGuest, window: PortWindow) -> None:
    guest.load(Mode.LONG, f"mov dx, {BASE}\n mov al, 7\n out dx, al\n inc dx\n in al, dx")
    assert guest.out() == (BASE, 7)
    assert guest.run() is Exit.IO
    assert guest.vcpu.kvm_run.u.io.direction == 0


def test_bytes_are_collected_and_registers_read_without_an_exit(guest: TinyGuest, window: PortWindow) -> None:
    window.show({5: 0x60}, 0, True)
    guest.load(
        Mode.LONG,
        f"""
        mov ecx, 'a'
        again: mov dx, {BASE + 5}
        mov eax, 0x11223344
        in al, dx
        mov [abs {DATA}], eax
        mov eax, ecx
        mov dx, {BASE}
        out dx, al
        inc ecx
        cmp ecx, 'z'
        jbe again
        out {END}, al
        """,
    )
    assert guest.out()[0] == END
    assert window.take() == bytes(range(ord("a"), ord("z") + 1))
    assert window.take() == b""
    assert guest.ram.read_u32(DATA) == 0x11223360


def test_only_the_write_that_changes_nothing_is_no_exit(guest: TinyGuest, window: PortWindow) -> None:
    window.show({1: 5, 2: 1}, 1 << 1, True)
    code = f"mov dx, {BASE + 1}\n mov al, 5\n out dx, al\n mov al, 4\n out dx, al\n inc dx\n mov al, 1\n out dx, al"
    guest.load(Mode.LONG, code)
    assert guest.out() == (BASE + 1, 4)
    assert guest.out() == (BASE + 2, 1)


@pytest.mark.parametrize(
    ("code", "port"),
    [
        (f"mov dx, {BASE}\n out dx, ax", BASE),
        (f"mov dx, {BASE - 1}\n out dx, al", BASE - 1),
        (f"mov dx, {BASE + 8}\n out dx, al", BASE + 8),
        (f"mov dx, {BASE + 3}\n out dx, al", BASE + 3),
        (f"mov rsi, {DATA}\n mov dx, {BASE}\n outsb", BASE),
        (f"mov rsi, {DATA}\n mov ecx, 3\n mov dx, {BASE}\n rep outsb", BASE),
        (f"mov dx, {BASE}\n in al, dx", BASE),
        (f"mov dx, {BASE + 5}\n in ax, dx", BASE + 5),
    ],
    ids=["wide", "before", "behind", "another", "string", "repeated", "read", "wide read"],
)
def test_other_accesses_are_exits(guest: TinyGuest, window: PortWindow, code: str, port: int) -> None:
    window.show({5: 0x60}, 0, True)
    guest.load(Mode.LONG, code)
    assert guest.run() is Exit.IO
    assert guest.vcpu.kvm_run.u.io.port == port
    assert window.take() == b""


def test_a_full_ring_is_an_exit(guest: TinyGuest, window: PortWindow) -> None:
    window.show({}, 0, True)
    guest.load(Mode.LONG, f"mov dx, {BASE}\n again: out dx, al\n inc eax\n jmp again")
    guest.vcpu.run()
    assert guest.vcpu.kvm_run.u.io.port == BASE
    assert window.take() == bytes(number & 0xFF for number in range(ROOM))
    assert guest.vcpu.io_data()[0] == ROOM & 0xFF
    guest.vcpu.run()
    assert window.take() == bytes(number + 1 & 0xFF for number in range(ROOM))


def test_who_waits_is_told_while_the_guest_runs(guest: TinyGuest, window: PortWindow) -> None:
    window.show({}, 0, True)
    guest.load(Mode.LONG, f"mov dx, {BASE}\n mov al, '!'\n out dx, al\n forever: jmp forever")
    runner = threading.Thread(target=guest.vcpu.run)
    runner.start()
    try:
        window.wait()
        assert window.take() == b"!"
    finally:
        guest.vcpu.kick()
        runner.join(WAIT_S)
    assert not runner.is_alive()


def test_closed_again_it_is_an_exit_for_a_guest_that_runs(guest: TinyGuest, window: PortWindow) -> None:
    window.show({1: 0}, 1 << 1, True)
    guest.load(Mode.LONG, f"mov dx, {BASE + 1}\n xor eax, eax\n again: out dx, al\n jmp again")
    ended: list[Exit | int] = []
    runner = threading.Thread(target=lambda: ended.append(guest.vcpu.run()))
    runner.start()
    window.show({}, 0, False)
    runner.join(WAIT_S)
    assert ended == [Exit.IO]


def test_who_traces_sees_each_access(guest: TinyGuest, window: PortWindow) -> None:
    window.show({}, 0, True)
    seen: list[ExitRecord] = []
    guest.vm.trace(seen.append)
    guest.load(Mode.LONG, f"mov dx, {BASE}\n mov al, 9\n out dx, al")
    assert guest.out() == (BASE, 9)
    assert "IO" in seen[-1].name


def test_a_device_in_the_kernel_goes_before_it(guest: TinyGuest, window: PortWindow) -> None:
    window.show({}, 0, True)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        guest.vm.ioeventfd(event, BASE, 1, pio=True)
        guest.load(Mode.LONG, f"mov dx, {BASE}\n out dx, al\n out {END}, al")
        assert guest.out()[0] == END
        assert os.eventfd_read(event) == 1
        assert window.take() == b""
    finally:
        os.close(event)


def test_each_is_counted(guest: TinyGuest, window: PortWindow) -> None:
    window.show({5: 0}, 0, True)
    guest.load(
        Mode.LONG,
        f"mov r15d, 500\n out {END}, al\n again: mov dx, {BASE + 5}\n in al, dx\n"
        f" mov dx, {BASE}\n out dx, al\n dec r15d\n jnz again\n out {END}, al",
    )
    guest.out()
    with guest.vcpu.stats() as counters:
        before = counters.read()
        guest.out()
        after = counters.read()
    assert {name: after[name] - before[name] for name in ("exits", "io_exits")} == {"exits": 1001, "io_exits": 1001}


def test_a_vm_has_one(guest: TinyGuest, window: PortWindow) -> None:
    assert guest.vm.port_window(0x2F8) is None


def test_there_is_no_ninth_register(window: PortWindow) -> None:
    with pytest.raises(ValueError, match="has 8"):
        window.show({8: 0}, 0, False)


# ---- cells: ports that are memory --------------------------------------------------------------------------------

CELL = 0xCF8
PLAIN = 0x80FF_FFFC


def cell(guest: TinyGuest, size: int = 4, value: int = 0, mask: int = PLAIN) -> PortCell:
    made = guest.vm.port_cell(CELL, size, value, mask)
    assert made is not None
    return made


def test_a_cell_keeps_what_is_written(guest: TinyGuest) -> None:
    made = cell(guest)
    guest.load(
        Mode.LONG,
        f"""
        mov dx, {CELL}
        mov eax, 0x80001234
        out dx, eax
        mov rax, -1
        in eax, dx
        mov [abs {DATA}], rax
        out {END}, al
        """,
    )
    assert guest.out()[0] == END
    assert made.value == 0x8000_1234
    assert guest.ram.read_u64(DATA) == 0x8000_1234, "32 bits clear those above"


@pytest.mark.parametrize(("size", "register"), [(1, "al"), (2, "ax")])
def test_fewer_bits_leave_the_rest_of_rax(guest: TinyGuest, size: int, register: str) -> None:
    value = 0xA5C3 & (1 << 8 * size) - 1
    made = cell(guest, size, value, 0xFF)
    guest.load(
        Mode.LONG,
        f"mov dx, {CELL}\n mov rax, 0x1122334455667788\n in {register}, dx\n mov [abs {DATA}], rax\n"
        f" xor {register}, 0x0F\n out dx, {register}\n out {END}, al",
    )
    assert guest.out()[0] == END
    assert guest.ram.read_u64(DATA) == 0x1122_3344_5566_7788 >> 8 * size << 8 * size | value
    assert made.value == value ^ 0x0F


def test_what_user_space_puts_there_is_read(guest: TinyGuest) -> None:
    made = cell(guest)
    guest.load(Mode.LONG, f"mov dx, {CELL}\n out {END}, al\n in eax, dx\n mov [abs {DATA}], eax\n out {END}, al")
    assert guest.out()[0] == END
    made.value = 0x8000_F000
    assert guest.out()[0] == END
    assert guest.ram.read_u32(DATA) == 0x8000_F000


@pytest.mark.parametrize(
    ("code", "size", "direction"),
    [
        ("mov eax, 0x80001001\n out dx, eax", 4, 1),
        ("mov eax, 0x81001000\n out dx, eax", 4, 1),
        ("out dx, ax", 2, 1),
        ("in al, dx", 1, 0),
        ("inc dx\n out dx, al", 1, 1),
        ("dec dx\n in eax, dx", 4, 0),
        (f"mov rsi, {DATA}\n outsd", 4, 1),
    ],
    ids=["a bit outside", "a reserved bit", "narrow", "narrow read", "inside", "before", "string"],
)
def test_other_accesses_of_a_cell_are_exits(guest: TinyGuest, code: str, size: int, direction: int) -> None:
    made = cell(guest, value=0x8000_1000, mask=0x80FF_FFFC & ~0x0100_0000)
    guest.load(Mode.LONG, f"mov dx, {CELL}\n {code}")
    assert guest.run() is Exit.IO
    io = guest.vcpu.kvm_run.u.io
    assert (io.size, io.direction) == (size, direction)
    assert made.value == 0x8000_1000


def test_without_a_mask_every_write_is_an_exit(guest: TinyGuest) -> None:
    """An index that reads as all ones: to write just those selects a register, too."""
    cell(guest, 1, 0xFF, 0)
    guest.load(Mode.LONG, f"mov dx, {CELL}\n in al, dx\n out dx, al")
    assert guest.out() == (CELL, 0xFF)


def test_a_hidden_cell_is_an_exit_for_a_guest_that_runs(guest: TinyGuest) -> None:
    made = cell(guest)
    guest.load(Mode.LONG, f"mov dx, {CELL}\n xor eax, eax\n again: out dx, eax\n jmp again")
    ended: list[Exit | int] = []
    runner = threading.Thread(target=lambda: ended.append(guest.vcpu.run()))
    runner.start()
    made.hide()
    runner.join(WAIT_S)
    assert ended == [Exit.IO]


def test_who_traces_sees_each_access_of_a_cell(guest: TinyGuest) -> None:
    made = cell(guest)
    seen: list[ExitRecord] = []
    guest.vm.trace(seen.append)
    guest.load(Mode.LONG, f"mov dx, {CELL}\n mov eax, 4\n out dx, eax")
    assert guest.out() == (CELL, 4)
    assert made.value == 0
    assert "IO" in seen[-1].name


def test_a_device_in_the_kernel_goes_before_a_cell(guest: TinyGuest) -> None:
    made = cell(guest)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        guest.vm.ioeventfd(event, CELL, 4, pio=True)
        guest.load(Mode.LONG, f"mov dx, {CELL}\n mov eax, 4\n out dx, eax\n out {END}, al")
        assert guest.out()[0] == END
        assert os.eventfd_read(event) == 1
        assert made.value == 0
    finally:
        os.close(event)


def test_a_vm_has_four_cells(guest: TinyGuest) -> None:
    for port in range(4):
        assert guest.vm.port_cell(port, 1, port, 0) is not None
    assert guest.vm.port_cell(4, 1, 4, 0) is None
    guest.load(Mode.LONG, f"in al, 3\n out {END}, al")
    assert guest.out() == (END, 3)


def test_a_cell_has_a_width(guest: TinyGuest) -> None:
    """What does not fit is cut off, so that IN leaves the rest of rAX; and there are three widths."""
    made = cell(guest, 1, 0x1FF)
    assert made.value == 0xFF
    made.value = 0x234
    assert made.value == 0x34
    with pytest.raises(ValueError, match="1, 2 or 4 bytes, not 3"):
        guest.vm.port_cell(CELL, 3, 0, 0)
