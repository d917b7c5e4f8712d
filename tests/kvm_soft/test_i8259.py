"""The PIC pair, driven through its ports and lines."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.soft.i8259 import I8259, Pic
from vmonty.kvm.soft.iodev import KvmIoBus
from vmonty.kvm.uapi.irq import kvm_pic_state

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
READ_IRR, READ_ISR, EOI = 0x0A, 0x0B, 0x20


class Driver:
    """A guest's view of a Pic on a bus."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.ended: list[tuple[int, int]] = []
        self.masked: list[tuple[int, int, bool]] = []
        self.pic = Pic(
            threading.RLock(),
            self.levels.append,
            lambda chip, pin: self.ended.append((chip, pin)),
            lambda chip, pin, masked: self.masked.append((chip, pin, masked)),
        )
        self.bus = KvmIoBus()
        self.pic.register(self.bus)

    def out(self, port: int, *values: int) -> None:
        for value in values:
            assert self.bus.write(port, 1, value)

    def inb(self, port: int) -> int:
        value = self.bus.read(port, 1)
        assert value is not None
        return value

    def initialize(self, icw4: int = 0x01, mask: int = 0) -> None:
        """Vectors 0x20–0x2F, as every PC operating system has them."""
        for port, vector, cascade in ((MASTER, 0x20, 4), (SLAVE, 0x28, 2)):
            self.out(port, 0x11)
            self.out(port + 1, vector, cascade, icw4, mask)

    def pulse(self, *irqs: int) -> None:
        for irq in irqs:
            self.pic.set_irq(irq, 0, 1)
            self.pic.set_irq(irq, 0, 0)

    def isr(self, port: int = MASTER) -> int:
        self.out(port, READ_ISR)
        return self.inb(port)

    def irr(self, port: int = MASTER) -> int:
        self.out(port, READ_IRR)
        return self.inb(port)


@pytest.fixture
def pc() -> Driver:
    driver = Driver()
    driver.initialize()
    driver.levels.clear()
    return driver


def test_interrupt_sequence(pc: Driver) -> None:
    """Data sheet, "Interrupt Sequence": request, INTR, acknowledge, in service, EOI."""
    pc.pulse(3)
    assert pc.levels == [True]
    assert pc.irr() == 8
    assert pc.pic.read_irq() == 0x23
    assert (pc.irr(), pc.isr(), pc.pic.output) == (0, 8, False)
    pc.out(MASTER, EOI)
    assert pc.isr() == 0
    assert pc.ended == [(0, 3)]


def test_the_slaves_vector_comes_through_the_cascade(pc: Driver) -> None:
    """Data sheet, "Cascade Mode"."""
    pc.pulse(12)
    assert pc.pic.read_irq() == 0x2C
    assert (pc.isr(), pc.isr(SLAVE)) == (0x04, 0x10)
    pc.out(SLAVE, EOI)
    pc.out(MASTER, EOI)
    assert (pc.isr(), pc.isr(SLAVE)) == (0, 0)
    assert pc.ended == [(1, 12), (0, 2)]


def test_without_a_request_the_vector_is_input_sevens(pc: Driver) -> None:
    """Data sheet, "Interrupt Sequence": no request when INTA comes."""
    assert pc.pic.read_irq() == 0x27
    assert pc.isr() == 0


def test_fully_nested_mode_serves_the_more_urgent_first(pc: Driver) -> None:
    """Data sheet, "Fully Nested Mode"."""
    pc.pulse(5, 1, 6)
    assert pc.pic.read_irq() == 0x21
    assert not pc.pic.output
    pc.pulse(0)
    assert pc.pic.read_irq() == 0x20
    served = []
    for _ in range(4):
        pc.out(MASTER, EOI)
        if pc.pic.output:
            served.append(pc.pic.read_irq())
    assert served == [0x25, 0x26]


def test_the_mask_holds_requests_back(pc: Driver) -> None:
    """Data sheet, "Operation Control Word 1"."""
    pc.out(MASTER + 1, 0x10)
    assert pc.pic.set_irq(4, 0, 1) == -1
    assert not pc.pic.output
    pc.out(MASTER + 1, 0)
    assert pc.pic.output
    assert pc.inb(MASTER + 1) == 0
    assert pc.masked == [(0, 4, True), (0, 4, False)]
    pc.out(SLAVE + 1, 0x01)
    assert pc.masked[-1] == (1, 8, True)


