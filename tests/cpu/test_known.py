"""What instructions with known first bytes are must be what ``decode`` says of them, in every field."""

from __future__ import annotations

import random

from vmonty.cpu import known


def test_random_bytes() -> None:
    """Few different first bytes, so that most were seen before with another displacement and immediate."""
    rng = random.Random(20261121)
    heads = [rng.randbytes(4) for _ in range(300)]
    for first in (b"\x0f", b"\x48\x0f", *(bytes([rex]) for rex in range(0x40, 0x50))):
        heads += [first + rng.randbytes(3) for _ in range(30)]
    codes = []
    for _ in range(60_000):
        tail = bytes(rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))) for _ in range(20))
        codes.append((rng.choice(heads) + tail)[:24])
    first, hits = known.compare(codes)
    assert first == -1, codes[first].hex()
    assert hits > 10_000


def test_every_opcode_and_modrm() -> None:
    """Each twice in a row, with SIB bytes of all kinds behind it."""
    rng = random.Random(7)
    codes = []
    for rex in (b"", b"\x40", b"\x48", b"\x4d", b"\x66"):
        for opcode in [bytes([n]) for n in range(256)] + [bytes([0x0F, n]) for n in range(256)]:
            for modrm in range(256):
                head = rex + opcode + bytes([modrm, rng.randrange(256)])
                codes += [head + rng.randbytes(20), head + rng.randbytes(20)]
    first, hits = known.compare(codes)
    assert first == -1, codes[first].hex()
    assert hits > 100_000


def test_a_shift_by_nothing_kills_no_flag() -> None:
    """What is kept of a shift must not say so of the next one, whose count is not 0, nor the other way round."""
    shl = [bytes.fromhex("48c1e0") + bytes([count]) + bytes(20) for count in (0, 3, 64, 1, 0)]
    assert known.compare(shl) == (-1, 4)
