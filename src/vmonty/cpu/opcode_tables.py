"""Makes the decoder's tables from ``isa.ROWS``. The build does it; see ``opcodes``, which holds them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vmonty.cpu import isa

# decode.A_*
ATTRIBUTES = {
    "lock": 1, "cl": 2, "wcx": 4, "d64": 8, "f64": 16, "i64": 32, "o64": 64, "W0": 128, "W1": 256, "L0": 512,
    "L1": 1024, "trap": 2048, "al": 4096, "shift": 8192, "y2": 131072, "r2": 262144,
    "sse": 524288,
}  # fmt: skip
MODRM, VECTOR, X87 = 16384, 32768, 65536
MEMORY, REGISTER, VVVV, VSIB, SIZED, SIMPLE, MOVABLE, LOOSE = (1 << bit for bit in range(20, 28))
SIZE_512 = 251  # the one size code that is no single letter
GROUPED = 0x8000  # in ROOT: the rest is an index into GROUP
ARPL = next(number for number, row in enumerate(isa.ROWS, 1) if row.name == "ARPL")
# Number 0 is no feature. decode.pxd has names for some of these numbers.
FEATURES = ("", *sorted({row.feature for row in isa.ROWS if row.feature} | {"cx16", "xgetbv1"}))


def _operand_size(letter: str, operand_size: int, w: int, wide: int) -> int:
    """Bytes of an operand. ``n`` is an address only."""
    fixed = {"b": 1, "1": 1, "w": 2, "2": 2, "d": 4, "4": 4, "q": 8, "o": 16, "t": 10, "v": operand_size}
    by_w = {"y": (4, 8), "c": (8, 16)}
    by_l = {"x": (16, 32), "h": (8, 16), "f": (4, 8), "e": (2, 4), "k": (8, 32)}
    if letter == "z":
        return min(operand_size, 4)
    if letter in by_w:
        return by_w[letter][w]
    return by_l[letter][wide] if letter in by_l else fixed.get(letter, 0)


def operand_sizes() -> bytes:
    """Give OPERAND_BYTES [letter][operand size >> 2 | W << 2 | L << 3]."""
    return bytes(
        _operand_size(chr(letter), (2, 4, 8, 0)[k & 3], k >> 2 & 1, k >> 3) for letter in range(256) for k in range(16)
    )


def _position(row: isa.Row, letters: str) -> int:
    """The number, from 1 on, of the operand with one of these letters; 0 when there is none."""
    found = [number for number, operand in enumerate(row.operands, 1) if operand.letter in letters]
    if len(found) > 1:
        raise ValueError(f"{row.name}: two operands of {letters}")
    return found[0] if found else 0


def implicit_writes(row: isa.Row) -> int:
    """Give the registers that a copied instruction may write without naming them: 1 rAX, 2 rCX, 4 rDX.

    One too many costs a shared check of operands; one too few would share a wrong one.
    """
    written = 2 if "wcx" in row.attributes else 0
    if row.map == 0 and not row.vex:
        names_all = (  # MOV of immediates, shifts, INC and DEC, TEST and NOT and NEG
            0xB0 <= row.opcode < 0xC2
            or row.opcode in (0xC6, 0xC7, 0xD0, 0xD1, 0xD2, 0xD3, 0xFE, 0xFF)
            or (row.opcode in (0xF6, 0xF7) and row.reg in range(4))
        )
        if row.opcode < 0x40:
            if row.opcode & 6 == 4 and row.opcode < 0x38:  # with an immediate operand, and not CMP
                written |= 1
        elif (not row.operands or row.opcode >= 0x90) and not names_all:
            written |= 5
    elif row.map == 1 and row.opcode in (0xB0, 0xB1, 0xC7):  # CMPXCHG, CMPXCHG8B
        written |= 5
    return written


def written(row: isa.Row) -> int:
    """Give what a copied instruction writes, for ``grouping``: bits of decode.pxd's W_..."""
    bits = implicit_writes(row)
    for letters, bit, byte in (("GZ", 8, 64), ("ER", 16, 128), ("B", 32, 0)):
        number = _position(row, letters)
        if number and row.operands[number - 1].access & 2:
            bits |= bit | (byte if row.operands[number - 1].size == "b" else 0)
    return bits


