"""MMIO by plain moves that needs no Python: others on the page, who watches, and what is counted see no difference."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.soft import intercepts
from vmonty.kvm.soft.emulate import Emulator
from vmonty.kvm.soft.insight import ExitRecord
from vmonty.kvm.uapi import Exit
from vmonty.testing.guests import DATA, HIGH_MMIO, MMIO, Mode, TinyGuest
from vmonty.testing.nasm import assemble

END = 0x10
TURNS = 4
STORES = f"mov ebx, {MMIO:#x}\n again: mov [rbx + 8], ecx\n inc ecx\n jmp again"


def mmio(guest: TinyGuest, address: int = MMIO + 8) -> int:
    """Run to an exit there; what is written."""
    assert guest.run() is Exit.MMIO
    _, at, data = guest.vcpu.mmio_access()
    assert at == address
    return int.from_bytes(data, "little")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the emulator has begun."""
    begun: list[int] = []
    before: Callable[..., bool] = Emulator.emulate

    def emulate(self: Emulator, instructions: int = 1) -> bool:
        begun.append(instructions)
        return before(self, instructions)

    monkeypatch.setattr(intercepts.Emulator, "emulate", emulate)
    return begun


def test_the_first_is_emulated(guest: TinyGuest, emulated: list[int]) -> None:
    guest.load(Mode.LONG, f"xor ecx, ecx\n {STORES}")
    assert [mmio(guest) for _ in range(TURNS)] == list(range(TURNS))
    assert len(emulated) == 1


@pytest.mark.parametrize(
    "code", ["lock inc dword [rbx]", "stosd", "xchg [rbx], ecx", "movnti [rbx], ecx", "not byte [rbx]"]
)
def test_what_is_not_plain_is_emulated(guest: TinyGuest, emulated: list[int], code: str) -> None:
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n again: mov edi, ebx\n {code}\n out {END}, al\n jmp again")
    for turn in range(1, TURNS):
        while guest.run() is Exit.MMIO:
            pass
        assert len(emulated) == turn


def test_an_eventfd_that_comes_to_a_known_page(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"xor ecx, ecx\n {STORES}")
    for turn in range(TURNS):
        assert mmio(guest) == turn
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        guest.vm.ioeventfd(event, MMIO + 8, 4, datamatch=TURNS + 1)
        assert mmio(guest) == TURNS
        assert mmio(guest) == TURNS + 2
        assert os.eventfd_read(event) == 1
        guest.vm.ioeventfd(event, MMIO + 8, 4, datamatch=TURNS + 1, deassign=True)
        assert mmio(guest) == TURNS + 3
    finally:
        os.close(event)


def test_a_coalesced_zone_that_comes_to_a_known_page(guest: TinyGuest) -> None:
    guest.load(
        Mode.LONG,
        f"xor ecx, ecx\n mov edx, {HIGH_MMIO:#x}\n mov ebx, {MMIO:#x}\n"
        " again: mov [rbx + 8], ecx\n mov [rdx], ecx\n inc ecx\n jmp again",
    )
    for turn in range(TURNS):
        assert mmio(guest) == turn
        assert mmio(guest, HIGH_MMIO) == turn
    guest.vm.register_coalesced_mmio(MMIO, 0x100)
    assert mmio(guest, HIGH_MMIO) == TURNS
    assert [(at, data) for at, data, _ in guest.vcpu.drain_coalesced_mmio()] == [
        (MMIO + 8, TURNS.to_bytes(4, "little"))
    ]


def test_more_pages_than_are_remembered(guest: TinyGuest) -> None:
    pages = 11
    guest.load(
        Mode.LONG,
        f"again: mov ebx, {HIGH_MMIO:#x}\n mov edx, {pages}\n next: mov [rbx], ebx\n add ebx, 4096\n dec edx\n"
        " jnz next\n jmp again",
    )
    for _ in range(3):
        for page in range(pages):
            address = HIGH_MMIO + page * 4096
            assert mmio(guest, address) == address


def test_who_traces_sees_each(guest: TinyGuest, emulated: list[int]) -> None:
    guest.load(Mode.LONG, f"xor ecx, ecx\n {STORES}")
    mmio(guest)
    seen: list[ExitRecord] = []
    guest.vm.trace(seen.append)
    for turn in range(1, TURNS):
        assert mmio(guest) == turn
    assert len(seen) == TURNS - 1
    assert len(emulated) == TURNS


def test_each_is_counted(guest: TinyGuest) -> None:
    names = ("exits", "mmio_exits", "insn_emulation", "pf_taken", "pf_emulate")
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n again: mov ecx, [rbx + 8]\n mov [rbx + 8], ecx\n jmp again")
    mmio(guest)
    mmio(guest)
    with guest.vcpu.stats() as counters:
        before = counters.read()
        for _ in range(TURNS):
            mmio(guest)
            mmio(guest)
        after = counters.read()
    assert {name: after[name] - before[name] for name in names} == dict.fromkeys(names, 2 * TURNS)


def test_signals_and_requests_between(guest: TinyGuest) -> None:
    """A kick between the exit and its completion is an exit of its own, and nothing is lost or done twice."""
    guest.load(
        Mode.LONG, f"mov ebx, {MMIO:#x}\n again: mov ecx, [rbx + 8]\n add [abs {DATA}], ecx\n out {END}, al\n jmp again"
    )
    for turn in range(1, 3 * TURNS):
        assert guest.run() is Exit.MMIO
        guest.vcpu.mmio_access()[2][:] = (1).to_bytes(4, "little")
        if turn % 3 == 0:
            guest.vcpu.kick()
            assert guest.vcpu.run() is Exit.INTR
        assert guest.out()[0] == END
        assert guest.ram.read_u32(DATA) == turn


@pytest.mark.parametrize("move", ["mov [ebx], ecx", "mov ecx, [ebx]"])
def test_the_last_instruction_of_32_bits(guest: TinyGuest, move: str) -> None:
    """What follows it is at 0: a register of more bits would be no state of a processor."""
    top = Ram(4096)
    code = assemble(move, 32, 0)
    top.write(4096 - 4 * len(code), 4 * code)
    guest.vm.set_user_memory_region(1, 0xFFFF_F000, top)
    guest.load(Mode.PROTECTED, f"mov ebx, {MMIO:#x}\n mov eax, {(1 << 32) - 4 * len(code):#x}\n jmp eax")
    for _ in range(4):
        mmio(guest, MMIO)
    guest.vcpu.complete_io()
    assert guest.vcpu.get_regs().rip == 0
