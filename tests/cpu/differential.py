"""Random instruction sequences on our processor and on the one that runs us, compared bit for bit.

``python -m tests.cpu.differential --cases 1000000`` runs long; ``--bits`` chooses 64-, 32- or 16-bit code, ``--row
NAME`` narrows, ``--seed`` repeats. Each row of the table is the first of a sequence in its turn.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import random
import struct
import sys
import time

from tests.cpu.cases import ARITHMETIC, Case, Maker, exists, why_not
from tests.cpu.native import CODE, CODE_SIZE, DATA, DATA_SIZE, IS_AMD, Native

from vmonty.cpu import core, inspection, isa, models
from vmonty.cpu.walks import SegmentState

OF, BR, GP, PF, MF, XM, AC = 4, 5, 13, 14, 16, 19, 17
CODE_PHYSICAL, DATA_PHYSICAL = 0x100000, 0x200000
# These fault somewhere in the middle, with a part done, or report a trap behind themselves.
INEXACT_FAULTS = frozenset(("MOVBE", "FBSTP", "INTO", "MASKMOVQ", "MASKMOVDQU", "VMASKMOVDQU", "POPA"))


def testable(row: isa.Row, bits: int) -> bool:
    """Tell whether a row can run natively in this mode and be compared."""
    return exists(row, bits) and not why_not(row, models.host_flags())


class Bench:
    """Both processors with the same memory, in 64-, 32- or 16-bit code."""

    def __init__(self, seed: int, bits: int = 64, exact: bool = False) -> None:
        self.rng = random.Random(seed)
        self.bits = bits
        self.exact = exact
        self.native = Native(bits)
        self.cpu = core.Cpu()
        self.cpu.keep_flags(exact)
        self.memory = mmap.mmap(-1, 4 << 20)
        self.cpu.add_region(0, self.memory)
        # Linear CODE and DATA are mapped as the host has them: code at 1 MB, data at 2 MB of guest memory.
        put = lambda at, value: struct.pack_into("<Q", self.memory, at, value)  # noqa: E731
        put(0x1000, 0x2007)
        put(0x2000, 0x3007)
        pages = ((CODE, CODE_PHYSICAL, CODE_SIZE >> 12, 0x4000), (DATA, DATA_PHYSICAL, DATA_SIZE >> 12, 0x5000))
        for base, physical, count, table in pages:
            put(0x3000 + (base >> 21 & 511) * 8, table | 7)
            for n in range(count):
                put(table + ((base >> 12 & 511) + n) * 8, physical + n * 4096 | 7)
        self.cpu.set_long_mode(0x1000)
        if bits != 64:
            self._set_segments()
        self.cpu.stop_at_events()
        self.slot = CODE + 0x1000
        self.mask = (1 << 64) - 1 if bits == 64 else (1 << 32) - 1

    def _set_segments(self) -> None:
        """Compatibility mode with the segments that Native has."""
        if self.bits == 32:
            both = SegmentState(8, 0, 0xFFFFFFFF, 0xC09B), SegmentState(16, 0, 0xFFFFFFFF, 0xC093)
        else:
            both = SegmentState(8, CODE, CODE_SIZE - 1, 0x9B), SegmentState(16, DATA, DATA_SIZE - 1, 0x93)
        for name in ("es", "ss", "ds"):
            inspection.put_segment(self.cpu, name, both[1])
        inspection.put_segment(self.cpu, "cs", both[0])

    def place(self, size: int) -> int:
        """Where the next code goes; the arena is used over and over."""
        if self.slot > CODE + CODE_SIZE - 512:
            self.slot = CODE + 0x1000
            self.cpu.flush_code()
        at = self.slot
        self.slot += (size + 31) & ~15
        return at

    def compare(self, case: Case) -> str:
        """Run a case on both; a description of the first difference, or nothing."""
        data = bytearray(self.rng.randbytes(DATA_SIZE))
        for where, content in case.patches:
            data[where - DATA : where - DATA + len(content)] = content
        registers = struct.pack("<16Q", *case.registers)
        at = self.place(len(case.code))
        self.native.data[:] = data
        theirs = self.native.run(at, case.code, registers, case.flags, case.xsave)
        self.memory[DATA_PHYSICAL : DATA_PHYSICAL + DATA_SIZE] = data
        offset = at - CODE + CODE_PHYSICAL
        self.memory[offset : offset + len(case.code) + 1] = case.code + b"\xf4"
        cpu = self.cpu
        cpu.registers = registers
        cpu["rflags"] = case.flags | 0x202
        cpu["rip"] = at - self.native.code_base
        cpu.xsave = case.xsave
        cpu.clear_event()
        why = cpu.run()
        event = cpu.event
        if why == "internal":
            return f"internal error {cpu.exit}"
        ours = event["vector"] if why == "debug" else -1
        if (ours, theirs.vector) == (-1, PF) and any(r.cls == "maskmov" for r in case.rows):
            # Whether a mask of all zeros faults is "implementation dependent". SDM, "MASKMOVQ"
            return ""
        names = {row.name for row in case.rows}
        if IS_AMD and (ours, theirs.vector) in ((BR, GP), (BR, PF)) and "BOUND" in names:
            # AMD's read the upper bound before they compare with the lower one.
            return ""
        if ours != theirs.vector:
            return f"vector {ours} not {theirs.vector} ({why}, {event}, native trap {theirs.trap})"
        if ours >= 0 and not any(r.name in INEXACT_FAULTS for r in case.rows):
            if cpu["rip"] != theirs.trap[3]:
                return f"fault at {cpu['rip']:#x} not {theirs.trap[3]:#x}"
            # Of masked elements and of areas in two pages processors report different bytes.
            precision = 0xFFF if any(r.cls == "masked" for r in case.rows) else 0
            is_area = any(r.cls == "fpu" for r in case.rows)
            # Of two operands that fault AMD's report the other one.
            is_area |= IS_AMD and not names.isdisjoint(("CMPSB", "CMPSW", "CMPSD", "CMPSQ"))
            if ours == PF and not is_area and (event["payload"] ^ theirs.trap[2]) & ~precision:
                return f"#PF address {event['payload']:#x} not {theirs.trap[2]:#x}"
        if why not in ("debug", "halt"):
            return f"stopped by {why}"
        return self._state(case, theirs.registers, theirs.flags, ours) or (
            "" if ours >= 0 else self._vectors(cpu.xsave, theirs.xsave)
        )

    def _state(self, case: Case, registers: bytes, flags: int, vector: int) -> str:
        """Compare general registers, flags and memory."""
        cpu, mask = self.cpu, self.mask
        if vector >= 0 and any(r.name in INEXACT_FAULTS for r in case.rows):
            return ""
        in_a_string = IS_AMD and vector >= 0 and any(r.cls == "string" for r in case.rows)
        if cpu.registers != registers:
            mine, other = struct.unpack("<16Q", cpu.registers), struct.unpack("<16Q", registers)
            count = 16 if self.bits == 64 else 8
            masks = [mask] * count
            if in_a_string:
                # Before the first iteration is done AMD's leave the upper halves alone, with 32-bit addresses, too.
                masks[1] = masks[6] = masks[7] = (1 << 32) - 1
            wrong = [
                f"r{n} {a & mask:#x} not {b & mask:#x}"
                for n, (a, b, mask) in enumerate(zip(mine[:count], other[:count], masks, strict=True))
                if (a ^ b) & mask
            ]
            if wrong:
                return "; ".join(wrong)
        # Flags of AMD's are those of the last iteration that was done, ours those before the first, as Intel's.
        if vector < 0 or (self.exact and not in_a_string):
            undefined = case.undefined if vector < 0 else case.unsure
            difference = (cpu["rflags"] ^ flags) & ARITHMETIC & ~undefined
            if difference:
                return f"flags {cpu['rflags'] & ARITHMETIC:#x} not {flags & ARITHMETIC:#x}, differ {difference:#x}"
        mine = bytearray(self.memory[DATA_PHYSICAL : DATA_PHYSICAL + DATA_SIZE])
        other = bytearray(self.native.data)
        for where, size in case.opaque:
            mine[where - DATA : where - DATA + size] = other[where - DATA : where - DATA + size]
        if mine != other:
            where = next(n for n in range(DATA_SIZE) if mine[n] != other[n])
            return (
                f"memory at {DATA + where:#x}: {mine[where : where + 16].hex()} not {other[where : where + 16].hex()}"
            )
        return ""

    def _vectors(self, mine: bytes, theirs: bytes) -> str:
        a, b = _comparable(mine), _comparable(theirs)
        if a == b:
            return ""
        where = next(n for n in range(832) if a[n] != b[n])
        row = slice(where & ~15, (where & ~15) + 16)
        return f"vector state at {where}: {a[row].hex()} not {b[row].hex()}"


def _comparable(image: bytes) -> bytes:
    """An XSAVE area without FOP, FIP, FDP, which show host addresses, and with initial states spelt out."""
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


def run(
    cases: int, seed: int, bits: int = 64, name: str = "", length: int = 0, stop_after: int = 20, exact: bool = False
) -> tuple[int, list[str], collections.Counter[isa.Row]]:
    """Run that many cases; how many ran, the differences, and how often each row did."""
    rng = random.Random(seed)
    bench = Bench(seed, bits, exact)
    maker = Maker(rng, bits, bench.native.xcr0)
    rows = [r for r in isa.ROWS if testable(r, bits) and (not name or r.name == name)]
    problems: list[str] = []
    seen: collections.Counter[isa.Row] = collections.Counter()
    done = 0
    turn = 0
    while done < cases and len(problems) < stop_after:
        row = rows[turn % len(rows)]
        turn += 1
        n = length or (1 if rng.random() < 0.6 else rng.randrange(2, 6))
        case = maker.case([row] + [rng.choice(rows) for _ in range(8)], n)
        if not case.rows:
            continue
        done += 1
        seen.update(case.rows)
        verdict = bench.compare(case)
        if verdict:
            names = "+".join(r.name for r in case.rows)
            problems.append(f"{bits}-bit {names} {case.code.hex()} undefined={case.undefined:#x}: {verdict}")
    never = [f"{r.name} ({'VEX ' if r.vex else ''}{r.map}.{r.opcode:02X})" for r in rows if not seen[r]]
    if done >= 4 * len(rows) and never:
        problems.append(f"{bits}-bit rows that were never made: {', '.join(never)}")
    return done, problems, seen


def main() -> int:
    """The long form, for a terminal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(64, 32, 16), default=64)
    parser.add_argument("--row", default="")
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--stop-after", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="keep dead flags too, and compare those of faults")
    arguments = parser.parse_args()
    start = time.monotonic()
    done, problems, seen = run(
        arguments.cases, arguments.seed, arguments.bits, arguments.row, arguments.length, arguments.stop_after,
        arguments.exact,
    )  # fmt: skip
    for problem in problems:
        print(problem)
    print(
        f"{arguments.bits}-bit code: {done} cases, {len(problems)} mismatches, {len(seen)} rows, "
        f"seed {arguments.seed}, {time.monotonic() - start:.1f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
