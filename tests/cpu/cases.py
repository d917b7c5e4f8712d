"""Random instruction sequences made from the table, for 64-, 32- and 16-bit code, with addresses that fall into DATA.

Which flags are undefined after an instruction is in its row (``u:``; SDM, "Flags Affected" of each instruction).
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from tests.cpu.native import DATA, DATA_SIZE, IS_AMD

from vmonty.cpu import decode, isa

# Classes of which every row is generated.
_CLASSES = """
copy lea nop btm moffs xlat push pop pushi pushm popm leave string emms df maskmov gather masked ud jcc jmp call jmpi
calli ret loop pushf popf
"""
TESTED_CLASSES = frozenset(_CLASSES.split())
# Of the system's classes those that ordinary programs may execute and that show nothing of the system.
_SYSTEM = """
DAA DAS AAA AAS AAM AAD SALC PUSHA POPA BOUND ENTER ARPL INTO FXSAVE FXRSTOR XSAVE XRSTOR XSAVEC FLDENV FNSTENV FRSTOR
FNSAVE
"""
TESTED_SYSTEM = frozenset(_SYSTEM.split())
# What cannot be compared, and why.
NOT_COMPARABLE = {
    "RDRAND": "chance", "RDSEED": "chance", "XSAVEOPT": "may leave out what it wrote before",
    "RSM": "#UD outside SMM on both, but an exit under some hypervisors", "UD0": "takes a modrm byte or not, by vendor",
}  # fmt: skip
FLAG_POSITIONS = {1: 0x1, 2: 0x4, 4: 0x10, 8: 0x40, 16: 0x80, 32: 0x800}
ARITHMETIC = 0x8D5
EDGES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF,
         0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x0123456789ABCDEF]  # fmt: skip
EDGE_FLOATS = [
    0.0, -0.0, 1.0, -1.0, 1.5, 3.14159, 1e30, -1e-30, float("inf"), float("-inf"), float("nan"), 2.0**31, 2.0**63,
]  # fmt: skip
DOUBLES = [struct.pack("<d", value) for value in EDGE_FLOATS]
SINGLES = [struct.pack("<f", value) for value in EDGE_FLOATS]
QUADS = [struct.pack("<Q", value) for value in EDGES]
# Base and index of 16-bit addressing forms. SDM, "16-Bit Addressing Forms with the ModR/M Byte".
FORMS_16 = ((3, 6), (3, 7), (5, 6), (5, 7), (6, -1), (7, -1), (5, -1), (3, -1))
M64, M32 = (1 << 64) - 1, (1 << 32) - 1


def flag_bits(letters: int) -> int:
    """EFLAGS bits of the isa's flag letters."""
    return sum(bit for letter, bit in FLAG_POSITIONS.items() if letters & letter)


def exists(row: isa.Row, bits: int) -> bool:
    """Is there such an instruction in this mode?"""
    return ("i64" if bits == 64 else "o64") not in row.attributes


def why_not(row: isa.Row, host_flags: frozenset[str]) -> str:
    """Why a row cannot be executed here as a program's instruction and compared; nothing when it can."""
    if row.name in NOT_COMPARABLE:
        return NOT_COMPARABLE[row.name]
    if row.cls not in TESTED_CLASSES and row.name not in TESTED_SYSTEM:
        return "a system instruction: it shows or needs what user space has not"
    if row.feature == "sha-ni" and "sha_ni" not in host_flags:
        return "the processor underneath has no SHA"
    return ""


@dataclass
class Case:
    """A sequence with its initial state."""

    bits: int = 64
    code: bytes = b""
    rows: list[isa.Row] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)
    flags: int = 0
    xsave: bytes = b""
    undefined: int = 0
    unsure: int = 0  # flags that are undefined somewhere before the last instruction
    patches: list[tuple[int, bytes]] = field(default_factory=list)  # address in DATA, bytes to be there
    opaque: list[tuple[int, int]] = field(default_factory=list)  # address in DATA, bytes that show host addresses


