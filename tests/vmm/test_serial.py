"""The UART's registers, in the order in which Linux's 8250 driver meets them."""

from __future__ import annotations

import pytest

from vmonty.vmm.hw.serial import (
    FIFO_SIZE,
    IER,
    IER_LINE_STATUS,
    IER_RECEIVED,
    IER_TRANSMIT_EMPTY,
    IIR_FCR,
    IIR_LINE,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_TRANSMIT_EMPTY,
    LCR,
    LCR_DIVISOR_LATCH,
    LSR,
    LSR_IDLE,
    LSR_OVERRUN,
    LSR_TRANSMIT_EMPTY,
    MCR,
    MCR_DTR,
    MCR_LOOP,
    MCR_OUT1,
    MCR_OUT2,
    MCR_RTS,
    MSR,
    MSR_CTS,
    MSR_DCD,
    MSR_DSR,
    MSR_RI,
    RBR_THR,
    SCR,
)

from .uart import Driver


@pytest.fixture
def uart() -> Driver:
    return Driver()


def test_autoconfiguration_finds_a_16550a(uart: Driver) -> None:
    # autoconfig(): the interrupt enable register holds four bits …
    uart[IER] = 0
    assert uart[IER] & 0x0F == 0
    uart[IER] = 0x0F
    assert uart[IER] & 0x0F == 0x0F
    uart[IER] = 0xFF
    assert uart[IER] == 0x0F
    uart[IER] = 0
    # … in loop mode RTS and OUT2 come back as CTS and DCD …
    uart[MCR] = MCR_LOOP | MCR_OUT2 | MCR_RTS
    assert uart[MSR] & 0xF0 == MSR_DCD | MSR_CTS
    uart[MCR] = MCR_OUT2
    # … the FIFO shows itself in two bits …
    uart[LCR] = 0
    uart[IIR_FCR] = 1
    assert uart[IIR_FCR] >> 6 == 3
    uart[IIR_FCR] = 0
    assert uart[IIR_FCR] >> 6 == 0
    # … and the scratch register says that this is no 8250.
    for value in (0xA5, 0x5A):
        uart[SCR] = value
        assert uart[SCR] == value


def test_no_later_chip_is_seen(uart: Driver) -> None:
    # autoconfig_16550a(): an extended feature register or a 64-byte FIFO would show here.
    uart[LCR] = LCR_DIVISOR_LATCH
    uart[IIR_FCR] = 0x21
    assert uart[IIR_FCR] & 0x20 == 0
    uart[LCR] = 0
    uart[IER] = 0x40
    assert not uart[IER] & 0x40


@pytest.mark.parametrize(
    ("output", "comes_back"),
    [(MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD), (0, 0)],
)
def test_loop_of_modem_lines(uart: Driver, output: int, comes_back: int) -> None:
    uart[MCR] = MCR_LOOP | output
    assert uart[MSR] & 0xF0 == comes_back


def test_a_terminal_is_connected(uart: Driver) -> None:
    assert uart[MSR] == MSR_CTS | MSR_DSR | MSR_DCD
    uart[MSR] = 0
    uart[LSR] = 0
    assert uart[MSR] == MSR_CTS | MSR_DSR | MSR_DCD
    assert uart[LSR] == LSR_TRANSMIT_EMPTY | LSR_IDLE


def test_divisor_latch_hides_two_registers(uart: Driver) -> None:
    uart[IER] = IER_RECEIVED
    uart[LCR] = LCR_DIVISOR_LATCH | 3
    uart[RBR_THR], uart[IER] = 0x34, 0x12
    assert (uart[RBR_THR], uart[IER]) == (0x34, 0x12)
    uart[LCR] = 3
    assert uart[IER] == IER_RECEIVED
    assert uart.sent == b""
    uart[RBR_THR] = ord("x")
    assert uart.sent == b"x"


@pytest.mark.parametrize(("fifo", "fits"), [(True, FIFO_SIZE), (False, 1)])
def test_size_of_the_fifo_by_loop(uart: Driver, fifo: bool, fits: int) -> None:
    # size_fifo(): more bytes than fit into the loop; what can be read is the size.
    uart[IIR_FCR] = 7 if fifo else 0
    uart[MCR] = MCR_LOOP
    for value in range(256):
        uart[RBR_THR] = value
    assert uart[LSR] & LSR_OVERRUN
    assert not uart[LSR] & LSR_OVERRUN, "reading the status takes the overrun away"
    assert uart.drain() == bytes(range(fits))
    assert uart.sent == b"", "nothing leaves the chip in loop mode"


def test_overrun_interrupts_first(uart: Driver) -> None:
    uart[MCR] = MCR_LOOP | MCR_OUT2
    uart[IER] = IER_LINE_STATUS | IER_RECEIVED
    for value in b"ab":
        uart[RBR_THR] = value
    assert uart[IIR_FCR] == IIR_LINE
    assert uart[LSR] & LSR_OVERRUN
    assert uart[IIR_FCR] == IIR_RECEIVED
    assert uart[RBR_THR] == ord("a")
    assert uart[IIR_FCR] == IIR_NONE
    assert uart.line == 0


def test_transmitter_empty_interrupt(uart: Driver) -> None:
    uart[IER] = IER_TRANSMIT_EMPTY
    assert uart.line == 1, "enabling it while the transmitter is empty raises it at once"
    assert uart[IIR_FCR] == IIR_TRANSMIT_EMPTY
    assert uart[IIR_FCR] == IIR_NONE, "reading the identification takes it away"
    assert uart.line == 0
    uart[RBR_THR] = ord("y")
    assert uart.line == 1
    assert uart[IIR_FCR] == IIR_TRANSMIT_EMPTY
    uart[IER] = IER_TRANSMIT_EMPTY
    assert uart.line == 0, "no new edge without a change"
    uart[IER] = 0
    uart[IER] = IER_TRANSMIT_EMPTY
    assert uart.line == 1, "the driver's test for a lost interrupt: off and on again raises it"
    uart[IER] = 0
    assert uart.line == 0


def test_out2_gates_the_line(uart: Driver) -> None:
    uart[MCR] = 0
    uart[IER] = IER_TRANSMIT_EMPTY
    assert uart.line == 0
    uart[MCR] = MCR_OUT2
    assert uart.line == 1
