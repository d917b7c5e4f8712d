"""The instruction decoder.

``isa.ROWS`` is three C tables here: ``ROW`` (one entry per row), ``ROOT`` indexed by [VEX][map]
[opcode][mandatory prefix], and ``GROUP`` for opcodes that the modrm byte tells apart (8 memory forms, then 64
register forms). A group is marked by the top bit of a ``ROOT`` entry; 0 is the invalid row.
"""

import cython

from vmonty.cpu import opcodes


@cython.cfunc
def _copy(to: cython.p_uchar, room: cython.size_t, data: bytes) -> object:
    source: cython.p_uchar = data
    size: cython.size_t = len(data)
    k: cython.size_t
    if size > room:
        raise ValueError("a table of the decoder is too small for isa.ROWS")
    for k in range(size):
        to[k] = source[k]


def _build():
    tables = opcodes.TABLES
    _copy(cython.cast(cython.p_uchar, cython.address(ROW[1])), cython.sizeof(ROW) - cython.sizeof(OpRow), tables.rows)
    _copy(cython.cast(cython.p_uchar, cython.address(ROOT[0][0][0][0])), cython.sizeof(ROOT), tables.root)
    _copy(cython.cast(cython.p_uchar, cython.address(GROUP[0][0])), cython.sizeof(GROUP), tables.groups)
    sizes = cython.cast(cython.p_uchar, cython.address(OPERAND_BYTES[0][0]))
    _copy(sizes, cython.sizeof(OPERAND_BYTES), tables.operand_sizes)
    for byte in (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3):
        PREFIX[byte] = 1
    for byte in range(0x40, 0x50):
        PREFIX[byte] = 2
    modrm: cython.int
    for modrm in range(0xC0):
        SHAPE[modrm] = 4 if modrm >> 6 == 2 or modrm & 0xC7 == 5 else modrm >> 6
        if modrm & 7 == 4:
            SHAPE[modrm] |= 8
    ROW[0].cls = C_UD


_build()

# The row that stands behind MOVSXD in other modes.
_ARPL = cython.declare(cython.int, opcodes.ARPL)

# Numbers of features that depend on more than the row.
_ABM = cython.declare(cython.int, opcodes.FEATURES.index("abm"))
_AVX2 = cython.declare(cython.int, opcodes.FEATURES.index("avx2"))
_BMI1 = cython.declare(cython.int, opcodes.FEATURES.index("bmi1"))
_CX16 = cython.declare(cython.int, opcodes.FEATURES.index("cx16"))
_CX8 = cython.declare(cython.int, opcodes.FEATURES.index("cx8"))
_LAHF_LM = cython.declare(cython.int, opcodes.FEATURES.index("lahf-lm"))


