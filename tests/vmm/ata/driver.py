"""The driver's side of an IDE controller: task files, data by ports, bus-master tables in guest RAM."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmonty.vmm.hw.ata import PiixIde
from vmonty.vmm.hw.ata.channel import (
    COMMAND,
    COUNT,
    DATA,
    DEVICE,
    FEATURE,
    LBA_HIGH,
    LBA_LOW,
    LBA_MID,
    ControlPort,
)  # fmt: skip
from vmonty.vmm.hw.ata.drive import STATUS_BUSY, STATUS_DATA, Drive
from vmonty.vmm.memory import GuestMemory

from ..pci_driver import PciHost

TABLE, BUFFER = 0x1000, 0x1_0000
PORTS = 0xC000


class Driver:
    """Talks to the primary channel of a controller in slot 1."""

    def __init__(self, drives: Sequence[Drive | None]) -> None:
        self.levels: list[int] = []
        self.memory = GuestMemory(1 << 20)
        self.host = PciHost()
        lines = [lambda level: self.levels.append(level), lambda level: None]
        self.controller = PiixIde(self.memory, [*drives, None, None], lines)
        self.host.bus.add(self.controller, 1)
        self.host.config(1, 0x20, 4, PORTS)
        self.host.config(1, 0x04, 2, 5)
        self.channel = self.controller.channels[0]
        self.control = ControlPort(self.channel)

    @property
    def interrupted(self) -> bool:
        return bool(self.levels) and self.levels[-1] == 1

    def status(self) -> int:
        return self.channel.read(COMMAND, 1)

    def command(
        self, code: int, lba: int = 0, count: int = 1, *, device: int = 0x40, wide: bool = False, feature: int = 0
    ) -> None:
        """Write a task file; *wide* gives each register twice."""
        write = self.channel.write
        write(DEVICE, 1, device if wide else device | lba >> 24 & 15)
        if wide:
            for register, value in (
                (FEATURE, feature >> 8), (COUNT, count >> 8), (LBA_LOW, lba >> 24), (LBA_MID, lba >> 32),
                (LBA_HIGH, lba >> 40),
            ):  # fmt: skip
                write(register, 1, value & 0xFF)
        for register, value in (
            (FEATURE, feature), (COUNT, count), (LBA_LOW, lba), (LBA_MID, lba >> 8), (LBA_HIGH, lba >> 16),
        ):  # fmt: skip
            write(register, 1, value & 0xFF)
        write(COMMAND, 1, code)

    def data_in(self, size: int, width: int = 2) -> bytes:
        """Read by ports, as far as the drive has data."""
        parts = []
        while sum(map(len, parts)) < size and self.control.read(0, 1) & STATUS_DATA:
            parts.append(self.channel.read(DATA, width).to_bytes(width, "little"))
        return b"".join(parts)

    def data_out(self, data: bytes, width: int = 2) -> None:
        for at in range(0, len(data), width):
            assert self.control.read(0, 1) & (STATUS_DATA | STATUS_BUSY) == STATUS_DATA
            self.channel.write(DATA, width, int.from_bytes(data[at : at + width], "little"))

    # ---- the bus master -----------------------------------------------------------------------------------------

    def table(self, *regions: tuple[int, int], end: bool = True) -> None:
        last = len(regions) - 1
        self.memory.write(
            TABLE,
            b"".join(
                struct.pack("<II", base, size & 0xFFFF | (0x8000_0000 if end and number == last else 0))
                for number, (base, size) in enumerate(regions)
            ),
        )
        self.host.ports.write(PORTS + 4, 4, TABLE)

    def start(self, *, to_memory: bool) -> None:
        self.host.ports.write(PORTS, 1, (8 if to_memory else 0) | 1)

    def master_status(self) -> int:
        return self.host.ports.read(PORTS + 2, 1)

    def stop(self) -> int:
        """As a driver does at an interrupt: stop, read the status, clear it."""
        self.host.ports.write(PORTS, 1, 0)
        status = self.master_status()
        self.host.ports.write(PORTS + 2, 1, 6)
        return status

    # ---- packets --------------------------------------------------------------------------------------------------

    def packet(self, cdb: bytes, limit: int = 0xFFFE) -> tuple[int, bytes]:
        """Send a packet and take all data by ports: (status, data)."""
        self.command(0xA0, limit << 8, 0, device=0)
        if self.control.read(0, 1) & STATUS_DATA:
            self.data_out(cdb.ljust(12, b"\0"))
        data = b""
        while self.control.read(0, 1) & STATUS_DATA:
            assert self.channel.read(COUNT, 1) & 3 == 2, "data to the host"
            size = self.channel.read(LBA_MID, 1) | self.channel.read(LBA_HIGH, 1) << 8
            assert 0 < size <= limit
            data += b"".join(self.channel.read(DATA, 2).to_bytes(2, "little") for _ in range(-(-size // 2)))[:size]
        assert self.channel.read(COUNT, 1) & 3 == 3, "the end of the command"
        return self.status(), data

    def sense(self) -> tuple[int, int, int]:
        _, data = self.packet(bytes((3, 0, 0, 0, 18)))
        return data[2], data[12], data[13]
