"""Configuration space: bytes, and which of their bits a guest may set or clear.

Source: PCI Local Bus Specification 3.0, "Configuration Space Organization".
"""

from __future__ import annotations

VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION_ID, CLASS_CODE = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
CACHE_LINE_SIZE, LATENCY_TIMER, HEADER_TYPE, BIST, BAR_0 = 0x0C, 0x0D, 0x0E, 0x0F, 0x10
SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID, ROM_ADDRESS = 0x2C, 0x2E, 0x30
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
HEADER_SIZE, CONFIG_SIZE, EXTENDED_SIZE = 0x40, 0x100, 0x1000

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 1, 2, 4, 1 << 10
# Parity error response and SERR# enable are kept, though no errors happen here.
COMMAND_KEPT = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4
HEADER_BRIDGE, HEADER_MULTIFUNCTION = 1, 0x80


class ConfigSpace:
    """*size* bytes. A guest's write sets the bits of ``writable``, and its ones clear those of ``clearable``.

    ``set`` and ``get`` are the device's side and know no masks. Little-endian; sizes in bytes.
    """

    def __init__(self, size: int = CONFIG_SIZE) -> None:
        self.size = size
        self.data = bytearray(size)
        self.writable = bytearray(size)
        self.clearable = bytearray(size)

    def set(self, offset: int, size: int, value: int, writable: int = 0, clearable: int = 0) -> None:
        """Define a register: its value, and the bits that a guest may write, or clear by writing ones."""
        end = offset + size
        self.data[offset:end] = value.to_bytes(size, "little")
        self.writable[offset:end] = writable.to_bytes(size, "little")
        self.clearable[offset:end] = clearable.to_bytes(size, "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Change a register's value; its masks stay."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """A register's value."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def guest_write(self, offset: int, size: int, value: int) -> None:
        """Apply a guest's write; bytes outside vanish."""
        for at in range(offset, min(offset + size, self.size)):
            byte, mask = value >> 8 * (at - offset) & 0xFF, self.writable[at]
            self.data[at] = (self.data[at] & ~mask | byte & mask) & ~(byte & self.clearable[at])

    def guest_read(self, offset: int, size: int) -> int:
        """What a guest reads; all ones outside."""
        if offset + size > self.size:
            return (1 << 8 * size) - 1
        return self.get(offset, size)
