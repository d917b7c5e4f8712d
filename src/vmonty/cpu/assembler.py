"""An emitter of x86-64 machine code: exactly what the translator and its stubs need.

Register arguments are hardware numbers (0 rax … 15 r15); ``NONE`` means no base or index. ``opcode`` carries its map
in bits 8 and 9: 0x8B, 0x1AF for 0F AF, 0x2F0 for 0F 38 F0. The caller guarantees room between ``at`` and ``limit``.
SDM, "Instruction Format".
"""

import cython

# SDM, "NOP", "Recommended Multi-Byte Sequence of NOP Instruction": of one to nine bytes, nine places each.
_SEQUENCES = cython.declare(
    bytes,
    b"\x90........"
    b"\x66\x90......."
    b"\x0f\x1f\x00......"
    b"\x0f\x1f\x40\x00....."
    b"\x0f\x1f\x44\x00\x00...."
    b"\x66\x0f\x1f\x44\x00\x00..."
    b"\x0f\x1f\x80\x00\x00\x00\x00.."
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00."
    b"\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
)


def _build():
    source: cython.p_uchar = _SEQUENCES
    k: cython.int
    for k in range(81):
        NOPS[k // 9][k % 9] = source[k]


_build()


def pad(a, length):
    """Append NOPs."""
    part: cython.int
    k: cython.int
    while length > 0:
        part = min(length, 9)
        length -= part
        for k in range(part):
            a.at[k] = NOPS[part - 1][k]
        a.at += part
