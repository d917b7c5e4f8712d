"""The observer's door: exact, and closed again without a trace."""

from __future__ import annotations

import threading
import time

import pytest

from vmonty.cpu import inspection
from vmonty.cpu.observe import Access, Event, Instruction, Observer, disassemble
from vmonty.testing.nasm import assemble

from .machine import CODE, HANDLERS, IDT, STACK0, TSS, Machine
from .vmx_guest import CODE as GUEST_CODE
from .vmx_guest import Guest

AT = 0x20000
TOP = STACK0 - 0x100


@pytest.fixture
def long() -> Machine:
    return Machine().long_mode()


def run(machine: Machine, source: str) -> str:
    return machine.run(assemble(f"default abs\n{source}\nhlt", 64, CODE))


def test_instructions_and_their_count(long: Machine) -> None:
    seen: list[Instruction] = []
    with Observer(long.cpu, on_instruction=seen.append) as observer:
        assert run(long, "mov ecx, 3\nagain: nop\n loop again") == "halt"
        assert observer.instructions == len(seen) == 8
    assert [i.rip - CODE for i in seen] == [0, 5, 6, 5, 6, 5, 6, 8]
    assert [i.code.hex() for i in seen[:3]] == ["b903000000", "90", "e2fd"]
    assert seen[2].text.startswith("loop")
    assert seen[0].bits == 64


def test_repeated_string_is_one_instruction(long: Machine) -> None:
    seen: list[Instruction] = []
    with Observer(long.cpu, on_instruction=seen.append) as observer:
        run(long, f"mov edi, {AT}\n mov ecx, 5\n rep stosb")
        assert (len(seen), observer.instructions) == (4, 4)


def test_instruction_over_two_pages(long: Machine) -> None:
    """All its bytes are shown."""
    seen: list[Instruction] = []
    with Observer(long.cpu, on_instruction=seen.append):
        long.run(bytes.fromhex("48b88877665544332211f4"), CODE + 0xFFC)
    assert seen[0].code.hex() == "48b88877665544332211"


def test_blocks(long: Machine) -> None:
    seen: list[int] = []
    with Observer(long.cpu, on_block=seen.append):
        run(long, "mov ecx, 2\nagain: nop\n loop again\n jmp over\n nop\nover: nop")
    assert [rip - CODE for rip in seen] == [0, 5, 8, 11]


def test_memory_accesses_in_order(long: Machine) -> None:
    seen: list[Access] = []
    long["rax"] = 0x1122
    with Observer(long.cpu, on_memory=seen.append):
        run(
            long, f"mov [{AT}], ax\n add byte [{AT}], 1\n push rax\n movups xmm0, [{AT}]\n movups [{AT + 0x1FF8}], xmm0"
        )
    assert [(a.linear, a.write, a.data.hex()) for a in seen] == [
        (AT, True, "2211"), (AT, False, "22"), (AT, True, "23"), (TOP - 8, True, "2211000000000000"),
        (AT, False, "2311" + "00" * 14), (AT + 0x1FF8, True, "2311" + "00" * 14),
    ]  # fmt: skip
    assert all(a.physical == a.linear and not a.implicit for a in seen)
    assert seen[0].rip == CODE


def test_string_accesses_come_one_by_one(long: Machine) -> None:
    seen: list[Access] = []
    with Observer(long.cpu, on_memory=seen.append):
        run(long, f"mov esi, {AT}\n mov edi, {AT + 64}\n mov ecx, 2\n rep movsw")
    assert [(a.linear - AT, a.write) for a in seen] == [(0, False), (64, True), (2, False), (66, True)]


def test_access_of_an_instruction_that_faults_is_none(long: Machine) -> None:
    seen: list[Access] = []
    with Observer(long.cpu, on_memory=lambda a: a.implicit or seen.append(a)):
        run(long, "pop qword [0x40000000]")
    assert seen == []


def test_events_and_what_their_delivery_touches(long: Machine) -> None:
    events: list[Event] = []
    implicit: list[int] = []
    with Observer(
        long.cpu, on_event=events.append, on_memory=lambda a: a.implicit and implicit.append(a.linear)
    ) as observer:
        run(long, "mov eax, [0x40000000]")
        assert observer.instructions == 1  # the handler's HLT
    assert events == [Event(CODE, 14, "exception", 0, 0x40000000)]
    assert implicit[:2] == [IDT + 14 * 16, IDT + 14 * 16 + 8]


def test_software_interrupt_counts(long: Machine) -> None:
    events: list[Event] = []
    with Observer(long.cpu, on_event=events.append) as observer:
        run(long, "int 0x30")
        assert observer.instructions == 2
    assert [(e.vector, e.kind) for e in events] == [(0x30, "soft_interrupt")]


