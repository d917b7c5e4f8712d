"""The I/O APIC, driven through MMIO and lines, with real local APICs behind it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.soft.ioapic import SUCCESSIVE_IRQ_MAX_COUNT
from vmonty.kvm.uapi.irq import kvm_ioapic_state

from .board import Board, to_x2apic, write

SELECT, WINDOW, EOI_REGISTER = 0xFEC00000, 0xFEC00010, 0xFEC00040
LEVEL, MASKED, REMOTE_IRR, LOGICAL, STATUS = 1 << 15, 1 << 16, 1 << 14, 1 << 11, 1 << 12


@pytest.fixture
def board() -> Board:
    return Board()


def register(board: Board, index: int) -> int:
    board.buses.mmio.write(SELECT, 4, index)
    value = board.buses.mmio.read(WINDOW, 4)
    assert value is not None
    return value


def test_identification_and_reset(board: Board) -> None:
    """Data sheet, "IOAPICID", "IOAPICVER", "IOAPICARB", "IOREDTBL[23:0]"."""
    assert register(board, 1) == 0x00170011
    board.buses.mmio.write(SELECT, 4, 0)
    board.buses.mmio.write(WINDOW, 4, 0xFFFFFFFF)
    assert (register(board, 0), register(board, 2)) == (0x0F000000, 0x0F000000)
    assert {board.entry(pin) for pin in range(24)} == {MASKED}
    assert register(board, 0x40) == register(board, 3) == 0xFFFFFFFF


@pytest.mark.parametrize(("size", "value"), [(1, 0x11), (2, 0x0011), (4, 0x00170011), (8, 0x00170011)])
def test_access_sizes(board: Board, size: int, value: int) -> None:
    board.buses.mmio.write(SELECT, size, 1)
    assert board.buses.mmio.read(WINDOW, size) == value
    assert board.buses.mmio.read(SELECT, size) == 1
    assert board.buses.mmio.read(SELECT + 0x20, size) == 0


def test_status_and_remote_irr_are_read_only(board: Board) -> None:
    board.redirect(3, 0xFFFFFFFFFFFFFFFF)
    assert board.entry(3) == 0xFFFFFFFFFFFFFFFF & ~(STATUS | REMOTE_IRR)


def test_edges(board: Board) -> None:
    """Data sheet, "IOREDTBL", trigger mode; results are KVM_IRQ_LINE_STATUS's."""
    apic = board.apics[0]
    assert board.ioapic.set_irq(4, 0, 1) == -1
    board.redirect(4, 0x34)
    assert apic.has_interrupt() is None
    assert board.ioapic.set_irq(4, 0, 1) == 0
    assert board.ioapic.set_irq(4, 0, 0) == 1
    assert board.ioapic.set_irq(4, 0, 1) == 1
    assert apic.get_interrupt() == 0x34
    assert board.entry(4) == 0x34


def test_levels_wait_for_their_eoi(board: Board) -> None:
    """Data sheet, "IOREDTBL", remote IRR."""
    apic = board.apics[0]
    board.redirect(10, LEVEL | 0x4A)
    assert board.ioapic.set_irq(10, 0, 1) == 1
    assert board.entry(10) == LEVEL | REMOTE_IRR | 0x4A
    assert board.ioapic.set_irq(10, 0, 1) == -1
    assert apic.get_interrupt() == 0x4A
    write(apic, 0xB0, 0)
    assert apic.get_interrupt() == 0x4A
    board.ioapic.set_irq(10, 0, 0)
    write(apic, 0xB0, 0)
    assert apic.has_interrupt() is None
    assert board.entry(10) == LEVEL | 0x4A


def test_a_masked_level_is_delivered_when_it_is_unmasked(board: Board) -> None:
    board.redirect(10, MASKED | LEVEL | 0x4A)
    assert board.ioapic.set_irq(10, 0, 1) == -1
    board.redirect(10, LEVEL | 0x4A)
    assert board.apics[0].has_interrupt() == 0x4A


