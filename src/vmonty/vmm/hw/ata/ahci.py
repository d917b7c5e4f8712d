"""82801I (ICH9) SATA in AHCI mode: the function, and the registers that all of its ports share.

Source: AHCI 1.3.1, "HBA Memory Registers"; Intel ICH9 data sheet, "SATA Controller Registers (D31:F2)".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vmonty.vmm.hw.ata.ahci_port import SLOTS, Loop, Port, idle
from vmonty.vmm.hw.ata.drive import Drive
from vmonty.vmm.hw.ata.piix_ide import Memory
from vmonty.vmm.hw.pci import PciDevice

DEVICE_ICH9_AHCI = 0x2922
SATA_AHCI = 0x01_0601
PORTS = 6
MSI, MAP, MAP_AHCI = 0x80, 0x90, 0x40
REGISTERS_BAR, REGISTERS_SIZE = 5, 4096

CAPABILITIES, CONTROL, INTERRUPTS, IMPLEMENTED, VERSION = 0x00, 0x04, 0x08, 0x0C, 0x10
FIRST_PORT, PORT_SIZE = 0x100, 0x80
CAP_QUEUING, CAP_64_BITS, CAP_AHCI_ONLY, CAP_LIST_OVERRIDE, CAP_FIRST_GENERATION = (
    1 << 30,
    1 << 31,
    1 << 18,
    1 << 24,
    1 << 20,
)
CONTROL_RESET, CONTROL_INTERRUPT, CONTROL_AHCI = 1 << 0, 1 << 1, 1 << 31
VERSION_1_3 = 0x0001_0300


class Ahci(PciDevice):
    """*drives*, port by port; *loops* carry the commands of each out. Both have one entry for each port."""

    def __init__(self, memory: Memory, drives: Sequence[Drive | None], loops: Sequence[Loop]) -> None:
        super().__init__(
            "ahci", vendor_id=0x8086, device_id=DEVICE_ICH9_AHCI, class_code=SATA_AHCI, revision=2,
            subsystem_vendor_id=0x1AF4, subsystem_id=0x1100, interrupt_pin=1,
        )  # fmt: skip
        self.config.set(MAP, 1, MAP_AHCI)
        self.lock = threading.RLock()
        self._control = CONTROL_AHCI
        self._pending = self._told = 0  # ports with something to tell; those of which a message has told
        self.ports = [
            Port(drive, memory, loop, self.lock, lambda: self.bus_master, self._changed)
            for drive, loop in zip(drives, loops, strict=True)
        ]
        self.add_msi(MSI)
        self.add_bar(REGISTERS_BAR, _Registers(self), REGISTERS_SIZE)

    def exclusively(self, port: int) -> Callable[[Callable[[], None]], None]:
        """A way to call functions while the drive at *port* carries no command out."""
        return self.ports[port].run_idle

    def config_written(self, offset: int, size: int) -> None:
        """MSI may have been switched: what waits is told the new way."""
        with self.lock:
            self._changed()

    # ---- registers, with the lock held ------------------------------------------------------------------------------

    def read(self, register: int) -> int:
        """A register, 32 bits."""
        if register >= FIRST_PORT:
            port, offset = divmod(register - FIRST_PORT, PORT_SIZE)
            return self.ports[port].read(offset) if port < len(self.ports) else 0
        match register:
            case 0x00:
                return (
                    CAP_64_BITS | CAP_QUEUING | CAP_LIST_OVERRIDE | CAP_FIRST_GENERATION | CAP_AHCI_ONLY
                    | SLOTS - 1 << 8 | len(self.ports) - 1
                )  # fmt: skip
            case 0x04:
                if self._control & CONTROL_RESET and idle(self.ports):
                    self._control &= ~CONTROL_RESET
                return self._control
            case 0x08:
                return self._pending
            case 0x0C:
                return (1 << len(self.ports)) - 1
            case 0x10:
                return VERSION_1_3
        return 0

    def write(self, register: int, value: int) -> None:
        """A register, 32 bits."""
        if register >= FIRST_PORT:
            port, offset = divmod(register - FIRST_PORT, PORT_SIZE)
            if port < len(self.ports):
                self.ports[port].write(offset, value)
        elif register == CONTROL:
            self._control = CONTROL_AHCI | value & CONTROL_INTERRUPT
            if value & CONTROL_RESET:
                self._control = CONTROL_AHCI | CONTROL_RESET
                self._pending = 0
                for each in self.ports:
                    each.reset()
            self._changed()
        elif register == INTERRUPTS:
            self._pending &= ~value
            # What is still there, or comes back, is told anew.
            self._told = 0
            self._changed()

    def _changed(self) -> None:
        """What ports want to tell is kept until the driver clears it; while they want it, it comes back."""
        for number, port in enumerate(self.ports):
            if port.pending:
                self._pending |= 1 << number
        wanted = self._pending if self._control & CONTROL_INTERRUPT else 0
        if self.msi is None or not self.bus_master:
            self._told = 0  # a message that was not sent told nobody
            self.set_irq(int(bool(wanted) and self.msi is None))
            return
        self.set_irq(0)
        fresh, self._told = wanted & ~self._told, wanted
        if fresh:
            self.send_msi()


class _Registers:
    """The registers as memory: 32 bits at a time, or two of them."""

    def __init__(self, controller: Ahci) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        controller = self._controller
        with controller.lock:
            value = controller.read(offset & ~3)
            if size == 8:
                value |= controller.read((offset & ~3) + 4) << 32
        return value >> 8 * (offset & 3)

    def write(self, offset: int, size: int, value: int) -> None:
        controller = self._controller
        if size < 4 or offset & 3:
            return  # a driver that does this cannot mean it
        with controller.lock:
            controller.write(offset, value & 0xFFFF_FFFF)
            if size == 8:
                controller.write(offset + 4, value >> 32 & 0xFFFF_FFFF)
