"""Random instruction sequences on our processor and on the one that runs us, compared bit for bit.

``python -m tests.cpu.differential --cases 1000000`` runs long; ``--row NAME`` narrows, ``--seed`` repeats.
"""

from __future__ import annotations

import argparse
import mmap
import random
import struct
import sys
import time
from dataclasses import dataclass, field

from tests.cpu.native import CODE, CODE_SIZE, DATA, DATA_SIZE, Native

from vmonty.cpu import core, decode, isa

TESTED_CLASSES = frozenset(
    (
        "copy", "lea", "nop", "btm", "moffs", "xlat", "push", "pop", "pushi", "pushm", "popm", "leave",
        "string", "emms", "df",
    )
)  # fmt: skip
# Not comparable: they show the clock or chance, or we do not have them on this host.
SKIPPED_NAMES = {"RDRAND", "RDSEED", "SHA1NEXTE", "SHA1MSG1", "SHA1MSG2", "SHA256RNDS2", "SHA256MSG1", "SHA256MSG2",
                 "SHA1RNDS4"}  # fmt: skip
ARITHMETIC = 0x8D5
FLAG_POSITIONS = {1: 0x1, 2: 0x4, 4: 0x10, 8: 0x40, 16: 0x80, 32: 0x800}
EDGES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF,
         0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x0123456789ABCDEF]  # fmt: skip
EDGE_FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    3.14159,
    1e30,
    -1e-30,
    float("inf"),
    float("-inf"),
    float("nan"),
    2.0**31,
    2.0**63,
]


def flag_bits(letters: int) -> int:
    """EFLAGS bits of the isa's flag letters."""
    return sum(bit for letter, bit in FLAG_POSITIONS.items() if letters & letter)


def testable(row: isa.Row) -> bool:
    """Tell whether a row can run natively in 64-bit user mode and be compared."""
    return row.cls in TESTED_CLASSES and row.name not in SKIPPED_NAMES and "i64" not in row.attributes


@dataclass
class Case:
    """A sequence with its initial state."""

    code: bytes = b""
    rows: list[isa.Row] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)
    flags: int = 0
    xsave: bytes = b""
    undefined: int = 0


