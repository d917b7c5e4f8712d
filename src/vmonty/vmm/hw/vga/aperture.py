"""The part of the window at 0xA0000 that is plain memory in the mode that is set, as a memory slot: no access exits.

Three uses of the window are plain: DISPI's banks and 256 colours in chain-4, which are video memory as it lies, and
text, whose characters and attributes lie in two planes. Of text the slot has a copy, one byte behind the other; what
is written there is put into its planes when the mode changes, and before somebody looks. What reads of a slot do not do
is fill the latches, which none of these modes uses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from vmonty.base.ram import Ram
from vmonty.vmm.hw.vga import registers as vga
from vmonty.vmm.hw.vga.registers import VgaRegisters

WINDOW, WINDOW_SIZE = 0xA_0000, 0x2_0000
PLANE_SIZE = 0x1_0000
# Of GC's memory map field: (offset, size) of where in the window memory answers.
MAPS = ((0, 0x2_0000), (0, 0x1_0000), (0x1_0000, 0x8000), (0x1_8000, 0x8000))
MOST_TEXT = 0x8000
# A mode is set by a dozen writes, most of which name a plain window for a moment: only what is used gets a slot.
WORTH_A_SLOT = 64


class Plain(NamedTuple):
    """*size* bytes from *offset* of the window on, which are video memory from *start* on, or text."""

    offset: int
    size: int
    start: int = 0
    text: bool = False


def plain(registers: VgaRegisters, bank: int | None, memory_size: int) -> Plain | None:
    """Which part of the window is plain memory now, if any, as VGA's registers or DISPI's *bank* have it."""
    if bank is not None:
        return Plain(0, PLANE_SIZE, bank * PLANE_SIZE % memory_size)
    sequencer, graphics = registers.sequencer, registers.graphics
    offset, size = MAPS[graphics[vga.MISCELLANEOUS] >> 2 & 3]
    if sequencer[vga.MEMORY_MODE] & vga.MEMORY_CHAIN_4:
        return Plain(offset, size) if sequencer[vga.MAP_MASK] == 0xF else None
    if (
        size > MOST_TEXT
        or sequencer[vga.MAP_MASK] != 3
        or sequencer[vga.MEMORY_MODE] & vga.MEMORY_NO_ODD_EVEN
        or graphics[vga.MODE] & (vga.MODE_WRITE | vga.MODE_READ_COMPARE | vga.MODE_ODD_EVEN) != vga.MODE_ODD_EVEN
        or graphics[vga.READ_MAP] & 2
        or graphics[vga.ENABLE_SET_RESET] & 3
        or graphics[vga.DATA_ROTATE]
        or graphics[vga.BIT_MASK] != 0xFF
    ):
        return None
    return Plain(offset, size, text=True)


class Aperture:
    """The slot. *show* places part of a Ram, from a start on with a size, at an address, or nowhere (None).

    Any thread may call any method.
    """

    def __init__(self, registers: VgaRegisters, memory: Ram, show: Callable[[Ram, int | None, int, int], None]) -> None:
        self._registers = registers
        self._memory = memory
        self._show = show
        self._text = Ram(MOST_TEXT, "vmonty-vga-text")
        self._spread = b""  # the text as it lies in the planes
        self._shown: Plain | None = None
        self._uses = 0
        self._covered = False
        # Not where DISPI has a linear frame buffer, or planes of its own: it may leave VGA's registers in text, and
        # what lay there would come over the picture.
        self.allowed = True
        self._lock = threading.Lock()

    def place(self, offset: int) -> tuple[Ram, int] | None:
        """The memory that the slot has for *offset* of the window."""
        shown = self._shown
        if shown is None or not 0 <= offset - shown.offset < shown.size:
            return None
        return (self._text if shown.text else self._memory), shown.start + offset - shown.offset

    def used(self, bank: int | None) -> None:
        """An access to the window was an exit."""
        self._uses += 1
        if self._uses < WORTH_A_SLOT or self._shown is not None or self._covered:
            return
        with self._lock:
            self._uses = 0
            wanted = self._wanted(bank)
            if wanted is None or self._covered or self._shown is not None:
                return
            if wanted.text:
                self._gather(wanted.size)
            self._shown = wanted
            ram = self._text if wanted.text else self._memory
            self._show(ram, WINDOW + wanted.offset, wanted.start, wanted.size)

    def changed(self, bank: int | None) -> None:
        """A register that addresses the window has a new value."""
        self._uses = 0
        with self._lock:
            if self._shown is not None and self._shown != self._wanted(bank):
                self._hide()

    def cover(self, covered: bool) -> None:
        """The chipset puts memory of its own there, or takes it away again."""
        with self._lock:
            self._covered = covered
            if covered and self._shown is not None:
                self._hide()

    def look(self) -> None:
        """Video memory is going to be read: let it have what was written."""
        with self._lock:
            if self._shown is not None and self._shown.text:
                self._scatter(self._shown.size)

    def _wanted(self, bank: int | None) -> Plain | None:
        return plain(self._registers, bank, self._memory.size) if self.allowed else None

    def _hide(self) -> None:
        # First, so that nothing more is written where nobody looks any more.
        self._show(self._memory, None, 0, 0)
        shown, self._shown = self._shown, None
        if shown is not None and shown.text:
            self._scatter(shown.size)

    # Of an even address n the byte is in plane 0, of the next one in plane 1, both at n: 4n and 4n + 1 in memory.

    def _gather(self, size: int) -> None:
        planes = self._memory.view(0, 4 * size)
        text = self._text.view(0, size)
        text[0::2], text[1::2] = planes[0::8], planes[1::8]
        self._spread = bytes(text)

    def _scatter(self, size: int) -> None:
        text = self._text.read(0, size)
        if text != self._spread:
            planes, cells = self._memory.view(0, 4 * size), memoryview(text)
            planes[0::8], planes[1::8] = cells[0::2], cells[1::2]
            self._spread = text
