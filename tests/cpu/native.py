"""Run machine code on the processor that runs us, with its registers, flags and traps under control."""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass

from vmonty.cpu import hosttraps

CODE = 0x30000000  # low, so that the stubs reach their data by absolute disp32
CODE_SIZE = 0x10000
STATE = CODE + CODE_SIZE  # gpr[16], flags, host rsp; the XSAVE area at +0x400
DATA = 0x31000000
DATA_SIZE = 0x3000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
MAP_FIXED = 0x10


def map_fixed(address: int, size: int, executable: bool) -> ctypes.Array[ctypes.c_char]:
    """Map anonymous memory at an address of our choice."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | (mmap.PROT_EXEC if executable else 0)
    got = _libc.mmap(address, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED, -1, 0)
    if got != address:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes at {address:#x}")
    return (ctypes.c_char * size).from_address(address)


@dataclass
class Outcome:
    """What an execution left behind."""

    registers: bytes
    flags: int
    xsave: bytes
    trap: tuple[int, int, int, int]


def _absolute(opcode: int, reg: int, address: int) -> bytes:
    """``mov`` between a 64-bit register and [disp32]."""
    return bytes([0x48 | (reg >> 3 << 2), opcode, 0x04 | (reg & 7) << 3, 0x25]) + struct.pack("<I", address)


class Native:
    """One arena of native code; ``run`` executes bytes at CODE + 0x1000 and up."""

    def __init__(self) -> None:
        self.code = map_fixed(CODE, CODE_SIZE + 0x1000, True)
        self.data = map_fixed(DATA, DATA_SIZE, False)
        xsave = STATE + 0x400
        enter = bytes.fromhex("53 55 41 54 41 55 41 56 41 57") + _absolute(0x89, 4, STATE + 136)
        enter += bytes.fromhex("b8 07 00 00 00 31 d2") + b"\x48\x0f\xae\x2c\x25" + struct.pack("<I", xsave)
        enter += b"\xff\x34\x25" + struct.pack("<I", STATE + 128) + b"\x9d"
        for reg in range(16):
            enter += _absolute(0x8B, reg, STATE + 8 * reg)
        enter += b"\xff\x24\x25" + struct.pack("<I", STATE + 144)
        self.code[0 : len(enter)] = enter
        leave = b"".join(_absolute(0x89, reg, STATE + 8 * reg) for reg in range(16))
        leave += _absolute(0x8B, 4, STATE + 136) + b"\x9c\x8f\x04\x25" + struct.pack("<I", STATE + 128) + b"\xfc"
        leave += bytes.fromhex("b8 07 00 00 00 31 d2") + b"\x48\x0f\xae\x24\x25" + struct.pack("<I", xsave)
        leave += bytes.fromhex("db e3 c5 f8 77") + b"\x0f\xae\x14\x25" + struct.pack("<I", STATE + 152)
        leave += bytes.fromhex("41 5f 41 5e 41 5d 41 5c 5d 5b c3")
        self.leave = CODE + 0x800
        self.code[0x800 : 0x800 + len(leave)] = leave
        struct.pack_into("<I", self.code, CODE_SIZE + 152, 0x1F80)
        self.traps = hosttraps.NativeTraps(CODE + 0x1000, CODE + CODE_SIZE, self.leave)
        self._enter = ctypes.CFUNCTYPE(None)(CODE)

    def run(self, at: int, code: bytes, registers: bytes, flags: int, xsave: bytes) -> Outcome:
        """Execute ``code`` at the address ``at`` in the arena."""
        offset = at - CODE
        back = struct.pack("<i", self.leave - (at + len(code) + 5))
        self.code[offset : offset + len(code) + 5] = code + b"\xe9" + back
        self.code[CODE_SIZE : CODE_SIZE + 136] = registers + struct.pack("<Q", flags | 0x202)
        struct.pack_into("<Q", self.code, CODE_SIZE + 144, at)
        self.code[CODE_SIZE + 0x400 : CODE_SIZE + 0x400 + 832] = xsave
        self.traps.prepare()
        self._enter()
        raw = self.code.raw
        state = raw[CODE_SIZE : CODE_SIZE + 136]
        return Outcome(
            state[:128], struct.unpack_from("<Q", state, 128)[0], raw[CODE_SIZE + 0x400 : CODE_SIZE + 0x400 + 832],
            self.traps.trap,
        )  # fmt: skip