# Where the two vendors' processors differ ours does as Intel's. Not made on one of AMD's: registers for PREFETCHW (#UD
# there); a wide VPEXTRD or VPINSRD outside 64-bit mode (#UD); unaligned operands of SHA (no fault); repetitions of no
# times with 32-bit addresses in 64-bit mode, which leave the upper halves of the registers alone there.
PREFETCH, NARROW, UNALIGNED = (
    (frozenset(("PREFETCH", "PREFETCHW", "PREFETCHWT1")), frozenset(("VPEXTRD", "VPINSRD")), "sha-ni")
    if IS_AMD
    else (frozenset[str](), frozenset[str](), "")
)
FEWEST = 1 if IS_AMD else 0


class Refused(Exception):
    """This row cannot follow those before it, or not with these operands."""


@dataclass
class _Draft:
    """What one instruction adds to a case."""

    registers: list[int]
    fixed: set[int]
    image: bytearray
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    opaque: list[tuple[int, int]] = field(default_factory=list)

    def fix(self, number: int, value: int, mask: int) -> None:
        """Give a register the value that an address needs."""
        if number in self.fixed:
            raise Refused
        self.registers[number] = self.registers[number] & ~mask | value & mask
        self.fixed.add(number)


class Maker:
    """Encodes rows with random operands."""

    def __init__(self, rng: random.Random, bits: int = 64, components: int = 0) -> None:
        self.rng = rng
        self.bits = bits
        self.components = components & ~7  # of XSAVE, in the host's XCR0 and not in ours: naming them faults here alone
        self.registers = 16 if bits == 64 else 8
        self.base = DATA if bits == 16 else 0  # of the data segments

    # ---- values ----------------------------------------------------------------------------------------------

    def value(self) -> int:
        """An integer, often an edge."""
        r = self.rng.random()
        mask = M64 if self.bits == 64 else M32
        if r < 0.35:
            return self.rng.choice(EDGES) & mask
        return self.rng.getrandbits(8 if r < 0.5 else 64) & mask

    def vectors(self) -> bytearray:
        """An XSAVE image with interesting x87, SSE and AVX registers."""
        rng = self.rng
        image = bytearray(832)
        struct.pack_into("<HHBxH", image, 0, 0x37F, 0, 0, 0)
        struct.pack_into("<II", image, 24, 0x1F80 | rng.choice([0, 0, 0x2000, 0x4000, 0x6000, 0x8040]), 0xFFFF)
        for n in range(8):
            if rng.random() < 0.5:
                image[32 + 16 * n : 42 + 16 * n] = rng.randbytes(8) + rng.choice(
                    [b"\xff\x3f", b"\xfe\xbf", b"\x05\x40"]
                )
        image[4] = rng.getrandbits(8)
        noise = rng.randbytes(512)
        kinds = rng.randbytes(64)
        for n in range(64):
            at = 160 + 8 * n if n < 32 else 320 + 8 * n  # XMM, then the upper halves at 576
            kind = kinds[n]
            if kind < 100:
                piece = noise[8 * n : 8 * n + 8]
            elif kind < 150:
                piece = DOUBLES[kind % len(DOUBLES)]
            elif kind < 200:
                piece = SINGLES[kind % len(SINGLES)] + SINGLES[(kind >> 1) % 8]
            else:
                piece = QUADS[kind % len(QUADS)]
            image[at : at + 8] = piece
        image[512] = 7
        return image

    def target(self, aligned: bool = False) -> int:
        """A linear address of data; sometimes across pages, sometimes partly unmapped or beyond the limit."""
        rng = self.rng
        r = rng.random()
        if r < 0.75:
            at = DATA + rng.randrange(512, DATA_SIZE - 1024)
        elif r < 0.95:
            at = DATA + 0x1000 * rng.randrange(1, 3) - rng.randrange(1, 40)
        elif r < 0.98:
            at = DATA + DATA_SIZE - rng.randrange(1, 20)
        else:
            at = rng.choice([0, 0x8000000000000000, DATA + DATA_SIZE + 100])
        return at & ~63 if aligned else at

    def offset(self, linear: int) -> int:
        """The offset in a data segment that is this linear address."""
        return linear - self.base & (M64 if self.bits == 64 else M32)

    # ---- encoding --------------------------------------------------------------------------------------------

    def encode(self, row: isa.Row, regs: list[int], fixed: set[int]) -> bytes | None:
        """One encoding of a row; sets registers that its address needs (``fixed`` ones may not change)."""
        draft = _Draft(regs, fixed, bytearray(832))
        try:
            return self._instruction(row, draft)
        except Refused:
            return None

    def _instruction(self, row: isa.Row, draft: _Draft) -> bytes:
        rng, bits = self.rng, self.bits
        attributes = row.attributes
        letters = {o.letter for o in row.operands}
        sizes = {o.size for o in row.operands}
        prefix, w, length = b"", 0, 0
        address_size = bits // 8
        if row.vex:
            w = 1 if "W1" in attributes else 0 if "W0" in attributes else int(rng.random() < 0.5)
            w &= bits == 64 or row.name not in NARROW
            two_lengths = "x" in sizes or "n" in sizes
            length = 1 if "L1" in attributes else 0 if "L0" in attributes else int(rng.random() < 0.5 and two_lengths)
        elif bits == 64:
            w = int(rng.random() < 0.4)
        if not row.vex:
            sized = "v" in sizes or "z" in sizes or not row.operands or row.cls in ("pushi", "enter", "sys")
            if row.prefix == 1 or (sized and row.prefix < 0 and not w and rng.random() < 0.25):
                prefix += b"\x66"
            if row.prefix >= 2:
                prefix += b"\xf3" if row.prefix == 2 else b"\xf2"
        small = (b"\x66" in prefix) != (bits == 16)  # 16-bit operands
        if rng.random() < 0.12:
            prefix += b"\x67"
            address_size = {64: 4, 32: 2, 16: 4}[bits]
        if bits != 64 and rng.random() < 0.06:
            prefix += rng.choice([b"\x26", b"\x36", b"\x3e"])  # es, ss, ds
        count = self.registers
        reg, rm, index = rng.randrange(count), rng.randrange(count), 0
        if row.reg >= 0:
            reg = row.reg
        elif "P" in letters:
            reg &= 7
        modrm = tail = b""
        form = self._form(row, letters)
        if row.modrm >= 0:
            modrm, reg, rm = bytes([row.modrm]), 0, 0
        elif row.has_modrm and form == "r":
            if letters & {"Q", "N"}:
                rm &= 7
            modrm = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        elif row.has_modrm:
            target = self._aim(row, draft, small)
            if address_size == 2:
                if row.cls == "gather":
                    raise Refused
                reg, modrm, tail = self._memory_16(row, reg, target, draft)
                rm = 0
            else:
                reg, rm, index, modrm, tail = self._memory(row, reg, target, draft, address_size)
            if "lock" in attributes and rng.random() < 0.2:
                prefix = b"\xf0" + prefix
        elif "Z" in letters or row.cls in ("push", "pop"):
            rm = row.opcode & 7 | (rng.randrange(2) << 3 if bits == 64 else 0)
        prefix += self._implicit(row, draft, address_size, prefix)
        immediate = self._immediate(row, small, w, address_size)
        if row.vex:
            vvvv = self._vvvv(row, reg, index, draft) if letters & {"H", "B"} else 0
            third = w << 7 | (~vvvv & 15) << 3 | length << 2 | row.prefix
            second = (0 if reg >= 8 else 0x80) | (0 if index >= 8 else 0x40) | (0 if rm >= 8 else 0x20) | row.map
            short = second & 0x60 == 0x60 and row.map == 1 and not w and rng.random() < 0.5
            head = bytes([0xC5, second & 0x80 | third]) if short else bytes([0xC4, second, third])
            return prefix + head + bytes([row.opcode]) + modrm + tail + immediate
        if bits == 64:
            rex = w << 3 | (reg >> 3 if modrm and row.modrm < 0 else 0) << 2 | (index >> 3) << 1 | rm >> 3
            if rex or rng.random() < 0.5:
                prefix += bytes([0x40 | rex])
        escape = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map]
        return prefix + escape + bytes([row.opcode]) + modrm + tail + immediate

    def _form(self, row: isa.Row, letters: set[str]) -> str:
        if row.form:
            return row.form
        if row.map == 0 and 0xD8 <= row.opcode <= 0xDF and row.modrm < 0:
            return "m"
        if row.name in PREFETCH and row.opcode == 0x0D:
            return "m"
        if letters & {"E", "W", "Q"}:
            return self.rng.choice("rm")
        return "m" if letters & {"M", "X"} else "r"

    def _aim(self, row: isa.Row, draft: _Draft, small: bool) -> int:
        """Choose where a memory operand lies, and what has to be there."""
        rng = self.rng
        # What touches a part of its operand, or in an order of its own, is kept away from faults.
        if row.name == "FBSTP" or (row.name == "FSTP" and row.operands[0].size == "t"):
            return DATA + rng.randrange(0, DATA_SIZE, 64)
        if row.cls == "gather":
            return DATA + rng.randrange(0x800, 0x1800)
        if row.cls == "fpu":
            return self._aim_state(row, draft, small)
        return self.target(row.feature == UNALIGNED or ("al" in row.attributes and rng.random() < 0.9))

    def _aim_state(self, row: isa.Row, draft: _Draft, small: bool) -> int:
        """An area for FXSAVE and its like: mostly aligned, and with an image that can be restored."""
        rng = self.rng
        at = DATA + rng.randrange(0, DATA_SIZE - 1024, 64)
        if row.name in ("FLDENV", "FNSTENV", "FRSTOR", "FNSAVE"):
            at += rng.randrange(64)
            step = 2 if small else 4
            words = (0x37F | rng.getrandbits(2) << 10, rng.getrandbits(16) & 0x7F00, rng.getrandbits(16), 0, 0, 0, 0)
            draft.patches.append((at, b"".join(value.to_bytes(step, "little") for value in words)))
            draft.opaque.append((at + 3 * step, 4 * step))
            return at
        image = self.vectors()
        draft.opaque.append((at + 6, 18))
        if row.name[0] == "X":
            rfbm = rng.randrange(8)
            draft.fix(0, rfbm, M64)
            draft.fix(2, rng.choice([0, 0, 1]), M64)
            if rng.random() < 0.5:
                image[512] = rng.randrange(8)
            if rng.random() < 0.3:
                image[520:528] = (1 << 63 | rng.randrange(8)).to_bytes(8, "little")
            if rng.random() < 0.1:
                image[rng.randrange(512, 576)] |= 1 << rng.randrange(8)
            for field in (512, 520):
                named = int.from_bytes(image[field : field + 8], "little") & ~self.components
                image[field : field + 8] = named.to_bytes(8, "little")
        elif rng.random() < 0.1:
            image[27] = 1  # a reserved bit of MXCSR
        draft.patches.append((at, bytes(image[:512] if row.name[0] == "F" else image)))
        return at + (8 if rng.random() < 0.05 else 0)

    def _memory_16(self, row: isa.Row, reg: int, target: int, draft: _Draft) -> tuple[int, bytes, bytes]:
        """A 16-bit addressing form that reaches the target."""
        rng = self.rng
        form, mod = rng.randrange(8), rng.randrange(3)
        base, index = FORMS_16[form]
        offset = self.offset(target)
        disp = rng.randrange(-128, 128) if mod == 1 else rng.randrange(-0x4000, 0x4000)
        if row.cls == "btm":
            if reg in (base, index):
                raise Refused
            draft.fix(reg, rng.randrange(-4000, 4000), M32)
        if mod == 0 and form == 6:
            return reg, bytes([(reg & 7) << 3 | 6]), struct.pack("<H", offset & 0xFFFF)
        if mod == 0:
            disp = 0
        add = 0
        if index >= 0:
            add = rng.randrange(0, 64)
            draft.fix(index, add, 0xFFFF)
        draft.fix(base, offset - disp - add, 0xFFFF)
        tail = b"" if mod == 0 else struct.pack("<b", disp) if mod == 1 else struct.pack("<h", disp)
        return reg, bytes([mod << 6 | (reg & 7) << 3 | form]), tail

    def _memory(
        self, row: isa.Row, reg: int, target: int, draft: _Draft, address_size: int
    ) -> tuple[int, int, int, bytes, bytes]:
        """A 32- or 64-bit addressing form that reaches the target: modrm.reg, base, index, modrm, what follows."""
        rng = self.rng
        mask = M64 if address_size == 8 else M32
        rm, index = rng.randrange(self.registers), rng.randrange(self.registers)
        scale, mod = rng.randrange(4), rng.choice([0, 1, 2])
        is_gather = row.cls == "gather"
        use_index = is_gather or (rng.random() < 0.35 and index not in (4, rm))
        disp = 0 if mod == 0 else rng.randrange(-128, 128) if mod == 1 else rng.randrange(-(1 << 20), 1 << 20)
        if mod == 0 and rm & 7 == 5:
            if self.bits == 64 or rng.random() < 0.7 or is_gather or row.cls == "btm":
                mod, disp = 1, 4
            else:  # an absolute address
                return reg, 0, 0, bytes([(reg & 7) << 3 | 5]), struct.pack("<I", self.offset(target) & M32)
        offset = self.offset(target) - disp
        if is_gather:
            if index == reg:
                raise Refused
            self._indices(row, index, scale, draft)
        elif use_index:
            value = rng.randrange(0, 64)
            draft.fix(index, value, mask)
            offset -= value << scale
        if row.cls == "btm":
            if reg == rm or (use_index and reg == index):
                raise Refused
            draft.fix(reg, rng.randrange(-4000, 4000), M64 if self.bits == 64 else M32)
        draft.fix(rm, offset, mask)
        if use_index or rm & 7 == 4:
            modrm = bytes([mod << 6 | (reg & 7) << 3 | 4])
            tail = bytes([scale << 6 | ((index & 7) if use_index else 4) << 3 | rm & 7])
        else:
            modrm, tail = bytes([mod << 6 | (reg & 7) << 3 | rm & 7]), b""
        tail += b"" if mod == 0 else struct.pack("<b", disp) if mod == 1 else struct.pack("<i", disp)
        return reg, rm, index if use_index else 0, modrm, tail

    def _indices(self, row: isa.Row, index: int, scale: int, draft: _Draft) -> None:
        """Give a gather's index register small elements, seldom one that faults."""
        rng = self.rng
        size, code = (8, "<q") if row.opcode & 1 else (4, "<i")
        for half in (160, 576):
            for at in range(half + 16 * index, half + 16 * index + 16, size):
                value = rng.randrange(-0x700, 0x800) >> scale
                struct.pack_into(code, draft.image, at, value if rng.random() < 0.97 else 1 << 28)

    def _vvvv(self, row: isa.Row, reg: int, index: int, draft: _Draft) -> int:
        vvvv = self.rng.randrange(self.registers)
        if row.cls == "gather" and vvvv in (reg, index):
            raise Refused
        return vvvv

    def _implicit(self, row: isa.Row, draft: _Draft, address_size: int, prefix: bytes) -> bytes:
        """Set the registers that an instruction uses without naming them; gives a REP prefix for strings."""
        rng = self.rng
        mask = {2: 0xFFFF, 4: M32, 8: M64}[address_size]
        stack = 0xFFFF if self.bits == 16 else M64 if self.bits == 64 else M32
        if row.cls == "string":
            for reg, value in (
                (6, self.offset(self.target())),
                (7, self.offset(self.target())),
                (1, rng.randrange(FEWEST, 40) if rng.random() < 0.8 else rng.randrange(FEWEST, 3000)),
            ):
                draft.fix(reg, value, mask)
            if rng.random() < 0.6:
                return rng.choice([b"\xf3", b"\xf2"]) if row.opcode in (0xA6, 0xA7, 0xAE, 0xAF) else b"\xf3"
        if row.cls in ("push", "pop", "pushi", "pushm", "popm", "pushf") or row.name in ("PUSHA", "POPA", "ENTER"):
            draft.fix(4, self.offset(self.target()) & ~7, stack)
        if row.name == "ENTER":
            draft.fix(5, self.offset(self.target()), stack)
        if row.cls == "leave":
            draft.fix(5, self.offset(self.target()), stack)
        if row.cls == "xlat":
            draft.fix(3, self.offset(self.target()), mask)
        if row.cls == "maskmov":
            draft.fix(7, self.offset(DATA + rng.randrange(0, DATA_SIZE, 64)), mask)
        return b""

    def _immediate(self, row: isa.Row, small: bool, w: int, address_size: int) -> bytes:
        rng = self.rng
        immediate = b""
        if row.name == "ENTER":
            return struct.pack("<HB", rng.randrange(0, 256), rng.choice([0, 0, 1, 2, 5, 31, 33]))
        for o in row.operands:
            if o.letter in "IL":
                n = {"b": 1, "w": 2, "x": 1}.get(o.size, 0)
                if not n:
                    n = 8 if o.size == "v" and w else 2 if small and not w else 4
                immediate += rng.randbytes(n)
            elif o.letter == "O":
                offset = self.offset(self.target()) & (1 << 8 * address_size) - 1
                immediate += offset.to_bytes(address_size, "little")
        return immediate

    # ---- control transfers -----------------------------------------------------------------------------------

    def _transfer(self, row: isa.Row, draft: _Draft) -> bytes:
        """A unit of code around a control transfer: where it goes shows in whether a filler is executed."""
        rng, bits = self.rng, self.bits
        filler = bytes([0xB0 | rng.randrange(4), rng.getrandbits(8)])  # mov al/cl/dl/bl, imm8
        escape = b"\x0f" if row.map == 1 else b""
        wide = bits // 8 if bits != 64 else 4
        if row.cls in ("jcc", "jmp", "loop"):
            size = 1 if row.operands[0].size == "b" else wide
            prefix = b""
            if row.cls == "loop" and rng.random() < 0.3:
                prefix = b"\x67"
            return prefix + escape + bytes([row.opcode]) + len(filler).to_bytes(size, "little") + filler
        draft.fix(4, self.offset(DATA + rng.randrange(0x800, 0x2800, 8)), 0xFFFF if bits == 16 else M64)
        if row.cls == "call":
            return b"\xe8" + len(filler).to_bytes(wide, "little") + filler
        here = b"\xe8" + bytes(wide)  # call the next instruction: its address is on the stack
        if row.cls == "ret":
            unit = bytes([row.opcode]) + (struct.pack("<H", rng.randrange(64)) if row.opcode == 0xC2 else b"")
            add = self._add_to_top(len(unit) + len(filler))
            return here + add + unit + filler
        reg = rng.choice([0, 1, 2, 3, 6, 7])
        if rng.random() < 0.5:
            unit = bytes([0xFF, 0xC0 | row.reg << 3 | reg])
            distance = 1 + 3 + len(unit) + len(filler)
            add = (b"\x48" if bits == 64 else b"") + bytes([0x83, 0xC0 | reg, distance + (bits == 64)])
            return here + bytes([0x58 | reg]) + add + unit + filler
        unit = (b"\x67" if bits == 16 else b"") + bytes([0xFF, row.reg << 3 | 4, 0x24])  # [esp] or [rsp]
        if bits == 16:
            draft.registers[4] &= 0xFFFF
        return here + self._add_to_top(len(unit) + len(filler)) + unit + filler

    def _add_to_top(self, distance: int) -> bytes:
        """Add to the return address on the stack the distance from behind this instruction, and its own length."""
        head = {64: b"\x48", 32: b"", 16: b"\x67"}[self.bits] + b"\x83\x04\x24"
        return head + bytes([len(head) + 1 + distance])

    def _popf(self, draft: _Draft) -> bytes:
        """PUSH and POPF of flags without TF."""
        rng = self.rng
        draft.fix(4, self.offset(DATA + rng.randrange(0x800, 0x2800, 8)), 0xFFFF if self.bits == 16 else M64)
        size = 2 if self.bits == 16 else 4
        return b"\x68" + (rng.getrandbits(16) & 0xCD5 | 2).to_bytes(size, "little") + b"\x9d" + b"\xfc"

    # ---- sequences -------------------------------------------------------------------------------------------

    def written(self, row: isa.Row, got: dict[str, object]) -> set[int]:
        """The general registers that an instruction may write, generously."""
        result = {0, 2} if row.map == 0 or row.name.startswith("CMPXCHG") else set()
        if "wcx" in row.attributes:
            result.add(1)
        if row.cls in ("push", "pop", "pushi", "pushm", "popm", "leave", "pushf"):
            result |= {4, 5}
        if row.cls == "string":
            result |= {0, 1, 6, 7}
        if row.name in ("PUSHA", "POPA", "ENTER") or row.cls in TRANSFERS:
            result |= set(range(8))
        if row.name in ("INC", "DEC") and row.opcode & 0xF0 == 0x40:
            result.add(row.opcode & 7)
        for o in row.operands:
            if o.access & 2:
                number = {"G": "reg", "Z": "reg", "E": "rm", "R": "rm", "B": "vvvv"}.get(o.letter)
                if number and not (o.letter == "E" and got["has_memory"]):
                    result |= {int(got[number]), int(got[number]) & 3}  # type: ignore[call-overload]
        return result

    def _unit(self, row: isa.Row, draft: _Draft) -> tuple[bytes, dict[str, object]]:
        """One instruction, or the unit of code around a control transfer, with its decoded fields."""
        if row.cls in TRANSFERS or row.cls == "popf":
            code = self._popf(draft) if row.cls == "popf" else self._transfer(row, draft)
            return code, {"has_memory": False, "immediate": 0, "operand_size": 4, "reg": 0, "rm": 0}
        code = self._instruction(row, draft)
        got = decode.decode_bytes(code + bytes(15), 0, self.bits // 8)
        if isinstance(got, int) or got["length"] != len(code):
            raise Refused
        if got["row"] is not row and not (row.name in ("INC", "DEC") and row.opcode & 0xF0 == 0x40):
            raise Refused  # the short forms are decoded as FE and FF
        if row.cls == "string" and self.rng.random() < 0.4:
            code = b"\xfd" + code + b"\xfc"  # downwards
        return code, got

    def case(self, rows: list[isa.Row], length: int) -> Case:
        """A sequence that begins with the first of ``rows``."""
        case = Case(self.bits, flags=self.rng.getrandbits(12) & ARITHMETIC, xsave=bytes(self.vectors()))
        case.registers = [self.value() for _ in range(self.registers)]
        case.registers += [0] * (16 - self.registers)
        case.registers[4] = self.offset(DATA + 0x1800 + self.rng.randrange(64) * 8)
        fixed: set[int] = set()
        written: set[int] = set()
        attempts = 0
        while len(case.rows) < length and attempts < 60:
            attempts += 1
            row = rows[0] if not case.rows else self.rng.choice(rows)
            if flag_bits(row.flags_read) & case.undefined or (case.undefined and row.cls in ("pushf", "string")):
                continue  # what it reads is not defined
            if row.cls in ("fpu", "gather") and case.rows:
                continue  # what it works on would depend on the others
            draft = _Draft(list(case.registers), set(fixed), bytearray(case.xsave))
            try:
                code, got = self._unit(row, draft)
            except Refused:
                continue
            if (draft.fixed - fixed) & written:
                continue  # its address was changed by an earlier instruction
            case.code += code
            case.rows.append(row)
            case.registers = draft.registers
            case.patches += draft.patches
            case.opaque += draft.opaque
            case.xsave = bytes(draft.image)
            written |= self.written(row, got)
            fixed = draft.fixed
            case.unsure |= case.undefined
            if row.cls == "fpu":
                break
            self._undefined(case, row, got)
        return case

    def _undefined(self, case: Case, row: isa.Row, got: dict[str, object]) -> None:
        """Follow which flags are undefined after the instruction."""
        if row.cls == "popf":
            case.undefined = 0
            return
        mask = 63 if (got["operand_size"] == 8 and row.opcode & 1) or (row.map and got["operand_size"] == 8) else 31
        if "shift" in row.attributes and not int(got["immediate"]) & mask:  # type: ignore[call-overload]
            return
        case.undefined = case.undefined & ~flag_bits(row.flags_written) | flag_bits(row.flags_undefined)
        if row.flags_maybe and row.cls != "string" and "cl" in row.attributes:
            # Shifts by CL: OF and AF are undefined for counts above 1. SDM, "SAL/SAR/SHL/SHR—Shift".
            case.undefined |= flag_bits(row.flags_maybe) & 0x810


TRANSFERS = frozenset(("jcc", "jmp", "call", "jmpi", "calli", "ret", "loop"))
