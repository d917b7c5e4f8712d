"""The PIT, driven through its ports on a virtual clock, and its counters against a model that ticks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.soft.i8254 import KVM_PIT_FREQ, Channel, Pit, from_bcd, to_bcd
from vmonty.kvm.soft.iodev import KvmIoBus
from vmonty.kvm.uapi.irq import kvm_pit_channel_state, kvm_pit_state, kvm_pit_state2

from .board import Board, read, write

CONTROL = 0x43


class PitBoard(Board):
    """A board with a PIT whose GSI 0 the PIC gets (as a PC's firmware leaves it)."""

    def __init__(self) -> None:
        super().__init__(on=False)
        self.pit = Pit(self.timers, self.irqs)
        self.pit.register(self.buses.pio, speaker=True)

    def out(self, port: int, *values: int) -> None:
        for value in values:
            assert self.buses.pio.write(port, 1, value)

    def inb(self, port: int) -> int:
        value = self.buses.pio.read(port, 1)
        assert value is not None
        return value

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.out(CONTROL, channel << 6 | 0x30 | mode << 1 | bcd)
        self.out(0x40 + channel, count & 0xFF, count >> 8)

    def ticks(self, count: int) -> None:
        """Let *count* whole clocks pass, counted from now."""
        self.timers.advance(-(-count * 1_000_000_000 // KVM_PIT_FREQ))

    def count(self, channel: int) -> int:
        self.out(CONTROL, channel << 6)
        return self.inb(0x40 + channel) | self.inb(0x40 + channel) << 8

    def acknowledge(self) -> int:
        """Take the PIC's interrupt and end it."""
        vector = self.pic.read_irq()
        self.out(0x20, 0x20)
        return vector


@pytest.fixture
def board() -> PitBoard:
    return PitBoard()


def counting_element(mode: int, count: int) -> Iterator[tuple[int, int]]:
    """The value and OUT of a 16-bit binary counter, clock by clock. Data sheet, "Mode Definitions".

    An independent model: it ticks, and reloads where the data sheet says so.
    """
    value, out, phase = count, int(mode != 0), 0
    if mode == 3:
        value = count & ~1
    while True:
        yield value & 0xFFFF, out
        if mode in (0, 1, 4, 5):
            value -= 1
            if value == 0:
                out = int(mode == 0 or mode == 1)
        elif mode == 2:
            value = count if value == 1 else value - 1
        else:
            # One clock after the count has expired OUT changes and the count is reloaded: at an odd count's high
            # half it expires at 0, else when it would be 0.
            last = 0 if count & 1 and out else 2
            if value <= last:
                value, out, phase = count & ~1, 1 - out, phase + 1
            else:
                value -= 2


@pytest.mark.parametrize("mode", range(6))
@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 11, 255, 256])
def test_counts_agree_with_a_model_that_ticks(mode: int, count: int) -> None:
    channel = Channel(gate=1)
    channel.mode, channel.count = mode, count
    for ticks, (value, out) in zip(range(3 * count + 3), counting_element(mode, count), strict=False):
        assert channel.counting(ticks) == value, ticks
        if mode in (0, 3):
            assert channel.out(ticks) == out, ticks


@given(st.integers(1, 0xFFFF), st.integers(0, 1 << 40), st.integers(0, 5))
def test_counts_stay_in_their_range(count: int, ticks: int, mode: int) -> None:
    channel = Channel(gate=1)
    channel.mode, channel.count = mode, count
    assert 0 <= channel.counting(ticks) <= 0xFFFF
    if mode in (2, 3):
        assert channel.counting(ticks) <= count
        assert channel.counting(ticks + count) == channel.counting(ticks)


@given(st.integers(0, 9999))
def test_bcd_digits(value: int) -> None:
    assert from_bcd(to_bcd(value)) == value
    assert f"{to_bcd(value):04x}" == f"{value:04d}"


def test_a_counter_counts_in_time(board: PitBoard) -> None:
    board.program(2, 0, 1000)
    board.ticks(300)
    assert board.count(2) == 700
    board.ticks(701)
    assert board.count(2) == 0xFFFF


def test_bcd_counting(board: PitBoard) -> None:
    """Data sheet, "Control Word Format": BCD counts four decades; 0 is 10,000."""
    board.program(2, 0, 0x1000, bcd=1)
    board.ticks(1)
    assert board.count(2) == 0x0999
    board.program(2, 2, 0x0000, bcd=1)
    board.ticks(1)
    assert board.count(2) == 0x9999
    assert board.pit.get_state().channels[2].count == 0x10000


@pytest.mark.parametrize(
    ("access", "written", "count"),
    [
        pytest.param(1, (0x34,), 0x34, id="LSB only"),
        pytest.param(2, (0x12,), 0x1200, id="MSB only"),
        pytest.param(3, (0x34, 0x12), 0x1234, id="LSB then MSB"),
        pytest.param(3, (0, 0), 0x10000, id="0 is the largest count"),
    ],
)
def test_write_operations(board: PitBoard, access: int, written: tuple[int, ...], count: int) -> None:
    """Data sheet, "Write Operations"."""
    board.out(CONTROL, 2 << 6 | access << 4 | 4)
    board.out(0x42, *written)
    assert board.pit.get_state().channels[2].count == count


def test_counter_latch_command(board: PitBoard) -> None:
    """Data sheet, "Counter Latch Command": held until it is read; a second command before that is ignored."""
    board.program(2, 2, 0x4000)
    board.ticks(0x10)
    board.out(CONTROL, 0x80)
    board.ticks(0x100)
    board.out(CONTROL, 0x80)
    assert (board.inb(0x42), board.inb(0x42)) == (0xF0, 0x3F)
    assert (board.inb(0x42), board.inb(0x42)) == (0xF0, 0x3E)


def test_read_back_command(board: PitBoard) -> None:
    """Data sheet, "Read-Back Command": status comes before the count; several counters at once."""
    board.program(2, 3, 100)
    board.program(1, 2, 100)
    board.out(CONTROL, 0xC0 | 0x0C)
    assert [board.inb(0x42) for _ in range(3)] == [0xB6, 100, 0]
    assert board.inb(0x41) == 0x34
    board.out(CONTROL, 0xE0 | 0x08)
    board.program(2, 0, 5)
    assert board.inb(0x42) == 0xB6


def test_modes_6_and_7_are_2_and_3(board: PitBoard) -> None:
    for mode in (6, 7):
        board.program(1, mode, 10)
        assert board.pit.get_state().channels[1].mode == mode - 4


def test_the_control_register_reads_as_zero_and_wide_accesses_are_bytes(board: PitBoard) -> None:
    assert board.inb(CONTROL) == 0
    board.buses.pio.write(0x42, 2, 0xFF12)
    assert board.pit.get_state().channels[2].count == 0x12


def test_port_61(board: PitBoard) -> None:
    """Gate, speaker data, counter 2's output, and the refresh bit toggling every 2^14 ns."""
    board.program(2, 0, 1000)
    board.out(0x61, 0x03)
    assert board.inb(0x61) & 0x2F == 0x03
    board.ticks(1000)
    assert board.inb(0x61) & 0x2F == 0x23
    seen = []
    for _ in range(6):
        seen.append(board.inb(0x61) >> 4 & 1)
        board.timers.advance(1 << 14)
    assert seen in ([0, 1] * 3, [1, 0] * 3)
    assert board.buses.pio.read(0x62, 1) is None
    assert board.buses.pio.write(0x62, 1, 0) is False


def test_the_keyboard_controller_is_not_the_pits(board: PitBoard) -> None:
    """Port 0x64 lies in KVM's range of the speaker, whose device never takes it: its accesses need not ask."""
    bus, told = KvmIoBus(), []
    bus.registering = lambda first, count: told.append((first, count))
    board.pit.register(bus, speaker=True)
    assert told == [(0x40, 4), (0x61, 1)]
    assert bus.candidates(0x61, 4)


def test_a_rising_gate_starts_the_count_again(board: PitBoard) -> None:
    """Data sheet, "Gate Pin Operations Summary": modes 1, 2, 3 and 5."""
    board.program(2, 1, 1000)
    board.out(0x61, 0)
    board.ticks(500)
    board.out(0x61, 1)
    assert board.count(2) == 1000
    board.ticks(10)
    board.out(0x61, 1)
    assert board.count(2) == 990


@pytest.mark.parametrize("mode", [2, 3])
def test_a_periodic_counter_0_ticks(board: PitBoard, mode: int) -> None:
    board.program(0, mode, 11932)
    period = 11932 * 10**9 // KVM_PIT_FREQ
    for _ in range(5):
        board.timers.advance(period - 1)
        assert not board.pic.output
        board.timers.advance(1)
        assert board.pic.output
        board.acknowledge()
    assert board.count(0) == 11932


@pytest.mark.parametrize("mode", [0, 1, 4])
def test_a_single_shot_counter_0_ticks_once(board: PitBoard, mode: int) -> None:
    board.program(0, mode, 1000)
    board.ticks(1001)
    assert board.pic.output
    board.acknowledge()
    board.ticks(100_000)
    assert not board.pic.output
    assert len(board.timers) == 0


def test_mode_5_does_not_tick(board: PitBoard) -> None:
    board.program(0, 2, 1000)
    board.program(0, 5, 1000)
    board.ticks(5000)
    assert not board.pic.output


def test_short_periods_are_stretched(board: PitBoard) -> None:
    """KVM's min_timer_period_us: 200 µs."""
    board.program(0, 2, 2)
    assert board.timers.advance(1_000_000) == 5


def missed(board: PitBoard, ticks: int) -> int:
    """How many interrupts the guest gets for *ticks* that came while it did nothing."""
    board.program(0, 2, 11932)
    board.ticks(11932 * ticks + 1)
    count = 0
    while board.pic.output:
        board.acknowledge()
        count += 1
    return count


def test_missed_ticks_are_made_up_for_when_reinjecting(board: PitBoard) -> None:
    assert missed(board, 7) == 7
    assert missed(board, 1) == 1


def test_missed_ticks_are_lost_without_reinjection(board: PitBoard) -> None:
    board.pit.set_reinject(False)
    assert missed(board, 7) == 1
    board.pit.set_reinject(True)
    assert missed(board, 7) == 7


def test_unmasking_forgets_the_backlog(board: PitBoard) -> None:
    board.program(0, 2, 11932)
    board.ticks(11932 * 7 + 1)
    board.out(0x21, 1)
    board.out(0x21, 0)
    count = 0
    while board.pic.output:
        board.acknowledge()
        count += 1
    assert count == 1


def test_a_late_timer_counts_all_it_missed(board: PitBoard) -> None:
    board.program(0, 2, 11932)
    # The thread was away: the clock jumps, and then the timers run.
    board.timers.virtual.time_ns += 10_000_000_000
    assert board.timers.run_due() == 1
    assert board.pit.pending in (999, 1000)


def test_ticks_through_the_ioapic_are_reinjected_at_the_apics_eoi() -> None:
    board = PitBoard()
    apic = board.apics[0]
    write(apic, 0xF0, 0x1FF)
    board.out(0x21, 0xFF)
    board.redirect(0, 0x30)
    board.program(0, 2, 11932)
    board.ticks(11932 * 3 + 1)
    for _ in range(3):
        assert apic.get_interrupt() == 0x30
        write(apic, 0xB0, 0)
    assert apic.get_interrupt() is None


def test_nmi_watchdog(board: PitBoard) -> None:
    """LINT0 as NMI gets every tick of the PIT."""
    write(board.apics[0], 0xF0, 0x1FF)
    write(board.apics[0], 0x350, 0x400)
    assert read(board.apics[0], 0x350) == 0x400
    board.program(0, 2, 11932)
    board.ticks(11933)
    assert board.vcpus[0].events == ["nmi"]


def test_hpet_legacy_replacement_stops_counter_0(board: PitBoard) -> None:
    board.program(0, 2, 11932)
    state = board.pit.get_state()
    state.flags |= 1
    board.pit.set_state(state)
    assert len(board.timers) == 0
    board.program(0, 2, 11932)
    assert len(board.timers) == 0
    state.flags = 0
    board.pit.set_state(state)
    assert len(board.timers) == 1
    assert board.pit.get_state().channels[0].mode == 2


def test_a_new_pit_is_as_kvm_makes_it(board: PitBoard) -> None:
    state = board.pit.get_state()
    assert [(c.count, c.mode, c.gate) for c in state.channels] == [(65536, 255, 1), (65536, 255, 1), (65536, 255, 0)]
    assert state.channels[0].count_load_time == 0
    assert state.channels[1].count_load_time == board.timers.clock.now_ns()


def test_close_stops_everything(board: PitBoard) -> None:
    board.program(0, 2, 11932)
    board.pit.close()
    board.ticks(100_000)
    assert not board.pic.output
    assert not board.irqs.has_ack_notifier(0, 0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.integers(0x40, 0x43) | st.just(0x61), st.integers(0, 255)),
        st.tuples(st.just("in"), st.integers(0x40, 0x43) | st.just(0x61), st.just(0)),
        st.tuples(st.just("time"), st.just(0), st.integers(0, 5_000_000)),
        st.tuples(st.just("ack"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


def play(board: PitBoard, sequence: list[tuple[str, int, int]]) -> None:
    for kind, port, value in sequence:
        match kind:
            case "out":
                board.out(port, value)
            case "in":
                assert 0 <= board.inb(port) <= 255
            case "time":
                board.timers.advance(value)
            case _:
                board.acknowledge()


@given(steps)
def test_any_sequence_is_survived_and_its_state_moves(sequence: list[tuple[str, int, int]]) -> None:
    board = PitBoard()
    play(board, sequence)
    assert len(board.timers) <= 1
    state = board.pit.get_state()
    board.pit.set_state(state)
    again = board.pit.get_state()
    for channel in (*state.channels, *again.channels):
        # Counting starts anew.
        channel.count_load_time = 0
    assert bytes(again) == bytes(state)


@given(st.binary(min_size=112, max_size=112), steps)
def test_any_state_that_user_space_sets_is_survived(page: bytes, sequence: list[tuple[str, int, int]]) -> None:
    board = PitBoard()
    board.pit.set_state(kvm_pit_state2.from_buffer_copy(page))
    play(board, sequence)
    old = kvm_pit_state()
    old.channels[0] = kvm_pit_channel_state(count=100, mode=2)
    board.pit.set_state(old)
    assert board.pit.get_state().channels[0].count == 100
