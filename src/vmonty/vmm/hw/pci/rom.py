"""A function's expansion ROM with contents. Source: PCI Local Bus Specification 3.0, "PCI Expansion ROMs"."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.vmm.hw.pci import config as cfg
from vmonty.vmm.hw.pci.device import PciDevice

HEADER, SIGNATURE = 26, b"\x55\xaa"
CHECKSUM_AT, STRUCTURE_AT = 6, 0x18  # which byte balances the sum; where the data structure's offset is
STRUCTURE = b"PCIR"
BLOCK = 512


class RomImage:
    """The ROM for accesses that no memory slot serves."""

    def __init__(self, contents: Ram) -> None:
        self._contents = contents

    def read(self, offset: int, size: int) -> int:
        """Its bytes."""
        return int.from_bytes(self._contents.read(offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """It is read-only."""


def add_rom_image(function: PciDevice, data: bytes, show: Callable[[Ram, int | None], None]) -> None:
    """Give *function* the ROM *data*. *show* lets the guest read it at an address, None for nowhere.

    Firmware reads all of it: as memory, not byte for byte.
    """
    contents = Ram(max(PAGE_SIZE, 1 << (len(data) - 1).bit_length()), f"vmonty-{function.name}-rom")
    contents.fill(0, contents.size, 0xFF)
    contents.write(0, for_function(data, function))
    function.add_rom(RomImage(contents), contents.size, lambda base: show(contents, base))


def for_function(data: bytes, function: PciDevice) -> bytes:
    """The ROM with the identity of *function* in its first image: firmware runs no ROM that names another device."""
    if len(data) < HEADER or not data.startswith(SIGNATURE):
        return data
    at = int.from_bytes(data[STRUCTURE_AT : STRUCTURE_AT + 2], "little")
    if data[at : at + 4] != STRUCTURE or len(data) < at + 8:
        return data
    made = bytearray(data)
    before = sum(made[at + 4 : at + 8])
    struct.pack_into("<HH", made, at + 4, function.config.get(cfg.VENDOR_ID, 2), function.config.get(cfg.DEVICE_ID, 2))
    made[CHECKSUM_AT] = (made[CHECKSUM_AT] + before - sum(made[at + 4 : at + 8])) & 0xFF
    return bytes(made)
