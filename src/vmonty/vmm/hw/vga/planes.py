"""The window at 0xA0000: 128 KiB through which a processor reaches the four planes of 64 KiB each.

Byte *n* of plane *p* lies at 4n + p of video memory, so that a 256-colour screen is linear there.
Source: IBM Personal System/2 Hardware Interface Technical Reference, "Video Subsystem", "Programming
Considerations": write modes 0 to 3, read modes 0 and 1, odd/even and chain-4 addressing.
"""

from __future__ import annotations

from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga import registers as vga
from vmonty.vmm.hw.vga.aperture import MAPS, PLANE_SIZE, Aperture
from vmonty.vmm.hw.vga.registers import VgaRegisters

# Four mask bits as four bytes.
_LANES = tuple(sum(0xFF << 8 * plane for plane in range(4) if mask >> plane & 1) for mask in range(16))
_ALL = 0xFFFF_FFFF
_EACH = 0x0101_0101


class PlaneWindow:
    """The window, as a bus device whose offset 0 is address 0xA0000. *bank* is DISPI's, in units of 64 KiB.

    What *aperture* shows as a memory slot comes here only from an access that was on its way already.
    """

    def __init__(self, registers: VgaRegisters, memory: Ram, aperture: Aperture) -> None:
        self._registers = registers
        self._memory = memory
        self._aperture = aperture
        self._latch = 0
        self.bank: int | None = None  # when set, the first 64 KiB are this part of video memory
        self.first = 0  # of each plane, the byte where the window begins: DISPI's bank of sixteen colours

    def read(self, offset: int, size: int) -> int:
        """A wide access is one of each byte in a row."""
        self._aperture.used(self.bank)
        return sum(self._read(offset + at) << 8 * at for at in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """As read."""
        self._aperture.used(self.bank)
        for at in range(size):
            self._write(offset + at, value >> 8 * at & 0xFF)

    def _place(self, offset: int) -> int | None:
        """*offset* in the part of the window that the map field chose."""
        base, size = MAPS[self._registers.graphics[vga.MISCELLANEOUS] >> 2 & 3]
        return offset - base if 0 <= offset - base < size else None

    def _banked(self, offset: int) -> int | None:
        bank = self.bank  # once: another vCPU may end the mode meanwhile
        if bank is None or offset >= PLANE_SIZE:
            return None
        return (bank * PLANE_SIZE + offset) % self._memory.size

    def _in_plane(self, at: int) -> int:
        """Where the planes' bytes lie of which *at* of the window is one."""
        return 4 * (self.first + at % PLANE_SIZE) % self._memory.size

    def _read(self, offset: int) -> int:
        if (direct := self._aperture.place(offset)) is not None:
            return direct[0].read_u8(direct[1])
        if (linear := self._banked(offset)) is not None:
            return self._memory.read_u8(linear)
        if (at := self._place(offset)) is None:
            return 0xFF
        registers = self._registers
        graphics = registers.graphics
        if registers.sequencer[vga.MEMORY_MODE] & vga.MEMORY_CHAIN_4:
            at %= 4 * PLANE_SIZE
            self._latch = self._memory.read_u32(at & ~3)
            return self._memory.read_u8(at)
        plane = graphics[vga.READ_MAP]
        if graphics[vga.MODE] & vga.MODE_ODD_EVEN:
            plane, at = plane & 2 | at & 1, at & ~1
        self._latch = self._memory.read_u32(self._in_plane(at))
        if not graphics[vga.MODE] & vga.MODE_READ_COMPARE:
            return self._latch >> 8 * plane & 0xFF
        wrong = (self._latch ^ _LANES[graphics[vga.COLOUR_COMPARE]]) & _LANES[graphics[vga.DONT_CARE]]
        wrong |= wrong >> 16
        return ~(wrong | wrong >> 8) & 0xFF

    def _write(self, offset: int, value: int) -> None:
        if (direct := self._aperture.place(offset)) is not None:
            direct[0].write_u8(direct[1], value)
            return
        if (linear := self._banked(offset)) is not None:
            self._memory.write_u8(linear, value)
            return
        if (at := self._place(offset)) is None:
            return
        registers = self._registers
        mask = registers.sequencer[vga.MAP_MASK]
        if registers.sequencer[vga.MEMORY_MODE] & vga.MEMORY_CHAIN_4:
            if mask >> (at & 3) & 1:
                self._memory.write_u8(at % (4 * PLANE_SIZE), value)
            return
        if not registers.sequencer[vga.MEMORY_MODE] & vga.MEMORY_NO_ODD_EVEN:
            mask, at = mask & (0xA if at & 1 else 0x5), at & ~1
        at = self._in_plane(at)
        lanes = _LANES[mask]
        self._memory.write_u32(at, self._mixed(value) & lanes | self._memory.read_u32(at) & ~lanes)

    def _mixed(self, value: int) -> int:
        """What the write mode makes of a byte: one for each plane."""
        graphics = self._registers.graphics
        mode, bits = graphics[vga.MODE] & 3, graphics[vga.BIT_MASK]
        if mode == 1:
            return self._latch
        rotation = graphics[vga.DATA_ROTATE] & 7
        turned = (value >> rotation | value << 8 - rotation) & 0xFF
        if mode == 0:
            set_reset = _LANES[graphics[vga.ENABLE_SET_RESET]]
            data = turned * _EACH & ~set_reset | _LANES[graphics[vga.SET_RESET]] & set_reset
        elif mode == 2:
            data = _LANES[value & 15]
        else:
            data, bits = _LANES[graphics[vga.SET_RESET]], bits & turned
        match graphics[vga.DATA_ROTATE] >> 3:
            case 1:
                data &= self._latch
            case 2:
                data |= self._latch
            case 3:
                data ^= self._latch
        chosen = bits * _EACH
        return data & chosen | self._latch & ~chosen & _ALL
