"""The local APIC by its page in memory: IPIs to each kind of destination, EOI, registers that read back.

Source: SDM, "Local APIC Register Address Map", "Interrupt Command Register (ICR)", "Determining IPI Destination".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.uapi.flags import KVM_MP_STATE_RUNNABLE
from vmonty.testing.guests import CODE, DATA, STACK, Mode, TinyGuest, load

from .irq_guests import APIC, APIC_EOI, APIC_ICR, APIC_ICR2, APIC_ID, APIC_ON, EOI, IPI_VECTOR, apic_write
from .runner import Runner

Start = Callable[[Vcpu], Runner]
APIC_PPR, APIC_LDR, APIC_DFR, APIC_ISR, APIC_IRR = 0xA0, 0xD0, 0xE0, 0x100, 0x200
TARGETS, ROUNDS, END = 3, 5, 0x10
READY_AT, TAKEN_AT = DATA, DATA + 0x40
PHYSICAL, LOGICAL, NMI, SELF, ALL, OTHERS, ASSERT = 0, 0x800, 0x400, 1 << 18, 2 << 18, 3 << 18, 1 << 14
FLAT, CLUSTER = 0xFFFF_FFFF, 0x0FFF_FFFF
# Room for the code of each vCPU, and for its stack.
PLACES = [(CODE, STACK), (CODE + 0x800, STACK - 0x800), (CODE + 0x1000, STACK - 0x1000)]
# Counts what came, at a place of the vCPU whose APIC says so.
TAKE = (
    f"push rax\n push rbx\n mov ebx, {APIC + APIC_ID:#x}\n mov eax, [rbx]\n shr eax, 24\n"
    f" lock inc dword [rax*8 + {TAKEN_AT:#x}]\n {{}} pop rbx\n pop rax\n iretq"
)
HANDLERS = {IPI_VECTOR: TAKE.format(EOI), 2: TAKE.format("")}


@pytest.fixture
def three(configured: Vm) -> Iterator[list[Vcpu]]:
    configured.create_irqchip()
    with ExitStack() as stack:
        made = [stack.enter_context(configured.create_vcpu(number)) for number in range(TARGETS)]
        for vcpu in made[1:]:
            vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
        yield made


def wait_for(who: set[int], turn: int) -> str:
    """Until each of *who* has counted *turn*, but not for ever."""
    one = "mov ecx, 100000000\n{0}: cmp dword [abs {1:#x}], {2}\n jae {0}done\n pause\n dec ecx\n jnz {0}\n{0}done:\n"
    return "".join(one.format(f"wait{turn}of{number}", TAKEN_AT + 8 * number, turn) for number in sorted(who))


CASES = {
    "physical": (PHYSICAL, 1, FLAT, {1}),
    "physical, itself": (PHYSICAL, 0, FLAT, {0}),
    "physical, nobody": (PHYSICAL, 9, FLAT, set()),
    "physical, broadcast": (PHYSICAL, 0xFF, FLAT, {0, 1, 2}),
    "flat": (LOGICAL, 4, FLAT, {2}),
    "flat, two": (LOGICAL, 5, FLAT, {0, 2}),
    "flat, all": (LOGICAL, 0xFF, FLAT, {0, 1, 2}),
    "flat, nobody": (LOGICAL, 0x80, FLAT, set()),
    "cluster": (LOGICAL, 6, CLUSTER, {1, 2}),
    "self": (SELF, 0, FLAT, {0}),
    "all": (ALL, 0, FLAT, {0, 1, 2}),
    "others": (OTHERS, 0, FLAT, {1, 2}),
    "NMI": (PHYSICAL | NMI, 2, FLAT, {2}),
    "NMI, others": (OTHERS | NMI, 0, FLAT, {1, 2}),
}


@pytest.mark.parametrize("waits", ["pause", "hlt"])
@pytest.mark.parametrize(("kind", "destination", "dfr", "who"), CASES.values(), ids=CASES.keys())
def test_where_an_ipi_goes(
    three: list[Vcpu], ram: Ram, runner: Start, kind: int, destination: int, dfr: int, who: set[int], waits: str
) -> None:
    def setup(number: int) -> str:
        return APIC_ON + apic_write(APIC_DFR, dfr) + apic_write(APIC_LDR, 1 << 24 + number) + "sti\n"

    for number in (1, 2):
        code, stack = PLACES[number]
        ready = f"mov dword [abs {READY_AT + 8 * number:#x}], 1"
        load(three[number], ram, Mode.LONG, f"{setup(number)} {ready}\n rest: {waits}\n jmp rest", HANDLERS,
             code=code, stack=stack)  # fmt: skip
    threads = [runner(vcpu) for vcpu in three[1:]]
    gather = "".join(
        f"there{number}: pause\n cmp dword [abs {READY_AT + 8 * number:#x}], 1\n jne there{number}\n"
        for number in (1, 2)
    )
    vector = 0 if kind & NMI else IPI_VECTOR
    send = apic_write(APIC_ICR2, destination << 24) + apic_write(APIC_ICR, kind | ASSERT | vector)
    rounds = "".join(send + wait_for(who, turn) for turn in range(1, ROUNDS + 1))
    load(three[0], ram, Mode.LONG, f"{setup(0)} {gather} {rounds} out {END}, al", HANDLERS)
    first = runner(three[0])
    assert first.next()[0] == END  # type: ignore[index]
    taken = [ram.read_u32(TAKEN_AT + 8 * number) for number in range(TARGETS)]
    for thread in (first, *threads):
        thread.end()
    assert taken == [ROUNDS if number in who else 0 for number in range(TARGETS)]


def read_all(registers: list[int]) -> str:
    """Keep each from TAKEN_AT on."""
    return "".join(
        f"mov ebx, {APIC + register:#x}\n mov eax, [rbx]\n mov [abs {TAKEN_AT + 4 * at:#x}], eax\n"
        for at, register in enumerate(registers)
    )


@pytest.mark.known_gap("apic-isr")
def test_registers_read_back(configured: Vm, three: list[Vcpu], ram: Ram) -> None:
    """What was written, and what happens to vectors: pending, in service, ended."""
    vector_word = 0x10 * (IPI_VECTOR >> 5)
    pending, serving = APIC_IRR + vector_word, APIC_ISR + vector_word
    send = apic_write(APIC_ICR2, 0xAB << 24 | 0x1234) + apic_write(APIC_ICR, SELF | ASSERT | IPI_VECTOR)
    registers = [APIC_ID, APIC_DFR, APIC_LDR, APIC_ICR, APIC_ICR2, pending, serving, APIC_PPR]
    inside = [pending, serving, APIC_PPR]
    kept = "".join(
        f"mov ebx, {APIC + register:#x}\n mov eax, [rbx]\n mov [abs {DATA + 4 * at:#x}], eax\n"
        for at, register in enumerate(inside)
    )
    load(
        three[0], ram, Mode.LONG,
        f"{APIC_ON} {apic_write(APIC_DFR, 0x0000_0000)} {apic_write(APIC_LDR, 0x12345678)} {send}"
        f" {read_all(registers)} sti\n hlt\n cli\n out {END}, al\n {read_all(inside)} out {END}, al",
        {IPI_VECTOR: f"push rax\n push rbx\n {kept} {EOI} pop rbx\n pop rax\n iretq"},
    )  # fmt: skip
    guest = TinyGuest(configured, three[0], ram)
    assert guest.out()[0] == END
    bit = 1 << (IPI_VECTOR & 31)
    seen = [ram.read_u32(TAKEN_AT + 4 * at) for at in range(len(registers))]
    assert seen[:5] == [0, CLUSTER, 0x1200_0000, SELF | ASSERT | IPI_VECTOR, 0xAB00_0000]
    assert seen[5:] == [bit, 0, 0]
    assert [ram.read_u32(DATA + 4 * at) for at in range(3)] == [0, bit, IPI_VECTOR & 0xF0]
    assert guest.out()[0] == END
    assert [ram.read_u32(TAKEN_AT + 4 * at) for at in range(3)] == [0, 0, 0]


@pytest.mark.known_gap("apic-isr")
@pytest.mark.parametrize("code", ["mov [rbx], al", "mov [rbx], ax", "mov [rbx + 4], eax"])
def test_narrow_and_odd_writes_end_nothing(configured: Vm, three: list[Vcpu], ram: Ram, code: str) -> None:
    """SDM: registers are 32 bits at multiples of 16; anything else is undefined, and KVM takes it for nothing."""
    send = apic_write(APIC_ICR, SELF | ASSERT | IPI_VECTOR)
    word = APIC_ISR + 0x10 * (IPI_VECTOR >> 5)
    load(
        three[0], ram, Mode.LONG,
        f"{APIC_ON} {send} sti\n hlt\n cli\n {read_all([word])} out {END}, al\n {EOI} {read_all([word])} out {END}, al",
        {IPI_VECTOR: f"mov ebx, {APIC + APIC_EOI:#x}\n {code}\n iretq"},
    )  # fmt: skip
    guest = TinyGuest(configured, three[0], ram)
    for expected in (1 << (IPI_VECTOR & 31), 0):
        assert guest.out()[0] == END
        assert ram.read_u32(TAKEN_AT) == expected


def test_a_base_that_moves(configured: Vm, three: list[Vcpu], ram: Ram) -> None:
    """The page is where IA32_APIC_BASE says, and nowhere else."""
    moved = 0xFED0_0000
    write = "mov ebx, {:#x}\n mov dword [rbx + 0x310], {:#x}\n"
    read = "mov ebx, {:#x}\n mov eax, [rbx + 0x310]\n mov [abs {}], eax\n"
    load(
        three[0], ram, Mode.LONG,
        f"{APIC_ON} {write.format(APIC, 0x1100_0000)} mov ecx, 0x1b\n rdmsr\n and eax, 0xfff\n or eax, {moved:#x}\n"
        f" wrmsr\n {read.format(moved, TAKEN_AT)} {write.format(moved, 0x2200_0000)} {read.format(moved, TAKEN_AT + 4)}"
        f" out {END}, al",
    )  # fmt: skip
    guest = TinyGuest(configured, three[0], ram)
    assert guest.out()[0] == END
    assert [ram.read_u32(TAKEN_AT), ram.read_u32(TAKEN_AT + 4)] == [0x1100_0000, 0x2200_0000]


@pytest.mark.parametrize("kind", [PHYSICAL, OTHERS, ALL], ids=["physical", "others", "all"])
def test_an_apic_that_is_off_hears_nothing(configured: Vm, three: list[Vcpu], ram: Ram, kind: int) -> None:
    """By IA32_APIC_BASE: no destination is its, not even for an NMI."""
    off, base = three[1], 0x1B
    (value,) = off.get_msrs([base]).values()
    off.set_msrs({base: value & ~(1 << 11)})
    send = apic_write(APIC_ICR2, 1 << 24) + apic_write(APIC_ICR, kind | NMI | ASSERT)
    load(three[0], ram, Mode.LONG, f"{APIC_ON} {apic_write(APIC_ICR2, 0)} {send * ROUNDS} out {END}, al", HANDLERS)
    guest = TinyGuest(configured, three[0], ram)
    assert guest.out()[0] == END
    events = [vcpu.get_vcpu_events().nmi.pending for vcpu in three[1:]]
    assert events == [0, int(kind != PHYSICAL) * events[1]]
    assert bool(events[1]) == (kind != PHYSICAL)


@pytest.mark.parametrize("touched", [False, True])
def test_a_base_in_memory(configured: Vm, three: list[Vcpu], ram: Ram, touched: bool) -> None:
    """Memory goes before the page, whether it is mapped yet or not."""
    there = 0x60000
    touch = f"mov ecx, [abs {there:#x}]\n" if touched else ""
    load(
        three[0], ram, Mode.LONG,
        f"{APIC_ON} {touch} mov ecx, 0x1b\n rdmsr\n and eax, 0xfff\n or eax, {there:#x}\n wrmsr\n mov ebx, {there:#x}\n"
        f" mov dword [rbx + 0x310], 0x12345678\n mov eax, [rbx + 0x310]\n mov [abs {TAKEN_AT}], eax\n out {END}, al",
    )  # fmt: skip
    guest = TinyGuest(configured, three[0], ram)
    assert guest.out()[0] == END
    assert (ram.read_u32(TAKEN_AT), ram.read_u32(there + 0x310)) == (0x1234_5678, 0x1234_5678)
