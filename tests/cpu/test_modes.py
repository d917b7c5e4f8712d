"""Real and 32-bit protected mode: one program that goes from the reset vector to flat 32-bit code."""

from __future__ import annotations

import mmap
import struct

from vmonty.cpu import core

# At 0:7C00. Real mode: moves, push, pop, loop (sum of 10..1), call, rep stosb to ES=100h; then LGDT, CR0.PE, a far jump
# to flat 32-bit code: push, pop to memory, a loop (sum of 5..1), call with EBP frame and LEAVE, LEA, HLT.
PROGRAM = bytes.fromhex(
    "31c08ed88ed0bc0070b83412a30005505bb90a0031d201cae2fc89160205e8270089360405b800018ec0bf0000b05ab9"
    "1000fcf3aa450f0116687c0f20c00c010f22c0ea6e7c0800be4d00c3909090900000000000000000ffff0000009acf00"
    "ffff00000092cf001700507c000066b810008ed88ec08ed0bc00600000b8efbeadde508f0508050000b90500000031db"
    "01cb424975fa891d0c050000e810000000a3100500008d749b03893514050000f45589e58b4504c9c3"
)


def test_from_reset_to_protected_mode() -> None:
    """What each mode computed lies at 0:500. SDM, "Switching to Protected Mode"."""
    cpu = core.Cpu()
    low, rom = mmap.mmap(-1, 1 << 20), mmap.mmap(-1, 65536)
    cpu.add_region(0, low)
    cpu.add_region(0xFFFF0000, rom)
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea007c0000")
    low[0x7C00 : 0x7C00 + len(PROGRAM)] = PROGRAM
    assert cpu.run() == "halt"
    assert struct.unpack_from("<3H", low, 0x500) == (0x1234, 55, 77)
    return_address = struct.unpack_from("<I", low, 0x510)[0]
    assert struct.unpack_from("<4I", low, 0x508) == (0xDEADBEEF, 15, return_address, 78)
    assert 0x7C00 < return_address < 0x7C00 + len(PROGRAM)
    assert low[0x1000:0x1011] == b"\x5a" * 16 + b"\0"
    assert (cpu["rsp"], cpu["rdx"], cpu["rbp"]) == (0x6000, 60, 1)
