"""0xA0000 to 0xFFFFF of a PC: RAM that the chipset shows or hides, and the firmware's ROM behind it.

```
0xFFFFF ┬ segment 0, 64 KiB    the last 128 KiB of the ROM show here
0xF0000 ┼ segments 1 to 12,    where RAM is not read
0xE0000 ┤ 16 KiB each
0xC0000 ┼
0xA0000 ┴ the screen's memory, RAM while the chipset opens it
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmonty.base.errors import UsageError
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vm
from vmonty.kvm.uapi.flags import KVM_MEM_READONLY
from vmonty.vmm.memory import FIRST_FREE_SLOT, HIGH_RAM_BASE, ISA_HOLE, ISA_HOLE_END, GuestMemory

BASE = 0xC_0000
SIZE = ISA_HOLE_END - BASE
SEGMENTS = ((0xF_0000, 0x1_0000), *((BASE + 0x4000 * number, 0x4000) for number in range(12)))
MOST_ALIASED = 128 << 10
SCREEN_SLOT, ROM_SLOT, FIRST_SEGMENT_SLOT = FIRST_FREE_SLOT, FIRST_FREE_SLOT + 1, FIRST_FREE_SLOT + 2
# Device memory has the slots from here on.
NEXT_FREE_SLOT = FIRST_SEGMENT_SLOT + len(SEGMENTS)


class _Attribute(NamedTuple):
    readable: bool = False
    writable: bool = False


class ShadowRam:
    """The memory of *vm* there, and *rom* below 4 GiB. At reset no RAM shows.

    Parts of a segment that a memory slot cannot show (it reads ROM and writes RAM) come here as accesses of a bus
    device at ``BASE``.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, rom: Ram | None = None) -> None:
        self._vm = vm
        self._memory = memory
        self._rom = rom
        self._screen_open = False
        # Told before RAM shows where the screen's memory is, and when it does no more.
        self.on_screen_memory: Callable[[bool], None] | None = None
        self._attributes = [_Attribute()] * len(SEGMENTS)
        self._shown: set[int] = set()
        if memory.low_end < ISA_HOLE_END:
            raise UsageError(f"memory of {memory.size >> 10} KiB: a PC has 1 MiB or more")
        if rom is not None:
            vm.set_user_memory_region(ROM_SLOT, HIGH_RAM_BASE - rom.size, rom, flags=KVM_MEM_READONLY)
            for segment in range(len(SEGMENTS)):
                self._show(segment)

    def set(self, segment: int, readable: bool, writable: bool) -> None:
        """What reads find in *segment*: RAM, or what lies behind it; and whether writes reach RAM."""
        wanted = _Attribute(readable, writable)
        if wanted != self._attributes[segment]:
            # A slot is not changed from read-only to writable: it goes, and comes again.
            self._hide(segment)
            self._attributes[segment] = wanted
            self._show(segment)

    def set_screen_memory_open(self, is_open: bool) -> None:
        """RAM at 0xA0000 in place of the screen's memory."""
        if is_open != self._screen_open:
            self._screen_open = is_open
            if is_open and self.on_screen_memory is not None:
                self.on_screen_memory(True)
            ram = self._memory.ram if is_open else None
            size = BASE - ISA_HOLE if is_open else 0
            self._vm.set_user_memory_region(SCREEN_SLOT, ISA_HOLE, ram, ISA_HOLE, size)
            if not is_open and self.on_screen_memory is not None:
                self.on_screen_memory(False)

    def _hide(self, segment: int) -> None:
        if segment in self._shown:
            self._shown.discard(segment)
            self._vm.set_user_memory_region(FIRST_SEGMENT_SLOT + segment, 0, None)

    def _show(self, segment: int) -> None:
        base, size = SEGMENTS[segment]
        attribute, slot = self._attributes[segment], FIRST_SEGMENT_SLOT + segment
        if attribute.readable:
            flags = 0 if attribute.writable else KVM_MEM_READONLY
            self._vm.set_user_memory_region(slot, base, self._memory.ram, base, size, flags)
            self._shown.add(segment)
        elif self._rom is not None and (offset := self._rom_offset(base)) is not None:
            self._vm.set_user_memory_region(slot, base, self._rom, offset, size, KVM_MEM_READONLY)
            self._shown.add(segment)

    def _rom_offset(self, address: int) -> int | None:
        """The place in the ROM that shows at *address*, None where it does not."""
        assert self._rom is not None
        aliased = min(self._rom.size, MOST_ALIASED)
        offset = self._rom.size - (ISA_HOLE_END - address)
        return offset if address >= ISA_HOLE_END - aliased else None

    # ---- what is no memory of a slot ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """All ones: neither RAM nor ROM is read here."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """RAM takes it where it is written without being read; a ROM, and RAM that is protected, do not."""
        segment = self._segment(BASE + offset)
        if self._attributes[segment].writable:
            self._memory.write(BASE + offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    @staticmethod
    def _segment(address: int) -> int:
        return 0 if address >= SEGMENTS[0][0] else 1 + (address - BASE) // SEGMENTS[1][1]