def offered_feature(i, features, code_size):
    """Tell whether CPUID offers an instruction that hangs on a feature bit."""
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    f: cython.int = r.feature
    if f == _CX8 and i.w:
        f = _CX16
    elif f == _LAHF_LM and code_size != 8:
        return 1
    elif (r.attributes & A_Y2 and i.l) or (r.attributes & A_R2 and not i.has_memory):
        f = _AVX2
    if (features[f >> 6] >> (f & 63)) & 1:
        return 1
    if i.map == 1 and not i.vex and f in (_ABM, _BMI1):
        i.row = ROOT[0][1][i.opcode][0]
        i.pp = 0
        _take_row(i)
        return 1
    return 0


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _take_row(i: cython.pointer(Insn)) -> cython.void:
    """Fill in what the row says of the instruction, its operand size and immediate being known."""
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    i.cls = r.cls
    i.feature = r.feature
    i.written = r.written
    i.reads = F_ALL if r.cls > C_NOP and r.cls != C_BTM and r.cls != C_MOFFS else r.flags_read
    i.kills = r.flags_written | r.flags_undefined
    i.shift_mask = 0
    if r.attributes & (A_SHIFT | A_CL):
        if r.attributes & A_SHIFT:
            i.shift_mask = 63 if operand_bytes(i, 0) == 8 else 31
            if not i.immediate & i.shift_mask:
                i.kills = 0
        if r.attributes & A_CL and r.flags_maybe:
            i.kills = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _immediate_bytes(i: cython.pointer(Insn), n: cython.int) -> cython.int:
    r: cython.pointer(OpRow) = cython.address(ROW[i.row])
    letter: cython.uchar = r.letter[n]
    code: cython.uchar = r.size[n]
    if letter == ord("I"):
        if code == ord("b"):
            return 1
        if code == ord("w"):
            return 2
        if code == ord("z"):
            return 2 if i.operand_size == 2 else 4
        return i.operand_size
    if letter == ord("J"):
        if code == ord("b"):
            return 1
        return 2 if i.operand_size == 2 else 4
    if letter == ord("L"):
        return 1
    if letter == ord("O"):
        return i.address_size
    if letter == ord("A"):
        return 4 if i.operand_size == 2 else 6
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _little_endian(code: cython.p_uchar, size: cython.int) -> uint64_t:
    value: uint64_t = 0
    k: cython.int
    if size == 1:
        return code[0]
    if size == 4:
        return cython.cast(cython.pointer(uint32_t), code)[0]
    for k in range(size):
        value |= cython.cast(uint64_t, code[k]) << (8 * k)
    return value


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _sign_extend(value: uint64_t, size: cython.int) -> int64_t:
    shift: cython.int = 64 - 8 * size
    return cython.cast(int64_t, value << shift) >> shift


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _memory_16(i: cython.pointer(Insn), code: cython.p_uchar, at: cython.int, available: cython.int) -> cython.int:
    """Decode a 16-bit addressing form; give the offset after it, or 0. SDM, "16-Bit Addressing Forms"."""
    rm: cython.int = i.modrm & 7
    i.index = NO_REGISTER
    if rm == 0 or rm == 1 or rm == 7:
        i.base = 3
    elif rm == 2 or rm == 3 or rm == 6:
        i.base = 5
    elif rm == 4:
        i.base = 6
    else:
        i.base = 7
    if rm == 0 or rm == 2:
        i.index = 6
    elif rm == 1 or rm == 3:
        i.index = 7
    size: cython.int = 0
    if i.mod == 1:
        size = 1
    elif i.mod == 2:
        size = 2
    elif i.mod == 0 and rm == 6:
        i.base = NO_REGISTER
        size = 2
    if at + size > available:
        return 0
    if size:
        i.displacement = _sign_extend(_little_endian(code + at, size), size)
    if i.segment < 0:
        i.segment = 2 if i.base == 5 else 3
    return at + size


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _memory(i: cython.pointer(Insn), code: cython.p_uchar, at: cython.int, available: cython.int,
            long_mode: cython.int) -> cython.int:  # fmt: skip
    """Decode SIB and displacement; give the offset after them, or 0 when bytes are missing."""
    rm: cython.int = i.modrm & 7
    size: cython.int = 0
    sib: cython.int
    i.index = NO_REGISTER
    i.base = rm | ((i.rex & 1) << 3)
    if rm == 4:
        if at >= available:
            return 0
        sib = code[at]
        at += 1
        i.scale = sib >> 6
        i.index = ((sib >> 3) & 7) | ((i.rex & 2) << 2)
        if i.index == 4 and ROW[i.row].cls != C_GATHER:
            i.index = NO_REGISTER
        i.base = (sib & 7) | ((i.rex & 1) << 3)
        if (sib & 7) == 5 and i.mod == 0:
            i.base = NO_REGISTER
            size = 4
    elif rm == 5 and i.mod == 0:
        i.base = RIP_BASE if long_mode else NO_REGISTER
        size = 4
    if i.mod == 1:
        size = 1
    elif i.mod == 2:
        size = 4
    if at + size > available:
        return 0
    if size:
        i.displacement = _sign_extend(_little_endian(code + at, size), size)
    if i.segment < 0:
        i.segment = 2 if i.base == 4 or i.base == 5 else 3
    return at + size


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _clear(i: cython.pointer(Insn)) -> cython.void:
    i.immediate = 0
    i.displacement = 0
    i.row = 0
    i.length = 0
    i.map = 0
    i.opcode = 0
    i.vex = 0
    i.pp = 0
    i.prefix66 = 0
    i.rep = 0
    i.lock = 0
    i.rex = 0
    i.w = 0
    i.l = 0
    i.vvvv = 0
    i.operand_size = 0
    i.address_size = 0
    i.modrm = 0
    i.mod = 0
    i.reg = 0
    i.rm = 0
    i.has_memory = 0
    i.scale = 0
    i.base = NO_REGISTER
    i.index = NO_REGISTER
    i.segment = -1
    i.segment_override = 0
    i.immediate_size = 0
    i.memory_size = 0
    i.memory_access = 0
    i.is4 = 0
    i.fault = 0
    i.flags_needed = 0
    i.flags_in = 0
    i.group = 0
    i.leader = 0
    i.verbatim = 0
    i.loose = 0
    i.simple = 0


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _immediates(
    i: cython.pointer(Insn), r: cython.pointer(OpRow), code: cython.p_uchar, at: cython.int, limit: cython.int,
    long_mode: cython.int
) -> cython.int:  # fmt: skip
    """Decode what follows ModRM and displacement; give the offset after it, or 0 when bytes are missing."""
    k: cython.int
    size: cython.int
    byte: cython.uchar
    for k in range(r.operands):
        if not r.immediates >> k & 1:
            continue
        byte = r.letter[k]
        size = _immediate_bytes(i, k)
        if at + size > limit:
            return 0
        if i.immediate_size and byte == ord("I"):  # ENTER
            i.immediate |= _little_endian(code + at, size) << (8 * i.immediate_size)
        else:
            i.immediate = _little_endian(code + at, size)
        i.immediate_size += size
        at += size
        if byte == ord("J"):
            i.immediate = cython.cast(uint64_t, _sign_extend(i.immediate, size))
        elif byte == ord("L"):
            if not long_mode:
                i.immediate &= 0x7F
            i.is4 = i.immediate >> 4
    return at


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _simple_row(code: cython.p_uchar, rex: cython.p_int, opcode_map: cython.p_int, at: cython.p_int) -> cython.int:
    """Find the row of an instruction in 64-bit mode; ``at`` is then behind its opcode. 0: not a simple one.

    What comes next in code cannot be predicted, so tables and shifts stand here where branches would be as short.
    """
    byte: cython.uchar = code[0]
    modrm: cython.int
    entry: cython.int
    rex[0] = byte if (byte & 0xF0) == 0x40 else 0
    at[0] = rex[0] != 0
    byte = code[at[0]]
    opcode_map[0] = byte == 0x0F
    at[0] += opcode_map[0]
    byte = code[at[0]]
    at[0] += 1
    if not opcode_map[0] and (byte == 0x90 or PREFIX[byte]):
        return 0
    entry = ROOT[0][opcode_map[0]][byte][0]
    if entry & 0x8000:
        modrm = code[at[0]]
        entry = GROUP[entry & 0x7FFF][8 + (modrm & 63) if modrm >= 0xC0 else modrm >> 3 & 7]
    return entry if ROW[entry].attributes & A_SIMPLE else 0


