"""The decoder against iced-x86, on random bytes."""

from __future__ import annotations

import random

import iced_x86
import pytest

from vmonty.cpu import decode

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
