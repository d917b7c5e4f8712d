"""The driver's side of an AHCI controller: command lists and tables in guest RAM, and the received FISes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from vmonty.vmm.hw.ata.ahci import PORTS, Ahci
from vmonty.vmm.hw.ata.ahci_port import CI, CLB, CMD, FB, FIS_RECEIVE, IE, IS, SACT, SERR, START, TFD
from vmonty.vmm.hw.ata.drive import Drive
from vmonty.vmm.memory import GuestMemory

from ..pci_driver import PciHost

LIST, RECEIVED, TABLES, BUFFER = 0x1000, 0x1800, 0x2000, 0x2_0000
TABLE_SIZE = 0x1000
REGISTERS = 0xFEB0_0000
SLOT = 1


class Now:
    """A loop that calls at once, or when ``go`` is called while it ``waits``."""

    def __init__(self) -> None:
        self.waits = False
        self._calls: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._calls.append(callback)
        if not self.waits:
            self.go()

    def go(self) -> None:
        while self._calls:
            self._calls.pop(0)()


class AhciDriver:
    """Talks to port 0 of a controller, which is started."""

    def __init__(self, drives: Sequence[Drive | None], *, start: bool = True, memory: int = 1 << 20) -> None:
        self.memory = GuestMemory(memory)
        self.host = PciHost()
        self.loop = Now()
        self.controller = Ahci(self.memory, [*drives, *[None] * (PORTS - len(drives))], [self.loop] * PORTS)
        self.host.bus.add(self.controller, SLOT)
        self.host.config(SLOT, 0x24, 4, REGISTERS)
        self.host.config(SLOT, 0x04, 2, 6)
        self.write(0x04, 1 << 31 | 2)
        if start:
            self.start()

    def start(self) -> None:
        for register, value in ((CLB, LIST), (CLB + 4, 0), (FB, RECEIVED), (FB + 4, 0)):
            self.port_write(register, value)
        self.port_write(IE, 0xFFFF_FFFF)
        self.port_write(SERR, 0xFFFF_FFFF)
        self.port_write(CMD, FIS_RECEIVE)
        self.port_write(CMD, FIS_RECEIVE | START)

    def read(self, register: int) -> int:
        return self.host.mmio.read(REGISTERS + register, 4)

    def write(self, register: int, value: int) -> None:
        self.host.mmio.write(REGISTERS + register, 4, value)

    def port_read(self, register: int, port: int = 0) -> int:
        return self.read(0x100 + 0x80 * port + register)

    def port_write(self, register: int, value: int, port: int = 0) -> None:
        self.write(0x100 + 0x80 * port + register, value)

    @property
    def interrupted(self) -> bool:
        return bool(self.host.lines) and self.host.lines[-1] == (SLOT, 0, 1)

    def acknowledge(self) -> int:
        """What the port has to tell; cleared."""
        causes = self.port_read(IS)
        self.port_write(IS, causes)
        self.write(0x08, 0xFFFF_FFFF)
        return causes

    def prepare(
        self, command: int, lba: int = 0, count: int = 1, *, feature: int = 0, device: int = 0x40, slot: int = 0,
        regions: Sequence[tuple[int, int]] = ((BUFFER, 0x1_0000),), write: bool = False, packet: bytes = b"",
        flags: int = 0x80, control: int = 0, kind: int = 0x27, length: int = 5, regions_said: int | None = None,
    ) -> None:  # fmt: skip
        """A command in *slot* with its table."""
        table = TABLES + TABLE_SIZE * slot
        said = len(regions) if regions_said is None else regions_said
        head = length | (0x40 if write else 0) | (0x20 if packet else 0) | said << 16
        self.memory.write(LIST + 32 * slot, struct.pack("<IIQ16x", head, 0, table))
        fis = struct.pack(
            "<BBBBBBBBBBBBBBBB4x", kind, flags, command, feature & 0xFF, lba & 0xFF, lba >> 8 & 0xFF, lba >> 16 & 0xFF,
            device, lba >> 24 & 0xFF, lba >> 32 & 0xFF, lba >> 40 & 0xFF, feature >> 8, count & 0xFF, count >> 8, 0,
            control,
        )  # fmt: skip
        self.memory.write(table, fis.ljust(0x40, b"\0") + packet.ljust(16, b"\0"))
        entries = b"".join(struct.pack("<QII", base, 0, size - 1) for base, size in regions)
        self.memory.write(table + 0x80, entries)

    def issue(self, *slots: int, queued: bool = False) -> None:
        bits = sum(1 << slot for slot in slots)
        if queued:
            self.port_write(SACT, bits)
        self.port_write(CI, bits)

    def command(self, command: int, lba: int = 0, count: int = 1, **others: object) -> tuple[int, int]:
        """Carry it out in slot 0: the interrupt causes, and the task file."""
        self.prepare(command, lba, count, **others)  # type: ignore[arg-type]
        self.issue(0)
        return self.acknowledge(), self.port_read(TFD)

    def moved(self, slot: int = 0) -> int:
        """How many bytes, as the command header says."""
        return int.from_bytes(self.memory.read(LIST + 32 * slot + 4, 4), "little")

    def restart(self) -> None:
        """As drivers do after an error."""
        self.port_write(CMD, FIS_RECEIVE)
        self.port_write(CMD, FIS_RECEIVE | START)
