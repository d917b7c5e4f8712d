"""The display adapter as a PCI function: VGA's ports and window, and the linear frame buffer.

BAR 0 is video memory, BAR 2 has the registers of VGA (from 0x400) and DISPI (from 0x500). Source: QEMU's documentation,
"QEMU Standard VGA"; it is the card that Linux's bochs driver and Debian's vgabios-stdvga know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmonty.base.ram import Ram
from vmonty.vmm.bus import Bus
from vmonty.vmm.hw.pci.device import PciDevice
from vmonty.vmm.hw.pci.rom import add_rom_image
from vmonty.vmm.hw.vga import scanout
from vmonty.vmm.hw.vga.aperture import PLANE_SIZE, Aperture
from vmonty.vmm.hw.vga.dispi import BANK, BITS, EIGHT_BIT_DAC, ENABLE, LINEAR, Dispi
from vmonty.vmm.hw.vga.planes import PlaneWindow
from vmonty.vmm.hw.vga.registers import VgaRegisters

VENDOR_ID, DEVICE_ID, CLASS_CODE, REVISION = 0x1234, 0x1111, 0x030000, 2
SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID = 0x1AF4, 0x1100
MEMORY_SIZE = 16 << 20
REGISTERS_SIZE = 4096
# Of BAR 2.
VGA_REGISTERS, DISPI_REGISTERS, EXTENDED_REGISTERS = 0x400, 0x500, 0x600
_FIRST_OF_BAR = 0x3C0 - 0x3B0


class MapMemory(Protocol):
    """Lets a guest reach *ram* at an address, to read or also to write; None for nowhere."""

    def __call__(self, ram: Ram, address: int | None, *, writable: bool = True) -> None: ...


class VgaCard(PciDevice):
    """The card. The board places ``registers``, ``window`` and ``dispi``; *map_memory* places BAR 0's memory.

    *show_window* places a part of a Ram over the window: see ``Aperture``.
    """

    def __init__(
        self, map_memory: MapMemory, show_window: Callable[[Ram, int | None, int, int], None], rom: bytes = b""
    ) -> None:
        super().__init__(
            "vga", vendor_id=VENDOR_ID, device_id=DEVICE_ID, class_code=CLASS_CODE, revision=REVISION,
            subsystem_vendor_id=SUBSYSTEM_VENDOR_ID, subsystem_id=SUBSYSTEM_ID,
        )  # fmt: skip
        self.memory = Ram(MEMORY_SIZE, "vmonty-vga")
        self.registers = VgaRegisters(self._addressing_changed)
        self.dispi = Dispi(MEMORY_SIZE, self._mode_changed)
        self.aperture = Aperture(self.registers, self.memory, show_window)
        self.window = PlaneWindow(self.registers, self.memory, self.aperture)
        self.add_bar(
            0, _Memory(self.memory), MEMORY_SIZE, prefetchable=True, moved=lambda base: map_memory(self.memory, base)
        )
        area = Bus("vga.registers", REGISTERS_SIZE)
        area.place(VGA_REGISTERS, 0x20, _Ports(self.registers), "vga")
        area.place(DISPI_REGISTERS, 0x20, _DispiWords(self.dispi), "dispi")
        area.place(EXTENDED_REGISTERS, 8, _Extended(), "extended")
        self.add_bar(2, area, REGISTERS_SIZE)
        if rom:
            add_rom_image(self, rom, lambda contents, base: map_memory(contents, base, writable=False))

    def mode(self) -> scanout.Mode | None:
        """What is on the screen, which video memory has from now on; None when it is dark."""
        self.aperture.look()
        return scanout.describe(self.registers, self.dispi)

    def _addressing_changed(self) -> None:
        self.aperture.changed(self.window.bank)

    def _mode_changed(self, clear: bool) -> None:
        dispi = self.dispi
        self.registers.dac_8_bits = bool(dispi[ENABLE] & EIGHT_BIT_DAC)
        # Sixteen colours lie in planes, whose bytes the window mixes; more colours are memory as it lies.
        planar, linear = dispi[BITS] == 4, bool(dispi[ENABLE] & LINEAR)
        self.aperture.allowed = not (dispi.enabled and (planar or linear))
        self.window.first = dispi[BANK] * PLANE_SIZE if dispi.enabled and planar else 0
        self.window.bank = dispi[BANK] if dispi.enabled and not (planar or linear) else None
        self._addressing_changed()
        if clear:
            self.memory.fill(0, self.memory.size)


class _Memory:
    """Video memory for an access that no memory slot serves."""

    def __init__(self, memory: Ram) -> None:
        self._memory = memory

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._memory.read(offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self._memory.write(offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))


class _Ports:
    """VGA's registers from port 0x3C0 on."""

    def __init__(self, registers: VgaRegisters) -> None:
        self._registers = registers

    def read(self, offset: int, size: int) -> int:
        return self._registers.read(_FIRST_OF_BAR + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._registers.write(_FIRST_OF_BAR + offset, size, value)


class _DispiWords:
    """DISPI's registers, side by side."""

    def __init__(self, dispi: Dispi) -> None:
        self._dispi = dispi

    def read(self, offset: int, size: int) -> int:
        return self._dispi.get(offset >> 1) if size == 2 and not offset & 1 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 2 and not offset & 1:
            self._dispi.set(offset >> 1, value)


class _Extended:
    """QEMU's two registers: how many bytes they are, and the frame buffer's byte order, which is fixed here."""

    LITTLE_ENDIAN = 0x1E1E1E1E

    def read(self, offset: int, size: int) -> int:
        return 8 if offset == 0 else self.LITTLE_ENDIAN

    def write(self, offset: int, size: int, value: int) -> None:
        pass  # the byte order stays
