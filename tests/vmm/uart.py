"""A driver's side of the UART."""

from __future__ import annotations

from vmonty.vmm.hw.serial import (
    IER,
    IER_RECEIVED,
    IIR_FCR,
    LSR,
    LSR_DATA_READY,
    MCR,
    MCR_DTR,
    MCR_OUT2,
    MCR_RTS,
    RBR_THR,
    Serial,
)


class Driver:
    """A UART, its interrupt line and what it sent, with registers by number."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        self.sent = bytearray()
        self.uart = Serial(self.edges.append, self.sent.extend)

    def __getitem__(self, register: int) -> int:
        return self.uart.read(register, 1)

    def __setitem__(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    @property
    def line(self) -> int:
        return self.edges[-1] if self.edges else 0

    def listen(self, fifo: bool = True) -> None:
        """As the driver's start-up leaves the chip for input."""
        self[IIR_FCR] = 1 if fifo else 0
        self[MCR] = MCR_DTR | MCR_RTS | MCR_OUT2
        self[IER] = IER_RECEIVED

    def drain(self) -> bytes:
        taken = bytearray()
        while self[LSR] & LSR_DATA_READY:
            taken.append(self[RBR_THR])
        return bytes(taken)