def test_making_an_entry_edge_triggered_clears_its_remote_irr(board: Board) -> None:
    """How Linux ends a level interrupt at I/O APICs without an EOI register."""
    board.redirect(10, LEVEL | 0x4A)
    board.ioapic.set_irq(10, 0, 1)
    board.redirect(10, MASKED | 0x4A)
    board.redirect(10, MASKED | LEVEL | 0x4A)
    assert board.entry(10) == MASKED | LEVEL | 0x4A


def test_several_sources_hold_one_line(board: Board) -> None:
    board.redirect(10, LEVEL | 0x4A)
    for source, level, up in ((0, 1, 1), (5, 1, 1), (0, 0, 1), (5, 0, 0)):
        board.ioapic.set_irq(10, source, level)
        assert board.ioapic.irr >> 10 & 1 == up
    board.ioapic.set_irq(10, 5, 1)
    board.ioapic.clear_source(5)
    board.ioapic.set_irq(10, 0, 0)
    assert board.ioapic.irr == 0


def test_destinations() -> None:
    """Data sheet, "IOREDTBL", destination field and mode."""
    board = Board(vcpus=3)
    for apic, ldr in zip(board.apics, (1, 2, 4), strict=True):
        write(apic, 0xD0, ldr << 24)
    for dest, takers in (
        (0 << 56, [0]), (2 << 56, [2]), (0xFF << 56, [0, 1, 2]), (6 << 56 | LOGICAL, [1, 2]), (9 << 56, []),
    ):  # fmt: skip
        board.redirect(5, dest | 0x35)
        assert board.ioapic.set_irq(5, 0, 1) == len(takers)
        board.ioapic.set_irq(5, 0, 0)
        assert [number for number, apic in enumerate(board.apics) if apic.get_interrupt() == 0x35] == takers
        for number in takers:
            board.apics[number].set_eoi()


def test_mask_and_acknowledge_notifiers(board: Board) -> None:
    seen: list[object] = []
    board.irqs.register_mask_notifier(7, seen.append)
    board.irqs.register_ack_notifier(7, lambda: seen.append("ack"))
    board.redirect(7, 0x37)
    board.redirect(7, 0x37)
    board.ioapic.set_irq(7, 0, 1)
    board.apics[0].get_interrupt()
    write(board.apics[0], 0xB0, 0)
    board.redirect(7, MASKED | 0x37)
    assert seen == [False, "ack", True]


def test_whoever_hears_the_acknowledge_may_drive_the_line(board: Board) -> None:
    board.redirect(7, LEVEL | 0x37)
    board.irqs.register_ack_notifier(7, lambda: board.irqs.set_irq(7, 0))
    board.irqs.set_irq(7, 1)
    board.apics[0].get_interrupt()
    write(board.apics[0], 0xB0, 0)
    assert board.apics[0].has_interrupt() is None


def test_the_rtcs_ticks_are_coalesced_until_all_have_ended_them() -> None:
    board = Board(vcpus=2)
    board.redirect(8, 0xFF << 56 | 0x38)

    def tick() -> int:
        result = board.ioapic.set_irq(8, 0, 1, line_status=True)
        board.ioapic.set_irq(8, 0, 0, line_status=True)
        return result

    assert tick() == 2
    assert tick() == 0
    for apic in board.apics:
        assert apic.get_interrupt() == 0x38
        assert tick() == 0
        apic.set_eoi()
    assert tick() == 2
    board.irqs.remove_apic(board.apics[1])
    board.apics[0].get_interrupt()
    board.apics[0].set_eoi()
    assert tick() == 1


def test_rtc_tracking_comes_back_with_the_state(board: Board) -> None:
    board.redirect(8, 0x38)
    board.ioapic.set_irq(8, 0, 1, line_status=True)
    board.ioapic.set_irq(8, 0, 0)
    board.ioapic.set_state(board.ioapic.get_state())
    assert board.ioapic.set_irq(8, 0, 1, line_status=True) == 0
    board.apics[0].get_interrupt()
    board.apics[0].set_eoi()
    assert board.ioapic.set_irq(8, 0, 1, line_status=True) == 1