@pytest.mark.parametrize(
    ("command", "isr", "turn"),
    [
        pytest.param(0x20, 0x28, 0, id="non-specific EOI ends the most urgent"),
        pytest.param(0x65, 0x0A, 0, id="specific EOI of 5"),
        pytest.param(0xA0, 0x28, 2, id="rotate on non-specific EOI: 1 becomes the lowest"),
        pytest.param(0xE3, 0x22, 4, id="rotate on specific EOI of 3"),
        pytest.param(0xC2, 0x2A, 3, id="set priority: 2 becomes the lowest"),
        pytest.param(0x40, 0x2A, 0, id="no operation"),
    ],
)
def test_operation_command_word_2(pc: Driver, command: int, isr: int, turn: int) -> None:
    """Data sheet, "Operation Control Word 2", with 1, 3 and 5 in service."""
    state = pc.pic.get_state(0)
    state.isr = 0x2A
    pc.pic.set_state(0, state)
    pc.out(MASTER, command)
    assert (pc.isr(), pc.pic.get_state(0).priority_add) == (isr, turn)


def test_rotation_makes_devices_equal(pc: Driver) -> None:
    """Data sheet, "Automatic Rotation (Equal Priority Devices)"."""
    served = []
    for _ in range(6):
        pc.pulse(3, 4, 5)
        served.append(pc.pic.read_irq() - 0x20)
        pc.out(MASTER, 0xA0)
    assert served == [3, 4, 5, 3, 4, 5]


def test_automatic_eoi_with_rotation() -> None:
    """Data sheet, "Automatic End of Interrupt (AEOI) Mode"."""
    pc = Driver()
    pc.initialize(icw4=0x03)
    pc.out(MASTER, 0x80)
    pc.pulse(3)
    assert pc.pic.read_irq() == 0x23
    assert pc.isr() == 0
    assert pc.pic.get_state(0).priority_add == 4
    assert pc.ended == [(0, 3)]
    pc.out(MASTER, 0x00)
    assert pc.pic.get_state(0).rotate_on_auto_eoi == 0


def test_special_mask_mode_lets_lower_priorities_in(pc: Driver) -> None:
    """Data sheet, "Special Mask Mode" (which Linux's KVM lacks)."""
    pc.pulse(2 + 1)
    assert pc.pic.read_irq() == 0x23
    pc.pulse(6)
    assert not pc.pic.output
    pc.out(MASTER + 1, 0x08)
    pc.out(MASTER, 0x68)
    assert pc.pic.output
    assert pc.pic.read_irq() == 0x26
    pc.out(MASTER, EOI)
    assert pc.isr() == 0x08
    pc.out(MASTER, 0x48)
    assert pc.pic.get_state(0).special_mask == 0


def test_special_fully_nested_mode_lets_the_slave_in_again() -> None:
    """Data sheet, "Special Fully Nested Mode"."""
    pc = Driver()
    pc.initialize(icw4=0x11)
    pc.pulse(12)
    assert pc.pic.read_irq() == 0x2C
    pc.pulse(9)
    assert pc.pic.output
    assert pc.pic.read_irq() == 0x29


def test_poll(pc: Driver) -> None:
    """Data sheet, "Poll Command": bit 7 and the number; 7 without a request."""
    pc.pulse(5)
    pc.out(MASTER, 0x0C)
    assert pc.inb(MASTER) == 0x85
    assert (pc.irr(), pc.isr()) == (0, 0)
    pc.out(MASTER, 0x0C)
    assert pc.inb(MASTER) == 0x07
    pc.pulse(10)
    pc.out(SLAVE, 0x0C)
    assert pc.inb(SLAVE + 1) == 0x82
    assert not pc.pic.output


@pytest.mark.parametrize(
    ("elcr", "lines", "results"),
    [
        pytest.param(0, (1, 1, 0, 1), (1, 1, 1, 0), id="edge: pending until acknowledged"),
        pytest.param(0x20, (1, 1, 0, 1), (1, 0, 1, 1), id="level: gone with the line"),
    ],
)
def test_edge_and_level(pc: Driver, elcr: int, lines: Sequence[int], results: Sequence[int]) -> None:
    """Data sheet, "Edge and Level Triggered Modes", with the PC's ELCR; the results are KVM_IRQ_LINE_STATUS's."""
    pc.out(ELCR, elcr)
    assert tuple(pc.pic.set_irq(5, 0, level) for level in lines) == tuple(results)


def test_a_level_that_stays_interrupts_again_after_its_eoi(pc: Driver) -> None:
    pc.out(ELCR + 1, 0x04)
    pc.pic.set_irq(10, 0, 1)
    assert pc.pic.read_irq() == 0x2A
    pc.out(SLAVE, EOI)
    pc.out(MASTER, EOI)
    assert pc.pic.output
    pc.pic.set_irq(10, 0, 0)
    pc.pic.read_irq()