def pack_row(row: isa.Row) -> bytes:
    """Pack one row as struct OpRow (32 bytes)."""
    letters = bytes(ord(o.letter) for o in row.operands)
    sizes = bytes(SIZE_512 if o.size == "512" else ord(o.size) for o in row.operands)
    access = bytes(o.access for o in row.operands)
    bits = sum(ATTRIBUTES[name] for name in row.attributes)
    if row.has_modrm:
        bits |= MODRM
    if any(o.letter in "VWHUPQNL" for o in row.operands):
        bits |= VECTOR
    if any(o.letter in "VWHUL" for o in row.operands) or "sse" in row.attributes:
        bits |= VECTOR | ATTRIBUTES["sse"]
    if row.map == 0 and 0xD8 <= row.opcode <= 0xDF:
        bits |= X87
    for flag, wanted in ((MEMORY, "M"), (REGISTER, "RUN"), (VVVV, "HB"), (VSIB, "X")):
        if any(o.letter in wanted for o in row.operands):
            bits |= flag
    if any(o.size in "vz" for o in row.operands) or (row.map == 0 and not row.operands):
        bits |= SIZED
    immediates = [o for o in row.operands if o.letter in "IJ"]
    simple = row.map < 2 and not row.vex and not {"i64", "W0", "W1"} & set(row.attributes) and len(immediates) < 2
    if simple and all(o.letter in "EGZIJVWPQM" for o in row.operands) and row.cls != "gather":
        bits |= SIMPLE
        if row.cls == "copy" and not {"cl", "wcx"} & set(row.attributes):
            bits |= MOVABLE
            if not bits & X87 and not any(o.letter == "P" for o in row.operands):
                bits |= LOOSE
    constant = {"b": (1, 1), "w": (2, 2), "z": (4, 4), "v": (4, 8)}[immediates[0].size] if immediates else (0, 0)
    return struct.pack(
        "<BB4s4s4sBBBBbBI8B", isa.CLASSES.index(row.cls), len(row.operands), letters, sizes, access, row.flags_read,
        row.flags_written, row.flags_undefined, row.flags_maybe, row.prefix, FEATURES.index(row.feature), bits,
        _position(row, "EWMQ"), _position(row, "GZ"), _position(row, "ER"), _position(row, "B"),
        sum(1 << number for number, o in enumerate(row.operands) if o.letter in "IJOLA"),
        bool(row.operands) and row.operands[0].letter == "Z", written(row),
        constant[0] | constant[1] << 4,
    )  # fmt: skip


def _slots(row: isa.Row) -> Iterator[int]:
    """Give the places of a row in its group: modrm.reg of memory forms, then 8 + the low six bits of modrm."""
    if row.modrm >= 0:
        yield row.modrm - 0xC0 + 8 if row.modrm >= 0xC0 else row.modrm >> 3 & 7
        return
    for reg in range(8) if row.reg < 0 else [row.reg]:
        if row.form != "r":
            yield reg
        if row.form != "m":
            yield from range(8 + reg * 8, 16 + reg * 8)


def _specificity(item: tuple[int, isa.Row]) -> tuple[bool, ...]:
    row = item[1]
    # Of two rows for one opcode the one of 64-bit mode stands in the table; decode knows the other (ARPL).
    return (row.prefix >= 0, row.modrm >= 0, row.reg >= 0, row.form != "", "i64" not in row.attributes)


def make() -> tuple[tuple[str, ...], int, bytes, bytes, bytes, bytes]:
    """Give the fields of ``opcodes.Tables``."""
    by_opcode: dict[tuple[bool, int, int], list[tuple[int, isa.Row]]] = {}
    for number, row in enumerate(isa.ROWS, 1):
        by_opcode.setdefault((row.vex, row.map, row.opcode), []).append((number, row))
    root = [0] * (2 * 4 * 256 * 4)
    groups: dict[tuple[int, ...], int] = {}
    for (vex, opcode_map, opcode), rows in by_opcode.items():
        for prefix in range(4):
            found = sorted(
                (i for i in rows if i[1].prefix == prefix or (i[1].prefix < 0 and not vex)), key=_specificity
            )
            if not found:
                continue
            at = ((vex * 4 + opcode_map) * 256 + opcode) * 4 + prefix
            if all(r.reg < 0 and r.modrm < 0 and not r.form for _, r in found):
                root[at] = found[-1][0]
                continue
            slots = [0] * 72
            for number, row in found:
                for slot in _slots(row):
                    slots[slot] = number
            root[at] = GROUPED | groups.setdefault(tuple(slots), len(groups))
    flat = [number for slots in groups for number in slots]
    return (
        FEATURES,
        ARPL,
        b"".join(pack_row(row) for row in isa.ROWS),
        struct.pack(f"<{len(root)}H", *root),
        struct.pack(f"<{len(flat)}H", *flat),
        operand_sizes(),
    )