def glance(code, i):
    """Give the length of a simple instruction in 64-bit mode, and of ``i`` what ``liveness`` asks for; 0: use decode.

    24 bytes are there.
    """
    rex: cython.int = 0
    opcode_map: cython.int = 0
    at: cython.int = 0
    entry: cython.int = _simple_row(code, cython.address(rex), cython.address(opcode_map), cython.address(at))
    r: cython.pointer(OpRow) = cython.address(ROW[entry])
    modrm: cython.int
    shape: cython.int
    if entry == 0 or r.feature:
        return 0
    i.row = entry
    i.fault = 0
    i.l = 0
    i.w = rex >> 3 & 1
    i.operand_size = 8 if r.attributes & (A_F64 | A_D64) or rex & 8 else 4
    if r.attributes & A_MODRM:
        modrm = code[at]
        at += 1
        shape = SHAPE[modrm]
        if shape & 8:
            if (code[at] & 7) == 5 and modrm < 0x40:
                shape = 4
            at += 1
        at += shape & 7
        if r.attributes & A_MEMORY and modrm >= 0xC0:
            return 0
    i.immediate = code[at]  # of shifts, whose first byte is all
    _take_row(i)
    return at + (r.constant >> (4 if i.operand_size == 8 else 0) & 15)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _simple(code: cython.p_uchar, i: cython.pointer(Insn)) -> cython.int:
    """Decode what most code in 64-bit mode is made of: no prefix but REX, none of the rarer operands.

    24 bytes are there, and the fields are clear. Gives the length, or 0: ``decode`` has to look at it in full.
    """
    rex: cython.int = 0
    opcode_map: cython.int = 0
    at: cython.int = 0
    modrm: cython.int = 0
    shape: cython.int
    size: cython.int
    sib: cython.int
    shift: cython.int
    entry: cython.int = _simple_row(code, cython.address(rex), cython.address(opcode_map), cython.address(at))
    r: cython.pointer(OpRow) = cython.address(ROW[entry])
    attributes: uint32_t = r.attributes
    byte: cython.uchar = code[at - 1]
    if entry == 0:
        return 0
    i.rex = rex
    i.w = rex >> 3 & 1
    i.row = entry
    i.map = opcode_map
    i.opcode = byte
    i.address_size = 8
    i.operand_size = 8 if attributes & (A_F64 | A_D64) or rex & 8 else 4
    i.segment = 3
    if attributes & A_MODRM:
        modrm = code[at]
        at += 1
        i.modrm = modrm
        i.mod = modrm >> 6
        i.reg = (modrm >> 3 & 7) | (rex & 4) << 1
        i.rm = (modrm & 7) | (rex & 1) << 3
        if modrm < 0xC0:
            shape = SHAPE[modrm]
            i.base = i.rm
            if shape & 8:
                sib = code[at]
                at += 1
                i.scale = sib >> 6
                i.base = (sib & 7) | (rex & 1) << 3
                i.index = (sib >> 3 & 7) | (rex & 2) << 2
                if i.index == 4:
                    i.index = NO_REGISTER
                if (sib & 7) == 5 and modrm < 0x40:
                    i.base = NO_REGISTER
                    shape = 4
            elif (modrm & 0xC7) == 5:
                i.base = RIP_BASE
            size = shape & 7
            shift = 32 - 8 * size & 31
            if size:
                i.displacement = cython.cast(int32_t, cython.cast(cython.pointer(uint32_t), code + at)[0] << shift)
                i.displacement >>= shift
                at += size
            i.has_memory = 1
            if i.base == 4 or i.base == 5:
                i.segment = 2
            if r.in_memory:
                i.memory_size = operand_bytes(i, r.in_memory - 1)
                i.memory_access = r.access[r.in_memory - 1]
            # Byte registers 4 to 7 may be AH, CH, DH, BH, or need a REX prefix.
            if attributes & A_LOOSE and (
                r.g == 0 or (ITSELF >> i.reg & 1 and ((i.reg & 12) != 4 or r.size[r.g - 1] != ord("b")))
            ):
                i.loose = 1
        elif attributes & A_MEMORY:
            return 0
    elif r.in_opcode:
        i.reg = (byte & 7) | (rex & 1) << 3
    if (
        attributes & A_MOVABLE
        and not i.has_memory
        and (r.g == 0 or ITSELF >> i.reg & 1)
        and (r.e == 0 or ITSELF >> i.rm & 1)
    ):
        i.verbatim = VERBATIM if opcode_map == 0 and not attributes & A_X87 and byte != 0x9B else VERBATIM_SYSTEM
    size = r.constant >> (4 if i.operand_size == 8 else 0) & 15
    if size:
        i.immediate_size = size
        shift = 64 - 8 * size
        i.immediate = cython.cast(cython.pointer(uint64_t), code + at)[0] << shift
        if r.cls in (C_JCC, C_JMP, C_CALL, C_LOOP):
            i.immediate = cython.cast(uint64_t, cython.cast(int64_t, i.immediate) >> shift)
        else:
            i.immediate >>= shift
        at += size
    i.length = at
    i.simple = 1
    return at