def test_a_line_is_up_while_any_source_holds_it(pc: Driver) -> None:
    pc.out(ELCR, 0x20)
    for source, level, pending in ((0, 1, True), (1, 1, True), (0, 0, True), (1, 0, False)):
        pc.pic.set_irq(5, source, level)
        assert bool(pc.irr()) is pending
    pc.pic.set_irq(5, 7, 1)
    pc.pic.clear_source(7)
    pc.pic.set_irq(5, 0, 0)
    assert pc.irr() == 0


def test_initialization_forgets_edges_and_keeps_levels(pc: Driver) -> None:
    """Data sheet, "Initialization Command Words 1 and 2 (ICW1, ICW2)"."""
    pc.out(ELCR, 0x20)
    pc.pic.set_irq(5, 0, 1)
    pc.pulse(3)
    pc.out(MASTER + 1, 0xFF)
    pc.out(MASTER, 0x10)
    state = pc.pic.get_state(0)
    assert (state.irr, state.imr, state.init_state) == (0x20, 0, 1)
    pc.out(MASTER + 1, 0x47, 0x04, 0xAB)
    state = pc.pic.get_state(0)
    assert (state.irq_base, state.init_state, state.imr) == (0x40, 0, 0xAB)


def test_the_elcr_has_no_bits_for_timer_keyboard_cascade_clock_and_fpu(pc: Driver) -> None:
    pc.out(ELCR, 0xFF)
    pc.out(ELCR + 1, 0xFF)
    assert (pc.inb(ELCR), pc.inb(ELCR + 1)) == (0xF8, 0xDE)


@pytest.mark.parametrize("size", [2, 4])
def test_wider_accesses_read_zero_or_reach_nobody(pc: Driver, size: int) -> None:
    expected = 0 if size == 2 else None
    assert pc.bus.read(MASTER, size) == expected
    assert pc.bus.write(MASTER, size, 0xFFFF) is (size == 2)
    assert pc.inb(MASTER + 1) == 0


def model(chip: I8259) -> int | None:
    """The priority resolver in words: walk from the top; stop at what is in service; take what asks and may."""
    in_service = chip.isr & ~(chip.imr if chip.special_mask else 0)
    for place in range(8):
        irq = (chip.priority_add + place) & 7
        ignored = chip.special_fully_nested_mode and chip.master and irq == 2
        if in_service >> irq & 1 and not ignored:
            return None
        if chip.irr & ~chip.imr & 1 << irq:
            return irq
    return None


octets = st.integers(0, 255)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.integers(0, 15), st.integers(0, 1)),
        st.tuples(st.just("out"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), octets),
        st.tuples(st.just("in"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.just(0)),
        st.tuples(st.just("ack"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_any_sequence_keeps_the_resolver_right_and_the_state_whole(sequence: list[tuple[str, int, int]]) -> None:
    pc = Driver()
    for kind, place, value in sequence:
        match kind:
            case "line":
                assert pc.pic.set_irq(place, 0, value) in (-1, 0, 1)
            case "out":
                pc.out(place, value)
            case "in":
                assert 0 <= pc.inb(place) <= 255
            case _:
                assert 0 <= pc.pic.read_irq() <= 255
        for index, chip in enumerate(pc.pic.chips):
            assert chip.request() == model(chip)
            assert chip.elcr & ~chip.elcr_mask == 0
            state = pc.pic.get_state(index)
            assert bytes(state) == bytes(kvm_pic_state.from_buffer_copy(bytes(state)))


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), steps)
def test_any_state_that_user_space_sets_is_survived_and_read_back(
    master: bytes, slave: bytes, sequence: list[tuple[str, int, int]]
) -> None:
    pc = Driver()
    pc.pic.set_state(1, kvm_pic_state.from_buffer_copy(slave))
    assert bytes(pc.pic.get_state(1)) == slave
    pc.pic.set_state(0, kvm_pic_state.from_buffer_copy(master))
    # The slave's output is evaluated anew, and may show at the cascade's input.
    again = bytes(pc.pic.get_state(0))
    assert (again[0] ^ master[0]) & ~4 == (again[1] ^ master[1]) & ~4 == 0
    assert again[2:] == master[2:]
    for kind, place, value in sequence:
        if kind == "line":
            pc.pic.set_irq(place, 0, value)
        elif kind == "out":
            pc.out(place, value)
        elif kind == "in":
            pc.inb(place)
        else:
            assert 0 <= pc.pic.read_irq() <= 255