def test_state_between_instructions(long: Machine) -> None:
    """A hook may look at everything."""
    seen = []
    with Observer(long.cpu, on_instruction=lambda _: seen.append(inspection.debug_state(long.cpu))):
        run(long, "mov eax, 5\n movd xmm0, eax\n xor eax, eax")
    assert [state["rax"] for state in seen[1:]] == [5, 5, 0]
    assert seen[0]["tr"].base == TSS
    assert int.from_bytes(long.cpu.xsave[160:176], "little") == 5


def test_stop_and_go_on(long: Machine) -> None:
    observer = Observer(long.cpu, on_instruction=lambda i: i.rip == CODE + 1 and observer.stop())
    assert run(long, "nop\n nop\n nop") == "debug"
    assert long["rip"] == CODE + 1
    observer.close()
    assert long.cpu.run() == "halt"


def test_what_a_hook_raises_comes_out_of_run(long: Machine) -> None:
    def refuse(_: object) -> None:
        raise LookupError("no")

    with Observer(long.cpu, on_memory=refuse), pytest.raises(LookupError):
        run(long, f"mov [{AT}], al\n mov [{AT + 1}], al")
    assert long["rip"] == CODE + 7
    assert long.cpu.run() == "halt"


def test_one_observer_at_a_time(long: Machine) -> None:
    with Observer(long.cpu), pytest.raises(ValueError, match="observed already"):
        Observer(long.cpu)
    Observer(long.cpu).close()


def test_observer_joins_a_running_processor(long: Machine) -> None:
    """It comes out of translated code, and goes back when the observer leaves."""
    seen = threading.Event()
    thread = threading.Thread(target=run, args=(long, "jmp $"))
    thread.start()
    time.sleep(0.01)  # whether it runs by now or not, the observer must see it
    with Observer(long.cpu, on_instruction=lambda _: seen.set()):
        assert seen.wait(10)
    long.cpu.kick()
    thread.join(10)
    assert not thread.is_alive()


def test_guest_of_vmx() -> None:
    guest = Guest()
    seen: list[int] = []
    accesses: list[Access] = []
    with Observer(guest.cpu, on_instruction=lambda i: seen.append(i.rip), on_memory=accesses.append) as observer:
        assert guest.run("905090f4") == 12
        assert (seen, observer.instructions) == ([GUEST_CODE + n for n in range(4)], 3)
    assert accesses[0].physical == accesses[0].linear


def test_observed_code_does_the_same(long: Machine) -> None:
    """Faults, strings, x87 and vectors: observed or not, the same end."""
    source = f"""
        mov edi, {AT}
        mov ecx, 100
    again:
        mov [rdi + rcx], ecx
        cvtsi2sd xmm0, ecx
        addsd xmm1, xmm0
        fild dword [rdi + rcx]
        fstp qword [rdi + rcx]
        loop again
        mov ecx, 64
        lea rsi, [rdi + 5]
        rep movsb"""
    other = Machine().long_mode()
    run(other, source)
    with Observer(long.cpu, on_memory=lambda _: None, on_event=lambda _: None, on_instruction=lambda _: None):
        run(long, source)
    assert long.ram.read(AT, 4096) == other.ram.read(AT, 4096)
    assert (long.cpu.registers, long.cpu.xsave, long["rflags"]) == (
        other.cpu.registers,
        other.cpu.xsave,
        other["rflags"],
    )


@pytest.mark.parametrize("instruction", ["movaps", "paddd", "palignr"])
@pytest.mark.parametrize("at", [AT, AT + 16, AT + 48])
def test_aligned_operands_of_observed_code(long: Machine, instruction: str, at: int) -> None:
    """Observed code has its operands in buffers: these are aligned as what they stand for."""
    last = ", 0" if instruction == "palignr" else ""
    long["cr4"] |= 0x200
    long.ram.write(at, bytes(range(16)))
    with Observer(long.cpu, on_memory=lambda _: None):
        assert run(long, f"pxor xmm0, xmm0\n {instruction} xmm0, [{at}]{last}\n movaps [{at + 64}], xmm0") == "halt"
    assert long.ram.read(at + 64, 16) == bytes(range(16))


def test_disassemble() -> None:
    assert disassemble(b"\xb8\x34\x12", bits=16) == "mov ax,1234h"


def test_handlers_are_seen(long: Machine) -> None:
    seen: list[int] = []
    with Observer(long.cpu, on_instruction=lambda i: seen.append(i.rip)):
        run(long, "ud2")
    assert seen == [CODE, HANDLERS + 96]
