"""16550A UART. Source: the National Semiconductor PC16550D data sheet, "Registers"."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

FIFO_SIZE = 16

# Register offsets; 0 and 1 are the divisor latch while LCR.DLAB is set.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RECEIVED, IER_TRANSMIT_EMPTY, IER_LINE_STATUS, IER_MODEM_STATUS = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_TRANSMIT_EMPTY, IIR_RECEIVED, IIR_LINE = 1, 0, 2, 4, 6
IIR_FIFO_ON = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVE = 1, 2
LCR_DIVISOR_LATCH = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMIT_EMPTY, LSR_IDLE = 1, 2, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80


class Window(Protocol):
    """Who answers plain accesses in the UART's place; see vmonty.kvm.api.PortWindow."""

    def show(self, values: Mapping[int, int], idle: int, collects: bool) -> None:
        """From now on so."""
        ...


class Serial:
    """One UART: eight byte registers.

    *output* takes what the guest sends, on the vCPU's thread. ``receive()`` queues what it shall get; it is
    handed over only while the guest listens (receive interrupt on, OUT2 set), so that input that comes before
    the guest's driver is not lost. With *polled*, for firmware and boot loaders, also to one that only asks for the
    line status. *irq* is called with the new level of the interrupt line. *window* is told when a byte that is sent
    has no other effect than its output, what the line status is meanwhile, and the interrupts that are on.
    """

    def __init__(
        self, irq: Callable[[int], None], output: Callable[[bytes], None], *, polled: bool = False,
        window: Window | None = None,
    ) -> None:  # fmt: skip
        self._irq = irq
        self._polled = polled
        self._output = output
        self._lock = threading.Lock()
        self._level = 0
        self._waiting: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._divisor = 12
        self._ier = self._fcr = self._lcr = self._scr = 0
        self._mcr = MCR_OUT2
        self._overrun = 0
        self._transmit_interrupt = False
        self._window = window
        self._shown: tuple[dict[int, int], int, bool] = ({}, 0, False)
        self._show()

    def receive(self, data: bytes) -> None:
        """Queue *data* for the guest. From any thread."""
        with self._lock:
            self._waiting.extend(data)
            self._refill()
            self._update()

    def _listening(self) -> bool:
        return bool(self._ier & IER_RECEIVED and self._mcr & MCR_OUT2 and not self._mcr & MCR_LOOP)

    def backlog(self) -> int:
        """How many bytes wait for the guest to take them. From any thread."""
        return len(self._waiting)

    def _depth(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _refill(self, *, asked: bool = False) -> None:
        while self._waiting and len(self._fifo) < self._depth() and (asked or self._listening()):
            self._fifo.append(self._waiting.popleft())

    def _pending(self) -> int:
        """The interrupt identification, highest priority first."""
        if self._ier & IER_LINE_STATUS and self._overrun:
            return IIR_LINE
        if self._ier & IER_RECEIVED and self._fifo:
            return IIR_RECEIVED
        if self._ier & IER_TRANSMIT_EMPTY and self._transmit_interrupt:
            return IIR_TRANSMIT_EMPTY
        return IIR_NONE

    def hide(self) -> None:
        """See every access from now on, also those that the window could answer. From any thread."""
        with self._lock:
            if self._window is not None:
                self._window.show({}, 0, False)
                self._window = None

    def _show(self) -> None:
        if self._window is None:
            return
        plain = not (self._lcr & LCR_DIVISOR_LATCH or self._mcr & MCR_LOOP or self._overrun)
        # A read of the line status hands over what waits for a polling reader.
        plain = plain and not (self._polled and self._waiting)
        values = {IER: self._ier, LSR: self._status()} if plain else {}
        shown = values, 1 << IER, plain and not self._ier & IER_TRANSMIT_EMPTY
        if shown != self._shown:
            self._shown = shown
            self._window.show(*shown)

    def _status(self) -> int:
        return LSR_TRANSMIT_EMPTY | LSR_IDLE | (LSR_DATA_READY if self._fifo else 0) | self._overrun

    def _update(self) -> None:
        self._show()
        # On a PC, OUT2 gates the interrupt.
        level = int(self._pending() != IIR_NONE and bool(self._mcr & MCR_OUT2))
        if level != self._level:
            self._level = level
            self._irq(level)

    def read(self, offset: int, size: int) -> int:
        """A register read; accesses wider than a byte see the low byte."""
        with self._lock:
            value = self._read(offset)
            self._update()
            return value

    def _read(self, offset: int) -> int:
        match offset:
            case 0 | 1 if self._lcr & LCR_DIVISOR_LATCH:
                return self._divisor >> 8 * offset & 0xFF
            case 0:
                value = self._fifo.popleft() if self._fifo else 0
                self._refill()
                return value
            case 1:
                return self._ier
            case 2:
                pending = self._pending()
                if pending == IIR_TRANSMIT_EMPTY:
                    self._transmit_interrupt = False
                return pending | (IIR_FIFO_ON if self._fcr & FCR_ENABLE else 0)
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 5:
                self._refill(asked=self._polled and not self._mcr & MCR_LOOP)
                status = self._status()
                self._overrun = 0
                return status
            case 6:
                if self._mcr & MCR_LOOP:
                    # "Modem Control Register", bit 4: the outputs come back as inputs.
                    return (
                        (MSR_CTS if self._mcr & MCR_RTS else 0)
                        | (MSR_DSR if self._mcr & MCR_DTR else 0)
                        | (MSR_RI if self._mcr & MCR_OUT1 else 0)
                        | (MSR_DCD if self._mcr & MCR_OUT2 else 0)
                    )
                return MSR_CTS | MSR_DSR | MSR_DCD
            case _:
                return self._scr

    def write(self, offset: int, size: int, value: int) -> None:
        """A register write; accesses wider than a byte write the low byte."""
        with self._lock:
            transmits = offset == RBR_THR and not self._lcr & LCR_DIVISOR_LATCH and not self._mcr & MCR_LOOP
        if transmits:
            # Without the lock: who takes the output may block, and input must still get in.
            self._output(bytes((value & 0xFF,)))
        with self._lock:
            self._write(offset, value & 0xFF)
            self._refill()
            self._update()

    def _write(self, offset: int, value: int) -> None:
        match offset:
            case 0 | 1 if self._lcr & LCR_DIVISOR_LATCH:
                shift = 8 * offset
                self._divisor = self._divisor & ~(0xFF << shift) | value << shift
            case 0 if self._mcr & MCR_LOOP:
                if len(self._fifo) < self._depth():
                    self._fifo.append(value)
                else:
                    self._overrun = LSR_OVERRUN
                self._transmit_interrupt = True
            case 0:
                self._transmit_interrupt = True
            case 1:
                if value & ~self._ier & IER_TRANSMIT_EMPTY:
                    self._transmit_interrupt = True
                self._ier = value & 0xF
            case 2:
                if value & FCR_CLEAR_RECEIVE and (not self._polled or self._mcr & MCR_LOOP):
                    self._fifo.clear()
                elif value & FCR_CLEAR_RECEIVE or (value ^ self._fcr) & FCR_ENABLE:
                    # The switch empties the FIFO. A real line loses what it held; ours can wait a moment more.
                    self._waiting.extendleft(reversed(self._fifo))
                    self._fifo.clear()
                self._fcr = value
            case 3:
                self._lcr = value
            case 4:
                self._mcr = value & 0x1F
            case 7:
                self._scr = value
            case _:
                pass  # line and modem status are read-only