def decode(code, available, rip, code_size, i):
    """Decode one instruction.

    ``code_size`` is 2, 4 or 8 (16-, 32-bit code, 64-bit mode); ``available`` counts the readable bytes (15 are
    always enough). Gives the length, DECODE_TRUNCATED, DECODE_INVALID (#UD) or DECODE_TOO_LONG (#GP).
    """
    size: cython.int
    i.rip = rip
    _clear(i)
    if available >= 16:
        cython.cast(cython.pointer(uint64_t), cython.address(i.bytes[0]))[0] = cython.cast(
            cython.pointer(uint64_t), code
        )[0]
        cython.cast(cython.pointer(uint64_t), cython.address(i.bytes[8]))[0] = cython.cast(
            cython.pointer(uint64_t), code + 8
        )[0]
        if code_size == 8 and available >= 24:
            size = _simple(code, i)
            if size:
                _take_row(i)
                return size
            _clear(i)
    size = _decode(code, available, rip, code_size, i)
    if size > 0:
        _take_row(i)
    return size


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _decode(
    code: cython.p_uchar, available: cython.int, rip: uint64_t, code_size: cython.int, i: cython.pointer(Insn)
) -> cython.int:
    """Decode any instruction; the fields are clear, and ``bytes`` filled if 16 are there."""
    at: cython.int = 0
    byte: cython.uchar
    k: cython.int
    long_mode: cython.int = code_size == 8
    entry: cython.ushort
    size: cython.int
    address_prefix: cython.int = 0
    limit: cython.int = min(15, available)
    short: cython.int = DECODE_TRUNCATED if available < 15 else DECODE_TOO_LONG
    if available < 16:
        for k in range(limit):
            i.bytes[k] = code[k]
    while True:
        if at >= limit:
            return short
        byte = code[at]
        if PREFIX[byte] == 0:
            break
        if PREFIX[byte] == 2:
            if not long_mode:
                break
            at += 1
            if at >= limit:
                return short
            i.rex = byte
            byte = code[at]
            if PREFIX[byte] == 0:
                break
            i.rex = 0  # a REX prefix counts only right before the opcode
            continue
        if byte == 0x66:
            i.prefix66 = 1
        elif byte == 0x67:
            address_prefix = 1
        elif byte == 0xF0:
            i.lock = 1
        elif byte == 0xF2 or byte == 0xF3:
            i.rep = byte
        elif byte == 0x26:
            i.segment = -1 if long_mode and i.segment >= 4 else 0
            i.segment_override = 1
        elif byte == 0x2E:
            i.segment = 1
            i.segment_override = 1
        elif byte == 0x36:
            i.segment = 2
            i.segment_override = 1
        elif byte == 0x3E:
            i.segment = 3
            i.segment_override = 1
        elif byte == 0x64:
            i.segment = 4
            i.segment_override = 1
        else:
            i.segment = 5
            i.segment_override = 1
        at += 1
    if long_mode and i.segment < 4:
        i.segment = -1
        i.segment_override = 0
    i.w = (i.rex >> 3) & 1
    # ---- opcode -------------------------------------------------------------------------------------
    byte = code[at]
    at += 1
    if (byte == 0xC4 or byte == 0xC5) and at < limit and (long_mode or code[at] >= 0xC0):
        if i.prefix66 or i.rep or i.lock or i.rex:
            return DECODE_INVALID
        i.vex = 1
        i.rex = 0x40
        if byte == 0xC5:
            if at + 2 > limit:
                return short
            byte = code[at]
            at += 1
            if not byte & 0x80:
                i.rex |= 4
            i.map = 1
        else:
            if at + 3 > limit:
                return short
            byte = code[at]
            if not byte & 0x80:
                i.rex |= 4
            if not byte & 0x40:
                i.rex |= 2
            if not byte & 0x20:
                i.rex |= 1
            i.map = byte & 31
            if i.map == 0 or i.map > 3:
                return DECODE_INVALID
            byte = code[at + 1]
            at += 2
            i.w = byte >> 7
        if not long_mode:
            i.rex = 0x40
        i.vvvv = (~(byte >> 3)) & (15 if long_mode else 7)
        i.l = (byte >> 2) & 1
        i.pp = byte & 3
        byte = code[at]
        at += 1
    else:
        if byte == 0x0F:
            if at >= limit:
                return short
            byte = code[at]
            at += 1
            i.map = 1
            if byte == 0x38 or byte == 0x3A:
                if at >= limit:
                    return short
                i.map = 2 if byte == 0x38 else 3
                byte = code[at]
                at += 1
        if i.rep == 0xF3:
            i.pp = 2
        elif i.rep == 0xF2:
            i.pp = 3
        elif i.prefix66:
            i.pp = 1
        if i.map == 2 and i.rep == 0xF2 and i.prefix66 and (byte == 0xF0 or byte == 0xF1):
            i.pp = 3
    i.opcode = byte
    entry = ROOT[i.vex][i.map][byte][i.pp]
    if entry == 0:
        return DECODE_INVALID
    if entry & 0x8000:
        if at >= limit:
            return short
        i.modrm = code[at]
        if i.modrm >= 0xC0:
            entry = GROUP[entry & 0x7FFF][8 + (i.modrm & 63)]
        else:
            entry = GROUP[entry & 0x7FFF][(i.modrm >> 3) & 7]
        if entry == 0:
            return DECODE_INVALID
    if i.map == 0 and byte == 0x90 and i.rex & 1 and not i.vex:
        entry = ROOT[0][0][0x91][0]  # xchg r8, rax
    if not long_mode and i.map == 0 and not i.vex and byte == 0x63:
        entry = _ARPL
    if long_mode and i.map == 0 and not i.vex and byte == 0x63 and i.prefix66 and not i.rex & 8:
        # MOVSXD of 16 bits extends nothing, and Intel's read two bytes for it: a MOV of them, on any host.
        i.opcode = 0x8B
        entry = ROOT[0][0][0x8B][0]
    if not long_mode and i.map == 0 and not i.vex and (byte & 0xF0) == 0x40:  # INC, DEC: as FF /0, FF /1
        entry = GROUP[ROOT[0][0][0xFF][0] & 0x7FFF][8 + (byte & 8) + (byte & 7)]
        i.opcode = 0xFF
        i.row = entry
        i.modrm = 0xC0 | (byte & 15)
        i.mod = 3
        i.reg = byte >> 3 & 1
        i.rm = byte & 7
        i.address_size = code_size
        i.operand_size = (6 - code_size) if i.prefix66 else code_size
        i.w = 0
        i.length = at
        return DECODE_INVALID if i.lock else at
    r: cython.pointer(OpRow) = cython.address(ROW[entry])
    i.row = entry
    # ---- sizes --------------------------------------------------------------------------------------
    attributes: cython.uint = r.attributes
    if long_mode:
        if attributes & A_I64:
            return DECODE_INVALID
        i.address_size = 4 if address_prefix else 8
        if attributes & A_F64 or i.w:
            i.operand_size = 8
        elif i.prefix66:
            i.operand_size = 2
        elif attributes & A_D64:
            i.operand_size = 8
        else:
            i.operand_size = 4
    else:
        if attributes & A_O64:
            return DECODE_INVALID
        if i.vex:  # with general registers VEX.W is ignored; REX there is none
            for k in range(r.operands):
                byte = r.letter[k]
                if byte == ord("E") or byte == ord("G") or byte == ord("B"):
                    i.w = 0
            if i.map == 3 and i.opcode >> 1 == 0x30:  # PCMPESTRM, PCMPESTRI: lengths in rAX and rDX
                i.w = 0
        i.address_size = (6 - code_size) if address_prefix else code_size
        i.operand_size = (6 - code_size) if i.prefix66 else code_size
    if i.vex:
        i.operand_size = 8 if i.w else 4
        if (attributes & A_W0 and i.w) or (attributes & A_W1 and not i.w):
            return DECODE_INVALID
        if (attributes & A_L0 and i.l) or (attributes & A_L1 and not i.l):
            return DECODE_INVALID
    # ---- modrm --------------------------------------------------------------------------------------
    if attributes & A_MODRM:
        if at >= limit:
            return short
        i.modrm = code[at]
        at += 1
        i.mod = i.modrm >> 6
        i.reg = ((i.modrm >> 3) & 7) | ((i.rex & 4) << 1)
        i.rm = (i.modrm & 7) | ((i.rex & 1) << 3)
        if i.mod != 3 and not (i.map == 1 and 0x20 <= i.opcode <= 0x23):
            i.has_memory = 1
            if i.address_size == 2:
                at = _memory_16(i, code, at, limit)
            else:
                at = _memory(i, code, at, limit, long_mode)
            if at == 0:
                return short
    elif r.in_opcode:
        i.reg = (byte & 7) | ((i.rex & 1) << 3)
    if i.segment < 0 and not i.has_memory:
        i.segment = 3  # of operands that no ModRM byte names: string sources, MOV's offsets
    # ---- operands -----------------------------------------------------------------------------------
    if i.has_memory:
        if attributes & A_REGISTER:
            return DECODE_INVALID
        if r.in_memory:
            size = operand_bytes(i, r.in_memory - 1)
            i.memory_size = size
            i.memory_access = r.access[r.in_memory - 1]
    elif attributes & A_MEMORY:
        return DECODE_INVALID
    if attributes & A_VSIB:
        # SDM, "Vector SIB (VSIB) Memory Addressing": a SIB byte, no register twice
        if not i.has_memory or i.address_size == 2 or i.modrm & 7 != 4:
            return DECODE_INVALID
        if i.reg == i.index or i.reg == i.vvvv or i.index == i.vvvv:
            return DECODE_INVALID
        i.memory_access = 1
    if r.immediates:
        at = _immediates(i, r, code, at, limit, long_mode)
        if at == 0:
            return short
    if i.vex and not attributes & A_VVVV and i.vvvv:
        return DECODE_INVALID
    if i.vex and i.opcode == 0x10 | (i.opcode & 1) and i.map == 1 and i.pp >= 2 and i.has_memory and i.vvvv:
        return DECODE_INVALID
    if not long_mode and i.segment < 0:
        i.segment = 3
    if i.lock:
        if not attributes & A_LOCK or not i.has_memory:
            return DECODE_INVALID
    if i.segment < 0:  # operands that no ModR/M names: strings, MOV of absolute addresses, XLAT, MASKMOV
        i.segment = 3
    i.length = at
    return at


