"""The decoder against iced-x86, on random bytes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import iced_x86
import pytest
from tests.cpu.cases import Maker, exists

from vmonty.cpu import decode, isa, opcode_tables, opcodes

# Valid for iced-x86, not offered by us: CPUID never shows them, so they are #UD.
NOT_OFFERED = {
    "AVX512", "XOP", "TBM", "FMA4", "SSE4A", "D3NOW", "CYRIX", "PADLOCK", "MPX", "KNC", "RTM", "HLE_OR_RTM", "AMX",
    "SMX", "CET", "PKU", "GFNI", "VAES", "VPCLMULQDQ", "AVX_VNNI", "AVX_IFMA", "AVX_NE_CONVERT", "SHA512", "SM3", "SM4",
}  # fmt: skip


def _judge(code: bytes, bits: int) -> str:
    ours = decode.decode_bytes(code, 0x1000, bits // 8)
    theirs = next(iter(iced_x86.Decoder(bits, code[:15], ip=0x1000)))
    if isinstance(ours, int):
        return "we refuse" if theirs.code != iced_x86.Code.INVALID else ""
    if theirs.code == iced_x86.Code.INVALID:
        return "we accept"
    if ours["length"] != theirs.len:
        return f"length {ours['length']} not {theirs.len}"
    return ""


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_lengths(bits: int) -> None:
    """Where both accept the bytes, the length is the same."""
    rng = random.Random(bits)
    wrong = []
    for _ in range(20000):
        code = rng.randbytes(15)
        if rng.random() < 0.3:
            code = (
                rng.choice([b"\x0f", b"\x66\x0f", b"\xf3\x0f", b"\x0f\x38", b"\xc5", b"\xc4\xe2", b"\x66\x0f\x3a"])
                + code
            )
        verdict = _judge(code[:15], bits)
        if verdict.startswith("length"):
            wrong.append((code.hex(), verdict))
    assert not wrong, wrong[:10]


# Our names that no mnemonic of theirs begins with.
OTHER_NAMES = {
    "SHL": "SAL", "CBW": "CDQE CWDE", "CWD": "CQO CDQ", "INSW": "INSD", "OUTSW": "OUTSD",
    "NOP": "XCHG RESERVEDNOP CLDEMOTE ENDBR RDSSP BND",
    "FWAIT": "WAIT", "MOVSW": "MOVSD MOVSQ", "CMPSW": "CMPSD CMPSQ", "STOSW": "STOSD STOSQ", "LODSW": "LODSD LODSQ",
    "SCASW": "SCASD SCASQ", "JCXZ": "JECXZ JRCXZ", "CALLF": "CALL", "JMPF": "JMP", "PREFETCHW": "PREFETCH RESERVEDNOP",
    "PREFETCH": "RESERVEDNOP", "CMPXCHG8B": "CMPXCHG16B", "MOVLPS": "MOVHLPS", "VMOVLPS": "VMOVHLPS",
    "MOVHPS": "MOVLHPS", "VMOVHPS": "VMOVLHPS", "MOVD": "MOVQ", "VMOVD": "VMOVQ", "PEXTRD": "PEXTRQ",
    "VPEXTRD": "VPEXTRQ", "PINSRD": "PINSRQ", "VPINSRD": "VPINSRQ",
}  # fmt: skip
MNEMONICS = {value: name for name, value in vars(iced_x86.Mnemonic).items() if isinstance(value, int)}


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_every_row_is_the_instruction_that_its_name_says(bits: int) -> None:
    """Encodings of every row have the same length and mnemonic in iced-x86."""
    maker = Maker(random.Random(bits), bits)
    for row in isa.ROWS:
        if not exists(row, bits):
            continue
        seen = 0
        for _ in range(60):
            code = ((maker.encode(row, [0] * 16, set()) or b"") + bytes(15))[:15]
            ours = decode.decode_bytes(code, 0x1000, bits // 8)
            if isinstance(ours, int) or ours["row"] is not row:
                continue
            theirs = next(iter(iced_x86.Decoder(bits, code, ip=0x1000)))
            name = MNEMONICS[theirs.mnemonic]
            if name == "INVALID" and row.name.startswith("MOV_"):
                continue  # a control or segment register that is not there: refused when it executes
            assert ours["length"] == theirs.len, f"{row.name} {code.hex()}"
            words = {row.name.split("_")[0], *OTHER_NAMES.get(row.name, "").split()}
            if not row.name.startswith("X87_"):
                assert any(name.startswith(word) for word in words), f"{row.name} {code.hex()} is {name}"
            seen += 1
            if seen > 5:
                break
        assert seen or (row.name in ("INC", "DEC") and row.opcode & 0xF0 == 0x40), row


def test_the_short_way_and_the_long_way() -> None:
    """24 bytes let decode take its short way in 64-bit mode: it finds what the long way finds, and so does glance."""
    rng = random.Random(7)
    glances = 0
    for start in ((), (0x48,), (0x41,), (0x4F,), (0x0F,), (0x4D, 0x0F)):
        for opcode in range(256):
            for modrm in range(0, 256, 3):
                code = (bytes((*start, opcode, modrm)) + rng.randbytes(24))[:24]
                found = decode.decode_bytes(code)
                assert found == decode.decode_bytes(code[:15]), code.hex()
                seen = decode.glance_bytes(code)
                if seen:
                    assert isinstance(found, dict), code.hex()
                    row = isa.ROWS[seen[1] - 1]
                    assert (found["length"], found["row"], found["operand_size"]) == (seen[0], row, seen[2]), code.hex()
                    glances += 1
    assert glances > 10000


def test_the_build_stores_the_tables_of_the_instruction_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(opcodes.TABLES) == opcode_tables.make()
    for name in opcodes.SOURCES:
        shutil.copy(Path(opcodes.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(opcodes, "_FOLDER", tmp_path)
    opcodes.store(tmp_path)
    with monkeypatch.context() as without:
        without.setattr(opcode_tables, "make", lambda: pytest.fail("the stored tables were not taken"))
        assert opcodes._load() == opcodes.TABLES
    # Other sources: what is stored is stale.
    with (tmp_path / opcodes.SOURCES[0]).open("a") as source:
        source.write("# one more line\n")
    changed = opcodes.TABLES._replace(arpl=1)
    monkeypatch.setattr(opcode_tables, "make", lambda: tuple(changed))
    assert opcodes._load() == changed
    (tmp_path / opcodes.STORED).write_bytes(b"cut short")
    assert opcodes._load() == changed
