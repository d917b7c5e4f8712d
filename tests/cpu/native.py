"""Run machine code on the processor that runs us, with its registers, flags and traps under control.

64-bit code runs as it is. 32-bit code runs in the segment that Linux keeps for 32-bit programs, 16-bit code in
segments of our own in the LDT (modify_ldt): both are entered and left by far jumps.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from vmonty.cpu import hosttraps

CODE = 0x30000000  # low, so that the stubs reach their data by absolute disp32
CODE_SIZE = 0x10000
STATE = CODE + CODE_SIZE  # gpr[16], flags, host rsp; the XSAVE area at +0x400
DATA = 0x31000000
DATA_SIZE = 0x3000

IS_AMD = "vendor_id\t: AuthenticAMD" in Path("/proc/cpuinfo").read_text()

# Linux, arch/x86/include/asm/segment.h: __USER32_CS, __USER_CS, __USER_DS.
USER32_CS, USER_CS, USER_DS = 0x23, 0x33, 0x2B
# Entries of the LDT: index, table bit, RPL 3.
LDT_CODE, LDT_DATA = 0 << 3 | 7, 1 << 3 | 7
SYS_MODIFY_LDT = 154

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
MAP_FIXED = 0x10


def map_fixed(address: int, size: int, executable: bool) -> memoryview:
    """Map anonymous memory at an address of our choice."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | (mmap.PROT_EXEC if executable else 0)
    got = _libc.mmap(address, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED, -1, 0)
    if got != address:
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes at {address:#x}")
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def set_ldt(index: int, base: int, limit: int, is_code: bool) -> None:
    """Put a 16-bit segment into the LDT: modify_ldt(2), struct user_desc."""
    contents = 2 if is_code else 0
    descriptor = ctypes.create_string_buffer(struct.pack("<4I", index, base, limit, contents << 1 | 1 << 6))
    if _libc.syscall(SYS_MODIFY_LDT, 1, descriptor, 16) != 0:
        raise OSError(ctypes.get_errno(), "modify_ldt: this kernel has no 16-bit segments")


@dataclass
class Outcome:
    """What an execution left behind."""

    registers: bytes
    flags: int
    xsave: bytes
    trap: tuple[int, int, int, int]
    vector: int


def _absolute(opcode: int, reg: int, address: int) -> bytes:
    """``mov`` between a 64-bit register and [disp32]."""
    return bytes([0x48 | (reg >> 3 << 2), opcode, 0x04 | (reg & 7) << 3, 0x25]) + struct.pack("<I", address)


def _load_selector(sreg: int, selector: int) -> bytes:
    """``mov ecx, selector; mov sreg, ecx``."""
    return b"\xb9" + struct.pack("<I", selector) + bytes([0x8E, 0xC1 | sreg << 3])


class Native:
    """One arena of native code; ``run`` executes bytes at CODE + 0x1000 and up."""

    def __init__(self, bits: int = 64) -> None:
        self.bits = bits
        self.code = map_fixed(CODE, CODE_SIZE + 0x1000, True)
        self.data = map_fixed(DATA, DATA_SIZE, False)
        self.code_base = CODE if bits == 16 else 0
        if bits == 16:
            set_ldt(0, CODE, CODE_SIZE - 1, True)
            set_ldt(1, DATA, DATA_SIZE - 1, False)
        data_selector = {16: LDT_DATA, 32: USER_DS, 64: 0}[bits]
        xsave = STATE + 0x400
        enter = bytes.fromhex("53 55 41 54 41 55 41 56 41 57") + _absolute(0x89, 4, STATE + 136)
        enter += bytes.fromhex("b8 07 00 00 00 31 d2") + b"\x48\x0f\xae\x2c\x25" + struct.pack("<I", xsave)
        if bits != 64:
            for sreg in (0, 3):  # es, ds
                enter += _load_selector(sreg, data_selector)
        enter += b"\xff\x34\x25" + struct.pack("<I", STATE + 128) + b"\x9d"
        if bits == 16:
            enter += _load_selector(2, data_selector)
        for reg in range(16):
            enter += _absolute(0x8B, reg, STATE + 8 * reg)
        enter += (b"\xff\x24\x25" if bits == 64 else b"\xff\x2c\x25") + struct.pack("<I", STATE + 144)
        self.code[0 : len(enter)] = enter
        leave = b"".join(_absolute(0x89, reg, STATE + 8 * reg) for reg in range(16))
        leave += _absolute(0x8B, 4, STATE + 136) + b"\x9c\x8f\x04\x25" + struct.pack("<I", STATE + 128) + b"\xfc"
        leave += _load_selector(2, USER_DS)
        leave += bytes.fromhex("b8 07 00 00 00 31 d2") + b"\x48\x0f\xae\x24\x25" + struct.pack("<I", xsave)
        leave += bytes.fromhex("db e3 c5 f8 77") + b"\x0f\xae\x14\x25" + struct.pack("<I", STATE + 152)
        leave += bytes.fromhex("41 5f 41 5e 41 5d 41 5c 5d 5b c3")
        self.leave = CODE + 0x800
        self.code[0x800 : 0x800 + len(leave)] = leave
        struct.pack_into("<I", self.code, CODE_SIZE + 152, 0x1F80)
        self.traps = hosttraps.NativeTraps(CODE + 0x1000, CODE + CODE_SIZE, self.leave)
        self._enter = ctypes.CFUNCTYPE(None)(CODE)
        # xor ecx, ecx; xgetbv: what XSAVE and XRSTOR reach on this processor.
        got = self.run(CODE + 0x1000, bytes.fromhex("31c9 0f01d0"), bytes(128), 0, bytes(832)).registers
        self.xcr0 = int.from_bytes(got[0:4], "little") | int.from_bytes(got[16:20], "little") << 32

    def _way_back(self, after: int) -> bytes:
        """The jump to the leaving stub from the address behind the code."""
        if self.bits == 64:
            return b"\xe9" + struct.pack("<i", self.leave - (after + 5))
        return (b"\x66" if self.bits == 16 else b"") + b"\xea" + struct.pack("<IH", self.leave, USER_CS)

    def run(self, at: int, code: bytes, registers: bytes, flags: int, xsave: bytes) -> Outcome:
        """Execute ``code`` at the address ``at`` in the arena."""
        offset = at - CODE
        whole = code + self._way_back(at + len(code))
        self.code[offset : offset + len(whole)] = whole
        self.code[CODE_SIZE : CODE_SIZE + 136] = registers + struct.pack("<Q", flags | 0x202)
        if self.bits == 64:
            struct.pack_into("<Q", self.code, CODE_SIZE + 144, at)
        else:
            selector = LDT_CODE if self.bits == 16 else USER32_CS
            struct.pack_into("<IH", self.code, CODE_SIZE + 144, at - self.code_base, selector)
        self.code[CODE_SIZE + 0x400 : CODE_SIZE + 0x400 + 832] = xsave
        self.traps.prepare(self.code_base)
        self._enter()
        state = bytes(self.code[CODE_SIZE : CODE_SIZE + 136])
        image = bytes(self.code[CODE_SIZE + 0x400 : CODE_SIZE + 0x400 + 832])
        return Outcome(
            state[:128], struct.unpack_from("<Q", state, 128)[0], image,
            self.traps.trap, self.traps.vector,
        )  # fmt: skip