def test_directed_eoi_needs_the_eoi_register(board: Board) -> None:
    """SDM, "Directed EOI With Local APIC Software Support"."""
    apic = board.apics[0]
    apic.configure(x2apic=True, tsc_deadline=True, phys_bits=46, directed_eoi=True)
    board.ioapic.eoi_register = True
    assert register(board, 1) == 0x00170020
    write(apic, 0xF0, 0x11FF)
    board.redirect(10, LEVEL | 0x4A)
    board.ioapic.set_irq(10, 0, 1)
    apic.get_interrupt()
    board.ioapic.set_irq(10, 0, 0)
    write(apic, 0xB0, 0)
    assert board.entry(10) & REMOTE_IRR
    board.buses.mmio.write(EOI_REGISTER, 4, 0x4A)
    assert not board.entry(10) & REMOTE_IRR


def test_an_interrupt_storm_is_slowed_down(board: Board) -> None:
    apic = board.apics[0]
    board.redirect(10, LEVEL | 0x4A)
    board.ioapic.set_irq(10, 0, 1)
    count = 0
    while apic.get_interrupt() == 0x4A:
        count += 1
        apic.set_eoi()
    assert count == SUCCESSIVE_IRQ_MAX_COUNT
    board.timers.advance(10_000_000)
    assert apic.get_interrupt() == 0x4A


def test_state(board: Board) -> None:
    board.redirect(4, 0x34)
    board.redirect(10, MASKED | LEVEL | 0x4A)
    board.ioapic.set_irq(4, 0, 1)
    board.ioapic.set_irq(10, 0, 1)
    state = board.ioapic.get_state()
    assert (state.base_address, state.irr) == (0xFEC00000, 1 << 10)
    other = Board()
    other.ioapic.set_state(state)
    assert bytes(other.ioapic.get_state()) == bytes(state)
    other.redirect(10, LEVEL | 0x4A)
    assert other.apics[0].has_interrupt() == 0x4A


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from([0, 0x10]), st.integers(0, 0xFFFFFFFF)),
        st.tuples(st.just("entry"), st.integers(0, 23), st.integers(0, (1 << 64) - 1)),
        st.tuples(st.just("entry"), st.integers(0, 23), st.integers(0, 0x1FFFF)),
        st.tuples(st.just("any"), st.integers(0, 0xFF), st.integers(0, (1 << 64) - 1)),
        st.tuples(st.just("line"), st.integers(0, 23), st.integers(0, 1)),
        st.tuples(st.just("serve"), st.integers(0, 1), st.just(0)),
    ),
    max_size=60,
)


def play(board: Board, sequence: list[tuple[str, int, int]]) -> None:
    for kind, place, value in sequence:
        match kind:
            case "write":
                assert board.buses.mmio.write(SELECT + place, 4, value)
            case "entry":
                board.redirect(place, value)
            case "any":
                for size in (1, 2, 4, 8):
                    board.buses.mmio.write(SELECT + place, size, value)
                    board.buses.mmio.read(SELECT + place, size)
            case "line":
                assert board.ioapic.set_irq(place, 0, value, line_status=True) >= -1
            case _:
                if board.apics[place].get_interrupt() is not None:
                    board.apics[place].set_eoi()


@given(steps, st.booleans())
def test_any_sequence_is_survived(sequence: list[tuple[str, int, int]], x2apic: bool) -> None:
    board = Board(vcpus=2)
    if x2apic:
        to_x2apic(board.apics[1])
    play(board, sequence)
    for entry in board.ioapic.redirtbl:
        assert 0 <= entry < 1 << 64
        assert entry & LEVEL or not entry & REMOTE_IRR
    state = board.ioapic.get_state()
    board.ioapic.set_state(state)
    again = board.ioapic.get_state()
    assert [e.bits & ~REMOTE_IRR for e in again.redirtbl] == [e.bits & ~REMOTE_IRR for e in state.redirtbl]


@given(st.binary(min_size=216, max_size=216), steps)
def test_any_state_that_user_space_sets_is_survived(page: bytes, sequence: list[tuple[str, int, int]]) -> None:
    board = Board(vcpus=2)
    board.ioapic.set_state(kvm_ioapic_state.from_buffer_copy(page))
    board.ioapic.base_address = 0xFEC00000
    play(board, sequence)