def decode_bytes(code: bytes, rip: int = 0, code_size: int = 8) -> dict[str, object] | int:
    """Decode for tests and tools: the fields as a dict, or the negative/zero result of ``decode``.

    Of 24 bytes, 15 count; they are what the short way of simple instructions asks for.
    """
    i: Insn
    buffer: cython.uchar[24]
    k: cython.int
    for k in range(min(len(code), 24)):
        buffer[k] = code[k]
    n: cython.int = decode(buffer, min(len(code), 24), rip, code_size, cython.address(i))
    if n <= 0:
        return n
    from vmonty.cpu import isa  # no guest needs it

    row = isa.ROWS[i.row - 1]
    return {
        "length": n, "name": row.name, "row": row, "operand_size": i.operand_size, "address_size": i.address_size,
        "has_memory": i.has_memory, "memory_size": i.memory_size, "memory_access": i.memory_access,
        "base": i.base, "index": i.index, "scale": i.scale, "displacement": i.displacement, "segment": i.segment,
        "reg": i.reg, "rm": i.rm, "vvvv": i.vvvv, "immediate": i.immediate, "rep": i.rep, "lock": i.lock,
    }  # fmt: skip


def glance_bytes(code: bytes) -> tuple[int, int, int] | None:
    """For tests: length, row, operand size by ``glance``, from 24 bytes; None when it leaves that to decode."""
    i: Insn
    buffer: cython.uchar[24]
    k: cython.int
    for k in range(24):
        buffer[k] = code[k]
    n: cython.int = glance(buffer, cython.address(i))
    return (n, i.row, i.operand_size) if n else None