class Maker:
    """Encodes rows with random operands whose addresses fall into DATA."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def value(self) -> int:
        """A 64-bit integer, often an edge."""
        r = self.rng.random()
        if r < 0.35:
            return self.rng.choice(EDGES)
        if r < 0.5:
            return self.rng.getrandbits(8)
        return self.rng.getrandbits(64)

    def vectors(self) -> bytes:
        """An XSAVE image with interesting x87, SSE and AVX registers."""
        rng = self.rng
        image = bytearray(832)
        struct.pack_into("<HHBxH", image, 0, 0x37F, 0, 0, 0)
        struct.pack_into("<II", image, 24, 0x1F80 | rng.choice([0, 0, 0x2000, 0x4000, 0x6000, 0x8040]), 0xFFFF)
        for n in range(8):
            if rng.random() < 0.5:
                image[32 + 16 * n : 42 + 16 * n] = rng.randbytes(8) + struct.pack(
                    "<H", rng.choice([0x3FFF, 0xBFFE, 0x4005])
                )
        image[4] = rng.getrandbits(8)
        for base in (160, 576):
            for n in range(32):
                r = rng.random()
                if r < 0.4:
                    piece = rng.randbytes(8)
                elif r < 0.6:
                    piece = struct.pack("<d", rng.choice(EDGE_FLOATS))
                elif r < 0.8:
                    piece = struct.pack("<ff", rng.choice(EDGE_FLOATS), rng.choice(EDGE_FLOATS[:8]))
                else:
                    piece = struct.pack("<Q", rng.choice(EDGES))
                image[base + 8 * n : base + 8 * n + 8] = piece
        image[512] = 7
        return bytes(image)

    def target(self, aligned: bool) -> int:
        """An address of data; sometimes across pages, sometimes partly unmapped."""
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

    def encode(self, row: isa.Row, regs: list[int], fixed: set[int]) -> bytes | None:
        """One encoding of a row; sets registers that its address needs (``fixed`` ones may not change)."""
        rng = self.rng
        attributes = row.attributes
        letters = {o.letter: o for o in row.operands}
        sizes = {o.size for o in row.operands}
        prefix, rex = b"", 0
        wide = False
        if row.vex:
            w = 1 if "W1" in attributes else 0 if "W0" in attributes else int(rng.random() < 0.5)
            length = 1 if "L1" in attributes else 0 if "L0" in attributes else int(rng.random() < 0.5 and "x" in sizes)
        else:
            w = int(rng.random() < 0.4)
            length = 0
            if ("v" in sizes or "z" in sizes or not row.operands) and row.prefix != 1 and not w and rng.random() < 0.25:
                prefix += b"\x66"
        if row.prefix == 1 and not row.vex:
            prefix += b"\x66"
        if row.prefix >= 2 and not row.vex:
            prefix += b"\xf3" if row.prefix == 2 else b"\xf2"
        if row.cls == "string":
            if rng.random() < 0.6:
                prefix += rng.choice([b"\xf3", b"\xf2"]) if row.opcode in (0xA6, 0xA7, 0xAE, 0xAF) else b"\xf3"
            for reg, value in ((6, self.target(False)), (7, self.target(False)), (1, rng.randrange(0, 40))):
                if reg in fixed and row.cls == "string":
                    return None
                regs[reg] = value
                fixed.add(reg)
        modrm = sib = b""
        reg = rng.randrange(16)
        rm = rng.randrange(16)
        index = 0
        if row.reg >= 0:
            reg = row.reg
        if any(letter in letters for letter in "PQ") and row.reg < 0:
            reg &= 7 if "P" in letters else 15
        form = row.form
        if not form:
            form = rng.choice("rm") if any(letter in letters for letter in "EWQ") else ("m" if "M" in letters else "r")
        if row.map == 0 and 0xD8 <= row.opcode <= 0xDF and row.modrm < 0:
            form = "m"
        # Masked moves and FBSTP touch only a part, in an order of their own: kept away from faults.
        inside = "MASKMOV" in row.name or row.name == "FBSTP"
        aligned = ("al" in attributes and rng.random() < 0.9) or inside
        if row.modrm >= 0:
            modrm = bytes([row.modrm])
            reg = rm = 0
        elif row.has_modrm and form == "r":
            if "Q" in letters or "N" in letters:
                rm &= 7
            modrm = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        elif row.has_modrm:
            rm = rng.randrange(16)
            index = rng.randrange(16)
            target = self.target(aligned)
            if inside:
                target = DATA + rng.randrange(0, DATA_SIZE, 64)
            scale = rng.randrange(4)
            mod = rng.choice([0, 1, 2])
            use_index = rng.random() < 0.35 and index != 4 and index != rm
            disp = 0 if mod == 0 else rng.randrange(-128, 128) if mod == 1 else rng.randrange(-(1 << 20), 1 << 20)
            if mod == 0 and rm & 7 == 5:
                mod, disp = 1, 4
            if rm in fixed or (use_index and index in fixed):
                return None
            offset = disp
            if use_index:
                regs[index] = rng.randrange(0, 64)
                offset += regs[index] << scale
                fixed.add(index)
            if row.cls == "btm":
                if reg in fixed or reg == rm or (use_index and reg == index):
                    return None
                regs[reg] = rng.randrange(-4000, 4000) & (1 << 64) - 1
                fixed.add(reg)
            regs[rm] = (target - offset) & (1 << 64) - 1
            fixed.add(rm)
            if use_index or rm & 7 == 4:
                modrm = bytes([mod << 6 | (reg & 7) << 3 | 4])
                sib = bytes([scale << 6 | ((index & 7) if use_index else 4) << 3 | rm & 7])
            else:
                modrm = bytes([mod << 6 | (reg & 7) << 3 | rm & 7])
                index = 0
            if not use_index:
                index = 0
            sib += b"" if mod == 0 else struct.pack("<b", disp) if mod == 1 else struct.pack("<i", disp)
            if "lock" in attributes and rng.random() < 0.2:
                prefix = b"\xf0" + prefix
        elif "Z" in letters or row.cls in ("push", "pop"):
            rm = row.opcode & 7 | (rng.randrange(2) << 3)
        if row.cls in ("push", "pop", "pushi", "pushm", "popm", "pushf"):
            if 4 in fixed:
                return None
            regs[4] = self.target(False) & ~7
            fixed.add(4)
        if row.cls == "leave":
            if 5 in fixed:
                return None
            regs[5] = self.target(False)
            fixed.add(5)
        if row.cls == "xlat":
            if 3 in fixed:
                return None
            regs[3] = self.target(False)
            fixed.add(3)
        immediate = b""
        for o in row.operands:
            if o.letter in "IL":
                n = {"b": 1, "w": 2, "x": 1}.get(o.size, 0)
                if o.size in "zv" and not n:
                    small = b"\x66" in prefix and not w
                    n = 2 if small else 8 if o.size == "v" and w else 4
                immediate += rng.randbytes(n)
            elif o.letter == "O":
                immediate += struct.pack("<Q", self.target(False))
        opcode = row.opcode
        if row.vex:
            vvvv = rng.randrange(16) if any(letter in letters for letter in "HB") else 0
            third = w << 7 | (~vvvv & 15) << 3 | length << 2 | row.prefix
            second = (0 if reg >= 8 else 0x80) | (0 if index >= 8 else 0x40) | (0 if rm >= 8 else 0x20) | row.map
            return bytes([0xC4, second, third, opcode]) + modrm + sib + immediate
        rex = w << 3 | (reg >> 3 if modrm and row.modrm < 0 else 0) << 2 | (index >> 3) << 1 | rm >> 3
        wide = rng.random() < 0.5
        head = prefix + (bytes([0x40 | rex]) if rex or wide else b"")
        return head + (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes([opcode]) + modrm + sib + immediate

    def written(self, row: isa.Row, got: dict[str, object]) -> set[int]:
        """The general registers that an instruction may write, generously."""
        result = {0, 2} if row.map == 0 or row.name.startswith("CMPXCHG") else set()
        if "wcx" in row.attributes:
            result.add(1)
        if row.cls in ("push", "pop", "pushi", "pushm", "popm", "leave"):
            result |= {4, 5}
        if row.cls == "string":
            result |= {0, 1, 6, 7}
        for o in row.operands:
            if o.access & 2:
                number = {"G": "reg", "Z": "reg", "E": "rm", "R": "rm", "B": "vvvv"}.get(o.letter)
                if number and not (o.letter == "E" and got["has_memory"]):
                    result |= {int(got[number]), int(got[number]) & 3}  # type: ignore[call-overload]
        return result

    def case(self, rows: list[isa.Row], length: int) -> Case:
        """A sequence that begins with the first of ``rows``."""
        regs = [self.value() for _ in range(16)]
        regs[4] = DATA + 0x1800 + self.rng.randrange(64) * 8
        fixed: set[int] = set()
        written: set[int] = set()
        case = Case(flags=self.rng.getrandbits(12) & ARITHMETIC, xsave=self.vectors())
        attempts = 0
        while len(case.rows) < length and attempts < 40:
            attempts += 1
            row = rows[0] if not case.rows else self.rng.choice(rows)
            trial_regs, trial_fixed = list(regs), set(fixed)
            if flag_bits(row.flags_read) & case.undefined:
                continue  # what it reads is not defined
            code = self.encode(row, trial_regs, trial_fixed)
            if code is None:
                continue
            got = decode.decode_bytes(code + bytes(15), 0, 8)
            if isinstance(got, int) or got["length"] != len(code) or got["row"] is not row:
                continue
            if (trial_fixed - fixed) & written:
                continue  # its address was changed by an earlier instruction
            written |= self.written(row, got)
            regs, fixed = trial_regs, trial_fixed
            case.code += code
            case.rows.append(row)
            killed = row.flags_written
            if "shift" in row.attributes and not got["immediate"] & (
                63 if (got["operand_size"] == 8 and row.opcode & 1) or row.map else 31
            ):
                continue
            case.undefined = case.undefined & ~flag_bits(killed) | flag_bits(row.flags_undefined)
            if row.flags_maybe and row.cls != "string":
                case.undefined |= flag_bits(row.flags_maybe) & (0x810 if "cl" in row.attributes else 0)
        case.registers = regs
        return case


class Bench:
    """Both processors with the same memory."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.native = Native()
        self.cpu = core.Cpu()
        self.memory = mmap.mmap(-1, 4 << 20)
        self.cpu.add_region(0, self.memory)
        # Linear CODE and DATA are mapped as the host has them: code at 1 MB, data at 2 MB of guest memory.
        put = lambda at, value: struct.pack_into("<Q", self.memory, at, value)  # noqa: E731
        put(0x1000, 0x2007)
        put(0x2000, 0x3007)
        for base, physical, pages, table in ((CODE, 0x100000, CODE_SIZE >> 12, 0x4000), (DATA, 0x200000, 3, 0x5000)):
            put(0x3000 + (base >> 21 & 511) * 8, table | 7)
            for n in range(pages):
                put(table + ((base >> 12 & 511) + n) * 8, physical + n * 4096 | 7)
        self.cpu.set_long_mode(0x1000)
        self.cpu.stop_at_events()
        self.slot = CODE + 0x1000
        self.code_physical = 0x100000

    def compare(self, case: Case) -> str:
        """Run a case on both; a description of the first difference, or nothing."""
        rng = self.rng
        data = rng.randbytes(DATA_SIZE)
        registers = struct.pack("<16Q", *case.registers)
        if self.slot > CODE + CODE_SIZE - 512:
            self.slot = CODE + 0x1000
            self.cpu.flush_code()
        at = self.slot
        self.slot += (len(case.code) + 31) & ~15
        self.native.data[0:DATA_SIZE] = data
        theirs = self.native.run(at, case.code, registers, case.flags, case.xsave)
        self.memory[0x200000 : 0x200000 + DATA_SIZE] = data
        offset = at - CODE + self.code_physical
        self.memory[offset : offset + len(case.code) + 1] = case.code + b"\xf4"
        cpu = self.cpu
        cpu.registers = registers
        cpu["rflags"] = case.flags | 0x202
        cpu["rip"] = at
        cpu.xsave = case.xsave
        cpu.clear_event()
        why = cpu.run()
        event = cpu.event
        signal, code, address, rip = theirs.trap
        if why == "internal":
            return f"internal error {cpu.exit}"
        vector = -1
        if signal == 11:
            vector = 13 if code == 128 else 14
        elif signal == 8:
            vector = 0 if code in (1, 2) else 19
        elif signal == 4:
            vector = 6
        elif signal == 7:
            vector = 17
        # Linux reports a #SS (non-canonical stack address) as SIGBUS.
        ours = event["vector"] if why == "debug" else -1
        if vector == 17 and ours == 12:
            ours = 17
        if vector == 19 and ours == 16:
            ours = 19
        if ours != vector:
            return f"vector {ours} not {vector} ({why}, {event}, native trap {theirs.trap})"
        if vector >= 0:
            if cpu["rip"] != rip:
                return f"fault at {cpu['rip']:#x} not {rip:#x}"
            if any("MASKMOV" in r.name or r.name in ("MOVBE", "FBSTP") for r in case.rows):
                return ""  # these fault somewhere in the middle
            if vector == 14 and event["payload"] != address:
                return f"#PF address {event['payload']:#x} not {address:#x}"
        if cpu.registers != theirs.registers:
            mine, other = struct.unpack("<16Q", cpu.registers), struct.unpack("<16Q", theirs.registers)
            return "; ".join(
                f"r{n} {a:#x} not {b:#x}" for n, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b
            )
        if vector < 0:
            difference = (cpu["rflags"] ^ theirs.flags) & ARITHMETIC & ~case.undefined
            if difference:
                return (
                    f"flags {cpu['rflags'] & ARITHMETIC:#x} not {theirs.flags & ARITHMETIC:#x}, differ {difference:#x}"
                )
        if self.memory[0x200000 : 0x200000 + DATA_SIZE] != self.native.data.raw:
            mine, other = self.memory[0x200000 : 0x200000 + DATA_SIZE], self.native.data.raw
            where = next(n for n in range(DATA_SIZE) if mine[n] != other[n])
            return (
                f"memory at {DATA + where:#x}: {mine[where : where + 16].hex()} not {other[where : where + 16].hex()}"
            )
        if vector >= 0:
            return ""  # some instructions change x87 tags or MXCSR status before they fault
        return self._vectors(cpu.xsave, theirs.xsave)

    def _vectors(self, mine: bytes, theirs: bytes) -> str:
        def clean(image: bytes) -> bytes:
            # FOP, FIP, FDP show host addresses; parts in their initial state are not written by XSAVE.
            out = bytearray(image)
            out[6:24] = bytes(18)
            for n in range(8):
                out[42 + 16 * n : 48 + 16 * n] = bytes(6)
            state = image[512]
            if not state & 1:
                out[0:5] = b"\x7f\x03\0\0\0"
                for n in range(8):
                    out[32 + 16 * n : 42 + 16 * n] = bytes(10)
            if not state & 2:
                out[160:416] = bytes(256)
            if not state & 4:
                out[576:832] = bytes(256)
            out[512] = 0
            return bytes(out)

        a, b = clean(mine), clean(theirs)
        if a == b:
            return ""
        where = next(n for n in range(832) if a[n] != b[n])
        row = slice(where & ~15, (where & ~15) + 16)
        return f"vector state at {where}: {a[row].hex()} not {b[row].hex()}"


