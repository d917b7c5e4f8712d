"""Input on its way through the UART: held, in order, never lost; and accesses that no driver makes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.serial import (
    FIFO_SIZE,
    IER,
    IER_TRANSMIT_EMPTY,
    IIR_FCR,
    IIR_FIFO_ON,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_TRANSMIT_EMPTY,
    LCR,
    LSR,
    LSR_DATA_READY,
    MCR,
    MCR_OUT2,
    RBR_THR,
    SCR,
    Serial,
)

from .uart import Driver


@pytest.fixture
def uart() -> Driver:
    return Driver()


def test_input_is_held_until_the_driver_listens(uart: Driver) -> None:
    uart.uart.receive(b"early")
    assert not uart[LSR] & LSR_DATA_READY
    assert uart.uart.backlog() == 5
    uart[IIR_FCR] = 7  # start-up clears the FIFOs
    uart.listen()
    assert uart.line == 1
    assert uart[IIR_FCR] == IIR_RECEIVED | IIR_FIFO_ON
    assert uart.drain() == b"early"
    assert uart.line == 0
    assert uart.uart.backlog() == 0


@pytest.mark.parametrize("fifo", [True, False])
def test_long_input_arrives_in_order(uart: Driver, fifo: bool) -> None:
    uart.listen(fifo)
    text = bytes(range(256)) * 3
    uart.uart.receive(text[:100])
    uart.uart.receive(text[100:])
    assert uart.drain() == text
    assert uart[RBR_THR] == 0, "an empty receiver reads as 0"


def test_a_fifo_switch_keeps_input(uart: Driver) -> None:
    uart.listen()
    uart.uart.receive(bytes(range(40)))
    assert [uart[RBR_THR] for _ in range(3)] == [0, 1, 2]
    uart[IIR_FCR] = 0
    assert [uart[RBR_THR] for _ in range(3)] == [3, 4, 5]
    uart[IIR_FCR] = 1
    assert uart.drain() == bytes(range(6, 40))


def test_clearing_the_fifo_drops_what_is_in_it(uart: Driver) -> None:
    uart.listen()
    uart.uart.receive(bytes(range(20)))
    uart[IIR_FCR] = 3
    assert uart.drain() == bytes(range(FIFO_SIZE, 20))


def test_output_that_blocks_does_not_hold_up_input() -> None:
    """What is typed while the output is stuck reaches the chip: the way to end such a machine leads past it."""
    uart: list[Serial] = []
    taken = []

    def stuck(data: bytes) -> None:
        uart[0].receive(b"typed")
        taken.append(data)

    uart.append(Serial(lambda level: None, stuck))
    uart[0].write(RBR_THR, 1, ord("z"))
    assert taken == [b"z"]
    assert uart[0].backlog() == 5


def test_wide_values_write_the_low_byte(uart: Driver) -> None:
    uart.uart.write(SCR, 1, 0x1234)
    assert uart[SCR] == 0x34
    uart.uart.write(RBR_THR, 2, 0x4142)
    assert uart.sent == b"B"


access = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7)),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 0x1FF)),
    st.tuples(st.just("receive"), st.binary(min_size=1, max_size=20)),
)


@given(st.lists(access, max_size=60))
def test_no_access_is_wrong(accesses: list[tuple[object, ...]]) -> None:
    uart = Driver()
    for kind, *details in accesses:
        if kind == "read":
            assert 0 <= uart[details[0]] <= 0xFF  # type: ignore[index]
        elif kind == "write":
            uart[details[0]] = details[1]  # type: ignore[index,assignment]
        else:
            uart.uart.receive(details[0])  # type: ignore[arg-type]
    assert all(before != after for before, after in zip([0, *uart.edges], uart.edges, strict=False))
    # Whatever happened, the line is as the registers say, and everything can be brought to rest.
    uart[LCR] = 0
    gated = bool(uart[MCR] & MCR_OUT2)
    assert uart.line == int(gated and not _identified(uart) & IIR_NONE)
    uart[IER] = 0
    assert uart.line == 0


def _identified(uart: Driver) -> int:
    """The identification without its side effect: a pending transmitter interrupt is put back."""
    enabled = uart[IER]
    pending = uart[IIR_FCR] & 0x0F
    if pending == IIR_TRANSMIT_EMPTY:
        uart[IER] = enabled & ~IER_TRANSMIT_EMPTY
        uart[IER] = enabled
    return pending


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=8), st.booleans(), st.integers(0, 40))
def test_nothing_is_lost_or_doubled(pieces: list[bytes], fifo: bool, switch_after: int) -> None:
    uart = Driver()
    uart.listen(fifo)
    taken = bytearray()
    for piece in pieces:
        uart.uart.receive(piece)
    while uart[LSR] & LSR_DATA_READY:
        taken.append(uart[RBR_THR])
        if len(taken) == switch_after:
            uart[IIR_FCR] = 0 if fifo else 1
    assert bytes(taken) == b"".join(pieces)