def run(cases: int, seed: int, name: str = "", length: int = 0, stop_after: int = 20) -> tuple[int, list[str]]:
    """Run that many cases; how many ran, and the differences."""
    rng = random.Random(seed)
    maker = Maker(rng)
    bench = Bench(seed)
    rows = [r for r in isa.ROWS if testable(r) and (not name or r.name == name)]
    problems: list[str] = []
    done = 0
    while done < cases and len(problems) < stop_after:
        row = rows[done % len(rows)]
        n = length or (1 if rng.random() < 0.6 else rng.randrange(2, 6))
        others = [row] + [rng.choice(rows) for _ in range(8)]
        state = rng.getstate()
        case = maker.case(others, n)
        del state
        done += 1
        if not case.rows:
            continue
        verdict = bench.compare(case)
        if verdict:
            problems.append(
                f"{'+'.join(r.name for r in case.rows)} {case.code.hex()} undefined={case.undefined:#x}: {verdict}"
            )
    return done, problems


def main() -> int:
    """The long form, for a terminal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--row", default="")
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--stop-after", type=int, default=20)
    arguments = parser.parse_args()
    start = time.monotonic()
    done, problems = run(arguments.cases, arguments.seed, arguments.row, arguments.length, arguments.stop_after)
    for problem in problems:
        print(problem)
    print(f"{done} cases, {len(problems)} mismatches, seed {arguments.seed}, {time.monotonic() - start:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
